"""The work that is timed: a training step on the first images of a run, and batches drawn anew."""

from time import perf_counter

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from chanscale.attaching import attach_scales
from chanscale.classifier import Classifier, classification_loss, lay_out
from chanscale.config import FitConfig, FixedPrecision
from chanscale.data.loading import BatchLoader, DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import make_fabric
from chanscale.modes import threads_given_back
from chanscale.proof import channel_groups
from chanscale.speed.choice import Choice
from chanscale.state import make_optimizer
from chanscale.training_mode import train_frozen

DRAWN = 2
"""Batches in a draw: fewer show the start of the threads more than their work."""


class TrainingStep:
    """A micro-batch that passes forth and back through the scaled network, as in training, at any choice.

    `model` is not changed: the copies share its frozen weights where their layout is the same.
    """

    def __init__(self, model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig) -> None:
        self._model, self._config = model, config
        self._images, self._labels = data.batch(splits.train[: config.micro_batch])
        self._groups = channel_groups(model, self._images)
        self._fabrics: dict[FixedPrecision, Fabric] = {}
        self._networks: dict[bool, tuple[Classifier, Optimizer]] = {}

    @property
    def images(self) -> int:
        """The images that a step passes."""
        return len(self._labels)

    def time(self, choice: Choice) -> float:
        """Return the seconds of a step at `choice`; inf where the machine cannot compute so."""
        try:
            return self._time(choice)
        except (
            RuntimeError,
            NotImplementedError,
        ):  # no kernel, or no memory; training, if it is chosen, says so
            return float("inf")

    def _time(self, choice: Choice) -> float:
        if choice.precision not in self._fabrics:
            config = self._config.model_copy(update={"precision": choice.precision})
            self._fabrics[choice.precision] = make_fabric(config)
        fabric = self._fabrics[choice.precision]
        cuda = [fabric.device] if fabric.device.type == "cuda" else []
        with threads_given_back(), torch.random.fork_rng(devices=cuda), fabric.autocast():
            if choice.threads is not None:
                torch.set_num_threads(choice.threads)
            network, optimizer = self.network(fabric.device, channels_last=choice.channels_last)
            images, labels = fabric.to_device((self._images, self._labels))
            _wait(fabric.device)
            began = perf_counter()
            _pass(network, images, labels)
            optimizer.zero_grad()
            _wait(fabric.device)
            return perf_counter() - began

    def network(self, device: torch.device, *, channels_last: bool) -> tuple[Classifier, Optimizer]:
        """Return the scaled network in a layout, and the optimizer of its scales and head."""
        if channels_last not in self._networks:
            scaled = lay_out(attach_scales(self._model, self._groups), channels_last=channels_last).to(device)
            # As of a head that has learnt: one of zeros would send nothing back.
            nn.init.constant_(scaled.head.linear.weight, 1 / scaled.head.linear.in_features)
            self._networks[channels_last] = train_frozen(scaled), make_optimizer(scaled, self._config)
        return self._networks[channels_last]


class Draws:
    """Batches of training images that are decoded anew, others each time: what a file system remembers is no speed."""

    def __init__(self, data: DecodedImages, splits: Splits, config: FitConfig) -> None:
        self._data, self._batch = data, config.batch_size
        self._rest = np.random.default_rng(config.seed).permutation(np.asarray(splits.train))

    @property
    def images(self) -> int:
        """The images of a draw."""
        return min(DRAWN * self._batch, len(self._rest))

    def time(self, workers: int) -> float:
        """Return the seconds of a draw by so many threads. Raises UnreadableImageError."""
        taken, self._rest = self._rest[: self.images], np.roll(self._rest, -self.images)
        loader = BatchLoader(self._data, taken, batch_size=self._batch, workers=workers)
        began = perf_counter()
        for _ in loader.epoch():
            pass
        return perf_counter() - began


def _pass(network: Classifier, images: Tensor, labels: Tensor) -> None:
    features = network.head.pool(network.feature_map(images))
    classification_loss(network.head(features), labels).mean().backward()  # type: ignore[no-untyped-call]


def _wait(device: torch.device) -> None:
    """Return when a GPU has computed what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
