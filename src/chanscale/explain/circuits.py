"""What feeds a channel: traced back through the convolutions, the strongest first."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.explain.chains import Chain, Step, gain_of
from chanscale.explain.naming import ChannelName, ChannelNames
from chanscale.modes import hooked
from chanscale.wording import percent

Means = Mapping[str, Tensor]
"""Mean size of each channel (C,) of what a convolution takes in, over images and positions, by its name."""

IMAGE = "these are the colours of the image"
"""Why the first convolution has no feeders."""


@dataclass(frozen=True)
class Circuit:
    """A channel, and those that feed it, strongest first, each with what feeds it in turn.

    `strength`: the size of the weights between the two x the scale of the fed channel x the mean activation of the
    feeder over the images given: how much it could move its target, not what it does on one image, where terms of
    both signs cancel. `share`: of the sum over all feeders. `excites`: whether the sum of the weights, scale
    included, is positive. `stop`: why nothing is said of what feeds it; None where `feeders` say, or where the depth
    asked for ends.
    """

    channel: ChannelName
    strength: float | None = None
    share: float | None = None
    excites: bool | None = None
    feeders: tuple["Circuit", ...] = ()
    stop: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the tree, a line for each channel."""
        return "\n".join(_lines(self, "", ""))


def averaging_inputs(chain: Chain, sums: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Add up in `sums`, while the context lasts, the mean size of each image's inputs to each convolution."""

    def add(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            sizes = given[0].detach().double().abs().flatten(2).mean(2).sum(0).cpu()
            sums[name] = sums[name] + sizes if name in sums else sizes

        return hook

    return hooked([step.layer.register_forward_pre_hook(add(step.name)) for step in chain.convolutions])


def trace_back(
    chain: Chain, means: Means, names: ChannelNames, channel: int, *, top: int = 3, depth: int = 3
) -> Circuit:
    """Return the circuit of a channel of the last map: the `top` feeders of each channel, `depth` layers back."""
    convolutions = chain.convolutions
    if not convolutions:
        name = ChannelName("", channel, None, f"the last map, channel {channel}")
        return Circuit(name, stop=chain.stop)
    feeders, stop = _find_feeders(chain, means, names, len(convolutions) - 1, channel, top, depth)
    return Circuit(names.name(convolutions[-1].name, channel), feeders=feeders, stop=stop)


def _find_feeders(
    chain: Chain, means: Means, names: ChannelNames, place: int, channel: int, top: int, depth: int
) -> tuple[tuple[Circuit, ...], str | None]:
    """Return the feeders of a channel of the convolution at `place` of the chain, and why there are none."""
    if place == 0 or depth == 0:
        return (), (chain.stop or IMAGE) if place == 0 else None
    step, before = chain.convolutions[place], chain.convolutions[place - 1]
    sources, strengths, signs = feeding(chain, step, means[step.name], channel)
    total = max(float(strengths.sum()), 1e-300)  # of a channel that nothing feeds, each share is 0
    found = []
    for index in strengths.argsort(descending=True, stable=True)[:top].tolist():
        feeders, stop = _find_feeders(chain, means, names, place - 1, sources[index], top, depth - 1)
        name, strength = names.name(before.name, sources[index]), float(strengths[index])
        found.append(Circuit(name, strength, strength / total, bool(signs[index] > 0), feeders, stop))
    return tuple(found), None


@torch.no_grad()
def feeding(chain: Chain, step: Step, mean: Tensor, channel: int) -> tuple[range, Tensor, Tensor]:
    """Return which input channels one channel of a convolution sees, and how strongly: strengths, and signed sums."""
    layer = step.layer
    assert isinstance(layer, _ConvNd)
    gain = gain_of(chain.behind(step.name), channel)
    weights = layer.weight[channel].double().cpu().flatten(1)
    width = len(weights)  # of a grouped convolution, the inputs of this channel's group alone
    first = channel // (layer.out_channels // layer.groups) * width
    sources = range(first, first + width)
    seen = mean[first : first + width]
    return sources, weights.abs().sum(1) * abs(gain) * seen, weights.sum(1) * gain * seen


def _lines(circuit: Circuit, first: str, rest: str) -> list[str]:
    told = circuit.channel.text
    if circuit.share is not None:
        told = f"{told}  {'+' if circuit.excites else '−'} {percent(circuit.share)}"
    if circuit.stop is not None:
        told = f"{told}  ({circuit.stop})"
    lines = [first + told]
    for feeder in circuit.feeders:
        last = feeder is circuit.feeders[-1]
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        lines += _lines(feeder, rest + branch, rest + below)
    return lines
