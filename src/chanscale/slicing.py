"""Keep only some positions along the outputs, or the inputs, of a layer: in place, each weight a bit-exact slice."""

from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from chanscale.errors import ModelError
from chanscale.heads import PooledHead
from chanscale.scaling import ChannelScale

OUTPUT_WIDTHS = ("out_channels", "num_features", "out_features", "num_parameters")
INPUT_WIDTHS = ("in_channels", "in_features")
"""What layers call the number of their outputs, and of their inputs."""


def output_width(layer: nn.Module) -> int:
    """Return the number of positions along the outputs of `layer`."""
    return _width(layer, OUTPUT_WIDTHS)


def input_width(layer: nn.Module) -> int:
    """Return the number of positions along the inputs of `layer`; of a grouped convolution, along those of a group."""
    width = _width(layer.linear if isinstance(layer, PooledHead) else layer, INPUT_WIDTHS)
    return width // layer.groups if isinstance(layer, _ConvNd) else width


def _width(layer: nn.Module, names: tuple[str, ...]) -> int:
    for name in names:
        if hasattr(layer, name):
            return int(getattr(layer, name))
    raise ModelError(f"a {type(layer).__name__} has no channels to count")


def is_depthwise(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution with one filter for each channel."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels > 1


def leave_as_groups(layer: nn.Module) -> bool:
    """Whether the groups of a grouped convolution leave as a whole; if not, the same channels of each group leave.

    Whichever leaves more to choose from.
    """
    if not isinstance(layer, _ConvNd):
        return False
    return layer.groups > min(layer.in_channels, layer.out_channels) // layer.groups


@singledispatch
def keep_outputs(layer: nn.Module, kept: Tensor) -> None:
    """Keep only the outputs `kept` of `layer`: ascending positions, shape (kept,). Raises ModelError."""
    raise ModelError(f"cannot remove output channels of a {type(layer).__name__}")


@singledispatch
def keep_inputs(layer: nn.Module, kept: Tensor) -> None:
    """Keep only the inputs `kept` of `layer`: ascending positions, shape (kept,). Raises ModelError.

    Those of a grouped convolution count within a group, and are the same in each.
    """
    raise ModelError(f"cannot remove input channels of a {type(layer).__name__}")


@keep_outputs.register
def _(layer: _ConvNd, kept: Tensor) -> None:
    transposed = isinstance(layer, _ConvTransposeNd) and layer.groups == 1
    if layer.groups > 1:
        _keep_groups(layer, kept)
    layer.out_channels = len(kept)
    _slice(layer, "weight", kept, dim=1 if transposed else 0)
    _slice(layer, "bias", kept)


def _keep_groups(layer: _ConvNd, kept: Tensor) -> None:
    """Drop, in place, the groups of a convolution that have none of the outputs `kept`, with their inputs."""
    groups, sizes = torch.unique(kept // (layer.out_channels // layer.groups), return_counts=True)
    if len(set(sizes.tolist())) > 1:
        raise ModelError(f"the groups of a convolution would have different widths: {sizes.tolist()[:8]}")
    layer.in_channels = layer.in_channels // layer.groups * len(groups)
    layer.groups = len(groups)


@keep_outputs.register(_BatchNorm)
@keep_outputs.register(_InstanceNorm)
def _(layer: nn.Module, kept: Tensor) -> None:
    layer.num_features = len(kept)  # type: ignore[assignment]
    for name in ("weight", "bias", "running_mean", "running_var"):
        _slice(layer, name, kept)


@keep_outputs.register
def _(layer: nn.Linear, kept: Tensor) -> None:
    layer.out_features = len(kept)
    _slice(layer, "weight", kept)
    _slice(layer, "bias", kept)


@keep_outputs.register
def _(layer: nn.PReLU, kept: Tensor) -> None:
    if layer.num_parameters > 1:
        layer.num_parameters = len(kept)
        _slice(layer, "weight", kept)


@keep_inputs.register
def _(layer: _ConvNd, kept: Tensor) -> None:
    layer.in_channels = len(kept) * layer.groups
    _slice(layer, "weight", kept, dim=0 if isinstance(layer, _ConvTransposeNd) else 1)


@keep_inputs.register
def _(layer: nn.Linear, kept: Tensor) -> None:
    layer.in_features = len(kept)
    _slice(layer, "weight", kept, dim=1)


@keep_outputs.register
def _(layer: ChannelScale, kept: Tensor) -> None:
    _slice(layer, "weight", kept)


@keep_inputs.register
def _(layer: PooledHead, kept: Tensor) -> None:
    keep_inputs(layer.linear, kept)
    for name in ("mean", "variance"):
        _slice(layer, name, kept)


def _slice(layer: nn.Module, name: str, kept: Tensor, *, dim: int = 0) -> None:
    old = getattr(layer, name)
    if old is None:
        return
    new = _slice_like(old.detach(), kept, dim=dim)
    setattr(
        layer,
        name,
        nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new,
    )


def _slice_like(values: Tensor, kept: Tensor, *, dim: int = 0) -> Tensor:
    """Return `values[kept]` along `dim`, in the memory layout of `values`."""
    sliced = values.index_select(dim, kept.to(values.device))
    channels_last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    # Copied into a tensor made for it: `contiguous` leaves strides of dimensions of size 1 as they happen to be,
    # kernels choose by them, and a model read from a file would round in another way.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(sliced, memory_format=layout).copy_(sliced)
