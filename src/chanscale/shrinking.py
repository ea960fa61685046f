"""How hard the scales are pressed: the L1 step that reaches the budget at the end of the phase, found as it goes.

Channels leave in the order of |scale| / weight, their importance (of tied channels: of the norm of their scales).
Of all channels that must go to meet the budget, the most important one is the pivot. Each batch takes the pivot's
importance, divided by the batches that are left, off the pivot. If the data pull the pivot up, the next step is
larger, so it is 0 with the last batch, whatever happens: nobody tunes the penalty, the budget is met, and every
channel that is removed has scales of exactly 0.

Plain L1 takes the same off every other scale. At first that is right: all channels feel the same pressure, and
those that matter show it by holding on. In the end it shrinks what stays along with what goes, and thirteen
layers of that leave no signal to learn from. A concave penalty takes (pivot / importance)^concavity times as
much: more off the small, little off the large (reweighted L1, Candes, Wakin & Boyd 2008, section 2). So the
concavity grows from 0 to its full value along the phase (graduated non-convexity, Blake & Zisserman 1987).

The last channels of a group, which the least width holds, are not pressed once they are less important than the pivot.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chanscale.channels import Kept
from chanscale.config import FitConfig, Weighting
from chanscale.costs import TrunkCost
from chanscale.errors import BudgetError
from chanscale.group_scales import GroupScales
from chanscale.selection import ChannelSelection, WidthRule, by_size, keep_above, keep_within, spare

TINY = 1e-12


@dataclass(frozen=True)
class Pace:
    """Where in a scaling phase a batch stands: the budget to reach, the batches left, itself included, and all."""

    budget: float
    batches_left: int
    batches: int

    @property
    def progress(self) -> float:
        """Share of the phase that is over: from 0 to nearly 1."""
        return 1 - self.batches_left / self.batches


class BudgetPenalty:
    """The L1 penalty on the scales of a network, and the selections that it leads to.

    `whole` counts the channels of the whole network, `cost` those that are left; `rule` says what widths may be.
    """

    def __init__(self, whole: TrunkCost, rule: WidthRule, config: FitConfig) -> None:
        self.whole, self.rule, self.config = whole, rule, config
        self.cost = whole
        # At full widths: at those of the moment, a layer's cost would fall with its neighbours and spare it.
        self._weights = channel_weights(config.weigh_by, whole)

    def follow(self, kept: Kept) -> None:
        """Count from now on in the network that has only the channels `kept` of the whole one."""
        self.cost = self.whole.keep(kept)

    def pivot(self, scales: GroupScales, pace: Pace) -> float:
        """Return the importance of the most important channel that must go to meet the budget."""
        return self.select_within(scales, pace.budget)[1]

    def step_size(self, scales: GroupScales, pace: Pace) -> float:
        """Return what to take off the pivot now, to have it at 0 with the last batch."""
        return self.pivot(scales, pace) / pace.batches_left

    @torch.no_grad()
    def shrink(self, scales: GroupScales, pace: Pace) -> float:
        """Soft-threshold every scale, in place; return what that took off the pivot."""
        importance, step, factors = self._press(scales, pace)
        # Said outright: a weight that is divided by and multiplied with may leave a last bit.
        steps = {
            name: (factors[name] * step).masked_fill((values <= step) & (factors[name] > 0), torch.inf)
            for name, values in importance.items()
        }
        scales.shrink(steps)
        return step

    @torch.no_grad()
    def add_gradient(self, scales: GroupScales, pace: Pace, *, lr: float) -> float:
        """Add the penalty's gradient to that of each scale, the paper's variant; return the step it aims at.

        It is measured in root mean squares of the data's gradient, which Adam turns into steps of `lr`.
        """
        _, step, factors = self._press(scales, pace)
        if lr == 0:  # the network is smaller than the budget already, and nothing is to move
            return step
        rms = scales.gradient_rms()
        scales.add_to_gradients({name: factor * (rms * step / lr) for name, factor in factors.items()})
        return step

    def select_within(self, scales: GroupScales, budget: float) -> tuple[ChannelSelection, float]:
        """Select the most important channels that the budget allows; return the pivot's importance with them.

        Raises BudgetError when the allowed widths cannot meet it.
        """
        return self._within(_importance(scales, self._weigh(scales)), budget)

    def allows(self, scales: GroupScales, budget: float) -> bool:
        """Whether the allowed widths can meet `budget`."""
        try:
            self.select_within(scales, budget)
        except BudgetError:
            return False
        return True

    def select_reached(self, scales: GroupScales, budget: float) -> ChannelSelection:
        """Select the channels above the threshold, but do not go further than the budget."""
        selection = keep_above(
            scales.norms(), threshold=self.config.cut, rule=self.rule, groups=self.cost.groups
        )
        if self.cost.of(self.config.budget_of, selection.kept) > self._limit(budget):
            return selection
        return self.select_within(scales, budget)[0]

    def _within(self, importance: Mapping[str, Tensor], budget: float) -> tuple[ChannelSelection, float]:
        of = self.config.budget_of
        return keep_within(importance, cost=self.cost, of=of, limit=self._limit(budget), rule=self.rule)

    def _limit(self, budget: float) -> float:
        return self.whole.limit(self.config.budget_of, budget)

    def _press(self, scales: GroupScales, pace: Pace) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
        """Return the importance of each channel, what to take off the pivot's, and how much more off each scale."""
        weights = self._weigh(scales)
        importance = _importance(scales, weights)
        pivot = self._within(importance, pace.budget)[1]
        return importance, pivot / pace.batches_left, self._factors(weights, importance, pivot, pace)

    def _factors(
        self,
        weights: Mapping[str, Tensor | float],
        importance: Mapping[str, Tensor],
        pivot: float,
        pace: Pace,
    ) -> dict[str, Tensor]:
        """Return how much more is taken off each scale than off the pivot's importance; shape (width,)."""
        exponent = self.config.concavity * pace.progress
        held = self._held(importance, pivot)
        # Twenty times smaller than the pivot is as good as gone; a larger ratio would only overflow.
        return {
            name: ~held[name] * weights[name] * (pivot / values.clamp_min(pivot / 20 + TINY)) ** exponent
            for name, values in importance.items()
        }

    def _held(self, importance: Mapping[str, Tensor], pivot: float) -> dict[str, Tensor]:
        """Return which channels stay although less important than the pivot: their group cannot do with fewer.

        Pressed on, they would come to next to nothing and stay, and a layer of such channels lets no signal through.
        """
        held = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in importance.items()}
        largest = by_size(importance)
        spared = spare(largest, self.cost.groups, self.rule)
        for name, order in largest.items():
            stay = torch.cat([order[: self.rule.floor(name, len(order))], spared.get(name, order[:0])])
            held[name][stay.to(held[name].device)] = True
        return {name: held[name] & (values <= pivot) for name, values in importance.items()}

    def _weigh(self, scales: GroupScales) -> dict[str, Tensor | float]:
        """Return the weight of each group, or of each channel where its scale does not tell what it is worth.

        Of those that the head alone reads, it falls with what the head makes of them (adaptive lasso, Zou 2006).
        """
        uses = {name: channels.uses() for name, channels in scales.last.items()}
        return {
            name: weight / uses[name] if name in uses else weight for name, weight in self._weights.items()
        }


def _importance(scales: GroupScales, weights: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    return {name: norms / weights[name] for name, norms in scales.norms().items()}


def channel_weights(weigh_by: Weighting, cost: TrunkCost) -> dict[str, float]:
    """Return what one unit of penalty weighs on a channel of each group; their mean over channels is 1.

    The fourth root tempers the costs, which differ by a factor of 15 between the layers of VGG16: with the plain
    cost, or its square root, the layers in the middle run dry before the first ones lose a channel.
    """
    if weigh_by == "uniform":
        return dict.fromkeys(cost.widths, 1.0)
    roots = {name: saved**0.25 for name, saved in cost.per_channel(weigh_by).items()}
    mean = sum(roots[name] * width for name, width in cost.widths.items()) / sum(cost.widths.values())
    return {name: root / mean for name, root in roots.items()}
