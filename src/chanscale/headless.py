"""Take the head off a classifier: run it, find the layer that makes its logits, and put nothing in its place.

Only that layer goes. Of a network with several fully connected layers (VGG16: flatten, then three of them) the others
stay, and they hold most of its parameters: pass such a network's convolutions instead, `model.features`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from chanscale.errors import ModelError, one_line
from chanscale.modes import hooked

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
}
"""What makes probabilities of (N, K) logits; behind one of these nothing can be trained as if they were logits."""


@dataclass(frozen=True)
class Headless:
    """A network that returns features, (N, F) or a map (N, C, *), and the name of the layer that was taken off it.

    `head` is None where there was none. `trunk` is a copy, in eval; its other layers have the names that they had
    (with `net.` before them where the logits came within an output of transformers).
    """

    trunk: nn.Module
    head: str | None


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        """Return the logits (N, K) of pixels (N, C, H, W)."""
        return self.net(x).logits


@torch.no_grad()
def remove_head(model: nn.Module, example: Tensor) -> Headless:
    """Return a copy of `model`, in eval, that returns the features which its logits are made of.

    `example`: (N, C, *), of a size that the model takes. The head is the last layer called, if it is linear and its
    output is what the model returns, or a 1x1 convolution whose pooled output is (SqueezeNet). A model that returns a
    feature map, or features that no such layer made, has none. Raises ModelError when the model does not run, returns
    something else, or ends in a softmax or a sigmoid.
    """
    net, output, last = _run(_copy(model), example)
    _require_features(net, example, output)
    if output.dim() > 2:
        return Headless(net, None)
    if last is None or not last.made(output):
        _refuse_probabilities(net, last, output)
        return Headless(net, None)
    head = _name(net, last)
    _take_off(net, head)
    _check_features(net, example, last, output)
    return Headless(net, head)


def without_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of `model`, in eval, with nothing in place of the layer `name`, under all names that it has.

    Given the `head` of a `Headless`, this makes its trunk again without running anything, also on the meta device.
    Raises ModelError when there is no such layer.
    """
    net = _copy(model)
    _take_off(net, name)
    return net


@dataclass(frozen=True)
class _Last:
    """The last layer called, if it can be a head: how often it was called, and a copy of what came out at last."""

    layer: nn.Linear | _ConvNd
    output: Tensor
    calls: int

    @property
    def inputs(self) -> int:
        return self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels

    def made(self, output: Tensor) -> bool:
        """Tell whether `output`, (N, K), is that of the layer, or was pooled from it."""
        if isinstance(self.layer, nn.Linear):
            return _is_same(self.output, output)
        return any(_is_close(logits, output) for logits in self.logits())

    def logits(self) -> Iterator[Tensor]:
        """Give all (N, K) that networks make of the layer's output: as it is, or with a ReLU and a pooling."""
        if isinstance(self.layer, nn.Linear):
            yield self.output
            return
        maps = self.output.flatten(2)
        yield from (maps.mean(2), maps.amax(2), maps.relu().mean(2), maps.amax(2).relu(), maps.mean(2).relu())


class _Recorder:
    """A forward hook for all layers that keeps what the last of them did."""

    def __init__(self) -> None:
        self.last: _Last | None = None
        self._calls: dict[nn.Module, int] = {}

    def __call__(self, layer: nn.Module, _: Any, output: Any) -> None:
        self._calls[layer] = calls = self._calls.get(layer, 0) + 1
        # A copy: an activation in place may follow.
        self.last = _Last(layer, output.clone(), calls) if _can_be_head(layer) else None  # type: ignore[arg-type]


def _can_be_head(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and set(layer.kernel_size) == {1})


def _layers(net: nn.Module) -> list[nn.Module]:
    """Return the modules that compute something with weights or statistics of their own."""
    # A block may own a weight too, and its hook would be called after those of the layers in it.
    return [
        module
        for module in net.modules()
        if isinstance(module, (nn.Linear, _ConvNd))
        or (not [*module.children()] and [*module.parameters(), *module.buffers()])
    ]


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:  # whatever a module of the user's does not let be copied
        advice = (
            "; call torch.nn.utils.remove_weight_norm on its layers first, or use torch.nn.utils.parametrizations"
            if any(name == "weight_g" for module in model.modules() for name in module._parameters)
            else ""
        )
        raise ModelError(f"{_kind(model)} cannot be copied: {_brief(error)}{advice}") from error


