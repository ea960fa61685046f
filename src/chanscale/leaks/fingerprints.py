"""Images as short vectors, whose cosine is large where one may be a copy of the other."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chanscale.leaks.thumbnails import SIDE, Pictures, level_contrast

Vectors = NDArray[np.float32]

REACH = 8.0
_VIEW = 0.8
"""Side of what a vector describes, as a share of the image: the margin is what a crop may take."""
_FREQUENCIES = 8
_CHUNK = 512
_EMPTY = 1e-3
"""Below this length, an image shows nothing: it is near to none."""


class Window(NamedTuple):
    """A part of an image: its size as a multiple of the usual view, its middle off that of the image, as shares."""

    scale: float
    down: float
    across: float


def _corners(scale: float, off: float) -> list[Window]:
    return [Window(scale, down, across) for down in (-off, off) for across in (-off, off)]


def _edges(scale: float, off: float) -> list[Window]:
    return [Window(scale, *place) for place in ((-off, 0), (off, 0), (0, -off), (0, off))]


WINDOWS = (
    Window(1, 0, 0),
    Window(0.9, 0, 0),
    *_edges(0.97, 0.025),
    *_corners(1, 0.03),
    *_corners(0.9, 0.045),
)
"""Where the view of a copy may lie in the original: whole, cropped, cut at an edge, shifted, or cut at a corner."""


def fingerprints(small: NDArray[np.uint8]) -> Vectors:
    """Return a vector of length 1 for each window of each thumbnail: its low frequencies, shape (windows, N, F).

    An inverted image has the negative vector; `mirror` gives a mirrored one's.
    """
    chunks = range(0, len(small), _CHUNK)
    return np.concatenate([_describe(small[at : at + _CHUNK]) for at in chunks], axis=1)


def mirror(vectors: Vectors) -> Vectors:
    """Return the vectors of the mirrored images: waves that are odd from left to right change their sign."""
    return vectors * np.where(_FOUND[1] % 2, -1, 1).astype(np.float32)


def _describe(small: NDArray[np.uint8]) -> Vectors:
    leveled = level_contrast(small, reach=REACH)
    found = np.stack([_project(leveled, window)[:, _FOUND[0], _FOUND[1]] for window in WINDOWS]) * _WEIGHT
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    vectors: Vectors = (found / np.maximum(length, _EMPTY)).astype(np.float32)
    return vectors


def _project(leveled: Pictures, window: Window) -> Vectors:
    across = _waves(window.scale, window.across).T
    projected: Vectors = np.matmul(_waves(window.scale, window.down) @ leveled, across, dtype=np.float32)
    return projected


def _waves(scale: float, off: float) -> Vectors:
    """Return cosines over the window, (_FREQUENCIES, SIDE); they fade at its ends, where a copy may differ."""
    side = _VIEW * scale
    along = ((np.arange(SIDE) + 0.5) / SIDE - 0.5 - off) / side + 0.5
    fading = np.sqrt(np.sin(np.pi * along.clip(0, 1)))
    waves: Vectors = (np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * along) * fading).astype(np.float32)
    return waves


# All but the mean, and not the finest in both directions. High frequencies are weak in any image, and tell most.
_SUM = np.add.outer(np.arange(_FREQUENCIES), np.arange(_FREQUENCIES))
_FOUND = np.nonzero((_SUM > 0) & (_SUM < _FREQUENCIES + 2))
_WEIGHT = np.sqrt(_SUM[_FOUND]).astype(np.float32)
