"""The training patches that excite a channel most: its receptive field, cut from the images it is most active on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chanscale.data.images import Pixels, read_image
from chanscale.data.loading import source_of
from chanscale.data.sources import ImageRecord
from chanscale.explain.receptive_fields import Box, ReceptiveField
from chanscale.explain.training_maps import TrainingMaps

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Patch:
    """A part of a training image: its `box` in the square of `side` pixels that the model sees; the activation there.

    What lies in the box may excite the channel, or only a part of it; at the border, padding may do so, too.
    """

    record: ImageRecord
    box: Box
    side: int
    activation: float


def find_patches(
    training: TrainingMaps, field: ReceptiveField, channel: int, *, image_size: int, top: int = 6
) -> tuple[Patch, ...]:
    """Return the patches where a channel of the last map is most active, one of an image, the most active first.

    Images on which it is nowhere above 0 have none.
    """
    peaks, places = training.peaks[:, channel], training.places[:, channel]
    order = peaks.argsort(descending=True, stable=True)[:top].tolist()
    found = []
    for index in (index for index in order if peaks[index] > 0):
        row, column = divmod(int(places[index]), training.columns)
        box = field.box(row, column, side=image_size)
        found.append(Patch(training.images.records[index], box, image_size, float(peaks[index])))
    return tuple(found)


def cut_patch(patch: Patch) -> Grey:
    """Return the pixels (h, w) of a patch, grey, at the resolution of the file. Raises UnreadableImageError."""
    grey = read_grey(patch.record)
    left, top, right, bottom = patch.box
    rows, columns = (_stretch(span, patch.side, size) for span, size in
                     zip(((top, bottom), (left, right)), grey.shape, strict=True))  # fmt: skip
    return grey[rows, columns]


def read_grey(record: ImageRecord) -> Grey:
    """Return an image (H, W) as large as it is, its colours averaged. Raises UnreadableImageError."""
    return to_grey(read_image(source_of(record), size=None, name=str(record.path or record.name)))


def to_grey(pixels: Pixels) -> Grey:
    """Return 16-bit pixels (C, H, W) as (H, W), 8 bits."""
    grey: Grey = np.rint(pixels.astype(np.float32).mean(0) / 257).astype(np.uint8)
    return grey


def _stretch(span: tuple[int, int], side: int, size: int) -> slice:
    """Return where pixels of a square of `side` lie along an axis of an image that is `size` pixels long."""
    first = min(span[0] * size // side, size - 1)
    return slice(first, max(first + 1, -(-span[1] * size // side)))
