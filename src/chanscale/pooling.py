"""Max pooling that remembers little: which pixel of each window won, in two bytes."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrugalMaxPool2d(nn.MaxPool2d):
    """A max pooling whose backward pass needs 2 bytes for each output; autograd keeps the input, and 8 bytes.

    Outputs and gradients are those of `nn.MaxPool2d`, bit for bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the largest value of each window."""
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _MaxPool.apply(input, self))  # type: ignore[no-untyped-call]
        return cast(Tensor, super().forward(input))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.MaxPool2d) -> Tensor:
        output, winners = F.max_pool2d(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
        )
        offsets = winners - _corners(output, x, pool)
        small = _largest_offset(x, pool) <= torch.iinfo(torch.int16).max
        ctx.save_for_backward(offsets.to(torch.int16 if small else torch.int32))
        ctx.pool, ctx.shape = pool, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (offsets,), pool = ctx.saved_tensors, ctx.pool
        layout = (
            torch.channels_last
            if grad.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        like = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout
        )  # its shape alone
        grad_x: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation),
            pool.ceil_mode, offsets + _corners(grad, like, pool),
        )  # fmt: skip
        return grad_x, None


def _corners(output: Tensor, x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """Return where the window of each output begins, as an index into a row-major map of `x`; shape (H, W)."""
    (rows, columns), (down, right), (above, left) = output.shape[2:], _pair(pool.stride), _pair(pool.padding)
    tops = torch.arange(rows, device=x.device) * down - above
    lefts = torch.arange(columns, device=x.device) * right - left
    return tops[:, None] * x.shape[3] + lefts


def _largest_offset(x: Tensor, pool: nn.MaxPool2d) -> int:
    """Return how far the last pixel of a window lies behind its first, in a row-major map of `x`."""
    (rows, columns), (down, right) = _pair(pool.kernel_size), _pair(pool.dilation)
    return (rows - 1) * down * x.shape[3] + (columns - 1) * right


def _pair(size: int | tuple[int, ...]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
