"""A backbone of one convolution and its weights in every format, for the tests of the weights modules."""

import hashlib
import io
import zipfile
from pathlib import Path

import h5py
import onnx
import safetensors.torch
import torch
from torch import nn

from chanscale.weight_sources import UrlSource

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "features.0.weight": torch.randn(4, 3, 3, 3, generator=GENERATOR),
    "features.0.bias": torch.randn(4, generator=GENERATOR),
}
NAMES = {
    ".h5": {"features.0.weight": "conv1", "features.0.bias": "conv1"},
    ".onnx": {"features.0.weight": "net/conv1/W:0", "features.0.bias": "net/conv1/b:0"},
    ".pth": {"features.0.weight": "_conv1.weight", "features.0.bias": "_conv1.bias"},
}
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
TORCH_WHEEL = "tiny_torch_weights-1.0-py3-none-any.whl"
PICKLES = ["w.pth", TORCH_WHEEL]
FORMATS = ["w.safetensors", "w.h5", "w-nested.h5", "w.onnx", WHEEL, *PICKLES]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3))


def write(path: Path, tensors=TENSORS) -> Path:
    """Write the tensors in the format that the name of the file asks for."""
    _WRITERS[path.suffix](path, tensors)
    return path


def _write_keras(path: Path, tensors) -> None:
    # Two ages of Keras: a file of weights, and a whole model.
    prefix = "model_weights/conv1/conv1/" if "nested" in path.name else "conv1/"
    with h5py.File(path, "w") as file:
        file[f"{prefix}conv1_W_1:0"] = tensors["features.0.weight"].permute(2, 3, 1, 0).numpy()
        file[f"{prefix}conv1_b_1:0"] = tensors["features.0.bias"].numpy()


def _write_onnx(path: Path, tensors) -> None:
    names = NAMES[".onnx"]
    initializers = [onnx.numpy_helper.from_array(tensors[name].numpy(), names[name]) for name in names]
    graph = onnx.helper.make_graph([], "g", [], [], initializers)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def torch_bytes(content, *, archive=False) -> bytes:
    """Return what torch.save writes: the format of before 2020, or the zip archive of since."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def published(tensors) -> bytes:
    """Return the .pth of a converter: other names, and TensorFlow's order in memory."""
    return torch_bytes({NAMES[".pth"][name]: _reversed_in_memory(tensor) for name, tensor in tensors.items()})


def _reversed_in_memory(tensor):
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


PTH = published(TENSORS)
DIGESTS = {".pth": hashlib.sha256(PTH).hexdigest()}


def _write_torch(path: Path, tensors) -> None:
    # Twice the same tensors are not twice the same bytes: the format holds addresses.
    path.write_bytes(PTH if tensors is TENSORS else published(tensors))


def _write_wheel(path: Path, tensors) -> None:
    suffix, info = ".pth" if path.name == TORCH_WHEEL else ".onnx", "tiny_weights-1.0.dist-info"
    content = path.with_suffix(suffix)
    write(content, tensors)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(content, f"tiny_weights/models/net{suffix}")
        wheel.writestr("tiny_weights/__init__.py", "raise RuntimeError('the wheel was imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content.unlink()


_WRITERS = {
    ".safetensors": lambda path, tensors: safetensors.torch.save_file(tensors, path),
    ".h5": _write_keras,
    ".onnx": _write_onnx,
    ".pth": _write_torch,
    ".whl": _write_wheel,
}


def url_source(path: Path, **changes) -> UrlSource:
    """Return a source that brings the file at `path`, or claims to."""
    content = path.read_bytes()
    fields = {"url": path.as_uri(), "md5": hashlib.md5(content).hexdigest(), "size": len(content)}
    return UrlSource(**(fields | changes))


def equal(got, wanted=TENSORS) -> bool:
    """Tell whether two sets of tensors are the same, bit for bit."""
    return set(got) == set(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)


def one_line_of(caught) -> str:
    """Return the message of an error, which must be one line."""
    text = str(caught.value)
    assert "\n" not in text
    return text
