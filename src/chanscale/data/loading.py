"""Decode images once, keep them as 16-bit pixels where memory allows, and hand them out in batches."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from chanscale.data.dicom import Frame
from chanscale.data.images import FULL_RANGE, Pixels, Source, count_channels, read_image
from chanscale.data.memory import free_memory
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.volumes import VolumeSpace, read_volume, require_extra
from chanscale.errors import ConfigError, DataError, UnreadableImageError, clip
from chanscale.team import local_size

Progress = Callable[[int, int], None]
Indices = Sequence[int] | NDArray[np.integer]

_SHARE_OF_FREE_MEMORY = 0.25
_T = TypeVar("_T")
_R = TypeVar("_R")


class Batch(NamedTuple):
    """Images (N, C, S, S) or (N, C, S, S, S) in [0, 1], class indices (N,), and indices into the image set (N,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class DecodedImages(Dataset[tuple[Tensor, int | Tensor, int]]):
    """The images of a set as float32 in [0, 1], all of one size and one number of channels.

    `images` is the set without those that were skipped; indices count in it. `channels` is 3 if any image is
    RGB (grey ones are then repeated), else 1. `labels`: (N,) or (N, K), as of the set. `space`: how volumes are read;
    None for pictures. `cached` says whether pixels are kept; if not, each access decodes, and may raise
    UnreadableImageError.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int,
        channels: int,
        cache: Pixels | None = None,
        space: VolumeSpace | None = None,
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.channels = channels
        self.space = space
        self._cache = cache
        self.labels = torch.from_numpy(images.labels)

    @property
    def cached(self) -> bool:
        """Whether the pixels are kept in memory."""
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor, int]:
        images, labels = self.batch([index])
        return images[0], labels[0] if labels.dim() > 1 else int(labels[0]), index

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return images (N, C, S, S), or volumes (N, C, S, S, S), in [0, 1], and labels (N,) or (N, K)."""
        rows = np.asarray(indices, dtype=np.intp)
        pixels = np.stack([self._decode(i) for i in rows]) if self._cache is None else self._cache[rows]
        # Divided, not multiplied by the inverse: so that an 8-bit v is exactly v / 255.
        return torch.from_numpy(pixels.astype(np.float32)).div_(FULL_RANGE), self.labels[
            torch.from_numpy(rows)
        ]

    def _decode(self, index: int) -> Pixels:
        return _read(
            self.images.records[index], shape_of(self.channels, self.image_size, self.space), self.space
        )


class BatchLoader:
    """Batches of some images of a set, in an order that depends on the seed and the epoch alone.

    An interrupted run therefore goes on as it would have: ask for the epoch that comes next. With `shuffle`,
    as for training, a last batch of a single image is dropped, since batch statistics need two. Images that
    are not cached are decoded ahead by `workers` threads.
    """

    def __init__(
        self,
        dataset: DecodedImages,
        indices: Indices,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 2,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more. Got batch_size={batch_size}.")
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers

    def __len__(self) -> int:
        return len(self._chunk(self.indices))

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, which counts from 0."""
        order = (
            np.random.default_rng((self.seed, epoch)).permutation(self.indices)
            if self.shuffle
            else self.indices
        )
        chunks = self._chunk(order)
        workers = 0 if self.dataset.cached else self.workers
        return _map_ahead(self._load, chunks, workers=workers, ahead=workers + 1)

    def _chunk(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        lonely = self.shuffle and self.batch_size > 1 and len(chunks) > 1 and len(chunks[-1]) == 1
        return chunks[:-1] if lonely else chunks

    def _load(self, chunk: NDArray[np.int64]) -> Batch:
        return Batch(*self.dataset.batch(chunk), torch.from_numpy(chunk.copy()))


def decode_images(
    images: ImageSet,
    *,
    image_size: int,
    space: VolumeSpace | None = None,
    most_channels: int | None = None,
    workers: int = 2,
    cache_bytes: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> DecodedImages:
    """Decode all images to squares of `image_size` pixels in `workers` threads, and keep them if they fit.

    Volumes are decoded to cubes, as `space` says; without it, they are refused, and with it, pictures (DataError).
    `cache_bytes` is the memory for decoded pixels; by default a quarter of what is free. An unreadable image, or one
    of more than `most_channels`, raises UnreadableImageError; with `skip_bad` it is left out instead, and named in
    `images.skipped` of what is returned. Images that do not fit are decoded when asked for; then they are read here
    only if `skip_bad` needs it.
    """
    _require_kind(images, space)
    records = images.records
    with closing(_map_ahead(_count_channels, records, workers=workers)) as counts:
        found = max(counts)
    channels = found if most_channels is None else min(found, most_channels)
    shape = (len(records), *shape_of(channels, image_size, space))
    fits = math.prod(shape) * np.dtype(np.uint16).itemsize <= _find_cache_bytes(cache_bytes)
    cache = np.empty(shape, dtype=np.uint16) if fits else None
    if fits or skip_bad:
        bad = _decode_all(
            records, shape[1:], cache, space=space, workers=workers, skip_bad=skip_bad, progress=progress
        )
        images = images.without([records[index].name for index in bad]) if bad else images
        cache = None if cache is None else _drop_rows(cache, bad)
    return DecodedImages(images, image_size=image_size, channels=shape[1], cache=cache, space=space)


def shape_of(channels: int, image_size: int, space: VolumeSpace | None) -> tuple[int, ...]:
    """Return the shape of one image, (C, S, S), or of one volume, (C, S, S, S)."""
    return (channels, *[image_size] * (2 if space is None else 3))


def _require_kind(images: ImageSet, space: VolumeSpace | None) -> None:
    """Raise DataError for volumes where pictures are wanted, or the other way round; ConfigError without MONAI."""
    if images.dimensions == 3 and space is None:
        raise DataError(
            f"{clip(images.records[0].name)} is a volume, and this takes pictures; volumes need a network for volumes, "
            "and go with fit, evaluate, predict, report and export"
        )
    if images.dimensions == 2 and space is not None:
        raise DataError(
            f"{clip(images.records[0].name)} is a picture, and the model takes volumes; give it .nii or .nii.gz files"
        )
    if space is not None:
        require_extra()


def _find_cache_bytes(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    # Of several processes on a machine, each holds all images.
    return int(_SHARE_OF_FREE_MEMORY * free_memory() / local_size())


def _decode_all(
    records: Sequence[ImageRecord],
    shape: tuple[int, ...],
    cache: Pixels | None,
    *,
    space: VolumeSpace | None,
    workers: int,
    skip_bad: bool,
    progress: Progress | None,
) -> list[int]:
    """Decode into the cache, if there is one, and return the indices of the unreadable images, ascending."""

    def decode(index: int) -> UnreadableImageError | None:
        try:
            pixels = _read(records[index], shape, space)
        except UnreadableImageError as error:
            return error
        if cache is not None:
            cache[index] = pixels
        return None

    bad = []
    with closing(_map_ahead(decode, range(len(records)), workers=workers)) as errors:
        for index, error in enumerate(errors):
            if error and not skip_bad:
                raise UnreadableImageError(
                    f"{error} Or leave it out with skip_bad (--skip-bad), where that is an option."
                ) from error
            if error:
                bad.append(index)
            if progress:
                progress(index + 1, len(records))
    return bad


def source_of(record: ImageRecord) -> Source:
    """Return where the pixels of an image are: its file, a frame of it, or an array."""
    if record.pixels is not None:
        return record.pixels
    if record.path is not None and record.frame is not None:
        return Frame(record.path, record.frame)
    return record.path or record.name


def _count_channels(record: ImageRecord) -> int:
    return record.channels or count_channels(source_of(record))


def _read(record: ImageRecord, shape: tuple[int, ...], space: VolumeSpace | None) -> Pixels:
    name = str(record.path or record.name)
    if space is None or record.path is None:
        pixels = read_image(source_of(record), size=shape[-1], name=name)
    else:
        pixels = read_volume(record.path, size=shape[-1], space=space, name=name)
    if pixels.shape[0] > shape[0]:
        raise UnreadableImageError(
            f"{name} is in colour, and the model takes grey images alone; make it grey."
        )
    return np.broadcast_to(pixels, shape)


def _drop_rows(cache: Pixels, bad: list[int]) -> Pixels:
    """Move the good rows up in place: a copy would need the memory twice."""
    good = np.delete(np.arange(len(cache)), bad)
    for new, old in enumerate(good):
        if new != old:
            cache[new] = cache[old]
    return cache[: len(good)]


def _map_ahead(
    function: Callable[[_T], _R], items: Iterable[_T], *, workers: int, ahead: int = 64
) -> Generator[_R, None, None]:
    """Map in threads, in order, with at most `ahead` results waiting; with no workers, in this thread."""
    if workers < 1:
        yield from map(function, items)
        return
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the caller stops early, or an image cannot be read
            for future in pending:
                future.cancel()
