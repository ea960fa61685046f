"""Which layers share a channel axis: the unit that is scaled, selected and removed.

A plain sequence of convolutions, norms, activations and pools is traced with torch.fx, and each of its
convolutions opens a `ChannelGroup`. Any other topology is refused by the name of the layer, never guessed.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import fx, nn
from torch.nn import functional as F

from chanscale.backbones import Preprocessing
from chanscale.errors import UnsupportedTopologyError
from chanscale.heads import PooledHead
from chanscale.pooling import FrugalMaxPool2d
from chanscale.scaling import AbsorbedReLU, FrozenBatchNorm2d, FrozenConv2d

# Exactly these: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv2d, FrozenConv2d)
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
CONSUMERS = (nn.Linear, PooledHead)
# These keep every channel apart from the others and map 0 to 0; a sigmoid, which makes 0.5 of it, does not.
TRANSPARENT_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
TRANSPARENT_FUNCTIONS = (
    torch.relu, F.relu, torch.flatten,
    F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d,
)  # fmt: skip
TRANSPARENT_METHODS = ("relu", "flatten", "contiguous")

_WANTED = "this version takes a plain sequence of conv, norm, ReLU and pool"


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that share one channel axis: a channel is scaled, selected and removed in all of them at once.

    All layers are named as `model.get_submodule` takes them. `consumers` take the channels in; a consumer
    behind a flatten takes several inputs per channel, one after the other.
    """

    name: str
    width: int
    norms: tuple[str, ...] = ()
    scale: str | None = None
    relu: str | None = None
    consumers: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """The layer behind which the scale belongs: the last norm, or else the convolution.

        A zero scale in front of a frozen norm would leave the constant beta - gamma * mu / sigma.
        """
        return self.norms[-1] if self.norms else self.name


def channel_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """Return the groups of `model` from input to output.

    The channels that `model` itself returns are its interface: the last convolution of a bare trunk has no
    consumer and is left out. Raises UnsupportedTopologyError, which names the first layer that is not part
    of a plain sequence, or when there is no group at all.
    """
    groups = tuple(group for group in _Chain.of(model).groups if group.consumers)
    if not groups:
        raise UnsupportedTopologyError("the network has no convolution whose channels could be removed")
    return groups


def output_width(trunk: nn.Module) -> int:
    """Return the number of channels of the feature map (N, C, H, W) that `trunk` returns.

    Raises UnsupportedTopologyError, also when it returns something else.
    """
    chain = _Chain.of(trunk)
    if not chain.open or chain.flat:
        raise UnsupportedTopologyError(
            "the trunk does not end in a feature map (N, C, H, W); pass it without its head"
        )
    return chain.groups[-1].width


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(
            m, (*CONVOLUTIONS, *NORMS, *CONSUMERS, AbsorbedReLU, FrugalMaxPool2d, Preprocessing)
        )
        return known or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # fx raises whatever the user's forward raises on a symbolic value
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedTopologyError(
            f"{type(model).__name__} cannot be traced ({reason}); {_WANTED}"
        ) from error


