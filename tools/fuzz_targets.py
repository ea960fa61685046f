"""What `fuzz` feeds: each reader of files from outside, with files to begin with, and how bytes become a file."""

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from PIL import Image

from chanscale.artifact import FORMAT as MODEL
from chanscale.artifact import METADATA, load_model, parse_info, read_model
from chanscale.comparison.cells import read_cell
from chanscale.config import FitConfig
from chanscale.data.images import count_channels, read_image
from chanscale.data.sources import ImageRecord, ImageSet, open_images
from chanscale.data.splits import read_splits
from chanscale.data.volumes import VolumeSpace, read_volume, require_extra
from chanscale.delta import FORMAT as DELTA
from chanscale.delta import read_delta
from chanscale.novelty.storage import FORMAT as NOVEL
from chanscale.novelty.storage import load_novelty
from chanscale.novelty.traits import read_dimensions
from chanscale.report_page.material import read_history, read_metrics
from chanscale.tuning.trials import read_trial
from dicom_files import COMPRESSIONS, dicom  # of tests/

Bytes = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A reader. `name`: of the file. `seeds`: inputs to begin with. `pack`: makes a file of an input."""

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    pack: Bytes = bytes


RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (9, 7), np.uint8)
COLOUR = RNG.integers(0, 255, (9, 7, 3), np.uint8)


def look_at(path: Path) -> None:
    """Do what a command does with an image."""
    count_channels(path)
    read_image(path, size=8)
    read_dimensions(ImageRecord("a", 0, "a", path=path))


def images(kind: str, **options: Any) -> list[bytes]:
    """Return a grey and a colour image."""
    files = [io.BytesIO(), io.BytesIO()]
    for array, file in zip((GREY, COLOUR), files, strict=True):
        Image.fromarray(array).save(file, format=kind, **options)
    return [file.getvalue() for file in files]


def wide_tiffs() -> list[bytes]:
    """Return TIFFs of 16 bits and colour, as they are and compressed."""
    files = []
    for options in ({}, {"compression": "zlib", "predictor": True}, {"planarconfig": "separate"}):
        file = io.BytesIO()
        array = np.full((3, 9, 7) if "planarconfig" in options else (9, 7, 3), 999, np.uint16)
        tifffile.imwrite(file, array, photometric="rgb", **options)
        files.append(file.getvalue())
    return files


def wide_pngs() -> list[bytes]:
    """Return PNGs of 16 bits, grey with alpha, RGB, and RGBA."""
    return [
        png_of(struct.pack(">IIBBBBB", 5, 3, 16, colour, 0, 0, 0), 2 * 5 * n)
        for colour, n in ((4, 2), (2, 3), (6, 4))
    ]


def png_of(header: bytes, width: int) -> bytes:
    """Return a PNG of three rows of ones, of `width` bytes."""
    rows = zlib.compress((b"\0" + b"\xff" * width) * 3)
    return with_checksums(
        PNG
        + b"".join(chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")))
    )


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_checksums(data: bytes) -> bytes:
    """Mend the checksums of a PNG: else each change would end at them."""
    mended, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        mended += chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length])
        place += 12 + length
    return mended + data[place:]


def dicoms() -> list[bytes]:
    """Return DICOM files, as they are and compressed."""
    array = RNG.integers(0, 4000, (40, 36)).astype(np.uint16)
    return [
        save(dicom(array, bits=12)),
        save(dicom(COLOUR, bits=8, photometric="RGB")),
        *map(compressed, COMPRESSIONS),
    ]


def compressed(syntax: str) -> bytes:
    """Return a DICOM file of a transfer syntax."""
    dataset = dicom(RNG.integers(0, 4000, (40, 36)).astype(np.uint16), bits=12)
    dataset.compress(syntax, generate_instance_uid=False)
    return save(dataset)


def save(dataset: Any) -> bytes:
    """Return the bytes of a DICOM file."""
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


SPACES = (VolumeSpace(), VolumeSpace(spacing=2.0, window=(0, 200)))


def look_inside(path: Path) -> None:
    """Read a volume, squashed to a cube and at a spacing."""
    for space in SPACES:
        read_volume(path, size=8, space=space)


def volumes() -> list[bytes]:
    """Return NIfTI volumes: of whole numbers, with a slope, of floats, and in the second version of the format."""
    require_extra()  # MONAI takes longer to import than an input may take to be read
    values = RNG.integers(0, 255, (5, 6, 4)).astype(np.int16)
    affine = np.diag([-1.5, 1.2, 2.0, 1.0])
    sloped = nibabel.Nifti1Image(values, affine)
    sloped.header.set_slope_inter(2.0, -10.0)
    images = [
        nibabel.Nifti1Image(values, affine), sloped, nibabel.Nifti1Image(values.astype(np.float32), affine),
        nibabel.Nifti2Image(values, affine),
    ]  # fmt: skip
    return [image.to_bytes() for image in images]


def zipped(data: bytes) -> bytes:
    """Return a gzip of some bytes, its checksum that of them, and its time none."""
    return gzip.compress(data, mtime=0)


def with_trailer(data: bytes) -> bytes:
    """Mend the checksum and the length at the end of a gzip: else each change would end at them."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(data[GZIP_HEADER:], MOST_UNPACKED)
    except zlib.error:
        return data
    if not unpacker.eof:
        return data
    body = data[: len(data) - len(unpacker.unused_data)]
    return body + struct.pack("<II", zlib.crc32(content), len(content)) + unpacker.unused_data[8:]


