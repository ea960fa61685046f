"""Files that were made to do harm: one line says what is wrong, nothing of them runs, nothing half-written is left."""

import io
import itertools
import json
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from chanscale import cli
from chanscale.artifact import FORMAT, METADATA, load_model, read_tensors
from chanscale.checkpoint import load_checkpoint
from chanscale.comparison.cells import read_cell
from chanscale.comparison.grid import GridFolder
from chanscale.config import FitConfig
from chanscale.data import readers
from chanscale.data.images import count_channels, read_image
from chanscale.data.sources import ImageRecord, ImageSet, open_images
from chanscale.data.splits import Splits, read_splits
from chanscale.delta import read_delta
from chanscale.errors import (
    ArtifactError,
    ChanscaleError,
    ConfigError,
    DataError,
    SplitError,
    UnreadableImageError,
)
from chanscale.novelty.storage import load_novelty
from chanscale.progress import Watcher
from chanscale.report_page import material
from chanscale.report_page.material import read_history, read_metrics
from chanscale.runs import RunFolder
from chanscale.weight_files import read_tensors as read_weights
from tiny_fits import tiny_classifier, tiny_config, tiny_images

# --- images

NOISE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks, width=8, height=8, bits=8, colour=0):
    """Return a PNG with any size in its header, and any chunks behind it."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_tag(tiff, tag, value):
    """Return a little-endian TIFF with another value in a tag of its first page."""
    content = bytearray(tiff)
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    places = [start + 2 + 12 * index for index in range(count)]
    (place,) = [place for place in places if struct.unpack_from("<H", content, place) == (tag,)]
    struct.pack_into("<HII", content, place + 2, 4, 1, value)
    return bytes(content)


def wide_tiff(**options):
    file = io.BytesIO()
    tifffile.imwrite(file, np.full((16, 16, 3), 999, np.uint16), photometric="rgb", **options)
    return file.getvalue()


PIXELS = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
LARGE = zlib.compress(bytes(20_000_000))
LARGEST = 2**31 - 1
WIDTH, HEIGHT, SAMPLES = 256, 257, 277

BOMBS = {
    "the largest PNG": png(PIXELS, width=LARGEST, height=LARGEST),
    "the largest PNG of 16 bits and colour": png(PIXELS, width=LARGEST, height=LARGEST, bits=16, colour=2),
    "a PNG above the limit": png(PIXELS, width=10_000, height=10_000),
    "a PNG of 16 bits above the limit": png(PIXELS, width=10_000, height=10_000, bits=16, colour=6),
    "a PNG without a width": png(PIXELS, width=0),
    "text that unpacks to much": png(chunk(b"zTXt", b"a\0\0" + LARGE), PIXELS),
    "a profile that unpacks to much": png(chunk(b"iCCP", b"a\0\0" + LARGE), PIXELS),
    "the largest TIFF": with_tag(with_tag(wide_tiff(), WIDTH, LARGEST), HEIGHT, LARGEST),
    "a TIFF above the limit": with_tag(with_tag(wide_tiff(), WIDTH, 10_000), HEIGHT, 10_000),
    "a TIFF of 60,000 channels": with_tag(wide_tiff(), SAMPLES, 60_000),
    "a strip that unpacks to more than it may": with_tag(wide_tiff(compression="zlib"), HEIGHT, 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_would_fill_the_memory_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "bomb.img"
    path.write_bytes(BOMBS[name])
    with pytest.raises(UnreadableImageError, match=r"bomb\.img") as caught:
        read_image(path, size=8)
    assert_one_line(caught.value)
    assert count_channels(path) in (1, 3)


@pytest.mark.parametrize(("bits", "colour"), [(8, 0), (16, 2)])
def test_pixels_behind_the_last_are_not_unpacked(tmp_path, bits, colour):
    """80 MB of zeros follow an image of 8 x 8: it is read as that image."""
    path = tmp_path / "long.png"
    path.write_bytes(png(chunk(b"IDAT", LARGE), bits=bits, colour=colour))
    assert not read_image(path, size=8).any()


def encoded(suffix):
    if suffix == "wide.tif":
        return wide_tiff()
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, format={"jpg": "JPEG", "tif": "TIFF", "png": "PNG"}[suffix])
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "wide.tif"])
def test_an_image_cut_at_any_64th_byte_raises_nothing_but_unreadable(tmp_path, suffix):
    content = encoded(suffix)
    path, refused = tmp_path / f"cut.{suffix}", 0
    for length in range(0, len(content) - 64, 64):
        path.write_bytes(content[:length])
        refused += is_refused(path)
    assert refused > 0.9 * len(range(0, len(content) - 64, 64))  # a JPEG may end early, between two blocks


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "wide.tif"])
@pytest.mark.parametrize("other", [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff"])
def test_an_image_damaged_at_any_64th_byte_raises_nothing_but_unreadable(tmp_path, suffix, other):
    content, path = encoded(suffix), tmp_path / f"damaged.{suffix}"
    refused = 0
    for place in itertools.chain(range(0, 64, 4), range(64, len(content), 64)):
        path.write_bytes(content[:place] + other + content[place + 4 :])
        refused += is_refused(path)
    assert refused > 0


def is_refused(path):
    """Tell whether an image cannot be used; what can be must have the size that was asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of what they pass over
            assert read_image(path, size=8).shape[1:] == (8, 8)
    except UnreadableImageError as error:
        assert_one_line(error)
        return True
    return False


