"""A tiny ONNX model with the inputs and outputs of an exported one; its colours have different weights."""

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions

COLOURS = np.array([[0.5, 0.35, 0.15], [-0.2, 0.9, 0.3], [0.1, -0.6, 0.8]], np.float32)
"""What each class makes of red, green and blue."""
CELL = 8
"""Pixels along a side of one cell of the map."""


def standin(
    classes: int = 2, *, grey_only: bool = False, with_map: bool = True, multilabel: bool = False
) -> bytes:
    """Return a model for two or three classes, whose logits depend on the mean colour."""
    maps = 1 if classes == 2 else classes
    weight = COLOURS[:maps].sum(1, keepdims=True) if grey_only else COLOURS[:maps]
    bias = np.full(maps, -2 if multilabel else -4, np.float32)
    constants = {
        "weight": weight[:, :, None, None] * np.float32(8 / 255), "bias": bias,
        "from": np.array([0]), "to": np.array([weight.shape[1]]), "channel_axis": np.array([1]),
        "sides": np.array([2, 3]), "one": np.float32([1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Concat", ["pixels"] * 3, ["repeated"], axis=1),
        helper.make_node("Slice", ["repeated", "from", "to", "channel_axis"], ["colours"]),
        helper.make_node("Conv", ["colours", "weight", "bias"], ["evidence"]),
        helper.make_node(
            "AveragePool", ["evidence"], ["class_map"], kernel_shape=[CELL] * 2, strides=[CELL] * 2
        ),
        helper.make_node("ReduceMean", ["class_map", "sides"], ["logits"], keepdims=0),
        *_shares(maps, multilabel=multilabel),
    ]
    shapes = {"probabilities": ["n", classes], "class_map": ["n", maps, "h", "w"]}
    outputs = [_value(name, shapes[name]) for name in ("probabilities", "class_map")[: 1 + with_map]]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    pixels = _value("pixels", ["n", 1 if grey_only else "channels", "height", "width"])
    graph = helper.make_graph(nodes, "standin", [pixels], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def _shares(maps: int, *, multilabel: bool) -> list:
    if multilabel:
        return [helper.make_node("Sigmoid", ["logits"], ["probabilities"])]
    if maps > 1:
        return [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    return [
        helper.make_node("Sigmoid", ["logits"], ["second"]),
        helper.make_node("Sub", ["one", "second"], ["first"]),
        helper.make_node("Concat", ["first", "second"], ["probabilities"], axis=1),
    ]


def _value(name: str, shape: list):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def run_model(model: bytes, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Return the outputs for one image (H, W) or (H, W, 3)."""
    options = SessionOptions()
    options.intra_op_num_threads = 1
    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": planes[None].astype(np.float32)})
