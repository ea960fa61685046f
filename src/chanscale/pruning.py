"""Physically remove channels: from the convolution, from the layers tied to it, from what consumes it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chanscale.attaching import Model
from chanscale.channels import ChannelGroup, channel_groups
from chanscale.errors import EmptySelectionError, InexactRemovalError, ModelError
from chanscale.heads import PooledHead
from chanscale.scaling import ChannelScale, ensure_affine
from chanscale.selection import ChannelSelection
from chanscale.slicing import keep_inputs, keep_outputs, slice_like

ROUNDING = 1e-8
"""Largest change of an output that is rounding, relative to the largest output, both computed in fp64.

Sums taken in another order differ by 1e-13; the head's division by small deviations enlarges that.
"""


def prune_channels(model: Model, selection: ChannelSelection) -> Model:
    """Return a copy of `model` that holds the selected channels alone, each weight a bit-exact slice.

    Groups that the selection does not name stay whole. Raises ModelError when the selection does not fit
    the model, and EmptySelectionError when it removes nothing, or all of a group.
    """
    groups = _selected_groups(model, selection)
    # Tensors are shared until each has been cut: a copy of the whole first would double the memory.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned = copy.deepcopy(model, dict(shared))
    for group in groups:
        kept = selection.kept[group.name]
        for name in (group.name, *group.norms, *([group.scale] if group.scale else [])):
            keep_outputs(pruned.get_submodule(name), kept)
        for name in group.consumers:
            consumer = pruned.get_submodule(name)
            keep_inputs(consumer, _positions(consumer, kept, group.width))
    _own(pruned, shared)
    return pruned


def mask_channels(model: Model, selection: ChannelSelection) -> Model:
    """Return a copy of `model` in which the channels not selected are exactly 0, and still there."""
    masked = copy.deepcopy(model)
    silence_channels(masked, selection)
    return masked


def silence_channels(model: nn.Module, selection: ChannelSelection) -> None:
    """Set the channels of `model` that are not selected to exactly 0, in place; no tensor of it is written to."""
    for group in _selected_groups(model, selection):
        keep = torch.zeros(group.width, dtype=torch.bool)
        keep[selection.kept[group.name]] = True
        # Without a scale, the layer it would stand behind is silenced: 0 * x + 0.
        layer = model.get_submodule(group.scale or group.anchor)
        if isinstance(layer, nn.BatchNorm2d):
            ensure_affine(layer, model.get_submodule(group.name).weight.device)  # type: ignore[arg-type]
        for name, parameter in list(layer.named_parameters(recurse=False)):
            values = _silence(parameter.detach(), keep)
            setattr(layer, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        for head in map(model.get_submodule, group.consumers):
            if isinstance(
                head, PooledHead
            ):  # a channel that is not there adds nothing, not even minus its old mean
                head.mean = _silence(head.mean, keep)


def _silence(values: Tensor, keep: Tensor) -> Tensor:
    return values.masked_fill(~keep.to(values.device).view(-1, *[1] * (values.dim() - 1)), 0)


def share(model: Model) -> Model:
    """Return a copy of `model` that uses the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def check_removal(pruned: nn.Module, masked: nn.Module, example: Tensor) -> float:
    """Return the largest relative difference between the two networks' outputs on `example` (N, C, H, W).

    Raises InexactRemovalError when it is more than rounding.
    """
    difference = output_change(masked, pruned, example)
    if not difference <= ROUNDING:
        raise InexactRemovalError(
            f"removing channels changed the output by {difference:.1e} of its size (rounding: {ROUNDING:.0e}); "
            "the network treats channels in a way that is not traced. Please report it"
        )
    return difference


@torch.no_grad()
def output_change(before: nn.Module, after: nn.Module, example: Tensor) -> float:
    """Return the largest change of an output on `example`, relative to the largest output before; in fp64."""
    # In fp32, the head's division by small deviations would make rounding look like a change. On the CPU,
    # since not every device has fp64.
    old, new = (_in_double(net).eval()(example.cpu().double()) for net in (before, after))
    return float((old - new).abs().max() / old.abs().max().clamp_min(1e-30))


def _in_double(net: Model) -> Model:
    """Return a twin of `net` that computes in fp64 on the CPU.

    Each module casts its tensors when it is called, and drops them again: a whole copy would double the memory
    of a training run.
    """
    twin = share(net)

    def cast(module: nn.Module, _: Any) -> None:
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    doubled = tensor.detach().cpu().double()
                    trained = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(doubled, requires_grad=False) if trained else doubled

    for module in twin.modules():
        whole = dict(module._parameters), dict(module._buffers)

        def drop(module: nn.Module, *_: Any, whole: tuple[dict[str, Any], dict[str, Any]] = whole) -> None:
            module._parameters.update(whole[0])
            module._buffers.update(whole[1])

        module.register_forward_pre_hook(cast)
        module.register_forward_hook(drop)
    return twin


def _own(model: nn.Module, shared: Mapping[int, Tensor]) -> None:
    """Give `model`, in place, copies of those `shared` tensors that it still holds."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in shared:
                module._parameters[name] = copy.deepcopy(parameter)
        for name, buffer in module._buffers.items():
            if id(buffer) in shared:
                module._buffers[name] = copy.deepcopy(buffer)


def _selected_groups(model: nn.Module, selection: ChannelSelection) -> list[ChannelGroup]:
    groups = {group.name: group for group in channel_groups(model)}
    for name, kept in selection.kept.items():
        if name not in groups:
            raise ModelError(
                f"the selection names {name!r}, which is no channel group; have {', '.join(groups)}"
            )
        _require_indices(kept, groups[name])
    if all(len(kept) == groups[name].width for name, kept in selection.kept.items()):
        raise EmptySelectionError("the selection keeps every channel: there is nothing to remove")
    return [groups[name] for name in selection.kept]


def _require_indices(kept: Tensor, group: ChannelGroup) -> None:
    if len(kept) == 0:
        raise EmptySelectionError(f"the selection keeps none of the {group.width} channels of {group.name!r}")
    ascending = bool((kept[1:] > kept[:-1]).all())
    if not ascending or kept[0] < 0 or kept[-1] >= group.width:
        raise ModelError(
            f"the indices for {group.name!r} must ascend within 0..{group.width - 1}; got {kept.tolist()[:8]}"
        )


@keep_outputs.register
def _(layer: ChannelScale, kept: Tensor) -> None:
    layer.weight = nn.Parameter(
        slice_like(layer.weight.detach(), kept), requires_grad=layer.weight.requires_grad
    )


@keep_inputs.register
def _(layer: PooledHead, kept: Tensor) -> None:
    keep_inputs(layer.linear, kept)
    layer.mean, layer.variance = slice_like(layer.mean, kept), slice_like(layer.variance, kept)


def _positions(layer: nn.Module, kept: Tensor, width: int) -> Tensor:
    """Return which inputs of `layer` hold the channels `kept` out of `width`: several each behind a flatten."""
    if not isinstance(layer, nn.Linear):
        return kept
    each = layer.in_features // width
    return (kept[:, None] * each + torch.arange(each)).flatten()
