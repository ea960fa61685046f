"""Channels as people know them: the layer's published name, and the index in the original network."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd

from chanscale.artifact import ModelInfo
from chanscale.cutting_points import cut_trunk
from chanscale.errors import ChanscaleError, one_line
from chanscale.explain.chains import Step
from chanscale.originals import rebuild_trunk
from chanscale.slicing import output_width
from chanscale.vgg import vgg16_names
from chanscale.wording import printable

_TRUNK = "trunk."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelName:
    """One channel of a layer of the model: its `position` there, the layer's name, its index in the original.

    `text`: `conv5_3 #271 of 512`. `original` is None where the run does not tell it.
    """

    layer: str
    position: int
    original: int | None
    text: str


@dataclass(frozen=True)
class ChannelNames:
    """What the layers of a model are called, which channels they kept, and how many the originals had.

    `labels`: published names, by layer; others are called as in the network. `kept`: ascending original indices.
    """

    labels: Mapping[str, str]
    kept: Mapping[str, Sequence[int]]
    widths: Mapping[str, int]

    def name(self, layer: str, position: int) -> ChannelName:
        """Return the name of the channel at `position` of `layer`."""
        label = self.labels.get(layer, printable(layer.removeprefix(_TRUNK)))
        kept, whole = self.kept.get(layer), self.widths.get(layer)
        if kept is None or position >= len(kept):
            return ChannelName(layer, position, None, f"{label}, kept channel {position}")
        of = "" if whole is None else f" of {whole}"
        return ChannelName(layer, position, kept[position], f"{label} #{kept[position]}{of}")


def name_channels(info: ModelInfo, convolutions: Sequence[Step]) -> ChannelNames:
    """Return the names of the channels of these `convolutions` of the model that `info` describes."""
    widths = _original_widths(info)
    kept: dict[str, Sequence[int]] = dict(info.kept)
    for step in convolutions:
        width = output_width(step.layer)
        if step.name not in kept and widths.get(step.name) == width:
            kept[step.name] = range(width)  # whole, so nothing was renumbered
    _share_along_depthwise(kept, convolutions)
    return ChannelNames(_labels(info), kept, widths)


def _share_along_depthwise(kept: dict[str, Sequence[int]], convolutions: Sequence[Step]) -> None:
    """Give a depthwise convolution the indices of what feeds it, or the other way round: their channels are one."""
    for first, second in pairwise(convolutions):
        layer = second.layer
        if isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels:
            known = kept.get(first.name, kept.get(second.name))
            if known is not None:
                kept[first.name] = kept[second.name] = known


def _labels(info: ModelInfo) -> dict[str, str]:
    if info.backbone.rpartition(":")[2] != "vgg16":
        return {}
    names = vgg16_names(weight="{}", bias="{}")
    return {
        _TRUNK + name.removesuffix(".weight"): label.replace("block", "conv").replace("_conv", "_")
        for name, label in names.items()
        if name.endswith(".weight")
    }


def _original_widths(info: ModelInfo) -> dict[str, int]:
    """Return how many channels each convolution of the original network has; nothing for one that no name rebuilds."""
    if info.rebuilt_by != "name":
        return {}
    try:
        trunk = cut_trunk(rebuild_trunk(info.backbone, info.head), info.without)
    except ChanscaleError as error:  # a library that is not installed; names lack a number then
        _log.warning("the widths of %s are not known: %s", info.backbone, one_line(error)[:150])
        return {}
    return {_TRUNK + name: _width(layer) for name, layer in trunk.named_modules() if _width(layer)}


def _width(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, _ConvNd) else 0
