"""Which pairs are worth laying on each other: those of near vectors."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from chanscale.data.loading import Progress
from chanscale.leaks.fingerprints import Vectors, fingerprints, mirror

NEAR = 0.965
"""Least cosine of a candidate (docs/benchmarks/leaks.md has what it lets pass)."""
NEAREST = 8
"""Candidates looked at for an image: in a set whose images are all alike, more would be no copies."""
_ROWS, _COLUMNS = 512, 2048  # a block of products stays in the cache


@dataclass(frozen=True)
class Candidates:
    """Pairs of images; `first`, mirrored or inverted where said so, may be what lies in `window` of `second`.

    All are arrays (P,); `window` is an index into WINDOWS, `cosine` how near the vectors are.
    """

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    window: NDArray[np.intp]
    mirrored: NDArray[np.bool_]
    inverted: NDArray[np.bool_]
    cosine: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, which: NDArray[Any]) -> Self:
        """Return those at these indices, or where a mask is true."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """Return all of these as one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def find_candidates(
    small: NDArray[np.uint8], *, files: NDArray[np.intp] | None = None, progress: Progress | None = None
) -> Candidates:
    """Return the pairs of thumbnails whose vectors are near in any window, mirrored or not; each pair once.

    `files` (N,): the number of each image's file; those of one are no pair, and default is a file each. All others are
    compared, in matrix products of blocks: time grows with N squared, memory with N.
    """
    vectors = fingerprints(small)
    files = np.arange(len(small)) if files is None else files
    found = [_none()]
    for start in range(0, len(small), _ROWS):
        near = _compare_rows(vectors, slice(start, start + _ROWS))
        # Before the nearest are kept: frames of one file are nearer to each other than to any copy.
        found.append(_keep_nearest(near.take(files[near.first] != files[near.second])))
        if progress:
            progress(min(start + _ROWS, len(small)), len(small))
    return _once(Candidates.join(found))


def _compare_rows(vectors: Vectors, rows: slice) -> Candidates:
    """Return the near pairs of which the first is one of these rows, in all windows, mirrored or not."""
    whole = vectors[0, rows]
    found = [
        part
        for window, others in enumerate(vectors)
        for mirrored in (False, True)
        for part in _compare(mirror(whole) if mirrored else whole, others, rows.start, window, mirrored)
    ]
    return Candidates.join([_none(), *found])


def _compare(rows: Vectors, others: Vectors, start: int, window: int, mirrored: bool) -> Iterator[Candidates]:
    for place in range(0, len(others), _COLUMNS):
        cosines = rows @ others[place : place + _COLUMNS].T
        if max(cosines.max(), -cosines.min()) < NEAR:
            continue
        first, second = np.nonzero(np.abs(cosines) >= NEAR)
        near = cosines[first, second]
        flags = np.full(len(near), window), np.full(len(near), mirrored), near < 0
        yield Candidates(first + start, second + place, *flags, np.abs(near))


def _keep_nearest(found: Candidates) -> Candidates:
    """Return the nearest of each first image, its best window for each other image."""
    best = _once(found, ordered=True)
    order = np.lexsort((-best.cosine, best.first))
    begins = np.searchsorted(best.first[order], best.first[order])
    return best.take(order[np.arange(len(order)) - begins < NEAREST])


def _once(found: Candidates, *, ordered: bool = False) -> Candidates:
    """Return the nearest candidate of each pair; `ordered`: (a, b) and (b, a) are two pairs."""
    low, high = found.first, found.second
    if not ordered:
        low, high = np.minimum(low, high), np.maximum(low, high)
    order = np.lexsort((found.window, -found.cosine, high, low))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
    return found.take(order[new])


def _none() -> Candidates:
    index, flag = np.empty(0, dtype=np.intp), np.empty(0, dtype=bool)
    return Candidates(index, index, index, flag, flag, np.empty(0, dtype=np.float32))