# --- tables and arrays


def assert_one_line(error):
    assert 0 < len(str(error)) < 2000
    assert "\n" not in str(error)


TABLES = {
    "a path that climbs": b"path,label\na/../../b.png,x\n",
    "an absolute path": b"path,label\n/etc/passwd,x\n",
    "a path of another machine": b"path,label\n\\\\server\\b.png,x\n",
    "a path with a NUL": b"path,label\na\0.png,x\nb.png,y\n",
    "a path of a home": b"path,label\n~/a.png,x\n",
    "a very long path": b"path,label\n" + b"a" * 100_000 + b".png,x\n",
    "a very long path to a folder": b"path,label\n" + b"a" * 100_000 + b",\n",
    "a very deep path to a folder": b"path,label\n" + b"a/" * 20_000 + b",\n",
    "a path with a line break": b'path,label\n"a\nb.png",x\n"c\rd.png",x\n',
    "a class with a line break": b'path,label\na.png,"x\ny"\n',
    "a split with a line break": b'path,label,split\na.png,x,"x\ny"\n',
    "a column with a line break": b'path,"la\nbel"\na.png,x\n',
    "a very long split": b"path,label,split\na.png,x," + b"a" * 100_000 + b"\n",
    "a very deep path": b"path,label\n" + b"a/" * 20_000 + b"b.png,x\n",
    "100,000 columns": b"path,label" + b",c" * 100_000 + b"\na.png,x\n",
    "a cell above the limit": b"path,label\na.png," + b"x" * 200_000 + b"\n",
    "a quote that never ends": b'path,label\n"a.png,x\n',
    "another encoding": "path,label\na.png,x\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_points_elsewhere_or_nowhere_is_refused(tmp_path, name):
    path = tmp_path / "table.csv"
    path.write_bytes(TABLES[name])
    with pytest.raises(DataError, match=r"table\.csv") as caught:
        open_images(path)
    assert_one_line(caught.value)


def test_control_characters_of_a_file_reach_no_terminal(tmp_path, capsys):
    """ESC could move the cursor or change the title; a turn of the direction shows another name than is there."""
    path = tmp_path / "table.csv"
    path.write_bytes('path,label\n"a\nb\x1b[2J\u202e.png",x\nc.png,y\n'.encode())
    assert cli.run(["fit", str(path), "--out", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert r"\u001b[2J\u202e.png" in line
    assert line.isprintable()
    assert sorted(tmp_path.iterdir()) == [path]


def npy(descr, shape, data=b""):
    """Return an array file whose header may say anything."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
    header = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


BYTES, LABELS = "'|u1'", npy("'<i8'", "(2,)", bytes(16))
PICKLED = b"cos\nsystem\n(S'touch marker'\ntR."
ARRAYS = {
    "pickled objects": npy("'|O'", "(2,)", PICKLED),
    "a header that is code": npy("__import__('os').system('touch marker')", "(2,)"),
    "a shape of 16 TB": npy(BYTES, "(1000000000000, 4, 4)"),
    "a shape that overflows": npy(BYTES, "(4294967296, 4294967296, 4)"),
    "a negative shape": npy(BYTES, "(-1, 4, 4)", bytes(32)),
    "less than the shape says": npy(BYTES, "(2, 4, 4)", bytes(31)),
    "a deep header": npy("(" * 9000, "(2,)"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_not_what_it_says_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("train_images.npy", ARRAYS[name])
        archive.writestr("train_labels.npy", LABELS)
    with pytest.raises(DataError, match=r"cannot read the arrays of a\.npz") as caught:
        open_images("a.npz")
    assert_one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_member_that_is_no_array_is_none_of_the_arrays(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images", "no array")
        archive.writestr("train_labels", LABELS)
    with pytest.raises(DataError, match=r"a\.npz must have MedMNIST's keys"):
        open_images(path)


@pytest.mark.parametrize("shape", [(1_000_000, 6, 10), (1_000_000, 1, 0)])
def test_arrays_that_would_fill_the_memory_are_not_unpacked(tmp_path, monkeypatch, shape):
    """60 MB of zeros, and a million images of no pixel, in a file of less than a hundredth of that."""
    monkeypatch.setattr(readers, "free_memory", lambda: 50_000_000)
    path, count = tmp_path / "a.npz", shape[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape_, width in (("images", shape, shape[1] * shape[2]), ("labels", (count,), 1)):
            with archive.open(f"train_{name}.npy", "w") as file:
                file.write(npy(BYTES, str(shape_)))
                for _ in range(count * width // 1_000_000):
                    file.write(bytes(1_000_000))
    with pytest.raises(DataError, match=r"a\.npz takes \d+.* of memory, and 50.0 MB are free") as caught:
        open_images(path)
    assert_one_line(caught.value)


def test_names_in_an_archive_of_arrays_are_no_paths(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in ("../../train_images.npy", "/train_images.npy", "train_images.npy"):
            archive.writestr(name, npy(BYTES, "(4, 4, 4)", bytes(64)))
        archive.writestr("train_labels.npy", npy("'<i8'", "(4,)", struct.pack("<4q", 0, 1, 0, 1)))
    assert len(open_images(folder / "a.npz")) == 4
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "a.npz"]


# --- files of tensors


def tensors(header, data=bytes(8), *, length=None):
    """Return a safetensors file whose header, and its length, may say anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSORS = {
    "a header of 2^64 bytes": tensors({"a": WHOLE}, length=2**64 - 1),
    "a header of 100 MB that is not there": tensors({"a": WHOLE}, length=10**8),
    "offsets behind the end": tensors({"a": WHOLE | {"data_offsets": [0, 800]}}),
    "negative offsets": tensors({"a": WHOLE | {"data_offsets": [-8, 0]}}),
    "tensors that overlap": tensors({"a": WHOLE, "b": WHOLE}),
    "a hole": tensors({"a": WHOLE}, bytes(16)),
    "a shape that overflows": tensors({"a": WHOLE | {"shape": [2**62, 2**62]}}),
    "an unknown type": tensors({"a": WHOLE | {"dtype": "O"}}),
    "a deep header": tensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a name that is no UTF-8": tensors(b'{"\xff": 1}'),
    "a header that is a list": tensors(b"[]"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_of_tensors_that_lies_is_refused_by_all_who_read_it(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(TENSORS[name])
    readers = (
        load_model,
        read_tensors,
        read_delta,
        lambda path: read_weights(path, {"a": (2,)}, {}),
        lambda path: load_checkpoint(path, tiny_config(), whole=tiny_classifier()),
    )
    for read in readers:
        with pytest.raises(ChanscaleError, match=r"model\.safetensors") as caught:
            read(path)
        assert_one_line(caught.value)


def with_metadata(told):
    return tensors({"__metadata__": {METADATA: told}, "a": WHOLE})


DEEPEST = sys.getrecursionlimit()
TOLD = {
    "no end of brackets": "[" * 200_000,
    "a format of a megabyte": json.dumps({"format": "x" * 1_000_000}),
    "a format of a number of a megabyte": '{"format": 1' + "0" * 1_000_000 + "}",
    "a key of a megabyte": json.dumps({"format": FORMAT, "info": {"x" * 1_000_000: 1}}),
    "a list": "[]",
    **{  # nested so deeply that what reads it may get through, and what writes or shows it not
        f"{depth} brackets in the {key}": f'{{"format": "{FORMAT}", "{key}": {"[" * depth}{"]" * depth}}}'
        for depth in range(DEEPEST - 200, DEEPEST, 10)
        for key in ("format", "info")
    },
}


@pytest.mark.parametrize("name", TOLD)
def test_metadata_that_are_none_are_told_in_a_line(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_metadata(TOLD[name]))
    (tmp_path / "novelty.safetensors").write_bytes(with_metadata(TOLD[name]))
    for read in (load_model, read_delta, load_novelty):
        with pytest.raises(ArtifactError, match=r"\.safetensors") as caught:
            read(path)
        assert_one_line(caught.value)


def test_ten_thousand_empty_tensors_are_read_as_such(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "many.safetensors"
    path.write_bytes(tensors({f"t{index}": empty for index in range(10_000)}, b""))
    found, _ = read_tensors(path)
    assert len(found) == 10_000


def test_a_name_twice_in_a_header_is_one_tensor(tmp_path):
    once = b'"a":' + json.dumps(WHOLE).encode()
    path = tmp_path / "twice.safetensors"
    path.write_bytes(tensors(b"{" + once + b"," + once + b"}"))
    found, _ = read_tensors(path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0.0, 0.0]}


def test_what_a_model_says_of_itself_reaches_no_terminal_as_it_is(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    told = json.dumps({"format": "\x1b[2J\nerror: none"})
    path.write_bytes(tensors({"__metadata__": {METADATA: told}, "a": WHOLE}))
    assert cli.run(["verify", str(path)]) == 2
    complaint = capsys.readouterr().err.rstrip("\n")
    assert complaint.startswith("error: ")
    assert complaint.isprintable()


# --- configurations

CONFIGS = {
    "an object of Python": "seed: !!python/object/apply:os.system ['touch marker']",
    "a name of Python": "seed: !!python/name:os.system",
    "a list that holds itself": "seed: &a [*a]",
    "keys that are no text": "1: 2",
    "a key that is a list": "{[a]: 2}",
    "two documents": "seed: 1\n---\nseed: 2",
    "a NUL": "seed: \0",
    "a share that is not finite": "budget: .inf",
    "a list": "- 1",
    "no end of brackets": "[" * 10_000,
    "lists of lists of lists": "a0: &a0 [1]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    + "seed: *a9",
    "keys of keys of keys": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)),
    "a date that is none": "seed: 2001-99-99",
    "a number of 5,000 digits": "seed: " + "1" * 5000,
    "a number of a million digits": "seed: 0x" + "f" * 1_000_000,
    "a word of a megabyte": "seed: " + "x" * 1_000_000,
    "a name of 1,000 letters": "x" * 1000 + ": 1\n",
    "2,000 options": "".join(f"x{n}: 1\n" for n in range(2000)),
    "a tag that does not fit": "seed: !!int ''",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_runs_nothing_and_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIGS[name])
    with pytest.raises(ConfigError) as caught:
        FitConfig.read(tmp_path / "config.yaml")
    assert_one_line(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# --- files of a run

SPLITS = {
    "nothing": b"",
    "a header alone": b"name,label,group,split\n",
    "a cell less": b"name,label,group,split\n0.png,no,0\n",
    "a cell more": b"name,label,group,split\n0.png,no,0,train,more\n1.png,yes,1,all\n",
    "a side that is none": b"name,label,group,split\n0.png,no,0,\x1b[2J\n",
    "a cell above the limit": b"name,label,group,split\n" + b"x" * 200_000 + b",no,0,train\n",
    "bytes": bytes(range(256)),
    "a very long name": b"name,label,group,split\n" + b"x" * 100_000 + b",no,0,train\n",
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_damaged_split_is_one_line(tmp_path, name):
    path = tmp_path / "splits.csv"
    path.write_bytes(SPLITS[name])
    pixels = np.zeros((4, 4), np.uint8)
    records = tuple(ImageRecord(f"{i}.png", i % 2, str(i), pixels=pixels) for i in range(4))
    with pytest.raises((ArtifactError, SplitError), match=r"splits\.csv") as caught:
        read_splits(path, ImageSet(tmp_path, ("no", "yes"), records))
    assert_one_line(caught.value)


DAMAGED = [b"", b"{", b"3", b"[1, 2]", b"\xff\xfe", b"null", b'{"n": NaN', b"[" * 200_000, b'{"n":' * 200_000]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_figures_are_one_line(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"metrics\.json") as caught:
        read_metrics(path)
    assert_one_line(caught.value)


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_notes_of_a_run_or_grid_are_one_line_and_a_damaged_cell_is_none(tmp_path, content):
    for name in ("grid.json", "cell.json"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "depth.json").write_bytes(content)
    for read in (GridFolder(tmp_path).read, RunFolder(tmp_path / "run", tiny_config()).read_depth):
        with pytest.raises(ArtifactError, match=r"(grid|depth)\.json") as caught:
            read()
        assert_one_line(caught.value)
    assert read_cell(tmp_path / "cell.json") is None


@pytest.mark.parametrize("told", [{}, {"accuracy": 3}, {"accuracy": {}}, {"accuracy": {"value": None}}])
def test_figures_without_an_accuracy_of_test_images_are_one_line(told):
    images, splits = tiny_images(8), Splits((), (), tuple(range(8)))
    with pytest.raises(ArtifactError, match=r"metrics\.json has no accuracy") as caught:
        material._judge(tiny_classifier(), images, splits, told, Watcher())
    assert_one_line(caught.value)


@pytest.mark.parametrize("content", [b"a,b\n\xff,1\n", b"a,b\n1\n", b"a\n1,2\n", b"a\n" + b"x" * 200_000])
def test_a_damaged_history_is_one_line(tmp_path, content):
    path = tmp_path / "history.csv"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"history\.csv") as caught:
        read_history(path)
    assert_one_line(caught.value)


@pytest.mark.parametrize("place", [0, 7, 8, 64, -8, -1])
def test_one_changed_byte_of_a_delta_or_model_is_refused_or_changes_no_shape(tmp_path, place):
    """A number that was changed within its tensor is still a number; `verify` and the digest of a delta tell of it."""
    content = bytearray(tensors({"a": WHOLE}))
    content[place] ^= 0xFF
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        found, _ = read_tensors(path)
    except ArtifactError as error:
        assert_one_line(error)
        return
    assert found["a"].shape == torch.Size([2])
