"""The resize of `read_image` as plain tensor operations, so that it can travel inside an exported graph."""

import math

import torch
from torch import Tensor, nn

LOBES = 3
"""How many zeros the filter has on each side."""


class LanczosResize(nn.Module):
    """Resize images (N, C, H, W) of any size to (N, C, size, size), antialiased; the aspect ratio is not kept.

    The filter is Pillow's `LANCZOS`, along the rows and then along the columns, each a product with a matrix of
    its weights. It holds nothing. A side that has the size already is not filtered, but for rounding.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return the resized images, in fp32."""
        height, width = images.shape[-2:]
        narrow = images @ lanczos_weights(width, self.size).T
        return lanczos_weights(height, self.size) @ narrow

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return str(self.size)


def lanczos_weights(length: int, size: int) -> Tensor:
    """Return the weights (size, length) by which `size` pixels are made of `length`; each row adds up to 1.

    Duchon 1979, Lanczos filtering; three lobes, stretched by the ratio when an image is made smaller.
    """
    target, source = torch.arange(size), torch.arange(length)
    # Distances of pixel centres, times 2 * size: whole numbers, which no rounding moves by a part of a pixel.
    distance = (2 * target[:, None] + 1) * length - (2 * source + 1) * size
    wider = (source[-1] + 1).clamp_min(size)  # a tensor: a graph is then for images of any size
    lobes = distance / (2 * wider)
    weights = _sinc(lobes) * _sinc(lobes / LOBES) * (lobes.abs() < LOBES)
    return weights / weights.sum(1, keepdim=True)


def _sinc(x: Tensor) -> Tensor:
    angle = math.pi * x
    return torch.where(angle == 0, 1.0, angle.sin() / torch.where(angle == 0, 1.0, angle))
