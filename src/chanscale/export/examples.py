"""Images to try an export on: those of the run's set, or phantoms where it is not at hand."""

from collections.abc import Iterator, Sequence

import numpy as np

from chanscale.data.images import Pixels, read_image
from chanscale.data.loading import source_of
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import ImageSet

PHANTOM_SIZE = 160


def read_whole(images: ImageSet, indices: Sequence[int]) -> Iterator[Pixels]:
    """Yield images of a set as large as they are: (C, H, W), 16 bits. Raises UnreadableImageError."""
    for index in indices:
        record = images.records[index]
        yield read_image(source_of(record), size=None, name=str(record.path or record.name))


def spread(indices: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of `indices`, evenly spread."""
    return [indices[place] for place in np.unique(np.linspace(0, len(indices) - 1, count).astype(int))]


def draw_examples(count: int = 8, *, grey_only: bool) -> Iterator[Pixels]:
    """Yield phantoms, (C, H, W), 16 bits: square, wide and tall, and every other one tinted unless `grey_only`."""
    for index in range(count):
        grey = draw_phantom(index, size=PHANTOM_SIZE, label=index % 2).image
        cut = grey[: PHANTOM_SIZE - 7 * index, : PHANTOM_SIZE - 5 * (index % 3)]
        tinted = index % 2 and not grey_only
        planes = [cut, cut // 2 + 64, 255 - cut] if tinted else [cut]
        yield np.stack(planes).astype(np.uint16) * np.uint16(257)
