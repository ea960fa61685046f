"""Scales and head of a frozen network, trained as `fit` refines them: no penalty, no removal."""

from collections.abc import Sequence
from dataclasses import replace

from chanscale.baselines.fine_tuning import Trained, mark_chosen
from chanscale.config import FitConfig
from chanscale.costs import TrunkCost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.epochs import EpochRunner
from chanscale.probe import fit_probe
from chanscale.progress import Watcher
from chanscale.pruning import prune_channels
from chanscale.schedule import Moment
from chanscale.selection import ChannelSelection, WidthRule
from chanscale.shrinking import BudgetPenalty
from chanscale.state import TrainingState, make_optimizer

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
"""Of the scales. The middle one is the default of `refine_lr`."""


def refine(
    state: TrainingState, cost: TrunkCost, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, moments: Sequence[Moment], lr: float,
) -> Trained:  # fmt: skip
    """Train the scales and the head of `state`, in place; return the best epoch by validation, and a row for each.

    `cost`: that of the whole network. `lr`: of the scales, at its start.
    """
    config = config.model_copy(update={"refine_lr": lr})
    runner = EpochRunner(data, splits, BudgetPenalty(cost, WidthRule(), config), config, watcher)
    for index, moment in enumerate(moments):
        ends = index == len(moments) - 1
        runner.run(state, replace(moment, phase="refine", index=index, length=len(moments), ends_stage=ends))
    assert state.best is not None
    runner.settle(state.best.model)
    runner.centre(state.best.model)
    return state.best.model, mark_chosen(state.history)


def cut(
    state: TrainingState, selection: ChannelSelection, data: DecodedImages, splits: Splits, config: FitConfig
) -> TrainingState:
    """Return where training starts from with the `selection` alone: scales as they are, a new linear head."""
    pruned = prune_channels(state.model, selection)
    fit_probe(pruned, data, splits.train, batch_size=config.micro_batch)
    return TrainingState(pruned, make_optimizer(pruned, config), dict(selection.kept))
