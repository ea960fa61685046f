"""The libraries that networks are taken from: one entry for each, with what it takes to build and to load.

None is imported before a network of it is asked for. No code of a hub is run, and no pickle read but for its tensors.
"""

import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chanscale.backbones import Preprocessing
from chanscale.errors import ConfigError
from chanscale.headless import Logits


@dataclass(frozen=True)
class Library:
    """What to do with the name that a network has in a library; `module` is the imported library.

    `build(module, network, dimensions, channels)`: the network with random weights, for as many classes as it likes.
    `load(module, network)`: with pretrained weights, for RGB images; and the names of the tensors that have none.
    `preprocess(module, network, model)`: what the pretrained network was trained on.
    `spell(module, network)`: the one spelling of its names. `is_elsewhere(network)`: its architecture is told by a
    folder, or by a hub, and not by the library. `has_volumes`: whether it builds networks in three dimensions.
    `by_hand`: how a person gets the weights.
    """

    build: Callable[[ModuleType, str, int, int], nn.Module]
    load: Callable[[ModuleType, str], tuple[nn.Module, set[str]]]
    preprocess: Callable[[ModuleType, str, nn.Module], Preprocessing]
    by_hand: str
    spell: Callable[[ModuleType, str], str] = lambda _, network: network
    is_elsewhere: Callable[[str], bool] = lambda _: False
    has_volumes: bool = False


def _imagenet(*_: Any) -> Preprocessing:
    return Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


# --- MONAI

_MONAI_PRETRAINED = re.compile(
    r"densenet(121|169|201)|seresne(x?)t50|seresnet(101|152)|seresnext101|senet154|efficientnet-b[0-7]", re.I
)
"""The 2-D networks that MONAI has ImageNet weights of; its ResNets' are for volumes."""


def _build_monai(
    monai: ModuleType,
    network: str,
    dimensions: int,
    channels: int,
    *,
    classes: int = 2,
    pretrained: bool = False,
) -> nn.Module:
    build, given = _find_monai(monai, network)
    wanted = {
        "spatial_dims": dimensions, "in_channels": channels, "n_input_channels": channels,
        "out_channels": classes, "num_classes": classes, "pretrained": pretrained,
    }  # fmt: skip
    known = _keywords(build)
    made: nn.Module = build(**given, **{key: value for key, value in wanted.items() if key in known})
    return made


def _load_monai(monai: ModuleType, network: str) -> tuple[nn.Module, set[str]]:
    if not _MONAI_PRETRAINED.fullmatch(network):
        raise ConfigError(
            f"MONAI has no pretrained weights of {network!r} for images: pass a .safetensors file with --weights FILE"
        )

    def build(*, pretrained: bool) -> nn.Module:
        torch.default_generator.manual_seed(0)
        return _build_monai(monai, network, 2, 3, classes=1000, pretrained=pretrained)

    model, random = build(pretrained=True), build(pretrained=False).state_dict()
    # MONAI passes over what it finds no weights for; the same seed shows what that was. Norms and biases may start
    # at the value that they end with.
    return model, {
        name
        for name, tensor in model.state_dict().items()
        if tensor.dim() > 1 and torch.equal(tensor, random[name])
    }


