"""Every format gives the same tensors, and a broken file gives one line."""

import pytest
import torch

from chanscale import weight_files
from chanscale.errors import WeightsError
from chanscale.weight_files import read_tensors
from tiny_weights import FORMATS, NAMES, TENSORS, WHEEL, equal, one_line_of, write

SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("filename", FORMATS)
def test_every_format_gives_the_same_tensors(tmp_path, filename):
    tensors = read_tensors(write(tmp_path / filename), SHAPES, NAMES)
    assert equal(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.97])
@pytest.mark.parametrize("filename", FORMATS)
def test_half_a_file_is_refused(tmp_path, filename, keep):
    path = write(tmp_path / filename)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(WeightsError) as caught:
        read_tensors(path, SHAPES, NAMES)
    assert filename in one_line_of(caught)


@pytest.mark.parametrize("filename", FORMATS)
def test_other_shapes_are_refused(tmp_path, filename):
    """A safetensors file keeps its shapes, which the digest check compares."""
    path = write(tmp_path / filename, {name: torch.cat([t, t]) for name, t in TENSORS.items()})
    if path.suffix == ".safetensors":
        assert not equal(read_tensors(path, SHAPES, NAMES))
        return
    with pytest.raises(WeightsError, match=r"arrays of shape|raw float32 values"):
        read_tensors(path, SHAPES, NAMES)


@pytest.mark.parametrize(("filename", "name"), [("w.safetensors", "more.bias"), ("w.onnx", "net/more:0")])
def test_a_file_without_the_tensor_is_refused(tmp_path, filename, name):
    names = {".onnx": NAMES[".onnx"] | {"more.bias": "net/more:0"}}
    with pytest.raises(WeightsError, match=name):
        read_tensors(write(tmp_path / filename), SHAPES | {"more.bias": (4,)}, names)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"pickle")
    wanted = r"must end in one of \.safetensors, \.h5, \.onnx, \.whl\. Got '\.pth' instead"
    with pytest.raises(WeightsError, match=wanted):
        read_tensors(tmp_path / "w.pth", SHAPES, NAMES)


def test_a_format_without_a_name_table_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"must end in one of \.safetensors\. Got '\.h5' instead"):
        read_tensors(write(tmp_path / "w.h5"), SHAPES, {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no file at .*nowhere\.h5"):
        read_tensors(tmp_path / "nowhere.h5", SHAPES, NAMES)


@pytest.mark.parametrize("filename", FORMATS)
def test_a_file_too_large_is_not_read(tmp_path, filename, monkeypatch):
    path = write(tmp_path / filename)
    monkeypatch.setattr(weight_files, "_MAX_BYTES", 400)
    with pytest.raises(WeightsError, match="more than the 400 that are allowed"):
        read_tensors(path, SHAPES, NAMES)


def test_a_wheel_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / WHEEL, {name: torch.zeros(4096) for name in TENSORS})
    monkeypatch.setattr(weight_files, "_MAX_BYTES", 8192)
    assert path.stat().st_size < 8192
    with pytest.raises(WeightsError, match=r"net\.onnx has \d+ bytes"):
        read_tensors(path, SHAPES, NAMES)
