"""Which channels the budget leaves, and methods that remove them in one shot between two times of fine-tuning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chanscale.baselines.fine_tuning import FineTuner, Trained, all_epochs, trunk_part
from chanscale.channels import carry_groups
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.progress import Watcher
from chanscale.proof import channel_groups
from chanscale.pruning import prune_channels, share
from chanscale.schedule import Moment
from chanscale.selection import ChannelSelection, WidthRule, keep_within
from chanscale.training import width_rule

Importance = dict[str, Tensor]
"""What each channel is worth, shape (width,), by the group's name."""

Rank = Callable[[Classifier, FineTuner], Importance]

Tune = Callable[[FineTuner, Classifier, Sequence[Moment], float], Trained]
"""Trains a model at a learning rate, in place; returns the epoch that is to be cut, and a row for each."""


@dataclass(frozen=True)
class Target:
    """What the budget leaves of a network that costs `cost`, in widths that `rule` allows."""

    cost: TrunkCost
    rule: WidthRule
    config: FitConfig

    def select(self, importance: Mapping[str, Tensor]) -> ChannelSelection:
        """Return the most important channels that the budget allows; a group not named stays whole.

        Raises BudgetError when the widths allowed cannot meet it.
        """
        of = self.config.budget_of
        limit = self.cost.limit(of, self.config.budget)
        return keep_within(importance, cost=self.cost, of=of, limit=limit, rule=self.rule)[0]

    def removed(self, selection: ChannelSelection) -> float:
        """Return the share of the trunk's parameters that is gone when only the `selection` stays."""
        return 1 - self.cost.parameters(selection.kept) / self.cost.original("parameters")


def make_target(model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig) -> Target:
    """Return what is to be left of `model`, which knows its groups. Raises BudgetError when that cannot be met."""
    groups = channel_groups(model, data.batch(splits.train[:2])[0])
    cost = trunk_cost(model, groups, data.batch(splits.train[:1])[0])
    target = Target(cost, width_rule(model, groups, config), config)
    target.select({name: torch.ones(width) for name, width in cost.widths.items()})
    return target


def know_groups(model: Classifier, data: DecodedImages, splits: Splits) -> Classifier:
    """Return a copy of `model`, on the same tensors, that knows its groups."""
    return carry_groups(share(model), channel_groups(model, data.batch(splits.train[:2])[0]))


def later_epochs(config: FitConfig) -> list[Moment]:
    """Return the epochs behind the removal. Raises ConfigError when there are none."""
    later = [moment for moment in all_epochs(config) if moment.phase == "refine"]
    if not later:
        raise ConfigError("a network cut in one shot must be trained again: use refine_epochs of at least 1")
    return later


def tune_all(tuner: FineTuner, model: Classifier, moments: Sequence[Moment], lr: float) -> Trained:
    """Fine-tune all of `model`, in place; return a copy at the best epoch, and a row for each."""
    return tuner.tune(model, moments, [trunk_part(model, lr)])


def tune_cut_tune(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, rank: Rank, lr: float, tune: Tune = tune_all,
) -> Trained:  # fmt: skip
    """Fine-tune a copy of `model` with `tune`, cut it to the budget by what `rank` says, and fine-tune all of it.

    One shot: `scale_epochs`, then `refine_epochs`, each with a cosine of its own. What is cut is the epoch that
    `tune` returns, what is returned the best of those behind it. The removal is not exact, since what is removed is
    not 0: the head is fitted anew, and the second time has to make up for the rest.
    """
    later = later_epochs(config)
    model = know_groups(model, data, splits)
    target = make_target(model, data, splits, config)
    tuner = FineTuner(model, data, splits, config, watcher)
    whole = tuner.copy(model)
    first = [moment for moment in all_epochs(config) if moment.phase == "scale"]
    tuned, before = tune(tuner, whole, first, lr)
    selection = target.select(rank(tuned, tuner))
    best, after = tune_all(tuner, prune_channels(tuned, selection), later, lr)
    return best, [
        *({**row, "parameters_removed": 0.0, "chosen": False} for row in before),
        *({**row, "parameters_removed": target.removed(selection)} for row in after),
    ]
