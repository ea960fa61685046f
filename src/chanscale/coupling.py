"""Which layers share channels, in any convolutional network: traced by Torch-Pruning, told as plain positions.

Torch-Pruning (Fang et al. 2023, DepGraph) follows autograd's graph of one forward pass, through residual adds,
concatenations, depthwise convolutions and flattening. It says what hangs together, not whether the removal of a
channel leaves the output as it is: that depends on where a zero is a zero. So a group says behind which layers a
scale must sit for that, and `proof.py` tries it.
"""

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from chanscale.channels import Axis, ChannelGroup, ScaleSite, Slot
from chanscale.coarsening import coarsen
from chanscale.errors import UnsupportedTopologyError, one_line
from chanscale.heads import PooledHead
from chanscale.modes import device_of
from chanscale.slicing import is_depthwise, leave_as_groups

NORMS = (_BatchNorm, _InstanceNorm)
"""Norms that treat every channel apart from the others, while they are in eval mode."""

GATES = ("Sigmoid", "Hardsigmoid", "Softmax")
"""What comes out of these multiplies other channels: its own 0 is not needed, and would not be one behind them."""

RETURNED = "the network returns these channels"

Positions = dict[nn.Module, dict[int, int]]
"""For each layer: position -> the channel of the group that it holds."""


def couple_channels(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """Return the groups of `model`, from input to output, as one forward pass of `example` shows them.

    `example`: (N, C, *), of a size that the model takes. The model is not changed, and may be frozen or in
    training. Raises UnsupportedTopologyError when it cannot be traced, or has no convolution.
    """
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    groups = sorted(_find_groups(model, example), key=lambda group: order[group.name])
    if not groups:
        raise UnsupportedTopologyError("the network has no convolution whose channels could be removed")
    coarse = sorted(coarsen(groups, _grouped(model)), key=lambda group: order[group.name])
    return tuple(_protect_overlaps(coarse))


def _find_groups(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """Return the groups as Torch-Pruning finds them, and leave nothing of its graph in memory."""
    trace = _trace(model, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(trace.graph.get_all_groups(root_module_types=[_ConvNd]))
        return [_describe(group, trace) for group in found]
    except Exception as error:  # whatever Torch-Pruning makes of layers that it does not know
        raise _untraced(model, error) from error
    finally:
        _take_apart(trace.graph)


def _untraced(model: nn.Module, error: Exception) -> UnsupportedTopologyError:
    return UnsupportedTopologyError(f"{type(model).__name__} cannot be traced: {one_line(error)[:200]}")


def _take_apart(graph: Any) -> None:
    """Cut what lets the nodes of `graph` refer to each other.

    They hold the maps of the pass and the weights of the model, and would until Python's collector comes by.
    """
    for node in graph.module2node.values():
        for others in (node.inputs, node.outputs, node.dependencies):
            others.clear()


def _grouped(model: nn.Module) -> dict[str, _ConvNd]:
    """Return the grouped convolutions of `model` that are not depthwise, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)
    }


@dataclass(frozen=True)
class _Trace:
    """Torch-Pruning's graph, the name of each layer in it, and the ReLU called on what a node of autograd makes."""

    graph: Any
    names: Mapping[nn.Module, str]
    relus: Mapping[Any, str] = field(default_factory=dict)


def _trace(model: nn.Module, example: Tensor) -> _Trace:
    # Imported here: it takes a second, and only tracing needs it.
    import torch_pruning as tp

    # Autograd records what requires a gradient: the twin's parameters do, on the memory of the model's.
    memory: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in model.parameters()}
    try:
        twin = _ease_tracing(copy.deepcopy(model, memory).eval())
        calls = _watch_relus(twin)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = tp.DependencyGraph().build_dependency(
                # Called by us: Torch-Pruning would try a bare tensor as a list of arguments first.
                twin, example.clone().to(device_of(model)), forward_fn=lambda net, x: net(x), verbose=False,
            )  # fmt: skip
    except Exception as error:  # whatever the model's forward raises, or what Torch-Pruning makes of it
        raise _untraced(model, error) from error
    count = Counter(relu for relu, _ in calls)
    relus = {input_of: relu for relu, input_of in calls if count[relu] == 1}
    return _Trace(graph, _name_layers(twin), relus)


def _ease_tracing(twin: nn.Module) -> nn.Module:
    """Spare Torch-Pruning, in place, what it loses the number of channels at; return `twin`."""
    for module in twin.modules():
        if hasattr(module, "inplace"):
            # Done in place on a view, as an instance norm returns one, an activation hides the norm.
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, (nn.PReLU, _InstanceNorm)):
            # Their weights pass through a view or a repeat, which would look like another input.
            module.requires_grad_(requires_grad=False)
    return twin


def _name_layers(model: nn.Module) -> dict[nn.Module, str]:
    names = {module: name for name, module in model.named_modules()}
    # A head is sliced as one: it holds statistics beside the weights of its linear layer.
    return names | {head.linear: name for head, name in names.items() if isinstance(head, PooledHead)}


def _watch_relus(model: nn.Module) -> list[tuple[str, Any]]:
    """Return a list that fills, as `model` runs, with the ReLUs called and the node that made the input of each."""
    calls: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if type(module) is nn.ReLU:
            # Asked before the call: a ReLU that works in place leaves another node behind.
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: calls.append((name, inputs[0].grad_fn))
            )
    return calls


