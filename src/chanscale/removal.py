"""One removal in the course of training: the network, the optimizer's moments and the index book, together."""

import copy
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor, nn

from chanscale.channels import Model
from chanscale.pruning import check_removal, output_change, prune_channels, share, silence_channels
from chanscale.selection import ChannelSelection


@dataclass(frozen=True)
class Removal(Generic[Model]):
    """A network without the channels that were not selected, and how far that changed it.

    `change`: largest change of an output on the example, relative to the largest output; rounding (below
    1e-8) where every channel removed had a scale of exactly 0.
    """

    model: Model
    kept: dict[str, Tensor]
    moments: list[dict[str, Tensor]]
    change: float

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer`, made anew for the pruned model, the state that the old one had."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, state in zip(parameters, self.moments, strict=True):
            if state:
                optimizer.state[parameter] = state


def remove_channels(
    model: Model,
    optimizer: torch.optim.Optimizer,
    kept: dict[str, Tensor],
    selection: ChannelSelection,
    *,
    example: Tensor,
) -> Removal[Model]:
    """Prune `model` and all that is shaped like it; compare it with the masked network on `example`.

    `kept`: each group's indices into the original network, shape (width,). Groups that the selection does not
    name stay whole. Raises InexactRemovalError when pruned and masked differ.
    """
    pruned = prune_channels(model, selection)
    masked = share(model)
    silence_channels(masked, selection)
    check_removal(pruned, masked, example)
    return Removal(
        model=pruned,
        kept=kept | {name: kept[name][chosen] for name, chosen in selection.kept.items()},
        moments=_prune_moments(model, optimizer, selection),
        change=output_change(model, masked, example),
    )


def _prune_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, selection: ChannelSelection
) -> list[dict[str, Tensor]]:
    """Return the state of each parameter that `optimizer` steps, in its order, without the channels removed."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pruned = {key: _prune_moment(model, optimizer, key, selection) for key in ("exp_avg", "exp_avg_sq")}
    # A scale in a branch that is never taken in training has no gradient, and so no state.
    return [
        {
            "step": optimizer.state[p]["step"].clone(),
            **{key: moment[names[p]] for key, moment in pruned.items()},
        }
        if p in optimizer.state
        else {}
        for p in stepped
    ]


def _prune_moment(
    model: nn.Module, optimizer: torch.optim.Optimizer, key: str, selection: ChannelSelection
) -> dict[str, Tensor]:
    """Prune one of Adam's moments as if it were the parameters, which it is shaped like."""
    frozen = [p for p in model.parameters() if p not in optimizer.state]
    # Frozen weights have no moments: where they would be, there are shapes alone.
    shapes = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in frozen}
    shadow = copy.deepcopy(model, dict(shapes))
    for parameter, twin in zip(model.parameters(), shadow.parameters(), strict=True):
        if parameter in optimizer.state:
            twin.data.copy_(optimizer.state[parameter][key])
    return {name: p.detach() for name, p in prune_channels(shadow, selection).named_parameters()}
