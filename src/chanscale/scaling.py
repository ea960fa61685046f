"""Channel scales, one trainable weight on each channel, and the frozen layers in front of them."""

from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from chanscale.pooling import FrugalMaxPool2d

SCALE = "channel_scale"
"""What a layer calls the scale behind it."""


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


def add_scale(layer: nn.Module, *, relu: bool = False, device: torch.device | None = None) -> ChannelScale:
    """Put a scale of 1 behind a convolution or a norm, in place, as its child; return it.

    It is on the device of the layer, or on `device` if the layer has no tensors.
    """
    width = int(layer.out_channels if isinstance(layer, _ConvNd) else layer.num_features)  # type: ignore[arg-type]
    scale = ChannelScale(width, relu=relu, device=_device_of(layer) or device)
    layer.add_module(SCALE, scale)
    layer.register_forward_hook(_apply_scale)
    return scale


def scale_of(layer: nn.Module) -> ChannelScale | None:
    """Return the scale behind `layer`, if it has one."""
    return cast(ChannelScale | None, layer._modules.get(SCALE))


def drop_scale(layer: nn.Module) -> None:
    """Take the scale behind `layer` away, in place."""
    del layer._modules[SCALE]
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _apply_scale]:
        del layer._forward_hooks[key]


def _device_of(layer: nn.Module) -> torch.device | None:
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return tensors[0].device if tensors else None


def _apply_scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scale = cast(ChannelScale, layer._modules[SCALE])
    if scale.relu and torch.is_grad_enabled() and _is_cheaper_made_anew(layer, inputs, output):
        return _scale_relu(output, scale.weight, inputs[0], cast(FrozenConv, layer))
    return cast(Tensor, scale(output))


class AbsorbedReLU(nn.ReLU):
    """A ReLU that the scale in front of it applies, until scales are merged."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`."""
        return input


class FrozenConv(_ConvNd):
    """A convolution that is never trained, and so remembers none of its input."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        numeric = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        in_batches = input.dim() == weight.dim()
        if numeric and in_batches and torch.is_grad_enabled() and input.requires_grad:
            return _frozen_conv(input, weight, bias, self)
        output: Tensor = super()._conv_forward(input, weight, bias)
        return output


def _is_cheaper_made_anew(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether `layer` is the first of a network, whose maps are large, while it has next to nothing to compute.

    Only if its convolution is all there is to make again: a class may pad, or standardise weights, in its `forward`.
    """
    if not isinstance(layer, FrozenConv) or output.requires_grad:
        return False
    if thawed_class(layer).forward not in _FORWARDS or not acts_alone(layer):
        return False
    return len(inputs) == 1 and inputs[0].numel() < output.numel()  # none: it was given by name


def acts_alone(layer: nn.Module) -> bool:
    """Whether a layer with a scale is all that makes its output: no hook, and no `forward` of the object's own."""
    return "forward" not in vars(layer) and [*layer._forward_hooks.values()] == [_apply_scale]


class FrozenNorm(nn.Module):
    """A norm that stays in eval under `train()`: batch statistics would cancel the scale."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval."""
        super().train(mode)
        self.training = False
        return self


class FrozenBatchNorm(FrozenNorm, _BatchNorm):
    """A batch norm that is never trained, and so remembers none of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised `input`, (N, C, *)."""
        if self.running_var is not None and torch.is_grad_enabled() and input.requires_grad:
            return _frozen_norm(input, self)
        return super().forward(input)


def freeze(module: nn.Module) -> None:
    """Make a convolution or norm, in place, what it is while scales are trained; leave any other layer as it is.

    Outputs stay as they are, bit for bit; a max pooling remembers less.
    """
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        return
    module.__class__ = _frozen_class(type(module))  # type: ignore[arg-type]
    module.train(module.training)  # a norm goes to eval


def thaw(module: nn.Module) -> None:
    """Undo `freeze`, in place; a ReLU that was absorbed acts again."""
    module.__class__ = nn.ReLU if isinstance(module, AbsorbedReLU) else thawed_class(module)


def thawed_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that `module` had before `freeze`."""
    kind: type[nn.Module] = getattr(type(module), "_thawed", type(module))
    return kind


@cache
def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that computes what `kind` computes, without being trained."""
    frozen: type[nn.Module]
    if kind is nn.MaxPool2d:
        frozen = FrugalMaxPool2d
    elif issubclass(kind, _ConvNd) and getattr(kind, "_conv_forward", None) in _CONV_FORWARDS:
        frozen = FrozenConv
    elif issubclass(kind, _BatchNorm) and kind.forward is _BatchNorm.forward:
        frozen = FrozenBatchNorm
    elif issubclass(kind, _NormBase):  # a subclass may compute something else: only its mode is held
        frozen = FrozenNorm
    else:
        return kind
    # The frozen class first: what it overrides is all that differs.
    return type(f"Frozen{kind.__name__}", (frozen, kind), {"_thawed": kind, "__module__": __name__})


