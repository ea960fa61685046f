"""What could be removed from a network, before anything is trained: a row for each group of channels."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.channels import ChannelGroup
from chanscale.costs import count_positions
from chanscale.proof import channel_groups
from chanscale.slicing import INPUT_WIDTHS, OUTPUT_WIDTHS


@dataclass(frozen=True)
class GroupReport:
    """One group: its layers, its width, what its channels hold, and why they stay, if they have to.

    `parameters` and `macs` (for one image): what goes if every channel goes. Groups share the weights between them,
    so their sums count some weights twice.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    parameters: int
    macs: int
    protected: str | None


@dataclass(frozen=True)
class NetworkReport:
    """All groups of a network, and how many of its convolutions' parameters lie in those that are not protected."""

    groups: tuple[GroupReport, ...]
    conv_parameters: int
    prunable_parameters: int

    @property
    def prunable(self) -> float:
        """Share of the convolutions' parameters that lie in a group that is not protected."""
        return self.prunable_parameters / self.conv_parameters


def inspect_network(model: nn.Module, example: Tensor) -> NetworkReport:
    """Trace `model` with `example` (N, C, *), try every group, and say what each holds.

    Raises UnsupportedTopologyError when the model cannot be traced.
    """
    return describe_network(model, channel_groups(model, example), example)


def describe_network(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> NetworkReport:
    """Say what each of the `groups` of `model` holds."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))
    }
    positions = count_positions(model, layers, example)
    return NetworkReport(
        groups=tuple(_report(model, group, positions) for group in groups),
        conv_parameters=sum(conv.weight.numel() for _, conv in _convolutions(model)),
        prunable_parameters=_count_prunable(model, groups),
    )


def _report(model: nn.Module, group: ChannelGroup, positions: dict[str, int]) -> GroupReport:
    parameters = macs = 0
    for slots, axis in ((group.outputs, OUTPUT_WIDTHS), (group.inputs, INPUT_WIDTHS)):
        for slot in slots:
            layer = model.get_submodule(slot.layer)
            weights = [p.numel() for p in layer.parameters(recurse=False)]
            # A layer that has no such name (a layer norm) protects the group: all its channels are in it.
            width = next(
                (int(getattr(layer, name)) for name in axis if hasattr(layer, name)), len(slot.positions)
            )
            if axis is INPUT_WIDTHS and isinstance(layer, _ConvNd):
                width //= layer.groups  # which share the axis
            # Along the inputs there is the weight alone; a bias belongs to the outputs.
            parameters += (
                sum(weights if axis is OUTPUT_WIDTHS else weights[:1]) * len(slot.positions) // width
            )
            macs += sum(weights[:1]) * positions.get(slot.layer, 0) * len(slot.positions) // width
    return GroupReport(group.name, group.layers, group.width, parameters, macs, group.protected)


def _count_prunable(model: nn.Module, groups: Iterable[ChannelGroup]) -> int:
    """Return the number of convolution weights whose output or input channel can be removed."""
    outputs: dict[str, set[int]] = defaultdict(set)
    inputs: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        if group.protected is None:
            for slots, found in ((group.outputs, outputs), (group.inputs, inputs)):
                for slot in slots:
                    found[slot.layer].update(slot.positions)
    total = 0
    for name, conv in _convolutions(model):
        per_pair = conv.weight.numel() // (conv.out_channels * (conv.in_channels // conv.groups))
        stay_out = conv.out_channels - len(outputs[name])
        stay_in = conv.in_channels // conv.groups - len(inputs[name])
        total += conv.weight.numel() - stay_out * stay_in * per_pair
    return total


def _convolutions(model: nn.Module) -> Sequence[tuple[str, _ConvNd]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd)]
