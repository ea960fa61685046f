"""What channels cost: parameters and multiply-accumulates of the convolutions, as a function of the widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from chanscale.channels import ChannelGroup
from chanscale.modes import in_eval

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]

Widths = Mapping[str, int]
"""Channels kept in each group, by the group's name."""


@dataclass(frozen=True)
class ConvCost:
    """One convolution: `taps` weights join each input channel to each output channel.

    `source` is the group that feeds it (none: the image), `outputs` its own width where that is fixed.
    """

    name: str
    source: str | None
    inputs: int
    outputs: int
    taps: int
    bias: bool
    positions: int

    def parameters(self, widths: Widths) -> int:
        """Weights and biases left at `widths`."""
        inputs = widths.get(self.source or "", self.inputs)
        outputs = widths.get(self.name, self.outputs)
        return inputs * outputs * self.taps + outputs * self.bias

    def macs(self, widths: Widths) -> int:
        """Multiply-accumulates for one image at `widths`."""
        inputs = widths.get(self.source or "", self.inputs)
        return inputs * widths.get(self.name, self.outputs) * self.taps * self.positions


@dataclass(frozen=True)
class TrunkCost:
    """The convolutions of a network, costed together."""

    convolutions: tuple[ConvCost, ...]

    def parameters(self, widths: Widths | None = None) -> int:
        """Weights and biases of all convolutions at `widths`; a group not named there is whole."""
        return sum(conv.parameters(widths or {}) for conv in self.convolutions)

    def macs(self, widths: Widths | None = None) -> int:
        """Multiply-accumulates for one image, of all convolutions, at `widths`."""
        return sum(conv.macs(widths or {}) for conv in self.convolutions)

    def of(self, what: str, widths: Widths | None = None) -> int:
        """`parameters` or `macs`, by name."""
        return self.macs(widths) if what == "macs" else self.parameters(widths)

    def per_channel(self, what: str, widths: Widths) -> dict[str, int]:
        """What the removal of one more channel of each group saves, at `widths`."""
        whole = self.of(what, widths)
        return {name: whole - self.of(what, {**widths, name: width - 1}) for name, width in widths.items()}


def trunk_cost(model: nn.Module, groups: tuple[ChannelGroup, ...], example: Tensor) -> TrunkCost:
    """Cost the convolutions of `model`, whose output sizes are measured on `example` (N, C, H, W)."""
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    positions = count_positions(model, convolutions, example)
    sources = {consumer: group.name for group in groups for consumer in group.consumers}
    return TrunkCost(
        tuple(
            ConvCost(
                name=name,
                source=sources.get(name),
                inputs=conv.in_channels,
                outputs=conv.out_channels,
                taps=conv.kernel_size[0] * conv.kernel_size[1],
                bias=conv.bias is not None,
                positions=positions[name],
            )
            for name, conv in convolutions.items()
            if name in positions  # one that is never called costs nothing
        )
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
    try:
        with in_eval(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return positions
