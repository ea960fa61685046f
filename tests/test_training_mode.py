"""Networks that do something else in training than in eval, and those that draw at random."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chanscale.errors import ModelError
from chanscale.pipeline import scale_and_select
from chanscale.progress import Watcher
from networks import randomise
from tiny_fits import tiny_config, tiny_images

IMAGES = tiny_images().images


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def fit(trunk, **options):
    return scale_and_select(randomise(trunk), IMAGES, config=tiny_config(test=0.0, validation=0.4), **options)


class Auxiliary(nn.Module):
    """A trunk with a second head that training alone has use for; it is returned, or kept as a loss."""

    def __init__(self, *, returned):
        super().__init__()
        self.stem, self.body, self.returned = block(3, 16), block(16, 8), returned
        self.aux = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
        self.aux(torch.zeros(1, 16, 32, 32))

    def forward(self, x):
        x = self.stem(x)
        if not self.training:
            return self.body(x)
        aux = self.aux(x)
        return (self.body(x), aux) if self.returned else self.body(x)


@pytest.mark.parametrize("returned", [True, False])
def test_an_auxiliary_head_is_refused_before_anything_is_trained(returned):
    with pytest.raises(ModelError, match=r"calls 'aux' in training alone; switch such auxiliary outputs off"):
        fit(Auxiliary(returned=returned))


class Pair(nn.Module):
    """A trunk that returns two tensors in training, of the same layers."""

    def __init__(self):
        super().__init__()
        self.body = block(3, 8)

    def forward(self, x):
        return (self.body(x), x) if self.training else self.body(x)


def test_a_network_that_returns_something_else_in_training_is_refused():
    with pytest.raises(ModelError, match=r"returns tuple in training, and \(2, 8, 32, 32\) in eval"):
        fit(Pair())


class OwnNorm(nn.Module):
    """A batch norm of its user's own, with running statistics that it renews in training."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=self.training, momentum=0.1)


def test_a_norm_of_ones_own_keeps_its_statistics():
    run = fit(nn.Sequential(block(3, 16), block(16, 16), OwnNorm(16), nn.ReLU()))
    (norm,) = [module for module in run.model.modules() if isinstance(module, OwnNorm)]
    assert torch.equal(norm.mean, torch.zeros(16))
    assert torch.equal(norm.variance, torch.ones(16))


class SkippedAtRandom(nn.Module):
    """Stochastic depth, drawn by Python's generator or NumPy's."""

    def __init__(self, draw):
        super().__init__()
        self.stem, self.blocks, self.draw = block(3, 16), nn.ModuleList(block(16, 16) for _ in range(3)), draw

    def forward(self, x):
        x = self.stem(x)
        for layer in self.blocks:
            if not (self.training and self.draw() < 0.5):
                x = x + layer(x)
        return x


class StoppedError(Exception):
    pass


class StopsAfterTwo(Watcher):
    def on_epoch(self, moment, row):  # noqa: ARG002
        if moment.epoch == 1:
            raise StoppedError


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand()], ids=["random", "numpy"])
def test_layers_that_are_skipped_at_random_are_skipped_alike_when_a_run_is_resumed(tmp_path, draw):
    def make():
        torch.manual_seed(0)
        return SkippedAtRandom(draw)

    whole = fit(make(), out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        fit(make(), out=tmp_path / "run", watcher=StopsAfterTwo())
    random.seed(7)
    np.random.seed(7)
    resumed = fit(make(), out=tmp_path / "run", resume=True)
    losses = [[row["train_loss"] for row in run.history] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_what_a_fit_draws_is_not_drawn_from_its_user():
    random.seed(5)
    np.random.seed(5)
    wanted = [(random.random(), np.random.rand()) for _ in range(2)]
    random.seed(5)
    np.random.seed(5)
    got = [(random.random(), np.random.rand())]
    fit(SkippedAtRandom(lambda: random.random() + np.random.rand()))
    got.append((random.random(), np.random.rand()))
    assert got == wanted