def _find_monai(monai: ModuleType, network: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    nets = importlib.import_module(f"{monai.__name__}.networks.nets")
    if network.lower().startswith("efficientnet-"):
        return nets.EfficientNetBN, {"model_name": network.lower()}
    return getattr(nets, network), {}


def _spell_monai(monai: ModuleType, network: str) -> str:
    build, given = _find_monai(monai, network)
    return str(given.get("model_name", build.__name__))


def _keywords(build: Callable[..., Any]) -> set[str]:
    """Return the keywords that a class, or a function that makes one, takes itself or hands on."""
    known = set(inspect.signature(build).parameters)
    if "kwargs" not in known:
        return known
    if inspect.isclass(build):
        makers = [
            base.__init__
            for base in build.__mro__[1:]
            if issubclass(base, nn.Module) and base is not nn.Module
        ]
    else:  # resnet18 and its like
        makers = [importlib.import_module(build.__module__).ResNet]
    return known.union(*(inspect.signature(maker).parameters for maker in makers))


# --- transformers


def _build_transformers(transformers: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions
    if _is_published(network):
        config = transformers.AutoConfig.from_pretrained(_place(network), trust_remote_code=False)
    else:
        config = getattr(transformers, f"{network}Config")(num_channels=channels)
    return Logits(
        transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False).float()
    )


def _load_transformers(transformers: ModuleType, network: str) -> tuple[nn.Module, set[str]]:
    if not _is_published(network):
        raise ConfigError(
            f"'transformers:{network}' has no weights: name a model of the hub or a folder, or pass --weights FILE"
        )
    model, found = transformers.AutoModelForImageClassification.from_pretrained(
        _place(network), use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    return Logits(model.float()), {f"net.{name}" for name in found["missing_keys"]}


def _preprocess_transformers(transformers: ModuleType, network: str, model: nn.Module) -> Preprocessing:
    del model
    if not _is_published(network):
        return _imagenet()
    file = transformers.utils.cached_file(_place(network), "preprocessor_config.json")
    return _from_processor(json.loads(Path(file).read_text(encoding="utf-8")))


def _from_processor(settings: Mapping[str, Any]) -> Preprocessing:
    """Return what an image processor of transformers does to pixels, given in 0 to 255, once they have their size."""
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = _three(settings, "image_mean"), _three(settings, "image_std")
    # Two settings of EfficientNet: pixels from -1, and divided by `std` once more.
    if settings.get("rescale_offset"):
        mean = [value + 1 for value in mean]
    if settings.get("include_top"):
        std = [value * more for value, more in zip(std, _three(settings, "image_std"), strict=True)]
    order = "bgr" if settings.get("do_flip_channel_order") else "rgb"
    return Preprocessing(order=order, scale=scale, mean=mean, std=std)  # type: ignore[arg-type]


def _three(settings: Mapping[str, Any], name: str) -> list[float]:
    value = settings.get(name)
    if value is None:
        raise ConfigError(f"preprocessor_config.json must say `{name}`, and does not; write it there")
    return list(value) if isinstance(value, list) else [value] * 3


def _is_published(network: str) -> bool:
    """Tell whether this is a model of the hub or a folder, which has a config.json, and not a kind of network."""
    return "/" in network or _is_folder(network)


def _is_folder(network: str) -> bool:
    return os.path.isdir(os.path.expanduser(network))  # noqa: PTH111, PTH112 - of no such user, Path's raises


def _place(network: str) -> str:
    """Return the whole path of a folder, or the name on the hub."""
    return str(Path(network).expanduser().resolve()) if _is_folder(network) else network


# --- timm


def _build_timm(timm: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions
    made: nn.Module = timm.create_model(network, pretrained=False, num_classes=2, in_chans=channels)
    return made


def _load_timm(timm: ModuleType, network: str) -> tuple[nn.Module, set[str]]:
    return timm.create_model(network, pretrained=True), set()


def _preprocess_timm(timm: ModuleType, network: str, model: Any) -> Preprocessing:
    del timm, network
    return Preprocessing(mean=tuple(model.pretrained_cfg["mean"]), std=tuple(model.pretrained_cfg["std"]))


def _is_elsewhere_for_timm(network: str) -> bool:
    """Tell whether timm asks a hub or a folder: `hf-hub:`, `hf_hub:`, `local-dir:`, in any spelling it may read."""
    source, colon, _ = network.partition(":")
    return bool(colon) and source != "timm"


# --- torchvision

_AS_TRAINED: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": True},
    "inception_v3": {"transform_input": True, "init_weights": True},
}
"""What torchvision switches when it loads weights; without it, the network built anew would be another."""


def _build_torchvision(torchvision: ModuleType, network: str, dimensions: int, channels: int) -> nn.Module:
    del dimensions, channels
    options = _AS_TRAINED.get(network.lower(), {})
    made: nn.Module = torchvision.models.get_model(network, weights=None, num_classes=2, **options)
    return made


def _load_torchvision(torchvision: ModuleType, network: str) -> tuple[nn.Module, set[str]]:
    return torchvision.models.get_model(network, weights="DEFAULT"), set()


def _preprocess_torchvision(torchvision: ModuleType, network: str, model: nn.Module) -> Preprocessing:
    del model
    transform = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    return Preprocessing(mean=tuple(transform.mean), std=tuple(transform.std))


_SAVE = "elsewhere save its state dict (safetensors.torch.save_file), and pass it with --weights FILE"

LIBRARIES: dict[str, Library] = {
    "monai": Library(
        build=_build_monai,
        load=_load_monai,
        preprocess=_imagenet,
        spell=_spell_monai,
        has_volumes=True,
        by_hand=_SAVE,
    ),
    "timm": Library(
        build=_build_timm,
        load=_load_timm,
        preprocess=_preprocess_timm,
        is_elsewhere=_is_elsewhere_for_timm,
        by_hand="download the model.safetensors of its page below https://huggingface.co/timm and pass --weights FILE",
    ),
    "torchvision": Library(
        build=_build_torchvision,
        load=_load_torchvision,
        preprocess=_preprocess_torchvision,
        spell=lambda _, network: network.lower(),
        by_hand=_SAVE,
    ),
    "transformers": Library(
        build=_build_transformers,
        load=_load_transformers,
        preprocess=_preprocess_transformers,
        spell=lambda _, network: _place(network),
        is_elsewhere=_is_published,
        by_hand="put config.json, preprocessor_config.json and model.safetensors into a folder, and name the folder",
    ),
}
"""Every library by the name it is imported by; a new one is an entry here."""
