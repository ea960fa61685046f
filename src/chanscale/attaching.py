"""Attach channel scales to a frozen network, and merge them back into plain layers."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.channels import ChannelGroup, Model, carry_groups
from chanscale.errors import ModelError
from chanscale.modes import device_of
from chanscale.scaling import (
    AbsorbedReLU,
    ChannelScale,
    acts_alone,
    add_scale,
    drop_scale,
    ensure_affine,
    freeze,
    scale_of,
    thaw,
)

FOLDABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
"""Exactly these multiply by their weight, and add their bias."""


def attach_scales(model: Model, groups: Sequence[ChannelGroup]) -> Model:
    """Return a copy of `model` with frozen convolutions and norms, and scales of 1 where its `groups` want them.

    The copy carries the groups, and its outputs are the original's, bit for bit. Frozen weights are not copied
    but shared with `model`; all other layers (a head) are copied as they are. Raises ModelError when every
    group is protected, or the model has scales already.
    """
    if any(isinstance(module, ChannelScale) for module in model.modules()):
        raise ModelError("the network has channel scales already; merge_scales takes them out")
    free = [group for group in groups if group.protected is None]
    if not free:
        reasons = dict.fromkeys(group.protected for group in groups)
        raise ModelError(f"no channel of the network can be removed: {'; '.join(map(str, reasons))}"[:300])
    scaled = copy.deepcopy(model, _share_frozen(model))
    for module in scaled.modules():
        freeze(module)
    _insert_scales(scaled, free)
    return carry_groups(scaled, groups)


def merge_scales(model: Model) -> Model:
    """Return a copy of `model` whose scales are folded into its convolutions or norms; they are plain again.

    scale * (w * x + b) = (scale w) * x + scale b; exact but for rounding. A layer of a class of its own, or with a hook
    of its user's, which may compute something else, keeps its scale behind it. Raises ModelError without scales.
    """
    merged = copy.deepcopy(model)
    layers = [layer for layer in merged.modules() if scale_of(layer)]
    if not layers:
        raise ModelError("the network has no channel scales to merge")
    for module in merged.modules():
        thaw(module)
    for layer in layers:
        if type(layer) in FOLDABLE and acts_alone(layer):
            _fold(layer)
    merged.__dict__.pop("_channel_groups", None)  # plain again
    return merged


def scale_weight(weight: Tensor, scale: Tensor, *, dim: int = 0) -> Tensor:
    """Return `weight` with each of its slices along `dim` multiplied by one value of `scale` (C,)."""
    return weight * scale.to(weight.dtype).view([-1 if axis == dim else 1 for axis in range(weight.dim())])


def _share_frozen(model: nn.Module) -> dict[int, Tensor]:
    """Return the memo with which a copy of `model` holds the weights of its convolutions and norms, frozen."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (_ConvNd, _NormBase)):
            for parameter in module.parameters(recurse=False):
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            memo |= {id(buffer): buffer for buffer in module.buffers(recurse=False)}
    return memo


def _insert_scales(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    relus = {site.layer: site.relu for group in groups for site in group.sites}
    for layer, relu in relus.items():
        add_scale(model.get_submodule(layer), relu=relu is not None, device=device_of(model))
        if relu is not None:
            model.get_submodule(relu).__class__ = AbsorbedReLU


@torch.no_grad()
def _fold(layer: nn.Module) -> None:
    scale = scale_of(layer)
    assert scale is not None
    ensure_affine(layer, scale.weight)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        dim = int(isinstance(layer, _ConvTransposeNd) and layer.groups == 1 and parameter.dim() > 1)
        folded = scale_weight(parameter, scale.weight, dim=dim)
        setattr(layer, name, nn.Parameter(folded, requires_grad=False))
    drop_scale(layer)