GZIP_HEADER, MOST_UNPACKED = 10, 1 << 24


def archive(**arrays: bytes) -> bytes:
    """Return a zip of files of arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name, data in arrays.items():
            content.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """Return the file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


LABELS = npy(np.array([0, 1, 0, 1]))
PICTURES = npy(np.zeros((4, 3, 3), np.uint8))


def tensors(header: bytes) -> bytes:
    """Return a file of tensors with any header, and 64 bytes behind it."""
    return struct.pack("<Q", len(header)) + header + bytes(64)


def with_metadata(text: bytes) -> bytes:
    """Return a file of one tensor, with any metadata."""
    told = {METADATA: text.decode("utf-8", "replace")}
    whole = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    return tensors(json.dumps({"__metadata__": told, "kept": whole}).encode())


INFO = {
    "backbone": "none", "classes": ["no", "yes"], "kept": {"trunk.0": [0, 1]}, "preprocessing": {"mean": [0.5]},
    "image_size": 32, "channels": 1, "head": None, "without": [], "rebuilt_by": "name", "program": None,
    "operating_point": None, "prediction_sets": None,
}  # fmt: skip
NO_DIGEST = "0" * 64


def documents(*values: object) -> list[bytes]:
    """Return JSON."""
    return [json.dumps(value).encode() for value in values]


def describe(path: Path) -> None:
    """Read what a model says of itself."""
    _, metadata = read_model(path)
    parse_info(metadata, path)


def judge(path: Path) -> None:
    """Read a detector, beside a model that it may be of."""
    path.with_name("model.safetensors").write_bytes(b"")
    load_novelty(path.parent)


def split(path: Path) -> None:
    """Read the split of four images."""
    records = tuple(ImageRecord(f"{i}.png", i % 2, str(i), pixels=GREY) for i in range(4))
    read_splits(path, ImageSet(path.parent, ("no", "yes"), records))


