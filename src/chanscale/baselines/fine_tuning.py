"""What the methods that change weights share: a copy to train, its epochs, and the best of them by validation."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.learning import Learner, cosine, merit
from chanscale.probe import fit_probe
from chanscale.progress import Watcher
from chanscale.schedule import Moment, plan_epochs

HEAD_LR = 1e-3
WEIGHT_DECAY = 1e-2

History = list[dict[str, Any]]
"""A row for each epoch; `chosen` is True on that of the model returned, whose validation AUC is the method's."""

Trained = tuple[Classifier, History]

Press = Callable[[float], None]
"""Acts on weights behind each step; what it is given is the factor on the learning rates of that step."""


@dataclass(frozen=True)
class Part:
    """Parameters that are trained at one learning rate, which is `lr` at its start."""

    parameters: list[nn.Parameter]
    lr: float
    decay: float = WEIGHT_DECAY


class FineTuner(Learner):
    """A learner for weights that change. Where the network has norms, each batch passes as a whole."""

    def __init__(
        self, model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
    ) -> None:
        if find_norms(model):
            # The statistics of five images are noise; `fit` takes none.
            config = config.model_copy(update={"micro_batch": config.batch_size})
        super().__init__(data, splits, config, watcher)
        self.indices = splits.train

    def copy(self, model: Classifier) -> Classifier:
        """Return a copy of `model` on the device of the run, laid out for it."""
        return to_channels_last(copy.deepcopy(model)).to(self.fabric.device)

    def tune(
        self, model: Classifier, moments: Sequence[Moment], parts: Sequence[Part],
        *, still: Iterable[nn.Module] = (), press: Press | None = None,
    ) -> Trained:  # fmt: skip
        """Train `parts` of `model` and its head, in place; return a copy at the best epoch, and a row for each.

        `model` itself is then at its last epoch. It starts from the linear head, as `fit` does, and follows a cosine
        (AdamW). `still`: norms that stay in eval. All other weights of `model` are frozen.
        """
        fit_probe(model, self.data, self.indices, batch_size=self.config.micro_batch)
        optimizer = self._make_optimizer(model, parts)
        best = model
        history: History = []
        for index, moment in enumerate(moments):
            began = perf_counter()
            model.train()
            for norm in still:
                norm.eval()
            loss = self._run_epoch(model, optimizer, moment, index / len(moments), 1 / len(moments), press)
            self.set_statistics(model)
            row = {"epoch": moment.epoch, "train_loss": loss, **self.validate(model)}
            row["seconds"] = round(perf_counter() - began, 2)
            if not history or merit(row) > max(map(merit, history)):
                best = copy.deepcopy(model)
            history.append(row)
            self.watcher.on_epoch(moment, row)
        self.settle(best)
        self.centre(best)
        return best, mark_chosen(history)

    def _make_optimizer(self, model: Classifier, parts: Sequence[Part]) -> Any:
        model.requires_grad_(False)
        parts = (*parts, Part(list(model.head.parameters()), HEAD_LR))
        for part in parts:
            for parameter in part.parameters:
                parameter.requires_grad_(True)
        groups = [
            {"params": part.parameters, "initial_lr": part.lr, "weight_decay": part.decay} for part in parts
        ]
        _, optimizer = self.fabric.setup(model, torch.optim.AdamW(groups))
        return optimizer

    def _run_epoch(
        self,
        model: Classifier,
        optimizer: Any,
        moment: Moment,
        start: float,
        length: float,
        press: Press | None,
    ) -> float:
        """Return the mean loss of an epoch that begins at a share `start` of the way, and is `length` of it."""
        losses = []
        for done, batch in enumerate(self.start_epoch(moment.epoch)):
            factor = cosine(start + length * done / len(self.train))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            losses.append(self.backward(model, batch, moment.epoch, done))
            optimizer.step()
            optimizer.zero_grad()
            if press:
                press(factor)
            self.watcher.on_batch(moment, done + 1, len(self.train), losses[-1])
        return sum(losses) / len(losses)


def middle(candidates: Sequence[float]) -> float:
    """Return the middle one of the candidates."""
    return candidates[len(candidates) // 2]


def all_epochs(config: FitConfig) -> list[Moment]:
    """Return the epochs that `fit` has when it stops at the budget."""
    return list(plan_epochs(config.model_copy(update={"tolerance": None})))


def trunk_part(model: Classifier, lr: float) -> Part:
    """Return all weights in front of the head."""
    return Part(list(model.trunk.parameters()), lr)


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch and instance norms of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _NormBase)}


def mark_chosen(history: History) -> History:
    """Return the rows, each with a mark that tells whether it is the best by validation."""
    best = max(history, key=merit)
    return [{**row, "chosen": row is best} for row in history]
