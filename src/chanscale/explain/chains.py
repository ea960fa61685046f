"""The layers between the image and the last map, where they run one behind the other; found by watching a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from chanscale.modes import device_of, hooked, in_eval
from chanscale.scaling import SCALE, scale_of

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
PER_CHANNEL = (
    *POOLS, _BatchNorm, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
"""Layers each of whose channels is made of the same channel of their input."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Step:
    """A layer of a chain: its name, and itself."""

    name: str
    layer: nn.Module

    @property
    def convolves(self) -> bool:
        """Whether it mixes channels; the others of a chain do not."""
        return isinstance(self.layer, _ConvNd)


@dataclass(frozen=True)
class Chain:
    """Layers that run one behind the other, up to the last map.

    `stop`: why the first of them does not take the image, or None where it does.
    """

    steps: tuple[Step, ...]
    stop: str | None = None

    @property
    def convolutions(self) -> tuple[Step, ...]:
        """The steps that mix channels, in order."""
        return tuple(step for step in self.steps if step.convolves)

    def behind(self, name: str) -> tuple[Step, ...]:
        """Return the steps from the convolution `name` on, in front of the next convolution."""
        place = next(place for place, step in enumerate(self.steps) if step.name == name)
        later = [n for n, step in enumerate(self.steps) if step.convolves and n > place]
        return self.steps[place : later[0] if later else None]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what it was given and returned, and how often each had been written to by then.

    The tensors are held, so that no other can take their place in memory.
    """

    step: Step
    given: object
    given_version: int
    returned: object
    returned_version: int


@torch.no_grad()
def find_chain(trunk: nn.Module, inputs: Tensor, *, prefix: str = "") -> Chain:
    """Return the chain of layers that ends in what `trunk` makes of `inputs` (N, C, *), as long as it is certain.

    Watched, not guessed: a layer is the one before when the very tensor that it returned is what the next one takes,
    with nothing written into it in between. A sum, a concatenation or a function breaks the chain, and so does a
    layer that may mix channels. `prefix` goes before the names of layers.
    """
    inputs = inputs[:1].to(device_of(trunk))
    calls, last = _watch(trunk, inputs, prefix)
    wanted: object = last
    version, taker, steps = last._version, "the head", list[Step]()
    while not (wanted is inputs and version == inputs._version and not _maker(calls, wanted)):
        place = _maker(calls, wanted)
        reason = _find_break(calls[place - 1] if place else None, version, taker, steps)
        if reason:
            return Chain(tuple(steps), reason)
        call = calls[place - 1]
        steps.insert(0, call.step)
        calls, wanted, version, taker = calls[: place - 1], call.given, call.given_version, call.step.name
    return Chain(tuple(steps))


def _maker(calls: Sequence[_Call], wanted: object) -> int:
    """Return the place, from 1, of the last call that returned `wanted`; 0 for none."""
    return next((n for n in range(len(calls), 0, -1) if calls[n - 1].returned is wanted), 0)


def _find_break(call: _Call | None, version: int, taker: str, later: Sequence[Step]) -> str | None:
    if call is None or call.returned_version != version:
        return f"what {taker} takes is no single layer's output, but a sum, a concatenation, or a function's"
    layer = call.step.layer
    if not (isinstance(layer, PER_CHANNEL) or _is_plain_convolution(layer)):
        return f"{call.step.name} ({type(layer).__name__}) may mix channels in a way of its own"
    if call.step.convolves and any(step.layer is layer for step in later):
        return f"{call.step.name} is called more than once"
    return None


def _is_plain_convolution(layer: nn.Module) -> bool:
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in _CONVOLUTIONS)


def _watch(trunk: nn.Module, inputs: Tensor, prefix: str) -> tuple[list[_Call], Tensor]:
    """Run `trunk`; return the calls of its layers as they ended, and its output."""
    calls: list[_Call] = []
    given: dict[str, tuple[object, int]] = {}
    handles = []
    for name, layer in trunk.named_modules():
        if name.rpartition(".")[2] == SCALE or any(child != SCALE for child, _ in layer.named_children()):
            continue

        def before(_: nn.Module, args: tuple[object, ...], name: str = name) -> None:
            lone = args[0] if len(args) == 1 else None
            given[name] = lone, _version_of(lone)

        def after(layer: nn.Module, _: object, output: object, name: str = name) -> None:
            calls.append(_Call(Step(prefix + name, layer), *given[name], output, _version_of(output)))

        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with hooked(handles), in_eval(trunk):
        output: Tensor = trunk(inputs)
    return calls, output


def _version_of(value: object) -> int:
    return value._version if isinstance(value, Tensor) else -1


@torch.no_grad()
def gain_of(steps: Sequence[Step], channel: int) -> float:
    """Return what a convolution and the norms behind it multiply one channel by: its scale, and a norm's factor."""
    gain = 1.0
    for step in steps:
        layer = step.layer
        if isinstance(layer, _BatchNorm) and layer.running_var is not None:
            weight = 1.0 if layer.weight is None else float(layer.weight[channel])
            gain *= weight / float(layer.running_var[channel] + layer.eps) ** 0.5
        if scale := scale_of(layer):
            gain *= float(scale.weight[channel])
    return gain


@torch.no_grad()
def scale_behind(steps: Sequence[Step], channel: int) -> float | None:
    """Return the trained scale of one channel of a convolution, or None where none sits behind it."""
    scales = [scale for step in steps if (scale := scale_of(step.layer)) is not None]
    return float(scales[0].weight[channel]) if scales else None
