"""Channel scales: one trainable weight on each output channel of a frozen convolution."""

from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Conv = TypeVar("Conv", bound=nn.Conv2d)
Norm = TypeVar("Norm", bound=nn.BatchNorm2d)


class ChannelScale(nn.Module):
    """Multiply each channel by its weight, then apply the ReLU whose place it took, if it took one.

    Input and output: (N, C, *), C the number of channels. `weight`: (C,), ones at first, so that nothing
    changes until it is trained. Wong et al. 2021, the channel-scaling layer.
    """

    def __init__(self, channels: int, *, relu: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled (and rectified) feature map, in the dtype of `x`."""
        if self.relu and torch.is_grad_enabled():
            return _scale_relu(x, self.weight)
        scaled = x * _per_channel(self.weight, x)
        return scaled.relu_() if self.relu else scaled

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.weight.numel()}, relu={self.relu}"


class AbsorbedReLU(nn.Identity):
    """Holds the place of a ReLU that the scale in front of it applies, until scales are merged."""


class FrozenConv2d(nn.Conv2d):
    """A convolution that is never trained, and so remembers none of its input; then the scale, if it has one."""

    scale: ChannelScale | None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """Return the frozen twin of `conv`; it shares the weights."""
        frozen = _conv_like(conv, cls)
        frozen.register_module("scale", None)
        return frozen

    def thaw(self) -> nn.Conv2d:
        """Return the plain convolution with the same weights, without the scale."""
        return _conv_like(self, nn.Conv2d)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`, scaled."""
        output = super().forward(input)
        return output if self.scale is None else cast(Tensor, self.scale(output))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        numeric = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if numeric and torch.is_grad_enabled() and input.requires_grad:
            return _frozen_conv(input, weight, bias, self)
        return cast(Tensor, super()._conv_forward(input, weight, bias))


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in eval under `train()` (batch statistics would cancel the scale); then the scale."""

    scale: ChannelScale | None

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> Self:
        """Return the frozen twin of `norm`; it shares the weights and statistics."""
        frozen = _norm_like(norm, cls)
        frozen.register_module("scale", None)
        return frozen.train()

    def thaw(self) -> nn.BatchNorm2d:
        """Return the plain norm with the same weights and statistics, without the scale."""
        return _norm_like(self, nn.BatchNorm2d)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised `input`, scaled."""
        output = super().forward(input)
        return output if self.scale is None else cast(Tensor, self.scale(output))

    def train(self, mode: bool = True) -> Self:
        """Let the scale follow `mode`; the norm stays in eval."""
        super().train(mode)
        self.training = False
        return self


def ensure_affine(norm: nn.BatchNorm2d, device: torch.device) -> None:
    """Give `norm`, in place, a weight of 1 and a bias of 0 if it has none."""
    if norm.weight is None:
        norm.affine = True
        norm.weight = nn.Parameter(torch.ones(norm.num_features, device=device), requires_grad=False)
        norm.bias = nn.Parameter(torch.zeros(norm.num_features, device=device), requires_grad=False)


def soft_threshold(scale: Tensor, step: Tensor | float) -> Tensor:
    """Return sign(s) max(|s| - step, 0): the proximal operator of step * |s|_1 (Parikh & Boyd 2014, 6.5.2)."""
    return scale.sign() * (scale.abs() - step).clamp_min(0)


class _ScaleReLU(torch.autograd.Function):
    """relu(scale * z), which remembers z alone: autograd would keep z, and the output for the ReLU."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(z, scale)
        return (z * _per_channel(scale, z)).relu_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        z, scale = ctx.saved_tensors
        # At a scale of 0 the ReLU is differentiated from the right: a channel that reached 0 can come back.
        before_relu = z * _per_channel(torch.where(scale == 0, 1.0, scale), z)
        # The result takes the place of `before_relu`: it is maps like these that memory goes to, not weights.
        grad = torch.ops.aten.threshold_backward.grad_input(grad, before_relu, 0, grad_input=before_relu)
        # A scale is a batch norm with mean 0 and variance 1; its kernel forms both gradients in one pass.
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        grad_z, grad_scale, _ = torch.ops.aten.native_batch_norm_backward(
            grad, z, scale, zeros, ones, None, None, False, 0.0, [ctx.needs_input_grad[0], True, False]
        )
        return grad_z, grad_scale


class _FrozenConv(torch.autograd.Function):
    """A convolution whose gradient reaches its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.conv, ctx.input = conv, (x.shape, x.dtype)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), conv, (shape, dtype) = ctx.saved_tensors, ctx.conv, ctx.input
        # Under autocast the fp32 weight was cast on the way in; keeping that copy would cost memory.
        grad_x: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape, weight.to(grad.dtype), grad, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return grad_x.to(dtype), None, None, None


def _scale_relu(z: Tensor, scale: Tensor) -> Tensor:
    return cast(Tensor, _ScaleReLU.apply(z, scale))  # type: ignore[no-untyped-call]


def _frozen_conv(x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, _FrozenConv.apply(x, weight, bias, conv))  # type: ignore[no-untyped-call]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _conv_like(conv: nn.Conv2d, kind: type[Conv]) -> Conv:
    twin = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
        conv.groups, conv.bias is not None, conv.padding_mode, device="meta",
    )  # fmt: skip
    _share_frozen(conv, twin)
    return twin.train(conv.training)


def _norm_like(norm: nn.BatchNorm2d, kind: type[Norm]) -> Norm:
    twin = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    _share_frozen(norm, twin)
    return twin.train(norm.training)


def _share_frozen(layer: nn.Module, twin: nn.Module) -> None:
    """Let `twin` use the tensors of `layer`, as parameters of its own that need no gradient."""
    for name, parameter in layer._parameters.items():
        shared = None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
        twin.register_parameter(name, shared)
    twin._buffers.update(layer._buffers)
