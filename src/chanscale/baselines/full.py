"""Full fine-tuning: every weight is trained."""

import copy
from time import perf_counter
from typing import Any

import torch

from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner, cosine, merit
from chanscale.probe import fit_probe
from chanscale.progress import Watcher
from chanscale.schedule import plan_epochs

TRUNK_LR = 3e-5
HEAD_LR = 1e-3
WEIGHT_DECAY = 1e-2


def train_full(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> tuple[Classifier, list[dict[str, Any]]]:
    """Return a fine-tuned copy of `model`, at its best epoch by validation, and a row for each epoch.

    It starts from the linear head, as `fit` does, runs as many epochs, and follows a cosine (AdamW).
    """
    learner = Learner(data, splits, config, watcher)
    tuned = to_channels_last(copy.deepcopy(model)).to(learner.fabric.device).requires_grad_(True)
    fit_probe(tuned, data, splits.train, batch_size=config.micro_batch)
    groups = [{"params": tuned.trunk.parameters()}, {"params": tuned.head.parameters()}]
    _, optimizer = learner.fabric.setup(tuned, torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY))
    moments = list(plan_epochs(config.model_copy(update={"tolerance": None})))
    best = copy.deepcopy(tuned)
    history: list[dict[str, Any]] = []
    for moment in moments:
        began = perf_counter()
        tuned.train()
        losses = []
        for done, batch in enumerate(learner.start_epoch(moment.epoch)):
            factor = cosine((moment.epoch + done / len(learner.train)) / len(moments))
            for group, lr in zip(optimizer.param_groups, (TRUNK_LR, HEAD_LR), strict=True):
                group["lr"] = lr * factor
            losses.append(learner.backward(tuned, batch, moment.epoch, done))
            optimizer.step()
            optimizer.zero_grad()
            learner.watcher.on_batch(moment, done + 1, len(learner.train), losses[-1])
        learner.set_statistics(tuned)
        row = {"epoch": moment.epoch, "train_loss": sum(losses) / len(losses), **learner.validate(tuned)}
        row["seconds"] = round(perf_counter() - began, 2)
        if not history or merit(row) > max(map(merit, history)):
            best = copy.deepcopy(tuned)
        history.append(row)
        learner.watcher.on_epoch(moment, row)
    learner.settle(best)
    return best, history