def _describe(group: Any, trace: _Trace) -> ChannelGroup:
    """Say in positions what Torch-Pruning found."""
    names = trace.names
    root = group[0].dep.target.module
    outputs: Positions = defaultdict(dict)
    inputs: Positions = defaultdict(dict)
    nodes, reason = {}, None
    for item in group:
        node, module = item.dep.target, item.dep.target.module
        nodes[node] = module
        reason = reason or _obstacle(node, names)
        if module not in names or _is_shared(module):
            continue
        takes_in = item.dep.handler.__name__ == "prune_in_channels" and not _passes_on(module)
        if not takes_in and not node.outputs:
            reason = reason or RETURNED
        slot = (inputs if takes_in else outputs)[module]
        for position, channel in zip(item.idxs, item.root_idxs, strict=True):
            if slot.setdefault(position, channel) != channel:
                reason = reason or f"{names[module]} mixes its channels"
    return ChannelGroup(
        name=_choose_name(root, outputs, names),
        width=root.out_channels,
        outputs=tuple(Slot(names[layer], *_transpose(slot)) for layer, slot in outputs.items()),
        inputs=tuple(Slot(names[layer], *_transpose(slot)) for layer, slot in inputs.items()),
        sites=tuple(
            ScaleSite(names[site.module], *_transpose(outputs[site.module]), relu=_find_relu(site, trace))
            # What leaves with its group needs no scale in front of the convolution: there is one behind it.
            for site in _find_sites(nodes, outputs, [taker for taker in inputs if not leave_as_groups(taker)])
        ),
        protected=reason,
    )


def _transpose(slot: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions, ascending, and the channel at each."""
    positions, channels = zip(*sorted(slot.items()), strict=True)
    return positions, channels


def _find_relu(site: Any, trace: _Trace) -> str | None:
    """Return the ReLU that alone takes what comes out of `site`, if there is one."""
    return trace.relus.get(site.grad_fn) if len(site.outputs) == 1 else None


def _choose_name(root: nn.Module, outputs: Positions, names: Mapping[nn.Module, str]) -> str:
    """Return the first convolution that makes the channels in the order in which `root` makes them."""
    order = list(names)
    makers = [
        layer for layer, slot in outputs.items() if isinstance(layer, _ConvNd) and slot == outputs[root]
    ]
    return names[min(makers, key=order.index)]


def _obstacle(node: Any, names: Mapping[nn.Module, str]) -> str | None:
    """Return why channels that pass `node` cannot be removed, as far as its type tells."""
    module = node.module
    if type(module).__name__ == "_OutputOp":
        return RETURNED
    if isinstance(module, nn.Parameter):
        return "they meet a parameter that belongs to no layer"
    if module not in names:
        return None
    if isinstance(module, (_ConvNd, nn.Linear, nn.PReLU, *NORMS)) and "weight" not in module._parameters:
        return f"the weight of {names[module]} is computed from other tensors"
    if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        if isinstance(module, _ConvTransposeNd):
            return f"{names[module]} is a grouped transposed convolution"
        if module.groups == module.out_channels:  # Torch-Pruning takes it for depthwise
            return f"{names[module]} makes one channel of each group of channels"
    if not isinstance(module, (_ConvNd, nn.Linear, nn.PReLU, *NORMS)):
        return f"{names[module]} ({type(module).__name__}) computes over all channels"
    return None


def _is_shared(module: nn.Module) -> bool:
    """Whether `module` has one parameter for all channels."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _passes_on(module: nn.Module) -> bool:
    """Whether what comes out of `module` has the channels that went in."""
    return isinstance(module, (nn.PReLU, *NORMS)) or is_depthwise(module)


def _find_sites(
    nodes: dict[Any, Any], makers: Container[nn.Module], takers: Container[nn.Module]
) -> Iterator[Any]:
    """Yield the node of the last of the `makers` on each way to whatever takes the channels in.

    A scale in front of another one is not needed; one in front of a frozen norm would leave its constant.
    """
    sites = {
        node for node, module in nodes.items() if module in makers and isinstance(module, (_ConvNd, *NORMS))
    }
    yield from (site for site in nodes if site in sites and _reaches_taker(site, nodes, sites, takers))


def _reaches_taker(start: Any, nodes: dict[Any, Any], sites: set[Any], takers: Container[nn.Module]) -> bool:
    waiting, seen = list(start.outputs), set()
    while waiting:
        node = waiting.pop()
        if node in seen or node not in nodes:
            continue
        seen.add(node)
        if nodes[node] in takers:
            return True
        gate = node.grad_fn is not None and node.grad_fn.name().startswith(GATES)
        if not gate and node not in sites:
            waiting.extend(node.outputs)
    return False


def _protect_overlaps(groups: list[ChannelGroup]) -> Iterator[ChannelGroup]:
    """Protect groups that claim a position which another one has: they would have to go together."""
    owner: dict[tuple[Axis, str, int], str] = {}
    for group in groups:
        claims = [(axis, slot.layer, position) for axis, slot in group.slots() for position in slot.positions]
        other = next((owner[claim] for claim in claims if claim in owner), None)
        owner |= dict.fromkeys(claims, group.name)
        yield group if other is None else group.protect(f"they are tied to channels of {other}")
