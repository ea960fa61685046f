"""Whether the convolutions of an ONNX graph are those of a model: its filters times their scales, bit for bit."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from chanscale.attaching import merge_scales, scale_weight
from chanscale.classifier import Classifier
from chanscale.errors import ArtifactError, clip, one_line
from chanscale.export.deployed import flush_denormals
from chanscale.provenance import differing_rows, same_bits
from chanscale.scaling import ChannelScale

CONVOLUTIONS = ("Conv", "ConvTranspose")
"""The operators that are compared with the model."""
FOREIGN = (
    "ConvInteger", "DeformConv", "Einsum", "GRU", "LSTM", "MatMulInteger", "QLinearConv", "QLinearMatMul", "RNN",
)  # fmt: skip
"""Operators with weights that no fp32 graph of ours has: filters could stand in them unseen."""


@dataclass(frozen=True)
class GraphProof:
    """How many convolutions of a graph are a model's, and into how many of them the exporter folded the norm behind."""

    convolutions: int
    with_norm: int


@dataclass(frozen=True)
class _Convolution:
    """The numbers of a convolution; None for what it has not, or a graph does not store."""

    weight: Tensor | None
    bias: Tensor | None

    def equals(self, other: "_Convolution") -> bool:
        """Tell whether all bits agree."""
        return _agree(self.weight, other.weight) and _agree(self.bias, other.bias)


def prove_graph(path: Path, model: Classifier) -> GraphProof:
    """Return the proof that the convolutions of the graph at `path` are those of `model`, its scales merged, in order.

    What is too small for a normal fp32 is 0 in a graph. A norm may have been folded into the convolution before it,
    w * (gamma / sqrt(variance + eps)), as onnxscript does. Convolutions that reach no output do not count. Raises
    ArtifactError, naming the first filter that differs, or what could hide other filters.
    """
    scaled = any(isinstance(module, ChannelScale) for module in model.modules())
    merged = merge_scales(model) if scaled else copy.deepcopy(model)
    flush_denormals(merged)
    wanted, found = list(_expect(merged)), _read_convolutions(path)
    if len(found) != len(wanted):
        raise ArtifactError(
            f"{path} must have the {len(wanted)} convolutions of the model, in fp32. Got {len(found)} instead: "
            "it is the graph of another, or was quantised"
        )
    with_norm = 0
    for got, (name, plain, folded) in zip(found, wanted, strict=True):
        if folded and got.equals(folded):
            with_norm += 1
        elif not got.equals(plain):
            # A bias where the model has none comes from a norm.
            closer = folded if folded and plain.bias is None and got.bias is not None else plain
            raise ArtifactError(f"{path}: {_describe_difference(name, got, closer)}; export it again")
    return GraphProof(len(found), with_norm)


def _expect(merged: Classifier) -> Iterator[tuple[str, _Convolution, _Convolution | None]]:
    """Yield each convolution in order: its name, its numbers, and those with the norm behind it, if one is."""
    layers = [(name, m) for name, m in merged.named_modules() if isinstance(m, (_ConvNd, _BatchNorm))]
    for (name, conv), (_, behind) in pairwise([*layers, ("", nn.Identity())]):
        if isinstance(conv, _ConvNd):
            plain = _Convolution(conv.weight.detach(), None if conv.bias is None else conv.bias.detach())
            yield name, plain, _fold(plain, behind) if isinstance(behind, _BatchNorm) else None


def _fold(conv: _Convolution, norm: _BatchNorm) -> _Convolution | None:
    if not norm.affine or norm.running_mean is None or norm.running_var is None or conv.weight is None:
        return None
    # In numpy, as the exporter does it: torch's root may differ in the last bit.
    gamma, beta, mean, variance = (
        tensor.detach().numpy() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    factor = gamma / np.sqrt(variance + norm.eps)
    bias = np.zeros_like(mean) if conv.bias is None else conv.bias.numpy()
    weight = scale_weight(conv.weight, torch.from_numpy(factor))
    return _Convolution(weight, torch.from_numpy((bias - mean) * factor + beta))


def _read_convolutions(path: Path) -> list[_Convolution]:
    """Return the convolutions of a graph that reach an output, in order. Raises ArtifactError."""
    try:
        model = onnx.load_model(path, load_external_data=False)
        doubt = next(_find_doubts(model), None)
        stored = {} if doubt else _read_initializers(model.graph)
    except Exception as error:  # whatever reading and parsing raise
        reason = one_line(error)[:200]
        raise ArtifactError(f"{path} is no ONNX graph ({reason}); chanscale export RUN writes one") from error
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise ArtifactError(
            f"{path} is in int8, whose filters are rounded and no slices; verify the graph in fp32, as export "
            "writes it without --int8"
        )
    if doubt:
        raise ArtifactError(
            f"{path} could compute with other filters than can be compared: {clip(doubt)}; export it again"
        )
    return [
        _Convolution(*[*(stored.get(name) for name in node.input[1:3]), None, None][:2])
        for node in _reaching_outputs(model.graph)
        if node.op_type in CONVOLUTIONS
    ]


def _read_initializers(graph: onnx.GraphProto) -> dict[str, Tensor]:
    return {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}


def _find_doubts(model: onnx.ModelProto) -> Iterator[str]:
    """Yield, in words, all by which the numbers of a graph may be others than those that stand beside its nodes."""
    graph = model.graph
    if model.functions:
        yield "it has functions of its own"
    if graph.sparse_initializer:
        yield "it has sparse tensors"
    for item in graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL or item.external_data:
            yield f"{item.name!r} lies in another file"
    # A runtime takes the first of two, the last, or what its caller gives.
    names = [item.name for item in (*graph.initializer, *graph.input)]
    made = [name for node in graph.node for name in node.output if name]
    for name, count in Counter([*names, *made]).items():
        if count > 1:
            yield f"{name!r} is there {count} times"
    for node in graph.node:
        if node.domain or node.op_type in FOREIGN:
            yield f"it has the operator {':'.join(filter(None, (node.domain, node.op_type)))}"
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            yield f"{node.op_type} has a graph of its own"


def _reaching_outputs(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that an output is computed from, in order."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needed: set[int] = set()
    waiting = [item.name for item in graph.output]
    while waiting:
        index = makers.get(waiting.pop())
        if index is not None and index not in needed:
            needed.add(index)
            waiting += graph.node[index].input
    return [graph.node[index] for index in sorted(needed)]


def _agree(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    return same_bits(got, wanted)


def _describe_difference(name: str, got: _Convolution, wanted: _Convolution) -> str:
    leaf = "bias" if _agree(got.weight, wanted.weight) else "weight"
    ours, theirs = getattr(wanted, leaf), getattr(got, leaf)
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"'{name}.{leaf}' must be {_describe_shape(ours)}. Got {_describe_shape(theirs)} instead"
    first, count, _ = differing_rows(theirs, ours)
    size = ours[first].numel()
    return (
        f"of filter {first} of '{name}.{leaf}', {count} of {size} weights are not the slice times its scale"
    )


def _describe_shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