def _run(net: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor, _Last | None]:
    """Return the network, wrapped if its logits lie within an output, and what it returned, and the last layer."""
    output, last = _record(net, example)
    if isinstance(output, Tensor):
        return net, output, last
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return Logits(net).eval(), logits, last
    raise ModelError(
        f"{_kind(net)} returns a {type(output).__name__}: wrap it in a module whose forward returns one tensor, "
        "the logits or the features"
    )


def _record(net: nn.Module, example: Tensor) -> tuple[Any, _Last | None]:
    recorder = _Recorder()
    with hooked(layer.register_forward_hook(recorder) for layer in _layers(net)):
        try:
            return net(example), recorder.last
        except Exception as error:  # whatever the user's network raises
            raise ModelError(
                f"{_kind(net)} does not run on images of {tuple(example.shape[1:])}: {_brief(error)}"
            ) from error


def _require_features(net: nn.Module, example: Tensor, output: Tensor) -> None:
    if output.dim() not in (2, example.dim()) or len(output) != len(example):
        raise ModelError(
            f"{_kind(net)} must return features (N, F) or a feature map (N, C, *). "
            f"Got {tuple(output.shape)} for images {tuple(example.shape)} instead."
        )


def _refuse_probabilities(net: nn.Module, last: _Last | None, output: Tensor) -> None:
    for logits in last.logits() if last else ():
        for name, activation in ACTIVATIONS.items():
            if logits.shape == output.shape and _is_close(activation(logits), output):
                raise ModelError(f"{_kind(net)} ends in a {name}: pass it without, so that it returns logits")


def _name(net: nn.Module, last: _Last) -> str:
    name: str = next(name for name, module in net.named_modules() if module is last.layer)
    if not name:
        raise ModelError(f"{_kind(net)} is a head without a trunk; pass a network that has convolutions")
    if last.calls > 1:
        raise ModelError(
            f"the head {name!r} of {_kind(net)} is called {last.calls} times, so it cannot be taken off: "
            "pass the network without it"
        )
    return name


def _take_off(net: nn.Module, name: str) -> None:
    try:
        layer = net.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{_kind(net)} has no layer {name!r} that could be taken off") from error
    for alias, module in list(net.named_modules(remove_duplicate=False)):
        if module is layer and alias:
            parent, _, attribute = alias.rpartition(".")
            setattr(net.get_submodule(parent), attribute, nn.Identity().eval())


def _check_features(trunk: nn.Module, example: Tensor, last: _Last, output: Tensor) -> None:
    """Raise ModelError unless `trunk` returns (N, F), of which the linear layer taken off makes `output` again."""
    features, _ = _record(trunk, example)
    wanted = (len(example), last.inputs)
    if not isinstance(features, Tensor) or features.shape != wanted:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(
            f"{_kind(trunk)} must return features {wanted} without its head. Got {got}; pass its trunk alone"
        )
    # A convolution is not checked: the ReLU that may follow it does not commute with it.
    again = last.layer(features) if isinstance(last.layer, nn.Linear) else output
    if not (_is_same(again, output) or _is_close(again, output)):
        raise ModelError(f"{_kind(trunk)} computes otherwise without its head; pass its trunk alone")


def _is_same(one: Tensor, other: Tensor) -> bool:
    return _is_alike(one, other) and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors differ by no more than another order of sums, or another kernel, explains."""
    if not _is_alike(one, other):
        return False
    return bool((one - other).abs().max() <= 32 * torch.finfo(other.dtype).eps * other.abs().max())


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _kind(net: nn.Module) -> str:
    kind: type = type(net.net if isinstance(net, Logits) else net)
    return kind.__name__


def _brief(error: BaseException) -> str:
    return one_line(error)[:200]
