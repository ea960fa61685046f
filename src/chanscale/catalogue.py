"""Networks by name: our own backbones, and those of the libraries that are installed."""

import importlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.backbones import BACKBONES, Preprocessing, build_backbone, find_backbone, load_backbone
from chanscale.errors import ChanscaleError, ConfigError, WeightsError, one_line
from chanscale.files import is_file
from chanscale.headless import Logits
from chanscale.libraries import LIBRARIES, Library
from chanscale.safe_loading import bare_tensors
from chanscale.weight_sources import Progress

VOLUMES = "@3d"
"""How the name of a network for volumes ends."""


@dataclass(frozen=True)
class PretrainedNetwork:
    """A network with its weights, in eval and float32: a trunk of ours, or a classifier of a library.

    `name`: the one spelling of its name. `build_network(name, bare=True)` makes the same network with random weights
    (the classes aside), now and later, if `can_be_rebuilt`: not from a folder or a hub, which may be gone by then.
    `origin`: in words, where the weights are from. `random_layer`: the last layer, where there were no weights for it,
    or for other classes; see `check_head`.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    origin: str
    can_be_rebuilt: bool = True
    random_layer: str | None = None

    def check_head(self, head: str | None) -> None:
        """Raise WeightsError if a layer without pretrained weights stays when the layer `head` is taken off."""
        if self.random_layer not in (None, head):
            raise WeightsError(
                f"there are no pretrained weights for the layer {self.random_layer!r} of {self.name}, which is not "
                "its head; pass others with --weights FILE"
            )


def build_network(name: str, *, dimensions: int = 2, channels: int = 3, bare: bool = False) -> nn.Module:
    """Return the network called `name` with random weights: a backbone of ours, or `<library>:<network>`.

    A name that ends in `@3d` is that of the network for grey volumes, whatever `dimensions` and `channels` say.
    `transformers:` takes the name of a configuration (ResNet), or a folder or model of the hub, of which config.json
    is read. A backbone of ours gets a linear head, which it lacks, unless `bare`. Works on the meta device. Raises
    ConfigError when there is no such network, or when its library is not installed.
    """
    found = _find(name)
    if found is None:
        return build_backbone(name) if bare else _with_head(build_backbone(name))
    with _told(name):
        return _require_network(found.build(dimensions, channels), name)


def load_network(
    name: str, *, weights: Path | None = None, progress: Progress | None = None
) -> PretrainedNetwork:
    """Return the network called `name`, for RGB images, with pretrained weights and the preprocessing they go with.

    One whose name ends in `@3d` is for grey volumes; it takes a file of weights, and voxels in [0, 1] as they are.
    `weights`: a .safetensors state dict of the network, by its own names, in place of the weights that its library
    fetches (for a backbone of ours: any file with its published tensors); the preprocessing stays that of the library,
    or ImageNet's where it has none. Draws no random numbers. Raises ConfigError, WeightsError.
    """
    found = _find(name)
    if found is None:
        model, backbone = load_backbone(name, weights=weights, progress=progress), find_backbone(name)
        return PretrainedNetwork(name, model, backbone.preprocessing(), backbone.origin)
    progress = progress or (lambda *_: None)
    progress(f"loading {name}", 0, 1)
    with torch.random.fork_rng(devices=[]), _told(name), bare_tensors():
        network = _load(found, weights)
    progress(f"loading {name}", 1, 1)
    return network


def require_network(name: str) -> None:
    """Raise ConfigError unless `name` is that of a backbone of ours, or of a library that is installed."""
    _find(name)


def is_elsewhere(name: str) -> bool:
    """Tell whether a folder or a hub says what the network called `name` is, which building it would open."""
    library, _, network = name.partition(":")
    return library in LIBRARIES and LIBRARIES[library].is_elsewhere(network.removesuffix(VOLUMES))


def takes_volumes(name: str) -> bool:
    """Tell whether the network called `name` is for volumes."""
    return name.endswith(VOLUMES)


def require_kind(name: str, dimensions: int) -> None:
    """Raise ConfigError where the network called `name` is for pictures and the images are volumes, or the reverse.

    The name of an object's class says nothing.
    """
    named = name in BACKBONES or ":" in name
    if named and dimensions == 3 and not takes_volumes(name):
        raise ConfigError(
            f"the images are volumes, and {name} is for pictures; name a network for volumes, such as "
            f"monai:resnet10{VOLUMES}, or pass one of your own in Python"
        )
    if named and dimensions == 2 and takes_volumes(name):
        raise ConfigError(
            f"the images are pictures, and {name} is for volumes; leave {VOLUMES} out of its name"
        )


def require_weights(name: str, weights: Path | None) -> None:
    """Raise WeightsError where no `weights` are given for a network that none can be fetched for."""
    if takes_volumes(name) and name not in BACKBONES and weights is None:
        raise WeightsError(
            f"no weights of {name} can be fetched: pass its state dict as a .safetensors file with --weights FILE, "
            "or in Python a network of your own"
        )


def load_weights(model: nn.Module, path: Path) -> set[str]:
    """Load a .safetensors state dict into `model`, strictly by name; return the tensors of `model` that got none.

    Those can only be of its last layer, which may be missing from the file, or be for another number of classes.
    Raises WeightsError, which names the first tensor that is missing, unknown or of another shape.
    """
    tensors, wanted = _read(path), _bare(model).state_dict()
    last = _last_layer(_bare(model))
    excused = {
        name for name in wanted if name.startswith(f"{last}.") and _is_other_head(name, tensors, wanted)
    }
    # Counters of batches came late to torch: many files do without, and nothing in eval reads them.
    optional = excused | {name for name in wanted if name.endswith(".num_batches_tracked")}
    problems = [
        *_first("lacks", [name for name in wanted if name not in tensors and name not in optional]),
        *_first("has, unknown to the network,", [name for name in tensors if name not in wanted]),
        *_misshaped(tensors, wanted, excused),
    ]
    if problems:
        raise WeightsError(
            f"{path} does not fit {type(_bare(model)).__name__}: it {' and '.join(problems).rstrip(',')}. "
            "It must hold the state dict of this network, under the network's own names"
        )
    _bare(model).load_state_dict({k: v for k, v in tensors.items() if k not in excused}, strict=False)
    return {f"{'net.' if isinstance(model, Logits) else ''}{name}" for name in excused}


@dataclass(frozen=True)
class _Found:
    library: Library
    module: ModuleType
    network: str
    for_volumes: bool

    @property
    def name(self) -> str:
        spelt = self.library.spell(self.module, self.network)
        return f"{self.module.__name__}:{spelt}{VOLUMES if self.for_volumes else ''}"

    def build(self, dimensions: int, channels: int) -> nn.Module:
        size = (3, 1) if self.for_volumes else (dimensions, channels)
        return self.library.build(self.module, self.network, *size)


def _find(name: str) -> _Found | None:
    """Return what a name of a library's network stands for; None for a backbone of ours."""
    library, separator, network = name.partition(":")
    have = ", ".join((*sorted(BACKBONES), *(f"{source}:<network>" for source in sorted(LIBRARIES))))
    if not separator:
        if name not in BACKBONES:
            raise ConfigError(f"`backbone` must be one of {have}. Got {name!r} instead.")
        return None
    if library not in LIBRARIES:
        raise ConfigError(f"{library!r} is no source of networks; have {have}")
    if not network:
        raise ConfigError(f"{name!r} names no network; write {library}:<network>")
    if takes_volumes(name) and not LIBRARIES[library].has_volumes:
        have = ", ".join(source for source in sorted(LIBRARIES) if LIBRARIES[source].has_volumes)
        raise ConfigError(f"{library} has no networks for volumes; have {have}")
    return _Found(
        LIBRARIES[library], _import(library, name), network.removesuffix(VOLUMES), takes_volumes(name)
    )


