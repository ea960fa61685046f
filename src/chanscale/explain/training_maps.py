"""What the last maps are on the training images: their mean, and where each channel is most active."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chanscale.classifier import Classifier
from chanscale.data.loading import BatchLoader, decode_images
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits
from chanscale.errors import DataError, ModelError
from chanscale.explain.decomposition import Decomposition, decompose

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingMaps:
    """Of N training `images`: the mean of the last maps (C, h, w), in fp64, and of each image and channel the largest
    value, `peaks` (N, C), and its position, `places` (N, C), which counts row by row; `columns`: w.
    """

    images: ImageSet
    mean: Tensor
    peaks: Tensor
    places: Tensor

    @property
    def columns(self) -> int:
        """Positions in a row of a map."""
        return self.mean.shape[2]

    def count_active(self, channel: int) -> int:
        """Return on how many images a channel is above 0 anywhere: what few excite is known from few."""
        return int((self.peaks[:, channel] > 0).sum())


@torch.no_grad()
def survey_training(
    model: Classifier, images: ImageSet, splits: Splits, *, image_size: int, progress: Progress | None = None
) -> TrainingMaps:
    """Run `model` over the training images of a set, as they are, not augmented. Raises DataError, ModelError."""
    if not splits.train:
        raise DataError(f"no image of {images.source} is one that the run was trained on")
    images = replace(images, records=tuple(images.records[index] for index in splits.train))
    data = decode_images(images, image_size=image_size)
    total: Tensor | float = 0.0
    peaks, places = [], []
    for batch in BatchLoader(data, range(len(data)), batch_size=16).epoch():
        maps = model.feature_map(batch.images)
        if maps.dim() != 4:
            raise ModelError("the network ends in features, not in maps; leave --images out")
        total = total + maps.double().sum(0)
        peak, place = maps.flatten(2).max(2)
        peaks.append(peak)
        places.append(place)
        if progress:
            progress(sum(map(len, peaks)), len(data))
    return TrainingMaps(images, torch.as_tensor(total) / len(data), torch.cat(peaks), torch.cat(places))


def decompose_mean(model: Classifier, training: TrainingMaps) -> Decomposition:
    """Return the parts of the mean training logit: a linear head makes of the mean map the mean of its answers."""
    return decompose(model.head, training.mean[None])
