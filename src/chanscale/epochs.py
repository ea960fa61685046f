"""One epoch of a run: train, press the scales, remove what reached zero, validate, keep the best."""

import copy
import math
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chanscale.classifier import Classifier, classification_loss, probabilities
from chanscale.config import FitConfig
from chanscale.data.augmentation import augment
from chanscale.data.loading import Batch, BatchLoader, DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import make_fabric
from chanscale.errors import TrainingError
from chanscale.metrics import mean_auc
from chanscale.probe import set_head_statistics
from chanscale.pruning import ROUNDING
from chanscale.removal import remove_channels
from chanscale.schedule import Moment
from chanscale.selection import ChannelSelection
from chanscale.shrinking import BudgetPenalty, Scales
from chanscale.progress import Watcher
from chanscale.state import Best, TrainingState, make_optimizer, scales_of

FULL_EPOCH = 20
"""Fewer batches than this leave an epoch too short for scales to learn; images are then taken repeatedly."""

SAMPLE = 200
"""Training images that the head's statistics are taken from: they place a mean within 7 % of a deviation."""


class EpochRunner:
    """Runs epochs of a `TrainingState`, in place; holds what stays the same from one to the next."""

    def __init__(
        self,
        data: DecodedImages,
        splits: Splits,
        penalty: BudgetPenalty,
        config: FitConfig,
        watcher: Watcher,
    ) -> None:
        self.data, self.penalty, self.config, self.watcher = data, penalty, config, watcher
        self.fabric = make_fabric(config)
        repeats = max(1, round(FULL_EPOCH * config.batch_size / len(splits.train)))
        self.train = BatchLoader(
            data, np.tile(splits.train, repeats), batch_size=config.batch_size, shuffle=True, seed=config.seed,
            workers=config.workers,
        )  # fmt: skip
        self.validation = BatchLoader(data, splits.validation, batch_size=config.micro_batch, workers=config.workers)
        self.sample = splits.train[:: max(1, len(splits.train) // SAMPLE)]
        self.example = data.batch(splits.validation[:2])[0]

    def run(self, state: TrainingState, moment: Moment) -> None:
        """Run the epoch `moment` and add its row to the history."""
        began = perf_counter()
        loss, step = self._train(state, moment)
        self._set_statistics(state)
        change = self._remove(state, moment) if moment.phase == "scale" else None
        row = {
            "epoch": moment.epoch, "stage": moment.stage, "phase": moment.phase, "train_loss": loss,
            **self._validate(state.model), **self._measure(state), "penalty_step": step, "removal_change": change,
            "seconds": round(perf_counter() - began, 2),
        }  # fmt: skip
        state.history.append(row)
        state.epoch += 1
        self._keep_best(state, moment, row)
        self.watcher.on_epoch(moment, row)

    def _train(self, state: TrainingState, moment: Moment) -> tuple[float, float]:
        """Return the mean loss, and the last step of the penalty."""
        model, optimizer = self.fabric.setup(state.model, state.optimizer)
        scales = scales_of(state.model)
        model.train()
        losses, step = [], 0.0
        for done, batch in enumerate(self.train.epoch(moment.epoch)):
            self._set_learning_rates(state, scales, moment, done)
            losses.append(self._backward(model, batch, moment.epoch, done))
            step = self._update(state, scales, optimizer, moment, done)
            self.watcher.on_batch(moment, done + 1, len(self.train), losses[-1])
        return sum(losses) / len(losses), step

    def _backward(self, model: Any, batch: Batch, epoch: int, done: int) -> float:
        """Sum up the gradients of one batch, a few images at a time; return its mean loss."""
        total = 0.0
        for images, labels in self._micro_batches(batch, epoch, done):
            loss = classification_loss(model(images), labels).sum() / len(batch.labels)
            self.fabric.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {total} in epoch {epoch}; use --precision 32-true, or a lower --head-lr"
            )
        return total

    def _micro_batches(self, batch: Batch, epoch: int, done: int) -> list[tuple[Tensor, Tensor]]:
        """Return parts of nearly equal size, none of a single image, which has no statistics."""
        images = batch.images
        if self.config.augment:
            # Seeded by the place in the run: a resumed run draws what an undisturbed one would have.
            seed = np.random.SeedSequence((self.config.seed, epoch, done)).generate_state(1)[0]
            images = augment(images, generator=torch.Generator().manual_seed(int(seed)))
        parts = max(1, min(len(images) // 2, -(-len(images) // self.config.micro_batch)))
        pairs = zip(images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True)
        return [self.fabric.to_device(pair) for pair in pairs]

    def _set_learning_rates(self, state: TrainingState, scales: Scales, moment: Moment, done: int) -> None:
        for_scales, for_head = state.optimizer.param_groups
        for_head["lr"] = self.config.head_lr
        if moment.phase == "scale":
            if moment.opens_stage and done == 0:
                # Adam moves a scale by at most lr: it outruns the penalty if its gradient agrees with itself.
                state.scale_lr = self._step_size(scales, moment, done) / self.config.pressure
            for_scales["lr"] = state.scale_lr
            return
        progress = (moment.index * len(self.train) + done) / (moment.length * len(self.train))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for_scales["lr"] = self.config.refine_lr * cosine
        for_head["lr"] *= cosine

    def _update(self, state: TrainingState, scales: Scales, optimizer: Any, moment: Moment, done: int) -> float:
        """Let the optimizer step, and the penalty press; return the penalty's step."""
        weight = state.model.head.linear.weight
        if weight.grad is not None:
            weight.grad += 2 * self.config.head_decay * weight.detach()
        kind = self.config.penalty if moment.phase == "scale" else None
        step = 0.0
        if kind == "gradient":
            step = self._step_size(scales, moment, done)
            self.penalty.add_gradient(scales, step / state.scale_lr)
        optimizer.step()
        optimizer.zero_grad()
        if kind == "proximal":
            step = self._step_size(scales, moment, done)
            self.penalty.shrink(scales, step)
        return step

    def _step_size(self, scales: Scales, moment: Moment, done: int) -> float:
        left = (moment.length - moment.index) * len(self.train) - done
        return self.penalty.step_size(scales, budget=moment.budget, batches_left=left)

    def _remove(self, state: TrainingState, moment: Moment) -> float | None:
        """Remove what reached the threshold; at the end of the phase, down to the budget. Return the change."""
        scales = scales_of(state.model)
        selection = (
            self.penalty.select_within(scales, moment.budget)[0]
            if moment.ends_phase
            else self.penalty.select_reached(scales, moment.budget)
        )
        if selection.widths == {name: len(scale) for name, scale in scales.items()}:
            return None
        return self._apply(state, selection)

    def _apply(self, state: TrainingState, selection: ChannelSelection) -> float:
        example = self.fabric.to_device(self.example)
        removal = remove_channels(state.model, state.optimizer, state.kept, selection, example=example)
        state.model, state.kept = removal.model, removal.kept
        state.optimizer = make_optimizer(state.model, self.config)
        removal.restore(state.optimizer)
        if removal.change > ROUNDING:
            self._set_statistics(state)
        return removal.change

    def _set_statistics(self, state: TrainingState) -> None:
        with self.fabric.autocast():
            set_head_statistics(state.model, self.data, self.sample, batch_size=self.config.micro_batch)

    @torch.no_grad()
    def _validate(self, model: Classifier) -> dict[str, float]:
        model.eval()
        scores, labels, losses = [], [], []
        with self.fabric.autocast():
            for batch in self.validation.epoch():
                images, targets = self.fabric.to_device((batch.images, batch.labels))
                logits = model(images)
                losses.append(classification_loss(logits, targets))
                scores.append(probabilities(logits))
                labels.append(targets)
        auc = mean_auc(torch.cat(scores).cpu().numpy(), torch.cat(labels).cpu().numpy())
        return {"validation_loss": float(torch.cat(losses).mean()), "validation_auc": auc}

    def _measure(self, state: TrainingState) -> dict[str, Any]:
        widths = {name: len(kept) for name, kept in state.kept.items()}
        parameters, macs = self.penalty.cost.parameters(widths), self.penalty.cost.macs(widths)
        return {
            "parameters": parameters, "parameters_removed": 1 - parameters / self.penalty.cost.parameters(),
            "macs": macs, "macs_removed": 1 - macs / self.penalty.cost.macs(), "widths": widths,
        }  # fmt: skip

    def _keep_best(self, state: TrainingState, moment: Moment, row: dict[str, Any]) -> None:
        """Note the epoch if it is the best of its stage; accept the stage's best when the stage is over."""
        if moment.phase == "refine" or moment.ends_phase:
            if state.candidate is None or _merit(row) > _merit(state.candidate.row):
                state.candidate = Best(copy.deepcopy(state.model), dict(state.kept), row)
        if moment.ends_stage and state.candidate is not None:
            top = max(past["validation_auc"] for past in state.history)
            if moment.stage == 0 or state.candidate.row["validation_auc"] >= top - (self.config.tolerance or 0):
                state.best = state.candidate
            state.candidate = None


def _merit(row: dict[str, Any]) -> tuple[float, float]:
    """Order epochs by validation AUC; a tie goes to the smaller loss."""
    return row["validation_auc"], -row["validation_loss"]
