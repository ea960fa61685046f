"""Static int8: convolutions whose weights and activations are whole numbers, by ranges seen on training images."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx

from chanscale.artifact import RULES
from chanscale.data.images import Pixels
from chanscale.export.agreement import raw_pixels
from chanscale.export.runtime import DESCRIPTION, INPUT, Floats, require_extra, telling
from chanscale.programs import quiet

QUANTISED = ["Conv", "Relu", "Clip", "MaxPool"]
"""What becomes int8. The resize, the preprocessing and the head stay in fp32: they take no time, and want precision."""
CALIBRATION = 100
"""How many training images the ranges are read on."""


def quantise_onnx(graph: bytes, images: Iterable[Pixels]) -> bytes:
    """Return an int8 copy of a graph of `export_onnx`, calibrated on training `images`: (C, H, W), 16 bits.

    Weights are signed, with a scale for each filter; activations unsigned, with ranges from the smallest to the
    largest value seen. Weights keep 7 bits: processors without VNNI overflow on 8. Its probabilities are others, so it
    has no operating point and no prediction sets. Raises ConfigError, ModelError.
    """
    require_extra()
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory(prefix="chanscale-") as folder, quiet(), telling("quantise"):
        plain, ready, whole = (Path(folder) / name for name in ("plain.onnx", "ready.onnx", "int8.onnx"))
        plain.write_bytes(graph)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, whole, _Calibration(images), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTISED,
        )  # fmt: skip
        return _forget_rules(whole.read_bytes())


def _forget_rules(graph: bytes) -> bytes:
    """Return `graph` without the rules that were settled on the probabilities of another, in fp32."""
    model = onnx.load_from_string(graph)
    for entry in model.metadata_props:
        if entry.key == DESCRIPTION:
            told = json.loads(entry.value)
            entry.value = json.dumps({name: told[name] for name in told if name not in RULES})
    content: bytes = model.SerializeToString()
    return content


class _Calibration:
    """Hands out one image at a time, as ONNX Runtime asks for them."""

    def __init__(self, images: Iterable[Pixels]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: raw_pixels(image)}
