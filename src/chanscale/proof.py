"""Which groups lose channels without a trace: tried on the network itself, before anything is trained.

What a network computes from a zero cannot be read off its layers: a sigmoid makes 0.5 of it, a view mixes channels,
a hard-coded width breaks. So half of the channels of each group are set to 0 where their scales would sit, and
removed; a group whose pruned network does not say what the masked one says is protected, with the reason.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from chanscale.attaching import attach_scales
from chanscale.channels import ChannelGroup, Kept, carried_groups
from chanscale.coupling import couple_channels
from chanscale.errors import ModelError, UnsupportedTopologyError, one_line
from chanscale.heads import PooledHead
from chanscale.pruning import (
    ROUNDING,
    relative_change,
    remove_positions,
    run_in_double,
    share,
    silence_positions,
)
from chanscale.scaling import ChannelScale


def channel_groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """Return the groups of `model`, traced with `example` (N, C, *), those that are not exact protected.

    A network that carries its groups is not traced again. The model is not changed. Raises
    UnsupportedTopologyError when it cannot be traced, ModelError when it has scales and does not know its groups.
    """
    carried = carried_groups(model)
    if carried is not None:
        return carried
    if any(isinstance(module, ChannelScale) for module in model.modules()):
        raise ModelError(
            "the network has scales, which hide its channels; pass it through merge_scales first"
        )
    groups = couple_channels(model, example)
    reference = _make_reference(model, example)
    open_groups = [group for group in groups if group.protected is None and group.width > 1]
    reasons = _find_inexact(reference, open_groups, example)
    reasons |= {group.name: "it has one channel" for group in groups if group.width == 1}
    proven = tuple(group.protect(reasons[group.name]) if group.name in reasons else group for group in groups)
    return proven if _takes_over_rightly(reference, proven, example) else _without_relus(proven)


def _make_reference(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a twin of `model` that hides nothing.

    Raises UnsupportedTopologyError when nothing can be proven on it.
    """
    reference, name = stir(share(model)), type(model).__name__
    try:
        said: Any = run_in_double(_Twice(reference), example)
    except Exception as error:  # whatever the user's forward raises
        reason = one_line(error)[:150]
        raise UnsupportedTopologyError(
            f"{name} does not run in fp64, where it is to be tried: {reason}"
        ) from error
    first, second = said
    if not isinstance(first, Tensor):
        kind = type(first).__name__
        raise UnsupportedTopologyError(
            f"{name} returns a {kind}; wrap it in a module that returns one tensor"
        )
    if first.isnan().any():
        raise UnsupportedTopologyError(f"{name} returns nan: nothing can be proven")
    if not torch.equal(first, second):
        raise UnsupportedTopologyError(
            f"{name} says something else each time, in eval too: nothing can be proven"
        )
    return reference


class _Twice(nn.Module):
    """Returns what a network says, and what it says when it is called once more."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        return self.net(x.clone()), self.net(x)  # it may work in place


def _takes_over_rightly(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> bool:
    """Whether scales that apply the ReLU behind them leave the output as it is: its input may be used elsewhere."""
    if not any(site.relu for group in groups if group.protected is None for site in group.sites):
        return True
    scaled, plain = (run_in_double(net, example) for net in (attach_scales(model, groups), model))
    return torch.equal(scaled, plain)


def _without_relus(groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    return tuple(
        replace(group, sites=tuple(replace(site, relu=None) for site in group.sites)) for group in groups
    )


def stir(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Make all that is constant in `model` vary from channel to channel, in tensors of its own; return it.

    A head of zeros, or a norm that has seen nothing, hides what a removal does. No tensor is written to.
    """
    generator = torch.Generator().manual_seed(seed)
    # By tensor: one that several modules hold stays one.
    varied: dict[Tensor, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (nn.LocalResponseNorm, nn.CrossMapLRN2d)):
            module.alpha = 1.0  # at the usual 1e-4, what it makes of its neighbours may pass for rounding
        stirred = isinstance(module, (_NormBase, PooledHead))
        own: tuple[dict[str, Any], ...] = (module._parameters, *([module._buffers] if stirred else []))
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and _is_constant(tensor):
                    if tensor not in varied:
                        varied[tensor] = _vary(tensor, generator)
                    tensors[name] = varied[tensor]
    return model


def _is_constant(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def _vary(tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Added, and positive: a variance stays one.
    added = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    varied = tensor.detach() + added.to(tensor.device)
    return nn.Parameter(varied, requires_grad=False) if isinstance(tensor, nn.Parameter) else varied


def _find_inexact(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> dict[str, str]:
    """Return the reason for each group that is not exact; by halves, since most networks have none or few."""
    reason = _try(model, groups, example)
    if reason is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    middle = len(groups) // 2
    found = _find_inexact(model, groups[:middle], example) | _find_inexact(model, groups[middle:], example)
    # Two groups may each be exact alone and not together.
    left = [group for group in groups if group.name not in found]
    if len(left) == len(groups) or (found and _try(model, left, example) is not None):
        return found | {group.name: f"not exact together with others: {reason}" for group in left}
    return found


def _try(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> str | None:
    """Return what goes wrong when some channels of all `groups` are removed, if something does."""
    removals = (halve(groups), behead(groups)) if groups else ()
    return next((why for kept in removals if (why := compare(model, groups, kept, example))), None)


def behead(groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Return the channels of each group but the first ones, a third: a lopsided removal.

    Half of them at random can be as many on both sides of a split. An odd number goes, where there are two or more:
    what takes every other channel then takes others.
    """
    return {
        group.name: torch.arange(group.width // 3 | 1 if group.width > 1 else 0, group.width)
        for group in groups
    }


def halve(groups: Iterable[ChannelGroup], *, seed: int = 0) -> dict[str, Tensor]:
    """Return half of the channels of each group, drawn at random, ascending: those that stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.width, generator=generator)[group.width // 2 :].sort().values
        for group in groups
    }


def compare(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, example: Tensor) -> str | None:
    """Return how the network of the `kept` channels differs from the one whose others are 0, or None."""
    try:
        pruned = run_in_double(remove_coupled(model, groups, kept), example)
    except Exception as error:  # whatever a forward that counts on the old widths raises
        return f"the network does not run without them ({one_line(error)[:120]})"
    difference = relative_change(run_masked(model, groups, kept, example), pruned)
    return None if difference <= ROUNDING else f"removal changes the output by {difference:.1e} of its size"


def run_masked(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, example: Tensor) -> Tensor:
    """Return the output for `example` of `model` with all but the `kept` channels at 0 where their scales would sit.

    In fp64, so that rounding cannot be taken for a difference, nor a small one for rounding.
    """
    masked = share(model)
    silence_positions(masked, groups, kept)
    return run_in_double(masked, example)


def remove_coupled(model: nn.Module, groups: Iterable[ChannelGroup], kept: Kept) -> nn.Module:
    """Return a copy of `model` with the `kept` channels alone, each weight a bit-exact slice."""
    pruned = share(model)
    remove_positions(pruned, groups, kept)
    return pruned
