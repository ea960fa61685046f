"""Small pictures of images, and the ways in which one can be held wrongly."""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from chanscale.novelty.facts import to_grey
from chanscale.novelty.gaussian import Floats, Gaussian

SIDE = 16
FAINT = 1 / 256
"""Added to the deviation of a thumbnail, so that what is blank stays blank."""

Turn = Callable[[Floats], Floats]

TURNS: dict[str, Turn] = {
    "looks inverted": lambda x: -x,
    "looks rotated by 90 degrees to the left": lambda x: np.rot90(x, -1, (1, 2)),
    "looks rotated by 90 degrees to the right": lambda x: np.rot90(x, 1, (1, 2)),
    "looks upside down": lambda x: x[:, ::-1],
    "looks turned by 180 degrees": lambda x: x[:, ::-1, ::-1],
}  # fmt: skip
"""What an image looks like, and what undoes it, on (N, SIDE, SIDE)."""

MIRRORED: dict[str, Turn] = {"looks mirrored": lambda x: x[:, :, ::-1]}


def draw_thumbnails(images: Tensor) -> Tensor:
    """Return thumbnails (N, SIDE * SIDE) of images (N, C, H, W): each of mean 0 and, but for `FAINT`, deviation 1."""
    small = F.interpolate(to_grey(images).double(), size=(SIDE, SIDE), mode="area").flatten(1)
    centred = small - small.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + FAINT)


def undo(turns: dict[str, Turn], thumbnails: Floats, usual: Gaussian) -> Floats:
    """Return how much nearer thumbnails (N, C) come to the `usual` ones when each turn is undone: (N, turns)."""
    square = thumbnails.reshape(-1, SIDE, SIDE)
    before = usual.distance(thumbnails)
    undone = [usual.distance(turn(square).reshape(thumbnails.shape)) for turn in turns.values()]
    return before[:, None] - np.stack(undone, 1)
