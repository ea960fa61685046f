"""The network that a run starts from: by name or an object of the user's own, without its head."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.backbones import BACKBONES, Preprocessing
from chanscale.catalogue import build_network, is_elsewhere, load_network
from chanscale.errors import ArtifactError, ModelError, clip
from chanscale.headless import Logits, remove_head, without_layer
from chanscale.modes import device_of
from chanscale.weight_sources import Progress


@dataclass(frozen=True)
class Original:
    """A pretrained trunk, and what is known of the network that it comes from.

    `name`: of a backbone or of a library's network, else the class of the object. `head`: the layer that was taken
    off, if one was. `full_parameters`: of the whole network, its own head included. `can_be_rebuilt`: by its name.
    """

    name: str
    trunk: nn.Module
    preprocessing: Preprocessing
    head: str | None
    full_parameters: int
    can_be_rebuilt: bool


def open_original(
    model: str | nn.Module,
    images: Tensor,
    *,
    preprocessing: Preprocessing | None = None,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Original:
    """Return the network called `model` with its pretrained weights, or the object `model`, without a head.

    `images`: (N, 1 or 3, *), pixels in [0, 1], to run it on. `preprocessing`: default, what the source of the network
    says; none for an object, which sees grey volumes in one channel if it takes one. An object is copied. Raises
    ConfigError, WeightsError, ModelError.
    """
    if isinstance(model, str) and model in BACKBONES:
        network = load_network(model, weights=weights, progress=progress)
        return Original(
            model,
            network.model,
            preprocessing or network.preprocessing,
            None,
            BACKBONES[model].full_parameters,
            True,
        )
    if isinstance(model, str):
        network = load_network(model, weights=weights, progress=progress)
        preprocessing = preprocessing or network.preprocessing
        headless = remove_head(network.model, preprocessing(images))
        network.check_head(headless.head)
        name, whole, can_be_rebuilt = network.name, network.model, network.can_be_rebuilt
    else:
        _require_plain(model)
        require_dimensions(model, images)
        preprocessing = preprocessing or _leave_as_it_is(model, images)
        headless = remove_head(model, preprocessing(images).to(device_of(model)))
        headless.trunk.cpu()
        name, whole, can_be_rebuilt = type(model).__name__, model, False
    full = sum(parameter.numel() for parameter in whole.parameters())
    return Original(name, headless.trunk, preprocessing, headless.head, full, can_be_rebuilt)


def _require_plain(model: nn.Module) -> None:
    """Raise ModelError where `model` is compiled, or does not compute in fp32."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript network cannot be scaled; pass the nn.Module that it was made of")
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if others := kinds - {torch.float32}:
        named = " and ".join(sorted(str(kind) for kind in others))
        raise ModelError(f"{type(model).__name__} has weights of {named}; pass it as fp32, `net.float()`")


def require_dimensions(model: nn.Module, images: Tensor) -> None:
    """Raise ModelError where no convolution of `model` is for as many dimensions as `images` (N, C, *) have."""
    kinds = {len(layer.kernel_size) for layer in _convolutions(model)}
    if kinds and images.dim() - 2 not in kinds:
        raise ModelError(
            f"{type(model).__name__} convolves in {min(kinds)} dimensions, and the images have {images.dim() - 2}; "
            "pictures need a network of 2, volumes of 3"
        )


def _leave_as_it_is(model: nn.Module, images: Tensor) -> Preprocessing:
    first = next(iter(_convolutions(model)), None)
    if images.dim() == 5 and first is not None and first.in_channels == 1:
        return Preprocessing(mean=(0.0,), std=(1.0,))
    return Preprocessing()


def _convolutions(model: nn.Module) -> list[_ConvNd]:
    return [module for module in model.modules() if isinstance(module, _ConvNd)]


def trunk_of(network: nn.Module, head: str | None) -> nn.Module:
    """Return `network` without its layer `head`; as it is, if that is off already. Raises ModelError."""
    if head is None:
        return network
    if head.startswith("net.") and not isinstance(getattr(network, "net", None), nn.Module):
        network = Logits(network)
    return without_layer(network, head)


def rebuild_trunk(name: str, head: str | None) -> nn.Module:
    """Return the trunk of the network called `name`, without its layer `head`; its weights mean nothing.

    The name may come from a file of anybody's: no folder and no hub is asked for it. Draws no random numbers. Raises
    ArtifactError for a network that one of these describes, ConfigError, ModelError.
    """
    if is_elsewhere(name):
        raise ArtifactError(
            f"a folder or a hub says what {clip(name)!r} is, and a file may not have one opened; fit it "
            "again, which leaves a program beside the model, or pass that network as `trunk` in Python"
        )
    if name in BACKBONES:
        with torch.device("meta"):  # shapes alone: no time or memory for weights that are replaced at once
            return BACKBONES[name].build()
    with torch.random.fork_rng(devices=[]):
        network = build_network(name, bare=True)
    return trunk_of(network, head)
