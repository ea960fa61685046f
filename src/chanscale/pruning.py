"""Physically remove channels: from the convolution, from the layers tied to it, from what consumes it."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.channels import (
    ChannelGroup,
    Kept,
    Model,
    carried_groups,
    carry_groups,
    free_groups,
    removed_positions,
    require_fit,
    shrink_groups,
)
from chanscale.errors import InexactRemovalError, one_line
from chanscale.heads import PooledHead
from chanscale.modes import device_of
from chanscale.scaling import add_scale, scale_of, thawed_class
from chanscale.selection import ChannelSelection
from chanscale.slicing import input_width, keep_inputs, keep_outputs, output_width

ROUNDING = 1e-8
"""Largest change of an output that is rounding, relative to the largest output, both computed in fp64.

Sums taken in another order differ by 1e-13; the head's division by small deviations enlarges that.
"""


def prune_channels(model: Model, selection: ChannelSelection) -> Model:
    """Return a copy of `model` that holds the selected channels alone, each weight a bit-exact slice.

    `model` carries its groups; those that the selection does not name stay whole. Raises ModelError when the
    selection does not fit, and EmptySelectionError when it removes nothing, or all of a group.
    """
    require_fit(free_groups(model), selection.kept)
    groups = carried_groups(model) or ()
    # Tensors are shared until each has been cut: a copy of the whole first would double the memory.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned = copy.deepcopy(model, dict(shared))
    remove_positions(pruned, groups, selection.kept)
    _own(pruned, shared)
    return carry_groups(pruned, shrink_groups(groups, selection.kept))


def remove_positions(model: nn.Module, groups: Iterable[ChannelGroup], kept: Kept) -> None:
    """Cut from each layer of `model`, in place, what holds a channel that is not `kept`; new tensors take its place."""
    for (axis, name), gone in removed_positions(groups, kept).items():
        layer = model.get_submodule(name)
        if axis == "inputs":
            keep_inputs(layer, _others(gone, input_width(layer)))
            continue
        stay = _others(gone, output_width(layer))
        keep_outputs(layer, stay)
        if scale := scale_of(layer):
            keep_outputs(scale, stay)


def mask_channels(model: Model, selection: ChannelSelection) -> Model:
    """Return a copy of `model` in which the channels not selected are exactly 0, and still there."""
    masked = _copy(model, {})
    silence_channels(masked, selection)
    return masked


def silence_channels(model: nn.Module, selection: ChannelSelection) -> None:
    """Set the channels of `model` that are not selected to exactly 0, in place; no tensor of it is written to."""
    groups = free_groups(model)
    require_fit(groups, selection.kept)
    silence_positions(model, groups, selection.kept)


def silence_positions(model: nn.Module, groups: Iterable[ChannelGroup], kept: Kept) -> None:
    """Set to 0, in place, where their scales sit, the channels that are not `kept`; no tensor is written to."""
    groups = tuple(groups)
    gone = removed_positions(groups, kept)
    for name in dict.fromkeys(site.layer for group in groups for site in group.sites):
        layer = model.get_submodule(name)
        scale = scale_of(layer) or add_scale(layer, device=device_of(model))
        silent = _silence(scale.weight.detach(), gone.get(("outputs", name), []))
        scale.weight = nn.Parameter(silent, requires_grad=scale.weight.requires_grad)
    for head, positions in (
        (model.get_submodule(name), p) for (axis, name), p in gone.items() if axis == "inputs"
    ):
        if isinstance(
            head, PooledHead
        ):  # a channel that is not there adds nothing, not even minus its old mean
            head.mean = _silence(head.mean, positions)


def _silence(values: Tensor, positions: list[int]) -> Tensor:
    return values.index_fill(0, torch.tensor(positions, dtype=torch.long, device=values.device), 0)


def _others(gone: Iterable[int], width: int) -> Tensor:
    """Return the positions, out of `width`, that are not `gone`."""
    stay = torch.ones(width, dtype=torch.bool)
    stay[list(gone)] = False
    return stay.nonzero().flatten()


def share(model: Model) -> Model:
    """Return a copy of `model` that uses the same tensors."""
    return _copy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _copy(model: Model, memo: dict[int, Any]) -> Model:
    twin, groups = copy.deepcopy(model, memo), carried_groups(model)
    # A torch.fx.GraphModule leaves behind what it does not know.
    return twin if groups is None else carry_groups(twin, groups)


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
    # In fp32, the head's division by small deviations would make rounding look like a change.
    try:
        old, new = (run_in_double(net, example) for net in (before, after))
    except Exception as error:  # whatever a forward raises
        raise InexactRemovalError(f"the network does not run any more: {one_line(error)[:200]}") from error
    return relative_change(old, new)


def relative_change(wanted: Tensor, got: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value; infinite if shapes differ."""
    if wanted.shape != got.shape or not got.isfinite().all():
        return float("inf")
    return float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30))


@torch.no_grad()
def run_in_double(net: nn.Module, example: Tensor) -> Tensor:
    """Return the output of `net`, in eval, for `example` (N, C, *), computed in fp64; raises what its forward raises.

    On the CPU, since not every device has fp64. `net` is not changed, nor is `example`.
    """
    inputs = example.detach().cpu().double()
    try:
        output: Tensor = _in_double(net).eval()(inputs.clone())
    except Exception:  # a tensor is used by another module than its own, or the network does not run at all
        output = copy.deepcopy(net).cpu().double().eval()(inputs.clone())
    return output


def _in_double(net: Model) -> Model:
    """Return a twin of `net` that computes in fp64 on the CPU.

    Each module casts its parameters when it is called, and drops them again: a whole copy would double the memory
    of a training run. Buffers, which are small, are the twin's own: a network may remember something in them.
    """
    twin = _copy(net, {id(parameter): parameter for parameter in net.parameters()})
    # By tensor: one that several modules hold stays one.
    doubled = {buffer: _double(buffer) for buffer in twin.buffers()}

    def cast(module: nn.Module, _: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_double(parameter.detach()), requires_grad=False)

    for module in twin.modules():
        if isinstance(module, _ConvNd) and thawed_class(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            _take_images_apart(module)
        module._buffers.update({name: doubled[it] for name, it in module._buffers.items() if it is not None})
        whole = dict(module._parameters)

        def drop(module: nn.Module, *_: Any, whole: dict[str, Any] = whole) -> None:
            module._parameters.update(whole)

        module.register_forward_pre_hook(cast)
        module.register_forward_hook(drop)
    return twin


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def _take_images_apart(convolution: _ConvNd) -> None:
    """Let `convolution` compute one image of a batch after the other, in place.

    In fp64 PyTorch unfolds all that it is given, which for 3 x 3 filters takes nine times the memory of the images.
    """
    whole = convolution.forward

    def forward(input: Tensor) -> Tensor:
        batched = input.dim() == convolution.weight.dim()
        return torch.cat([whole(image) for image in torch.split(input, 1)]) if batched else whole(input)

    convolution.forward = forward


def _own(model: nn.Module, shared: Mapping[int, Tensor]) -> None:
    """Give `model`, in place, copies of those `shared` tensors that it still holds."""
    memo: dict[int, Any] = {}  # one that several modules hold stays one
    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if id(tensor) in shared:
                    tensors[name] = copy.deepcopy(tensor, memo)
