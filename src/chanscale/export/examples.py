"""Images to try an export on: those of the run's set, or phantoms where it is not at hand."""

from collections.abc import Iterator, Sequence

import numpy as np

from chanscale.data.images import FULL_RANGE, Pixels, read_image
from chanscale.data.loading import source_of
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import ImageSet
from chanscale.data.volumes import VolumeSpace, read_volume
from chanscale.errors import DataError

PHANTOM_SIZE = 160


def read_whole(images: ImageSet, indices: Sequence[int]) -> Iterator[Pixels]:
    """Yield images of a set as large as they are: (C, H, W), 16 bits. Raises UnreadableImageError."""
    for index in indices:
        record = images.records[index]
        yield read_image(source_of(record), size=None, name=str(record.path or record.name))


def read_cubes(
    images: ImageSet, indices: Sequence[int], *, size: int, space: VolumeSpace
) -> Iterator[Pixels]:
    """Yield volumes of a set as a model takes them: (1, size, size, size), 16 bits. Raises DataError."""
    for index in indices:
        record = images.records[index]
        if record.path is None or not record.is_volume:
            raise DataError(f"{record.name} is a picture, and the model takes volumes; give those of the run")
        yield read_volume(record.path, size=size, space=space)


def draw_cubes(count: int = 8, *, size: int) -> Iterator[Pixels]:
    """Yield volumes of random grey levels, (1, size, size, size), 16 bits."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, FULL_RANGE, (1, size, size, size), dtype=np.uint16, endpoint=True)


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
