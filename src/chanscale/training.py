"""Train scales and head: shrink and remove down to the budget, then refine, and keep the best epoch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from chanscale.attaching import attach_scales
from chanscale.channels import ChannelGroup, free_groups
from chanscale.classifier import Classifier, lay_out, to_channels_last
from chanscale.config import CostKind, FitConfig
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.coupling import NORMS
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import make_fabric
from chanscale.epochs import EpochRunner
from chanscale.errors import TrainingError, clip
from chanscale.group_scales import GroupScales
from chanscale.heads import PooledHead
from chanscale.probe import fit_probe
from chanscale.progress import Watcher
from chanscale.proof import channel_groups
from chanscale.schedule import Moment, plan_epochs
from chanscale.selection import WidthRule
from chanscale.shrinking import BudgetPenalty
from chanscale.state import Best, TrainingState, make_optimizer, move_state
from chanscale.training_mode import generators_given_back
from chanscale.wording import percent

LITTLE_CHOICE = 3 / 4
"""A share of what the budget leaves; where the least widths hold more, rounding is said to leave little to select.

It lies between two cases: at 98 %, VGG16 was left with one channel in its last layer, and at chance; at 49 %, finer
widths read no better (docs/benchmarks/nih_opacity_64.md)."""

EXCESS = 0.05
"""How much more than the budget, as a share of the trunk, may go without a word."""

_log = logging.getLogger(__name__)


@generators_given_back()
def fit(
    model: Classifier,
    data: DecodedImages,
    splits: Splits,
    config: FitConfig,
    *,
    state: TrainingState | None = None,
    watcher: Watcher | None = None,
    save: Callable[[TrainingState], None] | None = None,
    channels_last: bool = True,
) -> Best:
    """Scale, select, remove and refine as `config` says; return the best epoch that meets the budget.

    `model` is not changed; it is traced, unless it carries its groups. With the `state` of an earlier call it goes
    on from there; `save` is called with the state after each epoch. `channels_last`: the layout of the weights in
    training; those that are returned have it in any case. Raises TrainingError, BudgetError, InexactRemovalError.
    """
    state = state or start(model, data, splits, config)
    groups = channel_groups(model, data.batch(splits.train[:2])[0])
    cost = trunk_cost(model, groups, data.batch(splits.train[:1])[0])
    if cost.loose:
        _log.warning(
            "%s of %s parameters are used otherwise than by a call of a convolution or linear layer (%s): none of them "
            "can be removed, and their MACs are not counted",
            f"{sum(cost.loose.values()):,}", f"{cost.parameters():,}", clip(", ".join(cost.loose)),
        )  # fmt: skip
    rule = width_rule(model, groups, config)
    penalty = BudgetPenalty(cost, rule, config)
    runner = EpochRunner(
        data,
        splits,
        penalty,
        config,
        watcher or Watcher(),
        anchored=config.anchor > 0 and has_norms(groups, model),
        channels_last=channels_last,
    )
    move_state(state, runner.fabric.device)
    for network in state.models:
        lay_out(network, channels_last=channels_last)
    stage = None
    for moment in plan_epochs(config):
        if moment.epoch < state.epoch:
            continue
        if moment.opens_stage and moment.stage > 0 and not _goes_on(state, penalty, moment):
            break
        if stage != moment.stage and (
            hint := find_little_choice(cost, rule, config.budget_of, moment.budget)
        ):
            _log.warning("%s", hint)
        stage = moment.stage
        runner.run(state, moment)
        if save:
            save(state)
    if state.best is None:
        raise TrainingError("no epoch met the budget; give it more epochs with --scale-epochs")
    if excess := _find_excess(state.best.row, config):
        _log.warning("%s", excess)
    to_channels_last(state.best.model)  # as it will be read from its file, and round
    runner.settle(state.best.model)
    runner.centre(state.best.model)
    return state.best


def start(model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig) -> TrainingState:
    """Attach scales to `model` and fit its head to the frozen features: where training starts from."""
    groups = channel_groups(model, data.batch(splits.train[:2])[0])
    scaled = to_channels_last(attach_scales(model, groups)).to(make_fabric(config).device)
    fit_probe(scaled, data, splits.train, batch_size=config.micro_batch)
    kept = {group.name: torch.arange(group.width) for group in free_groups(scaled)}
    return TrainingState(scaled, make_optimizer(scaled, config), kept)


def width_rule(model: Classifier, groups: tuple[ChannelGroup, ...], config: FitConfig) -> WidthRule:
    """Return what widths `config` allows. What the head of `model` takes in is not rounded unless it says so.

    A few channels there cost a CPU nothing to speak of, and are worth more to a reader.
    """
    heads = {name for name, module in model.named_modules() if isinstance(module, PooledHead)}
    last = {group.name for group in groups if heads & {slot.layer for slot in group.inputs}}
    unrounded = frozenset() if config.round_last else frozenset(last)
    sizes = {group.name: group.size for group in groups if group.protected is None}
    return WidthRule(minimum=config.min_channels, round_to=config.round_to, unrounded=unrounded, sizes=sizes)


def find_little_choice(cost: TrunkCost, rule: WidthRule, of: CostKind, budget: float) -> str | None:
    """Return, where rounding leaves little to select at a budget, what to do about it; else None.

    Also None where the budget cannot be met, which is an error, and where finer widths would hold as much.
    """

    def filled(multiple: int) -> float:
        finer = replace(rule, round_to=multiple)
        least = {name: torch.arange(finer.floor(name, width)) for name, width in cost.widths.items()}
        return cost.of(of, least) / cost.limit(of, budget)

    if not LITTLE_CHOICE < filled(rule.round_to) <= 1 or filled(1) > LITTLE_CHOICE:
        return None
    multiple = rule.round_to
    while filled(multiple) > LITTLE_CHOICE:  # at 1, it is not
        multiple //= 2
    return (
        f"--round-to {rule.round_to} leaves little to select: the least widths that it allows hold "
        f"{percent(filled(rule.round_to))} of what a budget of {budget:g} leaves; those of --round-to {multiple} hold "
        f"{percent(filled(multiple))}"
    )


def _find_excess(row: Mapping[str, Any], config: FitConfig) -> str | None:
    """Return, where much more than the budget went, what to do about it; else None. `row`: of the best epoch."""
    removed = row[f"{config.budget_of}_removed"]
    if config.tolerance is not None or removed - config.budget < EXCESS:
        return None
    finer = "; a smaller --round-to may come nearer" if config.round_to > 1 else ""
    return (
        f"{percent(removed)} of the {config.budget_of} went, where {percent(config.budget)} was asked for: the next "
        f"wider network that may be holds more{finer}"
    )


def has_norms(groups: tuple[ChannelGroup, ...], model: Classifier) -> bool:
    """Whether channels of the `groups` of `model` pass norms, whose statistics are frozen.

    A norm takes off a mean that its input no longer has once the scales before it have shrunk; where there are many,
    one behind the other, no signal is left. Without any, smaller scales make for smaller features, which the head
    standardises.
    """
    layers = {slot.layer for group in groups if group.protected is None for slot in group.outputs}
    return any(isinstance(model.get_submodule(name), NORMS) for name in layers)


def _goes_on(state: TrainingState, penalty: BudgetPenalty, moment: Moment) -> bool:
    """Whether the stage before `moment` was accepted, and there is a network small enough for the next."""
    accepted = state.best is not None and state.best.row["stage"] == moment.stage - 1
    penalty.follow(state.kept)
    return accepted and penalty.allows(GroupScales(state.model), moment.budget)
