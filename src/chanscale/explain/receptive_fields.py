"""Which pixels a position of the last map can depend on: the theoretical receptive field of a chain of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from chanscale.explain.chains import POOLS, Chain

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; right and bottom lie just outside."""


@dataclass(frozen=True)
class ReceptiveField:
    """Along each axis (rows, columns): how many pixels it spans, the stride of the map, and where the first begins.

    What lies outside of the image is padding. Theoretical: pixels near the middle count for more than those at the
    edge (Luo et al. 2016).
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]

    def box(self, row: int, column: int, *, side: int) -> Box:
        """Return the pixels of a square image of `side` that one position of the map sees, clipped to the image."""
        spans = []
        for place, size, stride, start in zip((row, column), self.size, self.stride, self.start, strict=True):
            first = start + stride * place
            spans.append((max(0, min(first, side - 1)), max(1, min(first + size, side))))
        (top, bottom), (left, right) = spans
        return left, top, right, bottom


def find_receptive_field(chain: Chain) -> ReceptiveField | None:
    """Return the receptive field of the last map of `chain`, or None where the chain does not begin at the image."""
    if chain.stop is not None:
        return None
    axes = [_compose([step.layer for step in chain.steps], axis) for axis in (0, 1)]
    (high, down, top), (wide, across, left) = axes
    return ReceptiveField((high, wide), (down, across), (top, left))


def _compose(layers: Sequence[nn.Module], axis: int) -> tuple[int, int, int]:
    """Return size, stride and start along one axis (Araujo et al. 2019, eq. 2 to 4)."""
    size, jump, start = 1, 1, 0
    for layer in layers:
        if isinstance(layer, (_ConvNd, *POOLS)):
            kernel, stride, padding, dilation = (_along(layer, name, axis) for name in _NAMES)
            size += dilation * (kernel - 1) * jump
            start -= _before(padding, dilation * (kernel - 1)) * jump
            jump *= stride
    return size, jump, start


_NAMES = ("kernel_size", "stride", "padding", "dilation")


def _along(layer: nn.Module, name: str, axis: int) -> Any:
    value: Any = getattr(layer, name, 1)  # an average pooling has no dilation
    return value[axis] if isinstance(value, tuple) else value


def _before(padding: int | str, reach: int) -> int:
    """Return the padding in front; `same` puts the odd pixel behind."""
    return {"valid": 0, "same": reach // 2}[padding] if isinstance(padding, str) else padding