_CONV_FORWARDS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def ensure_affine(norm: nn.Module, like: Tensor) -> None:
    """Give a norm, in place, a weight of 1 and a bias of 0 if it has none; of the kind of its statistics, or `like`."""
    if isinstance(norm, _NormBase) and norm.weight is None:
        norm.affine = True
        kind = norm.running_var if norm.running_var is not None else like
        norm.weight = nn.Parameter(kind.new_ones(norm.num_features), requires_grad=False)
        norm.bias = nn.Parameter(kind.new_zeros(norm.num_features), requires_grad=False)


def soft_threshold(scale: Tensor, step: Tensor | float) -> Tensor:
    """Return sign(s) max(|s| - step, 0): the proximal operator of step * |s|_1 (Parikh & Boyd 2014, 6.5.2)."""
    return scale.sign() * (scale.abs() - step).clamp_min(0)


class _ScaleReLU(torch.autograd.Function):
    """relu(scale * z), which remembers z alone: autograd would keep z, and the output for the ReLU.

    Given the convolution that made z, it remembers what that convolved, `x`, and does so again.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, x: Tensor | None, conv: FrozenConv | None) -> Tensor:
        ctx.save_for_backward(z if conv is None else x, scale)
        ctx.conv, ctx.dtype = conv, z.dtype  # that of autocast, which backward knows nothing of
        return (z * _per_channel(scale, z)).relu_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        kept, scale = ctx.saved_tensors
        z = kept if ctx.conv is None else _convolve_again(ctx.conv, kept, ctx.dtype)
        # At a scale of 0 the ReLU is differentiated from the right: a channel that reached 0 can come back.
        before_relu = z * _per_channel(torch.where(scale == 0, 1.0, scale), z)
        # The result takes the place of `before_relu`: it is maps like these that memory goes to, not weights.
        grad = torch.ops.aten.threshold_backward.grad_input(grad, before_relu, 0, grad_input=before_relu)
        # A scale is a batch norm with mean 0 and variance 1; its kernel forms both gradients in one pass.
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        grad_z, grad_scale, _ = torch.ops.aten.native_batch_norm_backward(
            grad, z, scale, zeros, ones, None, None, False, 0.0, [ctx.needs_input_grad[0], True, False]
        )
        return grad_z, grad_scale, None, None


def _convolve_again(conv: FrozenConv, x: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return conv._conv_forward(x.to(dtype), conv.weight.to(dtype), bias)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose gradient reaches its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: _ConvNd) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.conv, ctx.input = conv, (x.shape, x.dtype)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return convolve(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), conv, (shape, dtype) = ctx.saved_tensors, ctx.conv, ctx.input
        # The gradient asks for the shape of the input, not for what was in it.
        grad_x: Tensor = torch.ops.aten.convolution_backward(
            grad, grad.new_empty(1).expand(shape),
            # Under autocast the fp32 weight was cast on the way in; keeping that copy would cost memory.
            weight.to(grad.dtype),
            None, conv.stride, conv.padding, conv.dilation, False, [0], conv.groups, [True, False, False],
        )[0]  # fmt: skip
        return grad_x.to(dtype), None, None, None


class _FrozenNormalisation(torch.autograd.Function):
    """A batch norm in eval, a constant factor for each channel, whose gradient reaches its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _BatchNorm) -> Tensor:
        ctx.norm = norm
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        factor = (ctx.norm.running_var + ctx.norm.eps).rsqrt()
        return grad * _per_channel(
            factor if ctx.norm.weight is None else factor * ctx.norm.weight, grad
        ), None


def _scale_relu(z: Tensor, scale: Tensor, x: Tensor | None = None, conv: FrozenConv | None = None) -> Tensor:
    return cast(Tensor, _ScaleReLU.apply(z, scale, x, conv))  # type: ignore[no-untyped-call]


def _frozen_conv(x: Tensor, weight: Tensor, bias: Tensor | None, conv: _ConvNd) -> Tensor:
    return cast(Tensor, _FrozenConvolution.apply(x, weight, bias, conv))  # type: ignore[no-untyped-call]


def _frozen_norm(x: Tensor, norm: _BatchNorm) -> Tensor:
    return cast(Tensor, _FrozenNormalisation.apply(x, norm))  # type: ignore[no-untyped-call]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
