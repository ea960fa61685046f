"""How hard the scales are pressed: the L1 step that reaches the budget at the end of the phase, found as it goes.

Soft-thresholding takes the same amount off every scale (times the channel's weight), so the channels leave
in the order of |scale| / weight, their importance. Of all channels that must go, the most important one is
the pivot. Each batch takes off the pivot's importance divided by the batches that are left. A pivot that the
data pull up makes the next step larger, so that it is 0 with the last batch, whatever happens: nobody tunes
the penalty, the budget is met, and only channels whose scale is exactly 0 are removed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chanscale.config import FitConfig, Weighting
from chanscale.costs import TrunkCost
from chanscale.scaling import soft_threshold
from chanscale.selection import ChannelSelection, WidthRule, keep_above, keep_within

Scales = Mapping[str, nn.Parameter]
"""The scale weights of each group, shape (width,), by the group's name."""


class BudgetPenalty:
    """The L1 penalty on the scales of a network, and the selections that it leads to.

    `cost` counts the channels of the whole network; `rule` says what widths may be left.
    """

    def __init__(self, cost: TrunkCost, rule: WidthRule, config: FitConfig) -> None:
        self.cost, self.rule, self.config = cost, rule, config

    def step_size(self, scales: Scales, *, budget: float, batches_left: int) -> float:
        """Return what to take off an importance now, to have the pivot at 0 after the batches left."""
        return self.select_within(scales, budget)[1] / batches_left

    @torch.no_grad()
    def shrink(self, scales: Scales, step: float) -> None:
        """Soft-threshold every scale by `step` times its channel's weight, in place."""
        weights = self._weights(scales)
        for name, scale in scales.items():
            scale.copy_(soft_threshold(scale, step * weights[name]))

    @torch.no_grad()
    def add_gradient(self, scales: Scales, strength: float) -> None:
        """Add the gradient of strength * weight * |s|_1 to that of each scale; the paper's variant.

        `strength` counts in root mean squares of the gradient that the data give: Adam divides by those.
        """
        weights = self._weights(scales)
        gradients = {name: scale.grad for name, scale in scales.items() if scale.grad is not None}
        rms = torch.cat(list(gradients.values())).square().mean().sqrt()
        for name, gradient in gradients.items():
            gradient += scales[name].sign() * (strength * weights[name] * rms)

    def select_within(self, scales: Scales, budget: float) -> tuple[ChannelSelection, float]:
        """Select the most important channels that the budget allows; return the pivot's importance with them.

        Raises BudgetError when the allowed widths cannot meet it.
        """
        of = self.config.budget_of
        return keep_within(self._importance(scales), cost=self.cost, of=of, limit=self._limit(budget), rule=self.rule)

    def select_reached(self, scales: Scales, budget: float) -> ChannelSelection:
        """Select the channels above the threshold, but do not go further than the budget."""
        values = {name: scale.detach().abs() for name, scale in scales.items()}
        selection = keep_above(values, threshold=self.config.threshold, rule=self.rule)
        if self.cost.of(self.config.budget_of, selection.widths) > self._limit(budget):
            return selection
        return self.select_within(scales, budget)[0]

    def _limit(self, budget: float) -> float:
        return (1 - budget) * self.cost.of(self.config.budget_of)

    def _importance(self, scales: Scales) -> dict[str, Tensor]:
        weights = self._weights(scales)
        return {name: scale.detach().abs() / weights[name] for name, scale in scales.items()}

    def _weights(self, scales: Scales) -> dict[str, float]:
        widths = {name: len(scale) for name, scale in scales.items()}
        return channel_weights(self.config.weigh_by, self.cost, widths)


def channel_weights(weigh_by: Weighting, cost: TrunkCost, widths: Mapping[str, int]) -> dict[str, float]:
    """Return what one unit of penalty weighs on a channel of each group; their mean over channels is 1.

    The square root tempers the costs, which differ by two orders of magnitude between layers.
    """
    if weigh_by == "uniform":
        return dict.fromkeys(widths, 1.0)
    roots = {name: saved**0.5 for name, saved in cost.per_channel(weigh_by, widths).items()}
    mean = sum(roots[name] * width for name, width in widths.items()) / sum(widths.values())
    return {name: root / mean for name, root in roots.items()}
