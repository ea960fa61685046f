"""Pairs of images that are one exposure: candidates, each laid on the other and compared."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chanscale.data.loading import Progress
from chanscale.leaks.alignment import agreement, align, overlay, smooth
from chanscale.leaks.candidates import Candidates, find_candidates
from chanscale.leaks.fingerprints import WINDOWS
from chanscale.leaks.thumbnails import level_contrast
from chanscale.progress import Watcher

SAME = 0.89
"""Least agreement of two pictures of one exposure (docs/benchmarks/leaks.md: how it was chosen)."""
SURE = 0.985
"""Agreement that no two films, nor phantoms, have reached; a copy cut by 5 %, or stamped, may stay below."""
_PROMISING = 0.8
"""Least agreement of the small pictures for which the large ones are laid on each other at all."""
_COARSE, _FINE = 6.0, 3.0  # pixels over which contrast is leveled: to find the place, and to compare
_BLUR = 1.0  # both, so that what a resampling takes away counts for little
_BATCH = 64


@dataclass(frozen=True)
class Twins:
    """Two images of one exposure, `first` < `second`, and their agreement, 0 to 1."""

    first: int
    second: int
    agreement: float
    mirrored: bool
    inverted: bool


def find_twins(
    small: NDArray[np.uint8],
    *,
    files: NDArray[np.intp] | None = None,
    least: float = SAME,
    watcher: Watcher | None = None,
) -> list[Twins]:
    """Return the pairs of thumbnails, (N, SIDE, SIDE), that look like one exposure, in the order of their indices.

    Images of one file, by its number in `files` (N,), are no pair. What is found does not depend on the order of the
    images.
    """
    watcher = watcher or Watcher()
    order = np.array(sorted(range(len(small)), key=lambda index: small[index].tobytes()), dtype=np.intp)
    small = small[order]
    found = find_candidates(
        small, files=None if files is None else files[order],
        progress=lambda *done: watcher.on_step("comparing images", *done),
    )  # fmt: skip
    agreed = measure_agreement(
        small, found, progress=lambda *done: watcher.on_step("checking likely pairs", *done)
    )
    pairs = zip(
        np.sort(order[np.stack([found.first, found.second], axis=1)], axis=1).tolist(),
        agreed.tolist(), found.mirrored.tolist(), found.inverted.tolist(), strict=True,
    )  # fmt: skip
    twins = [Twins(a, b, value, *how) for (a, b), value, *how in pairs if value >= least]
    return sorted(twins, key=lambda pair: (pair.first, pair.second))


def measure_agreement(
    small: NDArray[np.uint8], found: Candidates, *, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Return how well each candidate's pictures agree where they overlap, laid on each other, shape (P,).

    It is the median over tiles of their correlation: a stamp or a border spoils a few tiles, another film nearly all.
    0 for a pair that small pictures tell apart.
    """
    agreed = np.zeros(len(found), dtype=np.float32)
    for start in range(0, len(found), _BATCH):
        part = found.take(np.arange(start, min(start + _BATCH, len(found))))
        agreed[start : start + len(part)] = _compare(small, part)
        if progress:
            progress(start + len(part), len(found))
    return agreed


@torch.inference_mode()
def _compare(small: NDArray[np.uint8], found: Candidates) -> NDArray[np.float32]:
    warp = torch.from_numpy(_first_maps(found))
    fixed, moving = _pictures(small, found, reach=_COARSE)
    half, other = F.avg_pool2d(fixed, 2), F.avg_pool2d(moving, 2)
    warp = align(half, other, warp)
    likely = _median(half, other, warp, tile=4) >= _PROMISING
    agreed = torch.zeros(len(found))
    if likely.any():
        warp = align(fixed[likely], moving[likely], warp[likely])
        fine = _pictures(small, found.take(likely.numpy()), reach=_FINE)
        one, other = (smooth(part, _BLUR) for part in fine)
        agreed[likely] = _median(one, other, warp, tile=8)
    return agreed.numpy()


def _median(fixed: Tensor, moving: Tensor, warp: Tensor, *, tile: int) -> Tensor:
    laid, inside = overlay(fixed, moving, warp)
    return agreement(fixed, laid, inside, tile=tile).nanmedian(dim=1).values.nan_to_num(0)


def _first_maps(found: Candidates) -> NDArray[np.float32]:
    """Return the map of each candidate by its window, (P, 2, 3), in [-1, 1]."""
    scale, down, across = np.array(WINDOWS, dtype=np.float32)[found.window].T
    zero = np.zeros_like(scale)
    maps: NDArray[np.float32] = np.stack([scale, zero, 2 * across, zero, scale, 2 * down], axis=1)
    return maps.reshape(-1, 2, 3)


def _pictures(small: NDArray[np.uint8], found: Candidates, *, reach: float) -> tuple[Tensor, Tensor]:
    """Return both pictures of each candidate, (P, SIDE, SIDE), the first as the second would be a copy of it."""
    fixed = torch.from_numpy(level_contrast(small[found.first], reach=reach))
    moving = torch.from_numpy(level_contrast(small[found.second], reach=reach))
    mirrored, inverted = torch.from_numpy(found.mirrored), torch.from_numpy(found.inverted)
    fixed = torch.where(mirrored[:, None, None], fixed.flip(-1), fixed)
    return torch.where(inverted[:, None, None], -fixed, fixed), moving
