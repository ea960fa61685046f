"""What every way of training shares: batches, gradients, statistics and validation."""

import math
from collections.abc import Iterator
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
from chanscale.progress import Watcher

FULL_EPOCH = 20
"""Fewer batches than this leave an epoch too short to learn in; images are then taken repeatedly."""

SAMPLE = 200
"""Training images that the head's statistics are taken from: they place a mean within 7 % of a deviation."""


class Learner:
    """The images of a run and the device it runs on; knows how to pass a batch forth and back."""

    def __init__(self, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher) -> None:
        self.data, self.config, self.watcher = data, config, watcher
        self.fabric = make_fabric(config)
        repeats = max(1, round(FULL_EPOCH * config.batch_size / len(splits.train)))
        self.train = BatchLoader(
            data, np.tile(splits.train, repeats), batch_size=config.batch_size, shuffle=True, seed=config.seed,
            workers=config.workers,
        )  # fmt: skip
        self.validation = BatchLoader(
            data, splits.validation, batch_size=config.micro_batch, workers=config.workers
        )
        self.sample = splits.train[:: max(1, len(splits.train) // SAMPLE)]
        self.example = data.batch(splits.validation[:2])[0]

    def start_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of `epoch`; layers that draw at random draw what that epoch would draw."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, epoch)).generate_state(1)[0]))
        return self.train.epoch(epoch)

    def backward(self, model: Any, batch: Batch, epoch: int, done: int) -> float:
        """Sum up the gradients of batch `done` of an epoch, a few images at a time; return its mean loss.

        Raises TrainingError when the loss is not finite.
        """
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

    def set_statistics(self, model: Classifier) -> None:
        """Renew the statistics of the head of `model`, in place."""
        with self.fabric.autocast():
            set_head_statistics(model, self.data, self.sample, batch_size=self.config.micro_batch)

    def validate(self, model: Classifier) -> dict[str, float]:
        """Return the loss and the AUC on the validation images."""
        logits, labels = self._validation_logits(model)
        if not logits.isfinite().all():
            raise TrainingError(
                "the outputs on the validation images are not finite; use --precision 32-true, or a lower --head-lr"
            )
        auc = mean_auc(probabilities(logits).cpu().numpy(), labels.cpu().numpy())
        return {"validation_loss": float(classification_loss(logits, labels).mean()), "validation_auc": auc}

    def centre(self, model: Classifier) -> None:
        """Move the intercept of the head, in place, to where the validation images have the least loss.

        The epoch is chosen by AUC, which no intercept changes; probabilities, and what is called positive, need one.
        """
        shift = fit_intercept(*self._validation_logits(model))
        with torch.no_grad():
            model.head.linear.bias.add_(shift)

    @torch.no_grad()
    def _validation_logits(self, model: Classifier) -> tuple[Tensor, Tensor]:
        model.eval()
        logits, labels = [], []
        with self.fabric.autocast():
            for batch in self.validation.epoch():
                images, targets = self.fabric.to_device((batch.images, batch.labels))
                logits.append(model(images))
                labels.append(targets)
        return torch.cat(logits), torch.cat(labels)

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


def fit_intercept(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the shift of `logits` (N, outputs) with the least cross-entropy on `labels` (N,); (outputs,)."""
    shift = torch.zeros(logits.shape[1], device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classification_loss(logits + shift, labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return shift.detach()


def merit(row: dict[str, Any]) -> tuple[float, float]:
    """Order epochs by validation AUC; a tie goes to the smaller loss."""
    return row["validation_auc"], -row["validation_loss"]


def cosine(progress: float) -> float:
    """Return the factor on a learning rate at a share `progress` of the way: from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))
