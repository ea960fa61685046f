"""A folder per class, a CSV table or a MedMNIST `.npz` file, read into rows of one kind; a table may name others."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chanscale.data.images import IMAGE_SUFFIXES
from chanscale.data.label_columns import OWN_COLUMNS, UNKNOWN, find_label_columns, read_labels
from chanscale.data.listing import list_folders, list_images
from chanscale.data.memory import free_memory
from chanscale.errors import DataError, clip, one_line
from chanscale.files import exists, is_file
from chanscale.wording import size_on_disk

Side = Literal["train", "validation", "test"]
SPLIT_WORDS: dict[str, Side] = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
_ROW_BYTES = 1000
"""About what an image takes in memory beside its pixels, its name and labels."""
_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))


@dataclass(frozen=True)
class Row:
    """One image as its source has it: the label and the patient in words, nothing checked across rows.

    `labels`: where it has several labels instead, whether each holds: 1, 0, or -1 where that is unknown.
    """

    name: str
    label: str
    group: str | None = None
    split: Side | None = None
    path: Path | None = None
    pixels: NDArray[np.generic] | None = None
    labels: Mapping[str, int] | None = None


def read_rows(source: Path, *, label_columns: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of a folder, a `.csv` or a `.npz`, as `open_images` documents them. Raises DataError."""
    rows = _read(source, label_columns)
    if not rows:
        raise DataError(f"{source} holds no image; add some, or pass another source.")
    return rows


def _read(source: Path, label_columns: Sequence[str] | None) -> list[Row]:
    if not exists(source):
        raise DataError(
            f"{clip(str(source))} does not exist; wanted a folder of class folders, a .csv table or a .npz file."
        )
    if source.is_dir():
        return _read_folder(source)
    if source.suffix.lower() == ".csv":
        return _read_table(source, label_columns)
    if source.suffix.lower() == ".npz":
        return _read_npz(source)
    raise DataError(f"wanted a folder of class folders, a .csv table or a .npz file, got {source}.")


