"""What every way of training shares: batches, gradients, statistics and validation."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from chanscale.classifier import Classifier, class_weights, classification_loss, probabilities
from chanscale.config import FitConfig
from chanscale.data.augmentation import augment
from chanscale.data.loading import Batch, BatchLoader, DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import make_fabric
from chanscale.errors import TrainingError
from chanscale.metrics import mean_auc
from chanscale.modes import device_of
from chanscale.probe import set_head_statistics
from chanscale.progress import Watcher
from chanscale.team import Portion, merge_parts, own_parts, share_gradients, sum_gradients
from chanscale.training_mode import repeatable, seed_generators

FULL_EPOCH = 20
"""Fewer batches than this leave an epoch too short to learn in; images are then taken repeatedly."""

SAMPLE = 200
"""Training images that the head's statistics are taken from: they place a mean within 7 % of a deviation."""


class Learner:
    """The images of a run and the device it runs on; knows how to pass a batch forth and back.

    `recompute`: the share of a step whose maps are not kept for its gradients, but computed again.
    """

    recompute = 0.0

    def __init__(self, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher) -> None:
        self.data, self.config, self.watcher = data, config, watcher
        self.fabric = make_fabric(config)
        repeats = count_repeats(len(splits.train), config.batch_size)
        self.train = BatchLoader(
            data, np.tile(splits.train, repeats), batch_size=config.batch_size, shuffle=True, seed=config.seed,
            workers=config.decoders,
        )  # fmt: skip
        self.judging = Portion(splits.validation)
        self.validation = BatchLoader(
            data, self.judging.own, batch_size=config.micro_batch, workers=config.decoders
        )
        self.sample = splits.train[:: -(-len(splits.train) // SAMPLE)]
        self.example = data.batch(splits.validation[:2])[0]
        labels, classes = data.images.labels[np.asarray(splits.train)], len(data.images.classes)
        self.weights = class_weights(labels, classes) if config.balance else None

    def start_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of `epoch`; layers that draw at random draw what that epoch would draw."""
        seed_generators(int(np.random.SeedSequence((self.config.seed, epoch)).generate_state(1)[0]))
        return self.train.epoch(epoch)

    def backward(self, model: Classifier, batch: Batch, epoch: int, done: int) -> float:
        """Add the gradients of batch `done` of an epoch; return its mean loss.

        The trunk computes a few images at a time, forth and back, which keeps the passing maps small; the head sees
        all, since it takes their statistics. Of several processes, each has some of these parts, and the head of all.
        Raises TrainingError when the loss is not finite.
        """
        images, labels = self.fabric.to_device((self._augment(batch.images, epoch, done), batch.labels))
        with self.fabric.autocast():
            parts = images.split(self.config.micro_batch)
            own = self._read(model, own_parts(parts))
            loss = classification_loss(model.head(merge_parts(own, parts)), labels, self.weights).mean()
        try:
            self.fabric.backward(loss)
        except CheckpointError as error:
            raise TrainingError(
                "the network computes something else when it is called again; use --recompute 0"
            ) from error
        self._merge_gradients(model)
        total = float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {total} in epoch {epoch}; use --precision 32-true, or a lower --head-lr"
            )
        return total

    def _read(self, model: Classifier, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the pooled features (N, C) of each part of a batch.

        Maps are kept for the gradients of the last ones alone; those of the others are computed again when it is
        their turn, and gradients come from the last to the first (Chen et al. 2016, section 3). That of the last part
        is at once: to forget it would save nothing.
        """

        def read(part: Tensor) -> Tensor:
            return model.head.pool(model.feature_map(part))

        # PyTorch does not take the random generator of MPS back, and another dropout would be drawn.
        wanted = 0 if device_of(model).type == "mps" else round(self.recompute * len(parts))
        forgotten = max(0, min(wanted, len(parts) - 1))
        first = [checkpoint(repeatable(read), part, use_reentrant=False) for part in parts[:forgotten]]
        return [*first, *(read(part) for part in parts[forgotten:])]

    def _merge_gradients(self, model: Classifier) -> None:
        head = list(model.head.parameters())
        ours = {id(parameter) for parameter in head}
        sum_gradients(p for p in model.parameters() if p.requires_grad and id(p) not in ours)
        share_gradients(head)

    def set_statistics(self, model: Classifier) -> None:
        """Renew the statistics of the head of `model`, in place."""
        with self.fabric.autocast():
            set_head_statistics(model, self.data, self.sample, batch_size=self.config.micro_batch)

    def settle(self, model: Classifier) -> None:
        """Renew the statistics of the head of `model`, in place, for inference, which is in fp32.

        bf16 rounds a feature by up to 0.4 % of its size, which can be several of its deviations: statistics taken
        in bf16 shift every logit of an fp32 network.
        """
        set_head_statistics(model, self.data, self.sample, batch_size=self.config.micro_batch)

    def validate(self, model: Classifier) -> dict[str, float]:
        """Return the loss and the AUC on the validation images."""
        with self.fabric.autocast():
            logits, labels = self._validation_logits(model)
        if not logits.isfinite().all():
            raise TrainingError(
                "the outputs on the validation images are not finite; use --precision 32-true, or a lower --head-lr"
            )
        shares = probabilities(logits, multilabel=model.multilabel)
        auc = mean_auc(shares.cpu().numpy(), labels.cpu().numpy())
        return {"validation_loss": float(classification_loss(logits, labels).mean()), "validation_auc": auc}

    def centre(self, model: Classifier) -> None:
        """Move the intercept of the head, in place, to where the validation images have the least loss, in fp32.

        The epoch is chosen by AUC; what is called positive, at a probability of 0.5, needs an intercept. With more
        than two classes none is fitted: the intercepts then decide which class wins, and change the AUC too. But where
        the loss was weighed by class, they have to be: the odds are no longer those of the images. Several labels have
        an intercept each.
        """
        if model.head.linear.out_features > 1 and not model.multilabel and not self.config.balance:
            return
        shift = fit_intercept(*self._validation_logits(model))
        with torch.no_grad():
            model.head.linear.bias.add_(shift)

    @torch.no_grad()
    def _validation_logits(self, model: Classifier) -> tuple[Tensor, Tensor]:
        model.eval()
        logits = [model(self.fabric.to_device(batch.images)) for batch in self.validation.epoch()]
        labels = self.data.labels[list(self.judging.indices)]
        return self.judging.gather(torch.cat(logits)), self.fabric.to_device(labels)

    def _augment(self, images: Tensor, epoch: int, done: int) -> Tensor:
        if not self.config.augment:
            return images
        # Seeded by the place in the run: a resumed run draws what an undisturbed one would have.
        seed = np.random.SeedSequence((self.config.seed, epoch, done)).generate_state(1)[0]
        return augment(images, generator=torch.Generator().manual_seed(int(seed)))


def count_repeats(images: int, batch_size: int) -> int:
    """Return how often an epoch takes each of the training images."""
    return max(1, round(FULL_EPOCH * batch_size / images))


def fit_intercept(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the shift of `logits` (N, outputs) with the least cross-entropy on `labels` (N,) or (N, K); (outputs,)."""
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
