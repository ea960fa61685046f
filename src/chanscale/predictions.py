"""What a model says about images whose classes are not known."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier
from chanscale.data.images import IMAGE_SUFFIXES
from chanscale.data.listing import list_images
from chanscale.data.loading import decode_images
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.errors import DataError
from chanscale.evaluation import predict
from chanscale.files import exists
from chanscale.programs import Program

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, K) of `classes` for the images `names`; `skipped` were unreadable."""

    names: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    skipped: tuple[str, ...] = ()

    @property
    def predicted(self) -> tuple[str, ...]:
        """The most probable class of each image."""
        return tuple(self.classes[index] for index in self.probabilities.argmax(1))

    def to_csv(self) -> str:
        """Return a table with the columns image, predicted and, for each class, `probability_<class>`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "predicted", *(f"probability_{name}" for name in self.classes)])
        for name, predicted, shares in zip(self.names, self.predicted, self.probabilities, strict=True):
            writer.writerow([name, predicted, *(f"{share:.8g}" for share in shares)])
        return text.getvalue()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return for each image its name, the predicted class, and the probability of each class."""
        return [
            {
                "image": name,
                "predicted": predicted,
                "probabilities": dict(zip(self.classes, shares, strict=True)),
            }
            for name, predicted, shares in zip(
                self.names, self.predicted, self.probabilities.tolist(), strict=True
            )
        ]


def predict_images(
    model: Classifier | Program,
    info: ModelInfo,
    paths: Sequence[Path],
    *,
    skip_bad: bool = False,
    decoding: Progress | None = None,
    predicting: Progress | None = None,
) -> Predictions:
    """Return what `model` says about image files, and about all images in folders.

    `info`: what the model's file says of it. `decoding` and `predicting` hear of images done, of all. Raises
    DataError, and UnreadableImageError unless `skip_bad` leaves such images out.
    """
    images = open_unlabelled(paths, info)
    data = decode_images(images, image_size=info.image_size, skip_bad=skip_bad, progress=decoding)
    probabilities, _ = predict(model, data, range(len(data)), progress=predicting)
    names = tuple(record.name for record in data.images.records)
    return Predictions(names, info.classes, probabilities, data.images.skipped)


def open_unlabelled(paths: Sequence[Path], info: ModelInfo) -> ImageSet:
    """Return image files, and all images in folders, each once, as a set. Raises DataError.

    No class is known: the labels stand empty, and are not to be looked at.
    """
    files = list(dict.fromkeys(file for path in paths for file in _find_images(path)))
    records = tuple(ImageRecord(str(file), label=0, group=str(file), path=file) for file in files)
    return ImageSet(paths[0], info.classes, records)


def _find_images(path: Path) -> Iterable[Path]:
    if not exists(path):
        raise DataError(f"{path} does not exist; wanted an image, or a folder of images.")
    if not path.is_dir():
        return [path]
    found = list_images(path)
    if not found:
        raise DataError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); pass another folder.")
    return found
