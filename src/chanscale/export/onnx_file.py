"""The deployed classifier as an ONNX graph, compared with PyTorch in ONNX Runtime before it is written."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from chanscale import __version__
from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier
from chanscale.data.images import Pixels
from chanscale.errors import ModelError, one_line
from chanscale.export.agreement import Agreement, compare, require_agreement
from chanscale.export.deployed import AXES, WHITE, DeployedClassifier, deploy, dynamic_axes, example_shape
from chanscale.export.runtime import (
    CLASS_MAP,
    DESCRIPTION,
    INPUT,
    PROBABILITIES,
    open_session,
    require_extra,
    run_session,
)
from chanscale.programs import Program, quiet, trace_program
from chanscale.wording import NOTICE

OPSET = 20

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
"""What turns a terminal's text to a colour."""


def export_onnx(
    model: Classifier | Program, info: ModelInfo, images: Iterable[Pixels]
) -> tuple[bytes, Agreement]:
    """Return `model` as an ONNX graph with its preprocessing inside, and how well it agrees with PyTorch on `images`.

    Input `pixels`: float32 (batch, 1 or 3, height, width), 0 to 255; of a network that takes grey alone, one channel.
    Outputs `probabilities` (batch, K) and, where the network ends in maps, `class_map` (batch, M, h, w). `images`:
    (C, H, W), 16 bits, of any size. Raises ConfigError without the extra, ModelError when the network cannot be
    exported, InexactExportError when a probability differs by more than 1e-4.
    """
    require_extra()
    content = to_onnx(deploy(model, info), describe_graph(info))
    agreement = compare(run_session(open_session(content)), model, info, images)
    require_agreement(agreement, "ONNX Runtime")
    return content, agreement


def to_onnx(deployed: DeployedClassifier, description: Mapping[str, Any]) -> bytes:
    """Return the graph of `deployed`, with the `description` in its metadata. Raises ModelError."""
    program = trace_program(deployed, example_shape(deployed), dynamic_axes(deployed))
    outputs = [PROBABILITIES, CLASS_MAP][: len(program.graph_signature.user_outputs)]
    try:
        with quiet():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[INPUT], output_names=outputs,
            )  # fmt: skip
    except Exception as error:  # whatever the exporter does not know
        raise ModelError(f"the network cannot be written as ONNX: {_reason(error)}") from error
    assert exported is not None
    return _finish(exported.model_proto, description)


def _reason(error: BaseException) -> str:
    """Return what the exporter met first; its last words are about its steps, in colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _COLOUR.sub("", one_line(error))[:200]


def describe_graph(info: ModelInfo) -> dict[str, Any]:
    """Return what a graph says of itself to whoever runs it, the rules to read its probabilities by among it."""
    takes = f"{INPUT}: float32 (batch, channels, height, width), 0 to {WHITE:.0f}; of 16 bits, value / 257"
    if info.space is not None:
        takes = f"{INPUT}: float32 (batch, 1, depth, height, width), 0 to {WHITE:.0f}; of read_volume, value / 257"
    return {
        "chanscale": __version__,
        "backbone": info.network,
        "classes": list(info.classes),
        "multilabel": info.multilabel,
        "image_size": info.image_size,
        "input": takes,
        **({} if info.space is None else {"space": asdict(info.space)}),
        **info.rules,
        "notice": NOTICE,
    }


def _finish(graph: Any, description: Mapping[str, Any]) -> bytes:
    """Return the file of a graph without the exporter's notes, which name files of this machine; axes by name."""
    for item in (*graph.graph.node, *graph.graph.initializer, *graph.graph.value_info, *graph.graph.input,
                 *graph.graph.output, graph.graph, graph):  # fmt: skip
        item.doc_string = ""
        del item.metadata_props[:]
    axes = graph.graph.input[0].type.tensor_type.shape.dim
    # Not strict: of the five axes of volumes the first alone is free.
    names = {axis.dim_param: name for axis, name in zip(axes, AXES, strict=False) if axis.dim_param}
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = names.get(axis.dim_param, axis.dim_param)
    graph.producer_name, graph.producer_version = "chanscale", __version__
    graph.metadata_props.add(key=DESCRIPTION, value=json.dumps(description))
    content: bytes = graph.SerializeToString()
    return content