def _load(found: _Found, weights: Path | None) -> PretrainedNetwork:
    library, module, network = found.library, found.module, found.network
    require_weights(found.name, weights)
    if weights is None:
        model, random = library.load(module, network)
    else:
        model = _require_network(found.build(2, 3), found.name)
        random = load_weights(model, weights)
    return PretrainedNetwork(
        name=found.name,
        model=_require_network(model, found.name).eval(),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,))
        if found.for_volumes
        else library.preprocess(module, network, model),
        origin=f"{found.name}, weights from {weights.name if weights else module.__name__}",
        can_be_rebuilt=not library.is_elsewhere(network),
        random_layer=_random_layer(found.name, model, random),
    )


def _import(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except Exception as error:  # torchvision raises a RuntimeError where it does not fit torch
        raise ConfigError(
            f"{name} needs {library}, which cannot be imported here: pip install {library}"
        ) from error


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a library raises into one line, and what it prints into a message that spoils no output."""
    library, _, network = name.partition(":")
    try:
        with redirect_stdout(sys.stderr):
            yield
    except ChanscaleError:
        raise
    except OSError as error:  # no network, no such file, no such model on the hub
        by_hand = LIBRARIES[library].by_hand
        raise WeightsError(f"cannot get {name} ({_brief(error)}). Without a network, {by_hand}") from error
    except Exception as error:  # whatever a library raises for a name it does not know
        raise ConfigError(f"{library} does not build {network!r}: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    return one_line(error)[:150].rstrip(".")


def _require_network(made: object, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} is no network, but a {type(made).__name__}; name a network")
    return made


def _with_head(trunk: nn.Module) -> nn.Module:
    width = trunk.get_submodule(_last_layer(trunk)).out_channels
    head = nn.Linear(cast(int, width), 2)
    return nn.Sequential(
        OrderedDict(trunk=trunk, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=head)
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path} must be a .safetensors file; make one with safetensors.torch.save_file(model.state_dict(), ...)"
        )
    if not is_file(path):
        raise WeightsError(f"no file at {path}")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({_brief(error)})") from error


def _bare(model: nn.Module) -> nn.Module:
    """Return the network whose names a file of weights has."""
    return model.net if isinstance(model, Logits) else model


def _last_layer(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]
    return names[-1] if names else ""


def _is_other_head(name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Tell whether a tensor of the last layer is missing, or differs in its classes alone."""
    if name not in tensors:
        return True
    here, there = wanted[name].shape, tensors[name].shape
    return here != there and here[1:] == there[1:]


def _first(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [f"{what} {names[0]!r}{more}"] if names else []


def _misshaped(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], excused: set[str]
) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name in wanted and name not in excused and tensor.shape != wanted[name].shape:
            yield f"has {name!r} of shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)},"
            return


def _random_layer(name: str, model: nn.Module, random: set[str]) -> str | None:
    """Return the last layer, if that is where the `random` tensors of `model` are. Raises WeightsError if not."""
    last = _last_layer(model)
    if elsewhere := sorted(tensor for tensor in random if not tensor.startswith(f"{last}.")):
        raise WeightsError(
            f"the weights of {name} are incomplete: none for {elsewhere[0]!r}, so it would stay random; "
            "pass others with --weights FILE"
        )
    return last if random else None