@dataclass
class _Chain:
    """Walks the traced nodes in order and keeps the groups met so far."""

    model: nn.Module
    groups: list[ChannelGroup] = field(default_factory=list)
    open: bool = False  # does the value at hand carry the channels of the last group?
    flat: bool = False  # is it (N, features)?
    last: fx.Node | None = None
    called: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        chain = cls(model)
        for node in _trace(model).nodes:
            chain._add(node)
        return chain

    def _add(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            raise _refusal(node, f"the tensor {node.target}")
        if node.op != "placeholder":
            self._require_sequence(node)
        if node.op == "call_module":
            self._add_module(node)
        elif node.op in ("call_function", "call_method"):
            self._add_call(node)
        self.last = node

    def _add_call(self, node: fx.Node) -> None:
        if node.target not in (*TRANSPARENT_FUNCTIONS, *TRANSPARENT_METHODS):
            raise _refusal(node, getattr(node.target, "__name__", str(node.target)))
        if node.target in (torch.flatten, "flatten"):
            self._flatten(node, *_flattened(*node.args, **node.kwargs))

    def _flatten(self, node: fx.Node, start: object, end: object) -> None:
        if (start, end) not in ((1, -1), (1, 3)):
            raise _refusal(node, f"a flatten from dimension {start} to {end}, not from 1 to -1")
        self.flat = True

    def _require_sequence(self, node: fx.Node) -> None:
        if node.all_input_nodes != [self.last] or len(node.users) > 1:
            raise _refusal(node, "a branch or a join")

    def _add_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        if type(module) in (*CONVOLUTIONS, *NORMS, *CONSUMERS):
            self._require_own_weights(node, module)
        if isinstance(module, nn.Conv2d) and type(module) in CONVOLUTIONS:
            self._open_group(node, name, module)
        elif type(module) in NORMS and self.open:
            # A ReLU met before stands in front of the new anchor: the scale behind it cannot take its place.
            self._follow(norms=(*self.groups[-1].norms, name), relu=None)
            self._follow_scale(name, module)
        elif type(module) in CONSUMERS:
            self._consume(node, name, module)
        elif isinstance(module, nn.Flatten):
            self._flatten(node, module.start_dim, module.end_dim)
        elif not isinstance(module, (*TRANSPARENT_MODULES, Preprocessing)):
            raise _refusal(node, type(module).__name__)
        elif isinstance(module, nn.ReLU) and self._may_take_over(name):
            self._follow(relu=name)
        self.called.add(name)

    def _open_group(self, node: fx.Node, name: str, conv: nn.Conv2d) -> None:
        if conv.groups != 1:
            raise _refusal(node, f"a convolution in {conv.groups} groups")
        self._close_group(name)
        self.groups.append(ChannelGroup(name=name, width=conv.out_channels))
        self.open = True
        self._follow_scale(name, conv)

    def _require_own_weights(self, node: fx.Node, module: nn.Module) -> None:
        if node.target in self.called:
            raise _refusal(node, "used twice")
        if not isinstance(module, PooledHead) and "weight" not in module._parameters:
            raise _refusal(node, "reparametrised: its weight is computed from other tensors")

    def _consume(self, node: fx.Node, name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not self.flat:
            raise _refusal(node, "a Linear without a flatten before it")
        self._close_group(name)

    def _close_group(self, consumer: str) -> None:
        if self.open:
            self._follow(consumers=(consumer,))
        self.open = False

    def _follow_scale(self, name: str, module: nn.Module) -> None:
        if getattr(module, "scale", None) is not None:
            self._follow(scale=f"{name}.scale")

    def _follow(self, **changes: object) -> None:
        self.groups[-1] = replace(self.groups[-1], **changes)  # type: ignore[arg-type]

    def _may_take_over(self, name: str) -> bool:
        """Whether the ReLU `name` stands directly behind the group's anchor and is called only there."""
        behind = self.last is not None and self.open and self.last.target == self.groups[-1].anchor
        return behind and sum(module is self.model.get_submodule(name) for module in _call_targets(self)) == 1


def _call_targets(chain: _Chain) -> list[nn.Module]:
    assert chain.last is not None
    nodes = chain.last.graph.nodes
    return [chain.model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]


def _flattened(_x: object, start_dim: object = 0, end_dim: object = -1) -> tuple[object, object]:
    """Return the bounds among the arguments of a flatten, or its defaults."""
    return start_dim, end_dim


def _refusal(node: fx.Node, what: str) -> UnsupportedTopologyError:
    layer, verb = node, "is"
    while layer.op not in ("call_module", "placeholder"):
        layer, verb = layer.prev, "is followed by"
    return UnsupportedTopologyError(f"layer {str(layer.target)!r} {verb} {what}; {_WANTED}")