def _read_folder(root: Path) -> list[Row]:
    folders = list_folders(root)
    if not folders:
        raise DataError(
            f"wanted a folder of images for each class in {root}, got no folder. Sort the images so."
        )
    files = {folder: list_images(folder) for folder in folders}
    empty = [folder.name for folder, images in files.items() if not images]
    if empty:
        raise DataError(
            f"{root} has no image ({_SUFFIXES}) in {', '.join(map(repr, empty))}. "
            "Each folder in it is a class: fill these, or move them away."
        )
    if len(folders) > 1 and all(folder.name.lower() in SPLIT_WORDS for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        lines = " and ".join(f"{folder.name},,{SPLIT_WORDS[folder.name.lower()]}" for folder in folders[:2])
        raise DataError(
            f"the folders in {root}, {names}, are sides, not classes. Name them in a table beside them instead: "
            f"path,label,split, with lines such as {lines}."
        )
    paths = ((path, folder) for folder in folders for path in files[folder])
    return [Row(path.relative_to(root).as_posix(), folder.name, path=path) for path, folder in paths]


def _read_table(table: Path, label_columns: Sequence[str] | None) -> list[Row]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = tuple(_column(name) for name in reader.fieldnames or () if name)
            cells = [(reader.line_num, _clean(row)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {table}: {one_line(error)}") from error
    several = find_label_columns(columns, label_columns, table)
    if not cells:
        raise DataError(f"{table} has a header but no row; add a line for each image.")
    return [row for line, cell in cells for row in _to_rows(cell, table, line, several)]


def _column(name: str) -> str:
    """Return a column's name: ours in small letters, whatever they are written in; others as they are."""
    name = name.strip()
    return name.lower() if name.lower() in OWN_COLUMNS else name


def _clean(row: dict[str, str | None]) -> dict[str, str]:
    # DictReader puts surplus cells under the key None, as a list.
    return {_column(key): (value or "").strip() for key, value in row.items() if isinstance(key, str)}


def _to_rows(row: dict[str, str], table: Path, line: int, several: Sequence[str]) -> list[Row]:
    """Return the image of a line, or all images of the folder or `.npz` that a line without a label names."""
    where = f"{table}, line {line}"
    if not row["path"]:
        raise DataError(f"{where}: the path is missing.")
    name, word = _to_name(row["path"], table), row.get("split", "").lower()
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(str(name)).is_absolute():
        raise DataError(
            f"{where}: wanted a path below {table.parent}, got {clip(row['path'])}: a table that points elsewhere "
            "breaks when it is moved. Put the table above its images."
        )
    if word and word not in SPLIT_WORDS:
        raise DataError(
            f"{where}: the split must be one of {', '.join(SPLIT_WORDS)}, got {clip(row['split'])!r}."
        )
    path, group, split = table.parent / name, row.get("group") or None, SPLIT_WORDS.get(word)
    if several:
        return [Row(str(name), "", group, split, path, labels=read_labels(row, several, where))]
    if row["label"]:
        return [Row(str(name), row["label"], group, split, path)]
    if not ((exists(path) and path.is_dir()) or path.suffix.lower() == ".npz"):
        raise DataError(f"{where}: the label is missing.")
    if group:
        raise DataError(f"{where}: {clip(row['path'])} has groups of its own; leave the group empty.")
    found = read_rows(path)
    return [replace(own, name=str(name / own.name), split=own.split or split) for own in found]


def _to_name(path: str, table: Path) -> PurePosixPath:
    """Return a path with slashes: a table that was written on Windows has backslashes between the folders."""
    literal = os.sep == "/" and is_file(table.parent / path)
    return PurePosixPath(path if literal else path.replace("\\", "/"))


def _read_npz(source: Path) -> list[Row]:
    try:
        # Opened here, since np.load leaves a damaged file open.
        with source.open("rb") as file, np.load(file, allow_pickle=False) as content:
            keys = [key for key in content.files if key.partition("_")[0] in SPLIT_WORDS]
            _require_memory(sum(member.file_size for member in content.zip.filelist), source)
            arrays = {key: array for key in keys if isinstance(array := content[key], np.ndarray)}
    except DataError:
        raise
    # A damaged archive raises nearly anything: BadZipFile, zlib.error, EOFError, NotImplementedError ...
    except Exception as error:
        raise DataError(f"cannot read the arrays of {source}: {clip(one_line(error))}") from error
    words = [word for word in SPLIT_WORDS if f"{word}_images" in arrays]
    if not words:
        raise DataError(f"{source} must have MedMNIST's keys, such as train_images and train_labels.")
    return [row for word in words for row in _read_npz_split(arrays, word, source)]


def _require_memory(wanted: int, source: Path) -> None:
    free = free_memory()
    if wanted > free:
        raise DataError(
            f"{source} takes {size_on_disk(wanted)} of memory, and {size_on_disk(free)} are free; take fewer images, "
            "or save them as files."
        )


def _read_npz_split(arrays: dict[str, NDArray[np.generic]], word: str, source: Path) -> list[Row]:
    images, labels = arrays[f"{word}_images"], arrays.get(f"{word}_labels", np.empty(0))
    _require_labels(images, labels, word, source)
    _require_memory(len(labels) * _ROW_BYTES, source)
    side, one_each = SPLIT_WORDS[word], labels.size == len(images)
    if one_each:
        told = enumerate(zip(images, labels.reshape(-1).tolist(), strict=True))
        return [Row(f"{word}/{i}", str(label), None, side, None, image) for i, (image, label) in told]
    names = [str(column) for column in range(labels.shape[1])]
    several = (dict(zip(names, own, strict=True)) for own in labels.tolist())
    rows = enumerate(zip(images, several, strict=True))
    return [Row(f"{word}/{i}", "", None, side, None, image, own) for i, (image, own) in rows]


def _require_labels(
    images: NDArray[np.generic], labels: NDArray[np.generic], word: str, source: Path
) -> None:
    """Raise DataError unless there is a whole number for each image, or several of 0, 1 and -1."""
    fits = images.ndim > 0 and labels.ndim in (1, 2) and len(labels) == len(images)
    one_each = fits and labels.size == len(images)
    several = fits and labels.size > len(images) and set(np.unique(labels).tolist()) <= {0, 1, UNKNOWN}
    if not (one_each or several) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{source}: wanted one whole number in {word}_labels for each of {word}_images, shape (N,) or (N, 1), or "
            f"several of 0, 1 and -1 (unknown), shape (N, K), got {labels.shape} of {labels.dtype} for images of "
            f"shape {images.shape}."
        )
