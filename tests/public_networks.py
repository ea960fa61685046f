"""Small backbones that are registered as public ones, and models that were scaled and pruned from them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from chanscale import weights
from chanscale.artifact import ModelInfo, save_model
from chanscale.backbones import BACKBONES, Backbone, load_backbone
from chanscale.classifier import Classifier, to_channels_last
from chanscale.cutting_points import cut_trunk
from chanscale.folding import fold_grey
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from networks import (
    PREPROCESSING,
    attach,
    build_classifier,
    describe,
    grouped_trunk,
    late_norm_trunk,
    norm_trunk,
    plain_trunk,
    randomise,
    renew_statistics,
    set_scales,
)

NAME = "small"


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow, and add the input, as EfficientNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.head(y + self.block(y))


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_trunk,
    "batch norm": norm_trunk,
    "norm behind the ReLU": late_norm_trunk,
    "grouped": grouped_trunk,
    "depthwise": Block,
}


def register(monkeypatch, trunk: str = "plain", *, seed: int = 1) -> None:
    """Make a network of the table the backbone `NAME`, with the same random weights each time."""

    def published(name, *, path=None, progress=None):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = randomise(TRUNKS[trunk]()).state_dict()
        return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}

    size = sum(tensor.numel() for tensor in published(NAME).values())
    entry = Backbone(NAME, TRUNKS[trunk], lambda: PREPROCESSING, size, size, "MIT", "drawn at random")
    monkeypatch.setitem(BACKBONES, NAME, entry)
    monkeypatch.setattr(weights, "resolve_weights", published)


def build_model(*, without: tuple[str, ...] = (), folded: bool = False) -> tuple[Classifier, ModelInfo]:
    """Return a scaled and pruned model of the registered backbone, and what its file says of it."""
    model = attach(build_classifier(cut_trunk(load_backbone(NAME), without)))
    kept = dict(set_scales(model).kept)
    model = to_channels_last(renew_statistics(prune_channels(model, ChannelSelection(kept))))
    if folded:
        model = fold_grey(model, torch.rand(2, 1, 32, 32))
    info = replace(describe(model, kept, backbone=NAME), without=without, channels=1 if folded else 3)
    return model, info


def save_run(folder: Path, **options) -> Path:
    """Write the model of `build_model` to a run folder; return the folder."""
    folder.mkdir()
    save_model(*build_model(**options), folder / "model.safetensors")
    return folder
