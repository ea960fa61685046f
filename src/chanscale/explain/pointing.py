"""Does a map point at what a reader marked? The pointing game, and the energy inside the box."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from chanscale.errors import ConfigError

Mask = NDArray[np.bool_]


class Box(NamedTuple):
    """A rectangle in shares of the image's sides, so that it holds at any size: from its upper left corner."""

    x: float
    y: float
    width: float
    height: float


def cover(boxes: Sequence[Box], *, side: int) -> Mask:
    """Return which pixels (side, side) have their middle in one of the boxes. Raises ConfigError if none has."""
    middles = (np.arange(side) + 0.5) / side
    mask = np.zeros((side, side), dtype=bool)
    for box in boxes:
        rows = (middles >= box.y) & (middles < box.y + box.height)
        columns = (middles >= box.x) & (middles < box.x + box.width)
        mask |= rows[:, None] & columns
    if not mask.any():
        raise ConfigError(f"wanted boxes that hold a pixel of an image of {side} x {side}, got {list(boxes)}")
    return mask


def enlarge(values: Tensor, *, side: int) -> NDArray[np.float64]:
    """Return a map (h, w) at the size of the image, (side, side), bilinearly, as maps are overlaid."""
    resized = F.interpolate(
        values[None, None].double(), size=(side, side), mode="bilinear", align_corners=False
    )
    found: NDArray[np.float64] = resized[0, 0].cpu().numpy()
    return found


def points_at(values: NDArray[np.floating], mask: Mask) -> float:
    """Return 1 where the largest value of a map lies in `mask`, 0 where not (Zhang et al. 2018, sec. 4.1).

    Both (side, side). Where several positions have the largest value, the share of them that lies in the mask.
    """
    return float(mask[values == values.max()].mean())


def energy_inside(values: NDArray[np.floating], mask: Mask) -> float:
    """Return which share of what is positive in a map lies in `mask` (Wang et al. 2020, Score-CAM, eq. 5).

    Both (side, side). A map that is nowhere positive says nothing about the place: the share of the image then.
    """
    positive = np.maximum(values, 0)
    total = positive.sum()
    return float(positive[mask].sum() / total) if total > 0 else float(mask.mean())


def centre_map(side: int) -> NDArray[np.float64]:
    """Return a map (side, side) that knows the middle of the image alone: the baseline to beat.

    A Gaussian of a quarter of the side.
    """
    offsets = ((np.arange(side) + 0.5) / side - 0.5) / 0.25
    bell: NDArray[np.float64] = np.exp(-0.5 * offsets**2)
    return np.outer(bell, bell)
