"""What channels cost: parameters and multiply-accumulates of the weights that they are joined by."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.channels import ChannelGroup, Kept, removed_positions, shrink_groups
from chanscale.classifier import NOTHING, Classifier, LeftOut
from chanscale.heads import PooledHead
from chanscale.loose_weights import loose_weights
from chanscale.modes import device_of, hooked, in_eval

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LayerCost:
    """One layer: `taps` weights join each of its inputs to each of its outputs, at `places` in the map.

    `inputs` of each output: one for a depthwise convolution.
    """

    name: str
    outputs: int
    inputs: int
    taps: int
    bias: bool
    places: int


@dataclass(frozen=True)
class TrunkCost:
    """The convolutions and linear layers of a network in front of its head, and the groups of its channels.

    `left_out`: what the pretrained trunk had behind them. `loose`: the sizes of weights that are used otherwise, by
    name; they stay, and their MACs are not known.
    """

    layers: tuple[LayerCost, ...]
    groups: tuple[ChannelGroup, ...]
    left_out: LeftOut = NOTHING
    loose: Mapping[str, int] = field(default_factory=dict)

    def parameters(self, kept: Kept | None = None) -> int:
        """Weights and biases when only the channels `kept` stay; a group not named there is whole."""
        outputs, inputs = self._count(kept or {})
        return int((outputs * (inputs * self._of("taps") + self._of("bias"))).sum()) + sum(
            self.loose.values()
        )

    def macs(self, kept: Kept | None = None) -> int:
        """Multiply-accumulates for one image when only the channels `kept` stay."""
        outputs, inputs = self._count(kept or {})
        return int((outputs * inputs * self._of("taps") * self._of("places")).sum())

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels of each group that is not protected."""
        return {name: width for name, (_, width) in self._firsts.items()}

    def of(self, what: str, kept: Kept | None = None) -> int:
        """`parameters` or `macs`, by name."""
        return self.macs(kept) if what == "macs" else self.parameters(kept)

    def original(self, what: str) -> int:
        """`parameters` or `macs` of the pretrained trunk: what is left out of it counts."""
        return self.of(what) + (self.left_out.macs if what == "macs" else self.left_out.parameters)

    def limit(self, what: str, budget: float) -> float:
        """Return what may be left of the pretrained trunk when the `budget`, a share of it, is removed."""
        return (1 - budget) * self.original(what)

    def per_channel(self, what: str) -> dict[str, float]:
        """Return what the removal of one channel saves, the mean over each group that is not protected."""
        outputs, inputs = self._count({})
        each = self._of("taps") * (self._of("places") if what == "macs" else 1)
        along = {
            "outputs": each * inputs + (0 if what == "macs" else self._of("bias")),
            "inputs": each * outputs,
        }
        saved = np.zeros(self._channels)
        for axis, values in along.items():
            owners, starts = self._axes[axis]
            lengths = np.diff([*starts, len(owners)])
            np.add.at(saved, owners, np.repeat(values, lengths))
        return {
            name: float(saved[first : first + width].mean()) for name, (first, width) in self._firsts.items()
        }

    def keep(self, kept: Kept) -> "TrunkCost":
        """Return the cost of the network that has only the channels `kept` left."""
        gone = removed_positions(self.groups, kept)
        layers = tuple(
            replace(
                layer,
                outputs=layer.outputs - len(gone.get(("outputs", layer.name), ())),
                inputs=layer.inputs - len(gone.get(("inputs", layer.name), ())),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, groups=shrink_groups(self.groups, kept))

    def _count(self, kept: Kept) -> tuple[Numbers, Numbers]:
        """Return the number of outputs, and of inputs, that each layer has left."""
        alive = np.ones(self._channels, dtype=np.int64)
        for name, indices in kept.items():
            first, width = self._firsts[name]
            alive[first : first + width] = 0
            alive[first + indices.cpu().numpy()] = 1
        outputs, inputs = (
            np.add.reduceat(alive[owners], starts) if len(starts) else np.zeros(0, np.int64)
            for owners, starts in (self._axes["outputs"], self._axes["inputs"])
        )
        return outputs, inputs

    def _of(self, field: str) -> Numbers:
        return np.array([getattr(layer, field) for layer in self.layers], dtype=np.int64)

    @property
    def _channels(self) -> int:
        """The number of all channels of free groups; the last place stands for those that cannot go."""
        return sum(width for _, width in self._firsts.values()) + 1

    @cached_property
    def _firsts(self) -> dict[str, tuple[int, int]]:
        """Where the channels of each free group begin, when all lie in a row, and how many they are."""
        firsts, total = {}, 0
        for group in self.groups:
            if group.protected is None:
                firsts[group.name] = total, group.width
                total += group.width
        return firsts

    @cached_property
    def _axes(self) -> dict[str, tuple[Numbers, Numbers]]:
        """For each axis: the channel at every position of all layers in a row, and where each layer begins."""
        found = {}
        for axis in ("outputs", "inputs"):
            lengths = [getattr(layer, axis) for layer in self.layers]
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            owners = np.full(starts[-1], self._channels - 1, dtype=np.int64)
            place = dict(zip((layer.name for layer in self.layers), starts.tolist(), strict=False))
            for group in self.groups:
                for where, slot in group.slots():
                    if group.protected is None and where == axis and slot.layer in place:
                        first = self._firsts[group.name][0]
                        owners[place[slot.layer] + np.array(slot.positions)] = first + np.array(slot.channels)
            found[axis] = owners, starts[:-1]
        return found


def trunk_cost(model: nn.Module, groups: Iterable[ChannelGroup], example: Tensor) -> TrunkCost:
    """Cost the layers of `model` in front of its head; their output sizes are measured on `example` (N, C, *)."""
    heads = {head.linear for head in model.modules() if isinstance(head, PooledHead)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and module not in heads
    }
    places = count_positions(model, layers, example)
    # One that is never called costs nothing, unless its weight is used all the same.
    costs = [_cost(name, layer, places[name]) for name, layer in layers.items() if name in places]
    loose = loose_weights(model, [*heads, *(layers[cost.name] for cost in costs)], example)
    left_out = model.left_out if isinstance(model, Classifier) else NOTHING
    return TrunkCost(tuple(costs), tuple(groups), left_out, loose)


def _cost(name: str, layer: nn.Module, places: int) -> LayerCost:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, _ConvNd):
        outputs, inputs = layer.out_channels, layer.in_channels // layer.groups
    else:
        outputs, inputs = weight.shape
    return LayerCost(
        name, outputs, inputs, weight.numel() // (outputs * inputs), layer.bias is not None, places
    )


@torch.no_grad()
def count_positions(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, int]:
    """Return how often, for one image of `example` (N, C, *), each layer that is called applies its weights."""
    positions: dict[str, int] = {}

    def count(name: str) -> Hook:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counted = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
            width = counted.shape[-1] if isinstance(layer, nn.Linear) else counted.shape[1]
            positions[name] = positions.get(name, 0) + counted.numel() // (width * len(counted))

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    with hooked(handles), in_eval(model):
        model(example.to(device_of(model)))
    return positions
