"""One epoch of scale and select: train, press the scales, remove what reached zero, validate, keep the best."""

import copy
from time import perf_counter
from typing import Any

from chanscale.classifier import lay_out
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.group_scales import GroupScales, scale_parameters
from chanscale.last_layer import drop_rounding
from chanscale.learning import Learner, cosine, merit
from chanscale.progress import Watcher
from chanscale.pruning import ROUNDING
from chanscale.removal import remove_channels
from chanscale.schedule import Moment
from chanscale.selection import ChannelSelection
from chanscale.shrinking import BudgetPenalty, Pace
from chanscale.state import Best, TrainingState, make_optimizer
from chanscale.team import require_same
from chanscale.training_mode import train_frozen


class EpochRunner(Learner):
    """Runs epochs of a `TrainingState`, in place; holds what stays the same from one to the next.

    `anchored`: the scales of a group are stretched after every shrinkage, so that its largest stay at 1.
    `channels_last`: the layout of the weights.
    """

    def __init__(
        self, data: DecodedImages, splits: Splits, penalty: BudgetPenalty, config: FitConfig, watcher: Watcher,
        *, anchored: bool = False, channels_last: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(data, splits, config, watcher)
        self.penalty, self.anchored, self.channels_last = penalty, anchored, channels_last
        self.recompute = config.recompute

    def run(self, state: TrainingState, moment: Moment) -> None:
        """Run the epoch `moment` and add its row to the history."""
        began = perf_counter()
        loss, step = self._train(state, moment)
        self.set_statistics(state.model)
        change = self._remove(state, moment) if moment.phase == "scale" else None
        row = {
            "epoch": moment.epoch, "stage": moment.stage, "phase": moment.phase, "train_loss": loss,
            **self.validate(state.model), **self._measure(), "penalty_step": step, "removal_change": change,
            "seconds": round(perf_counter() - began, 2),
        }  # fmt: skip
        state.history.append(row)
        state.epoch += 1
        self._keep_best(state, moment, row)
        self.watcher.on_epoch(moment, row)

    def _train(self, state: TrainingState, moment: Moment) -> tuple[float, float]:
        """Return the mean loss, and the last step of the penalty."""
        _, optimizer = self.fabric.setup(state.model, state.optimizer)
        scales = GroupScales(state.model)
        self.penalty.follow(state.kept)
        train_frozen(state.model)
        losses, step = [], 0.0
        for done, batch in enumerate(self.start_epoch(moment.epoch)):
            self._set_learning_rates(state, scales, moment, done)
            losses.append(self.backward(state.model, batch, moment.epoch, done))
            step = self._update(state, scales, optimizer, moment, done)
            self.watcher.on_batch(moment, done + 1, len(self.train), losses[-1])
        return sum(losses) / len(losses), step

    def _set_learning_rates(
        self, state: TrainingState, scales: GroupScales, moment: Moment, done: int
    ) -> None:
        for_scales, for_head = state.optimizer.param_groups
        if moment.opens_stage and done == 0:
            # Adam moves a scale by at most lr: it outruns the penalty if its gradient agrees with itself.
            step = self.penalty.step_size(scales, self._pace(moment, done))
            state.scale_lr = step / self.config.pressure
        if moment.phase == "scale":
            for_scales["lr"], for_head["lr"] = state.scale_lr, self.config.head_lr
            return
        factor = cosine((moment.index * len(self.train) + done) / (moment.length * len(self.train)))
        for_scales["lr"], for_head["lr"] = self.config.refine_lr * factor, self.config.head_lr * factor

    def _update(
        self, state: TrainingState, scales: GroupScales, optimizer: Any, moment: Moment, done: int
    ) -> float:
        """Let the optimizer step, and the penalty press; return the penalty's step."""
        weight = state.model.head.linear.weight
        if weight.grad is not None:
            weight.grad += 2 * self.config.head_decay * weight.detach()
        kind = self.config.penalty if moment.phase == "scale" else None
        step = 0.0
        drop_rounding(scales.last, scales.parameters)
        if kind == "gradient":
            step = self.penalty.add_gradient(scales, self._pace(moment, done), lr=state.scale_lr)
        optimizer.step()
        optimizer.zero_grad()
        if kind == "proximal":
            step = self.penalty.shrink(scales, self._pace(moment, done))
        if kind and self.anchored:
            scales.anchor(self.config.anchor)
        return step

    def _pace(self, moment: Moment, done: int) -> Pace:
        batches = moment.length * len(self.train)
        return Pace(moment.budget, batches - moment.index * len(self.train) - done, batches)

    def _remove(self, state: TrainingState, moment: Moment) -> float | None:
        """Remove what reached the threshold; at the end of the phase, down to the budget. Return the change.

        Without `early_removal`, the end of the phase is all there is.
        """
        if not (moment.ends_phase or self.config.early_removal):
            return None
        scales = GroupScales(state.model)
        selection = (
            self.penalty.select_within(scales, moment.budget)[0]
            if moment.ends_phase
            else self.penalty.select_reached(scales, moment.budget)
        )
        if selection.widths == scales.widths:
            return None
        return self._apply(state, selection)

    def _apply(self, state: TrainingState, selection: ChannelSelection) -> float:
        example = self.fabric.to_device(self.example)
        removal = remove_channels(state.model, state.optimizer, state.kept, selection, example=example)
        state.model, state.kept = lay_out(removal.model, channels_last=self.channels_last), removal.kept
        require_same([*state.kept.values(), *scale_parameters(state.model).values()], "channels and scales")
        state.optimizer = make_optimizer(state.model, self.config)
        removal.restore(state.optimizer)
        self.penalty.follow(state.kept)
        if removal.change > ROUNDING:
            self.set_statistics(state.model)
        return removal.change

    def _measure(self) -> dict[str, Any]:
        whole, left = self.penalty.whole, self.penalty.cost
        parameters, macs = left.parameters(), left.macs()
        return {
            "parameters": parameters, "parameters_removed": 1 - parameters / whole.original("parameters"),
            "macs": macs, "macs_removed": 1 - macs / whole.original("macs"), "widths": left.widths,
        }  # fmt: skip

    def _keep_best(self, state: TrainingState, moment: Moment, row: dict[str, Any]) -> None:
        """Note the epoch if it is the best of its stage; accept the stage's best when the stage is over."""
        meets_budget = moment.phase == "refine" or moment.ends_phase
        if meets_budget and (state.candidate is None or merit(row) > merit(state.candidate.row)):
            state.candidate = Best(copy.deepcopy(state.model), dict(state.kept), row)
        if moment.ends_stage and state.candidate is not None:
            top = max(past["validation_auc"] for past in state.history)
            if moment.stage == 0 or state.candidate.row["validation_auc"] >= top - (
                self.config.tolerance or 0
            ):
                state.best = state.candidate
            state.candidate = None
