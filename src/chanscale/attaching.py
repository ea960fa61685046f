"""Attach channel scales to a frozen network, and merge them back into plain convolutions."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from chanscale.channels import ChannelGroup, channel_groups
from chanscale.errors import ModelError
from chanscale.scaling import AbsorbedReLU, ChannelScale, FrozenBatchNorm2d, FrozenConv2d


Model = TypeVar("Model", bound=nn.Module)


def attach_scales(model: Model) -> Model:
    """Return a copy of `model` with frozen convolutions and norms, and a scale of 1 on each channel.

    The copy's outputs are the original's, bit for bit. All other layers (a head) stay as they were. Raises
    UnsupportedTopologyError, or ModelError when the model has scales already.
    """
    groups = channel_groups(model)
    if any(group.scale for group in groups):
        raise ModelError("the network has channel scales already; merge_scales takes them out")
    scaled = copy.deepcopy(model)
    for name, module in list(scaled.named_modules()):
        if isinstance(module, nn.Conv2d):
            replace_module(scaled, name, FrozenConv2d.of(module))
        elif isinstance(module, nn.BatchNorm2d):
            replace_module(scaled, name, FrozenBatchNorm2d.of(module))
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
        if isinstance(module, FrozenConv2d | FrozenBatchNorm2d):
            replace_module(merged, name, module.thaw())
        elif isinstance(module, AbsorbedReLU):
            replace_module(merged, name, nn.ReLU(inplace=True))
    return merged


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return `weight` (C, ...) with each of its C output channels multiplied by `scale` (C,)."""
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the qualified `name` in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _insert_scale(model: nn.Module, group: ChannelGroup) -> None:
    anchor = model.get_submodule(group.anchor)
    device = next(anchor.parameters()).device
    anchor.scale = ChannelScale(group.width, relu=group.relu is not None).to(device)
    if group.relu is not None:
        replace_module(model, group.relu, AbsorbedReLU())


@torch.no_grad()
def _fold(anchor: nn.Module) -> None:
    assert isinstance(anchor, FrozenConv2d | FrozenBatchNorm2d)
    assert anchor.scale is not None
    scale = anchor.scale.weight
    if anchor.weight is None:  # a norm without an affine map gets one
        anchor.weight, anchor.bias = nn.Parameter(torch.ones_like(scale)), nn.Parameter(torch.zeros_like(scale))
        anchor.affine = True
    for name, parameter in list(anchor.named_parameters(recurse=False)):
        setattr(anchor, name, nn.Parameter(scale_weight(parameter, scale), requires_grad=False))
