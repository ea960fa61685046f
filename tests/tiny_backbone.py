"""A backbone of three convolutions with fixed random weights, for tests that fit a model in a second."""

import torch
from torch import nn

from chanscale import weights
from chanscale.backbones import BACKBONES, Backbone, Preprocessing

NAME = "tiny"
WIDTHS = {"trunk.features.0": 8, "trunk.features.3": 16, "trunk.features.6": 16}


class TinyTrunk(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in WIDTHS.values():
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.features(x)


def fixed_weights(name, *, path=None, progress=None):
    """Stand in for `weights.resolve_weights`: the same random numbers each time, from no file."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TinyTrunk().state_dict()


def register(setitem=dict.__setitem__, setattribute=setattr) -> None:
    """Make `--backbone tiny` work, with pytest's monkeypatch or for the whole process."""
    trunk = sum(tensor.numel() for tensor in fixed_weights(NAME).values())
    entry = Backbone(NAME, TinyTrunk, Preprocessing, 2 * trunk, trunk, "MIT", "here")
    setitem(BACKBONES, NAME, entry)
    setattribute(weights, "resolve_weights", fixed_weights)
