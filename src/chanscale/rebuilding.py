"""Give a network the tensors of a pruned one: the layers become as wide as what they are given."""

from collections.abc import Mapping
from functools import singledispatch

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.errors import ModelError
from chanscale.scaling import SCALE, add_scale, ensure_affine, freeze, scale_of
from chanscale.slicing import is_depthwise, leave_as_groups


def install_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make `model`, a whole network, in place, the scaled and pruned one whose state dict `tensors` is.

    Raises ModelError when a tensor is missing, or is none that a removal could have left.
    """
    for module in model.modules():
        freeze(module)
    for name in tensors:
        layer, _, leaf = name.rpartition(f".{SCALE}.")
        if (
            layer and leaf == "weight" and not scale_of(model.get_submodule(layer))
        ):  # a layer may have two names
            add_scale(model.get_submodule(layer))
    _widen_norms(model, tensors)
    wanted = model.state_dict()
    strange = sorted(set(wanted) ^ set(tensors))
    if strange:
        raise ModelError(
            f"{strange[0]!r} is {'missing' if strange[0] in wanted else 'not part of the network'}"
        )
    for name, tensor in tensors.items():
        _require_part(name, tensor, wanted[name])
        _install(model, name, tensor)
    for module in model.modules():
        adopt_widths(module)


def _widen_norms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a norm without weights those that a removal or a merge gave it."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and f"{name}.weight" in tensors:
            ensure_affine(module, tensors[f"{name}.weight"])


def _require_part(name: str, got: Tensor, whole: Tensor) -> None:
    fits = got.dim() == whole.dim() and got.shape[2:] == whole.shape[2:] and got.dtype == whole.dtype
    if not fits or any(g > w or g == 0 < w for g, w in zip(got.shape, whole.shape, strict=True)):
        raise ModelError(
            f"{name!r} is {got.dtype} {tuple(got.shape)}, which is no part of {whole.dtype} {tuple(whole.shape)}"
        )


def _install(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


@singledispatch
def adopt_widths(layer: nn.Module) -> None:
    """Set, in place, the widths that `layer` states to those of its weight."""


@adopt_widths.register
def _(layer: _ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
        if is_depthwise(layer):  # of the others, none leaves
            layer.groups = layer.in_channels = layer.out_channels = first
    elif leave_as_groups(layer):
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        layer.groups = first // outputs
        layer.in_channels, layer.out_channels = inputs * layer.groups, first
    elif isinstance(layer, _ConvTransposeNd):
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups


@adopt_widths.register
def _(layer: _NormBase) -> None:
    scale = scale_of(layer)
    known = (layer.running_mean, layer.weight, None if scale is None else scale.weight)
    layer.num_features = next((len(tensor) for tensor in known if tensor is not None), layer.num_features)


@adopt_widths.register
def _(layer: nn.Linear) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


@adopt_widths.register
def _(layer: nn.PReLU) -> None:
    layer.num_parameters = len(layer.weight)
