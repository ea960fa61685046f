"""Channels that the head alone reads: it standardises them, so that their scales tell nothing, and its weights do.

Where all between such a scale and the head is homogeneous (ReLU, pooling), the scale cancels, and its gradient is
rounding and nothing else. Adam would make whole steps of that: which channels stay would be drawn by lot, and
otherwise on every machine. So such gradients count as 0, and a channel weighs by what the head makes of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chanscale.channels import ChannelGroup, Slot
from chanscale.heads import PooledHead

ROUNDING = 1e-3
"""Gradients so much smaller than those of all scales are rounding: in fp32 they come to 1e-5 of them, others to 0.1."""
LEAST = 0.05
"""What a channel counts as at least, beside the mean of its layer: the head may yet make more of it."""


@dataclass(frozen=True)
class LastChannels:
    """The channels of a group that `head` alone reads: where, and behind which layers their scales stand."""

    head: PooledHead
    inputs: Slot
    sites: tuple[Slot, ...]

    @torch.no_grad()
    def uses(self) -> Tensor:
        """Return the size of the head's weights for each channel, (width,), beside their mean; 0.05 at least."""
        squares = self.head.linear.weight.square().sum(0)[list(self.inputs.positions)]
        channels = torch.tensor(self.inputs.channels, device=squares.device)
        sizes = squares.new_zeros(max(self.inputs.channels) + 1).index_add_(0, channels, squares).sqrt()
        return (sizes / sizes.mean().clamp_min(1e-12)).clamp_min(LEAST)


def find_last(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, LastChannels]:
    """Return the groups of `model` that a head, and nothing else, reads, by their names."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, PooledHead)}
    return {
        group.name: LastChannels(heads[group.inputs[0].layer], group.inputs[0], group.sites)
        for group in groups
        if len(group.inputs) == 1 and group.inputs[0].layer in heads
    }


@torch.no_grad()
def drop_rounding(last: Mapping[str, LastChannels], scales: Mapping[str, nn.Parameter]) -> None:
    """Set to 0, in place, the gradients of `scales`, by layer, in front of a head that are rounding."""
    gradients = {layer: scale.grad for layer, scale in scales.items() if scale.grad is not None}
    if not last or not gradients:
        return
    bound = ROUNDING * _root_mean_square(list(gradients.values()))
    for channels in last.values():
        own = [
            (gradients[site.layer], list(site.positions))
            for site in channels.sites
            if site.layer in gradients
        ]
        if own and _root_mean_square([gradient[positions] for gradient, positions in own]) <= bound:
            for gradient, positions in own:
                gradient[positions] = 0


def _root_mean_square(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values]).square().mean().sqrt()
