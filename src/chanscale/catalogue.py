"""Networks by name: our own backbones, and those of the libraries that are installed. One entry for each source."""

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chanscale.backbones import BACKBONES, build_backbone
from chanscale.errors import ConfigError, one_line

Build = Callable[[ModuleType, str, int, int], nn.Module]
"""Makes a network of a library: (library, name, dimensions, input channels) -> a classifier of two classes."""


def build_network(name: str, *, dimensions: int = 2, channels: int = 3) -> nn.Module:
    """Return the network called `name` with random weights: a backbone of ours, or `<library>:<network>`.

    Raises ConfigError when there is none, or when its library is not installed.
    """
    library, _, network = name.partition(":")
    if not network:
        return _with_head(name)
    if library not in SOURCES:
        raise ConfigError(
            f"{library!r} is no source of networks; have {', '.join(sorted((*BACKBONES, *SOURCES)))}"
        )
    try:
        module = importlib.import_module(library)
    except Exception as error:  # torchvision raises a RuntimeError where it does not fit torch
        raise ConfigError(
            f"{name} needs {library}, which cannot be imported here: pip install {library}"
        ) from error
    try:
        return SOURCES[library](module, network, dimensions, channels)
    except Exception as error:  # whatever a library raises for a name it does not know
        reason = one_line(error)[:150]
        raise ConfigError(f"{library} does not build {network!r}: {reason}") from error


def _with_head(name: str) -> nn.Module:
    trunk = build_backbone(name)
    return nn.Sequential(
        trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(trunk(torch.zeros(1, 3, 64, 64)).shape[1], 2)
    )


def _monai(library: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    build = getattr(importlib.import_module(f"{library.__name__}.networks.nets"), network)
    wanted = {
        "spatial_dims": dimensions, "dimensions": dimensions, "in_channels": channels,
        "n_input_channels": channels, "out_channels": 2, "num_classes": 2, "pretrained": False,
    }  # fmt: skip
    known = set(inspect.signature(build).parameters)
    if "kwargs" in known:  # resnet18 and its like hand theirs on
        known |= {"spatial_dims", "n_input_channels" if network.startswith("resnet") else "in_channels"}
    made: nn.Module = build(**{key: value for key, value in wanted.items() if key in known})
    return made


def _transformers(library: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions, channels
    config = getattr(library, f"{network}Config")()
    return _Logits(getattr(library, f"{network}ForImageClassification")(config))


def _timm(library: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions
    made: nn.Module = library.create_model(network, pretrained=False, num_classes=2, in_chans=channels)
    return made


def _torchvision(library: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions, channels
    made: nn.Module = library.models.get_model(network, weights=None, num_classes=2)
    return made


class _Logits(nn.Module):
    """A transformers classifier that returns its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x).logits


SOURCES: dict[str, Build] = {
    "monai": _monai, "transformers": _transformers, "timm": _timm, "torchvision": _torchvision,
}  # fmt: skip
"""How to build a network of each library; a new one is an entry here."""