MODELS = ({"format": MODEL, "info": INFO}, {"format": MODEL, "info": {}})
DELTAS = (
    {
        "format": DELTA, "chanscale": "0", "weights": NO_DIGEST, "sha256": NO_DIGEST, "widths": {"trunk.0": 8},
        "model": {"format": MODEL, "info": {**INFO, "kept": None}},
    },
)  # fmt: skip
DETECTORS = (
    {
        "format": NOVEL, "chanscale": "0", "sha256": NO_DIGEST, "layers": ["trunk.0"], "facts": ["brightness"],
        "rate": 0.05, "margin": 0.1,
    },
)  # fmt: skip
CELL = {
    "format": "chanscale-cell/1",
    "cell": {"method": "ours", "size": None, "fold": 0, "seed": 0},
    "test": {"a": [1]},
}
TRIAL = {
    "format": "chanscale-trial/1", "number": 0, "state": "complete", "options": {"budget": 0.9}, "validation_auc": 0.8,
    "parameters": {"kept": 1, "removed": 0.9}, "macs": {"kept": 1, "removed": 0.9}, "aucs": [0.8], "epochs": 6,
    "seconds": 1.5,
}  # fmt: skip
FIGURES = {
    "accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}, "auc": {"value": None, "low": None, "high": None},
    "before": {}, "best_epoch": 1, "bytes": {"model": 9}, "depth": {"layer": None}, "epochs": 2,
    "groups": {"protected": {}}, "images": {"train": 2, "validation": 2, "test": 2, "skipped": 0},
    "macs": {"trunk": 9, "kept": 1, "removed": 0.9}, "n": 2,
    "parameters": {"trunk": 9, "kept": 1, "head": 1, "removed": 0.9},
    "peak_memory_bytes": 1, "precision": "32-true", "seconds": 1.5, "threads": 1, "validation_auc": None,
    "versions": {"torch": "2"},
}  # fmt: skip
TABLE = b'path,label,group,split\na.png,no,1,train\n"b.png",yes,2,val\nfolder,,,\na.npz,,,test\n'
SPLIT = (
    b"name,label,group,split\n0.png,no,0,train\n1.png,yes,1,validation\n2.png,no,2,test\n3.png,yes,3,train\n"
)
HISTORY = b"epoch,phase,validation_auc,parameters,width:trunk.0\n1,scale,0.6,9,8\n2,refine,nan,8,7\n"

TARGETS = {
    "png": Target("a.png", look_at, lambda: [*images("PNG"), *wide_pngs()], with_checksums),
    "jpeg": Target("a.jpg", look_at, lambda: [*images("JPEG"), *images("JPEG", progressive=True)]),
    "tiff": Target("a.tif", look_at, lambda: [*images("TIFF"), *images("TIFF", compression="tiff_lzw"), *wide_tiffs()]),
    "dicom": Target("a.dcm", look_at, dicoms),
    "table": Target("a.csv", open_images, lambda: [TABLE, b"path,label\na.png,x\nb.png,y\n"]),
    "npz": Target("a.npz", open_images, lambda: [archive(train_images=PICTURES, train_labels=LABELS)]),
    "npy": Target(
        "a.npz", open_images, lambda: [PICTURES, npy(np.zeros((4, 3, 3, 3), ">u2"))],
        lambda data: archive(train_images=data, train_labels=LABELS),
    ),
    "config": Target("config.yaml", FitConfig.read, lambda: [FitConfig().to_yaml().encode(), b"seed: 1\nbudget: .5\n"]),
    "header": Target(
        "model.safetensors", load_model,
        lambda: documents({"a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}), tensors,
    ),
    "model": Target("model.safetensors", describe, lambda: documents(*MODELS), with_metadata),
    "delta": Target("delta.safetensors", read_delta, lambda: documents(*DELTAS), with_metadata),
    "novelty": Target("novelty.safetensors", judge, lambda: documents(*DETECTORS), with_metadata),
    "splits": Target("splits.csv", split, lambda: [SPLIT]),
    "metrics": Target("metrics.json", read_metrics, lambda: documents(FIGURES)),
    "history": Target("history.csv", read_history, lambda: [HISTORY]),
    "cell": Target("ours-all-f0-s0.json", read_cell, lambda: documents(CELL)),
    "volume": Target("a.nii", look_inside, volumes),
    "volume_gz": Target("a.nii.gz", look_inside, lambda: list(map(zipped, volumes())), with_trailer),
    "trial": Target("0000.json", read_trial, lambda: documents(TRIAL)),
}  # fmt: skip


def words() -> Iterator[str]:
    """Yield what the readers look for: a fuzzer would be long in finding it."""
    yield from FitConfig.model_fields
    yield from FIGURES
    yield from INFO
    yield from ("path", "label", "group", "split", "train", "validation", "test", "val")
    yield from (
        "!!int ",
        "!!float ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!python/name:",
        "&a ",
        "*a",
        "<<: ",
        ".inf",
    )
    yield from (
        "train_images",
        "train_labels",
        "__metadata__",
        "data_offsets",
        "'descr'",
        "'|O'",
        "null",
        "NaN",
        "1e999",
    )
