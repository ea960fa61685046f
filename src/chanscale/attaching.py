"""Attach channel scales to a frozen network, and merge them back into plain convolutions."""

import copy
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from chanscale.channels import ChannelGroup, channel_groups
from chanscale.errors import ModelError
from chanscale.pooling import FrugalMaxPool2d
from chanscale.scaling import AbsorbedReLU, ChannelScale, FrozenBatchNorm2d, FrozenConv2d, ensure_affine

Model = TypeVar("Model", bound=nn.Module)


def attach_scales(model: Model) -> Model:
    """Return a copy of `model` with frozen convolutions and norms, and a scale of 1 on each channel.

    The copy's outputs are the original's, bit for bit. Frozen weights are not copied but shared with `model`;
    all other layers (a head) are copied as they are. Raises UnsupportedTopologyError, or ModelError when the
    model has scales already.
    """
    groups = channel_groups(model)
    if any(group.scale for group in groups):
        raise ModelError("the network has channel scales already; merge_scales takes them out")
    scaled = copy.deepcopy(model, {id(tensor): tensor for tensor in _frozen_tensors(model)})
    for name, module in list(scaled.named_modules()):
        if isinstance(module, nn.Conv2d):
            replace_module(scaled, name, FrozenConv2d.of(module))
        elif isinstance(module, nn.BatchNorm2d):
            replace_module(scaled, name, FrozenBatchNorm2d.of(module))
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            replace_module(scaled, name, FrugalMaxPool2d.of(module))
    for group in groups:
        _insert_scale(scaled, group)
    return scaled


def merge_scales(model: Model) -> Model:
    """Return a copy of `model` whose scales are folded into its convolutions or norms; they are plain again.

    scale * (w * x + b) = (scale w) * x + scale b; exact but for rounding. Raises ModelError without scales.
    """
    groups = [group for group in channel_groups(model) if group.scale]
    if not groups:
        raise ModelError("the network has no channel scales to merge")
    merged = copy.deepcopy(model)
    for group in groups:
        _fold(merged.get_submodule(group.anchor))
    for name, module in list(merged.named_modules()):
        if isinstance(module, FrozenConv2d | FrozenBatchNorm2d | FrugalMaxPool2d):
            replace_module(merged, name, module.thaw())
        elif isinstance(module, AbsorbedReLU):
            replace_module(merged, name, nn.ReLU(inplace=True))
    return merged


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return `weight` (C, ...) with each of its C output channels multiplied by `scale` (C,)."""
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module called `name`, under every name that it has in `model`."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, candidate in parent._modules.items() if candidate is old]:
            setattr(parent, child, module)


def _frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)


def _insert_scale(model: nn.Module, group: ChannelGroup) -> None:
    anchor = model.get_submodule(group.anchor)
    conv = cast(nn.Conv2d, model.get_submodule(group.name))
    anchor.scale = ChannelScale(group.width, relu=group.relu is not None, device=conv.weight.device)
    if group.relu is not None:
        replace_module(model, group.relu, AbsorbedReLU())


@torch.no_grad()
def _fold(anchor: nn.Module) -> None:
    assert isinstance(anchor, FrozenConv2d | FrozenBatchNorm2d)
    assert anchor.scale is not None
    scale = anchor.scale.weight
    if isinstance(anchor, nn.BatchNorm2d):
        ensure_affine(anchor, scale.device)
    for name, parameter in list(anchor.named_parameters(recurse=False)):
        setattr(anchor, name, nn.Parameter(scale_weight(parameter, scale), requires_grad=False))
