"""Which layers share a channel axis: the unit that is scaled, selected and removed.

A plain sequence of convolutions, norms, activations and pools is traced with torch.fx, and each of its
convolutions opens a `ChannelGroup`. Any other topology is refused by the name of the layer, never guessed.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from chanscale.backbones import Preprocessing
from chanscale.errors import UnsupportedTopologyError
from chanscale.heads import PooledHead
from chanscale.scaling import AbsorbedReLU, FrozenBatchNorm2d, FrozenConv2d

CONVOLUTIONS = (nn.Conv2d,)
NORMS = (nn.BatchNorm2d,)
CONSUMERS = (nn.Linear, PooledHead)
# These keep every channel apart from the others and map 0 to 0; a sigmoid, which makes 0.5 of it, does not.
TRANSPARENT_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
TRANSPARENT_FUNCTIONS = (torch.relu, F.relu, torch.flatten, F.adaptive_avg_pool2d)
TRANSPARENT_METHODS = ("relu", "flatten", "contiguous")


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
    of a plain sequence.
    """
    chain = _Chain(model)
    for node in _trace(model).nodes:
        chain.add(node)
    if not chain.groups:
        raise UnsupportedTopologyError("the network has no convolution whose channels could be removed")
    return tuple(group for group in chain.groups if group.consumers)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, FrozenConv2d | FrozenBatchNorm2d | AbsorbedReLU | PooledHead | Preprocessing)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # fx raises whatever the user's forward raises on a symbolic value
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedTopologyError(
            f"{type(model).__name__} cannot be traced ({reason}); pass a plain sequence of conv, norm, ReLU and pool"
        ) from error


@dataclass
class _Chain:
    """Walks the traced nodes in order and keeps the groups met so far."""

    model: nn.Module
    groups: list[ChannelGroup] = field(default_factory=list)
    open: bool = False  # does the value at hand carry the channels of the last group?
    last: fx.Node | None = None
    called: set[str] = field(default_factory=set)

    def add(self, node: fx.Node) -> None:
        if node.op != "placeholder" and node.op != "output":
            self._require_sequence(node)
        if node.op == "call_module":
            self._add_module(node)
        elif node.op == "call_function" and node.target not in TRANSPARENT_FUNCTIONS:
            raise _refusal(node, getattr(node.target, "__name__", str(node.target)))
        elif node.op == "call_method" and node.target not in TRANSPARENT_METHODS:
            raise _refusal(node, str(node.target))
        elif node.op == "get_attr":
            raise _refusal(node, str(node.target))
        self.last = node

    def _require_sequence(self, node: fx.Node) -> None:
        if node.all_input_nodes != [self.last] or len(node.users) > 1:
            raise _refusal(node, "a branch or a join")

    def _add_module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        if isinstance(module, CONVOLUTIONS):
            self._open_group(node, name, module)
        elif isinstance(module, NORMS) and self.open:
            self._follow(norms=(*self.groups[-1].norms, name))
            self._follow_scale(name, module)
        elif isinstance(module, CONSUMERS):
            self._close_group(name)
        elif not isinstance(module, (*TRANSPARENT_MODULES, Preprocessing)):
            raise _refusal(node, type(module).__name__)
        elif isinstance(module, nn.ReLU) and self._may_take_over(name):
            self._follow(relu=name)
        self.called.add(name)

    def _open_group(self, node: fx.Node, name: str, conv: nn.Conv2d) -> None:
        if conv.groups != 1:
            raise _refusal(node, f"a convolution in {conv.groups} groups")
        if name in self.called:
            raise _refusal(node, "a convolution that is used twice")
        self._close_group(name)
        self.groups.append(ChannelGroup(name=name, width=conv.out_channels))
        self.open = True
        self._follow_scale(name, conv)

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


def _refusal(node: fx.Node, what: str) -> UnsupportedTopologyError:
    where = node.target if node.op == "call_module" else node.name
    return UnsupportedTopologyError(
        f"layer {str(where)!r} is {what}; this version takes a plain sequence of conv, norm, ReLU and pool"
    )
