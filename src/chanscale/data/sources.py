"""Where images and labels come from: a folder per class, a CSV table, or a MedMNIST `.npz` file.

Nothing is decoded here; unreadable images come to light in `chanscale.data.loading`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.config import Frames
from chanscale.data.dicom import name_file, name_frame, read_header
from chanscale.data.dicom_patients import load_key, rename_patient
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.readers import Row, Side, read_rows
from chanscale.data.volumes import is_volume
from chanscale.errors import DataError, clip
from chanscale.files import is_file
from chanscale.wording import printable


@dataclass(frozen=True)
class ImageRecord:
    """One labelled image, not decoded.

    `name` is unique within the set: the path relative to the root, or 'train/17' in an `.npz`. `label` is an
    index into the classes; where an image has several labels, `labels` says of each class whether it holds: 1, 0, or
    -1 where that is unknown. `group` is the patient, or the name itself where no patient is known. `split` is
    the side that the source itself puts the image on. Either `path` or `pixels` is there. `frame`, from 1, is
    one of several of a DICOM file. `renamed`: the group is a patient of a DICOM header, under another name.
    `channels`: 1 or 3, where the header was read already.
    """

    name: str
    label: int
    group: str
    split: Side | None = None
    path: Path | None = None
    pixels: NDArray[np.generic] | None = field(default=None, compare=False, repr=False)
    frame: int | None = None
    renamed: bool = False
    labels: tuple[int, ...] = ()
    channels: int | None = field(default=None, compare=False, repr=False)

    @property
    def is_volume(self) -> bool:
        """Whether the image has three dimensions, by the name of its file."""
        return self.path is not None and is_volume(self.path)

    @property
    def has_patient(self) -> bool:
        """Whether a patient is known, and not only the file."""
        return self.group != (self.name if self.frame is None else name_file(self.name))


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one source; `skipped` names those left out because they are unreadable.

    Classes are in alphabetical order (whole numbers: by value). With two classes, index 1 is the positive
    one. Where an image has several labels, each is a class, in the order of their columns. `frames`: which of a DICOM
    file's were asked for.
    """

    source: Path
    classes: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    skipped: tuple[str, ...] = ()
    frames: Frames = "first"

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def is_multilabel(self) -> bool:
        """Whether an image may have several classes, or none. Raises DataError unless all images are of one kind."""
        several = [record for record in self.records if record.labels]
        _require_one_kind(len(several), len(self.records), self.source)
        for record in several:
            if len(record.labels) != len(self.classes):
                raise DataError(
                    f"{clip(record.name)} of {self.source} has {len(record.labels)} labels; wanted one for each of "
                    f"{len(self.classes)} classes: 1, 0, or {UNKNOWN} where it is unknown."
                )
        return bool(several)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, shape (len,); of several labels whether each holds, shape (len, K): 1, 0, or -1 if unknown."""
        if self.is_multilabel:
            return np.array([record.labels for record in self.records], dtype=np.int64)
        return np.array([record.label for record in self.records], dtype=np.int64)

    @property
    def strata(self) -> NDArray[np.bool_]:
        """Of what kinds each image is, shape (len, S), in the order of `stratum_names`: what a split is to balance."""
        labels = self.labels
        if self.is_multilabel:
            return np.hstack([labels == 1, labels == 0])
        one_hot: NDArray[np.bool_] = labels[:, None] == np.arange(len(self.classes))
        return one_hot

    @property
    def stratum_names(self) -> tuple[str, ...]:
        """The kinds of images that a split is to balance: each class, and the absence of each of several labels."""
        return self.classes + tuple(f"without {name}" for name in self.classes if self.is_multilabel)

    @cached_property
    def dimensions(self) -> int:
        """2 for pictures, 3 for volumes. Raises DataError where both are there: a network takes one kind."""
        volumes = [record for record in self.records if record.is_volume]
        if 0 < len(volumes) < len(self.records):
            raise DataError(
                f"{self.source} holds {len(volumes)} volumes, such as {clip(volumes[0].name)}, and "
                f"{len(self.records) - len(volumes)} pictures; a network takes one kind. Put them apart."
            )
        return 3 if volumes else 2

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in class order."""
        return dict(zip(self.classes, self.strata.sum(0).tolist(), strict=False))

    @property
    def has_groups(self) -> bool:
        """Whether a patient is known for any image."""
        return any(record.has_patient for record in self.records)

    def count_patients(self, indices: Iterable[int] | None = None) -> int | None:
        """Return how many groups the images have, those at `indices` or all; None where no patient is known."""
        if not self.has_groups:
            return None
        records = self.records if indices is None else (self.records[index] for index in indices)
        return len({record.group for record in records})

    @property
    def group_keys(self) -> NDArray[Any]:
        """What tells groups apart when they are sorted or drawn, shape (len,): the same on every machine.

        The names that patients of DICOM get depend on a secret; where there are such, groups are numbered as they
        appear.
        """
        groups = [record.group for record in self.records]
        if not any(record.renamed for record in self.records):
            return np.array(groups)
        number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        return np.array([number[group] for group in groups])

    def on_side(self, side: Side) -> "ImageSet | None":
        """Return the images that the source itself puts on this side, or None if there are none."""
        records = tuple(record for record in self.records if record.split == side)
        return replace(self, records=records) if records else None

    def without(self, names: Sequence[str]) -> "ImageSet":
        """Return the set less these images, which join `skipped`. Raises DataError if none is left."""
        left_out = set(names)
        kept = tuple(record for record in self.records if record.name not in left_out)
        if not kept:
            raise DataError(
                f"none of the {len(self)} images in {self.source} is readable; the first is {clip(names[0])}."
            )
        return replace(self, records=kept, skipped=self.skipped + tuple(names))


def describe_label(record: ImageRecord, classes: Sequence[str]) -> str:
    """Return the class of an image; of several labels those that hold, as `effusion|mass`, or unknown: `effusion?`."""
    if not record.labels:
        return classes[record.label]
    told = zip(classes, record.labels, strict=True)
    return "|".join(name + "?" * (holds == UNKNOWN) for name, holds in told if holds) or "none"


def open_images(
    path: Path | str,
    *,
    group_pattern: str | None = None,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
    frames: Frames = "first",
    label_columns: Sequence[str] | None = None,
) -> ImageSet:
    """List the images and labels of a folder, a table or an array file.

    - A folder holds a folder per class; subfolders of a class belong to it. Hidden files, other suffixes and
      images outside a class folder are passed over.
    - A `.csv` has the columns path and label, and may have group and split (train, val or validation, test).
      Paths are relative to the table and stay below its folder, so that the two can be moved together. A line
      without a label names a folder or an `.npz`, whose images come with their own labels, groups and splits.
      Without a column label, or with `label_columns`, an image has several labels, a column for each: 1, 0, or
      nothing (or -1) where it is unknown.
    - A `.npz` has MedMNIST's keys `{train,val,test}_{images,labels}`; its splits are the official ones. Labels (N, K)
      of 0, 1 and -1 are several of an image.

    `group_pattern` is searched in the file name (in the whole relative path if the pattern has a '/'); its
    first group, or else its whole match, names the patient. Else the PatientID of a DICOM file does, as a keyed
    hash; it is not kept. Of DICOM files with several `frames`, the first is taken, or each, as one image.
    `classes` gives the names and their order, as when a model is evaluated: then a class may be absent, and no
    other may appear. With `skip_bad`, rows whose file is missing are left out. Raises DataError, and ConfigError
    where the key of the hash cannot be had.
    """
    source = Path(path)
    rows = read_rows(source, label_columns=label_columns)
    missing = [row.name for row in rows if row.path is not None and not is_file(row.path)]
    if missing and not skip_bad:
        advice = "Mend the links" if source.is_dir() else "Paths are relative to the table; correct them"
        raise DataError(
            f"{len(missing)} of {len(rows)} images named in {source} are not there, such as {clip(missing[0])}. "
            f"{advice}, or leave these out with skip_bad (--skip-bad), where that is an option."
        )
    _check_names(rows, source)
    _require_one_kind(sum(row.labels is not None for row in rows), len(rows), source)
    names = _name_classes(rows, source) if classes is None else classes
    images = ImageSet(source, names, _to_records(rows, names, group_pattern, source, frames), frames=frames)
    images = images.without(missing) if missing else images
    if classes is None:
        _check_classes(images)
    return images


def _check_names(rows: list[Row], source: Path) -> None:
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise DataError(
            f"{source} names {len(repeated)} images more than once, such as {clip(repeated[0])}. Keep one of each."
        )
    told = {word for row in rows for word in row.labels or (row.label,)}
    foreign = sorted(word for word in told if printable(word) != word)
    if foreign:  # the model's file holds the classes, as text
        raise DataError(f"the class {clip(foreign[0])!r} of {source} is no valid UTF-8; rename its folder.")


def _require_one_kind(several: int, count: int, source: Path) -> None:
    """Raise DataError where some of `count` images, but not all, have several labels."""
    if 0 < several < count:
        raise DataError(
            f"{source} brings images of one label and of several together ({count - several} and {several}); "
            "keep one kind, or give each image a label for every class."
        )


def _name_classes(rows: list[Row], source: Path) -> tuple[str, ...]:
    several = {tuple(row.labels) for row in rows if row.labels is not None}
    if not several:
        return _order_classes({row.label for row in rows})
    if len(several) > 1:
        one, other = (clip(", ".join(names)) for names in sorted(several)[:2])
        raise DataError(f"{source} brings images with the labels {one} and with {other}; keep one kind.")
    return several.pop()


def _order_classes(names: set[str]) -> tuple[str, ...]:
    numbers = all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names)
    # By name as well: 1 and 01 are two classes.
    return tuple(sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names))


def _check_classes(images: ImageSet) -> None:
    if len(images.classes) < 2:
        raise DataError(
            f"{images.source} has only the class {clip(images.classes[0])!r}; wanted two or more."
        )
    counts = zip(images.stratum_names, images.strata.sum(0).tolist(), strict=True)
    few = {name: count for name, count in counts if count < 2}
    if few:
        name, count = next(iter(few.items()))
        raise DataError(
            f"class {clip(name)!r} of {images.source} has {count} image{'' if count == 1 else 's'}; "
            "wanted two or more. Add images, or remove the class."
        )


def spread_frames(record: ImageRecord) -> list[ImageRecord]:
    """Return a record for each frame of a DICOM file that has several, all of one group; else the record."""
    header = None if record.path is None else read_header(record.path)
    count = 1 if header is None else header.frames
    if count == 1:
        return [record]
    numbers = range(1, count + 1)
    return [replace(record, name=name_frame(record.name, number), frame=number) for number in numbers]


def _to_records(
    rows: list[Row], classes: tuple[str, ...], group_pattern: str | None, source: Path, frames: Frames
) -> tuple[ImageRecord, ...]:
    pattern = _compile(group_pattern)
    if pattern is not None and any(row.group for row in rows):
        raise DataError(
            f"{source} has a group column and group_pattern={group_pattern!r} was given; use one of them."
        )
    index = {name: i for i, name in enumerate(classes)}
    unknown = sorted({name for row in rows for name in row.labels or (row.label,)} - index.keys())
    if unknown:
        raise DataError(
            f"{source} has the class {clip(unknown[0])!r}; wanted only {', '.join(map(repr, classes))}."
        )
    records = [_to_record(row, index, pattern) for row in rows]
    if frames == "all":
        records = [frame for record in records for frame in spread_frames(record)]
    return tuple(records)


def _to_record(row: Row, index: Mapping[str, int], pattern: re.Pattern[str] | None) -> ImageRecord:
    group = _find_group(row, pattern)
    header = read_header(row.path) if group is None and row.path is not None else None
    renamed = rename_patient(header.patient, key=load_key()) if header and header.patient else None
    found = ImageRecord(
        row.name, 0, group or renamed or row.name, row.split, row.path, row.pixels,
        renamed=renamed is not None, channels=header.channels if header else None,
    )  # fmt: skip
    if row.labels is None:
        return replace(found, label=index[row.label])
    return replace(found, labels=tuple(row.labels.get(name, UNKNOWN) for name in index))


def _compile(group_pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if group_pattern is None else re.compile(group_pattern)
    except re.error as error:
        raise DataError(f"group_pattern={group_pattern!r} is not a regular expression: {error}.") from error


def _find_group(row: Row, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return row.group
    text = row.name if "/" in pattern.pattern else PurePosixPath(row.name).name
    match = pattern.search(text)
    group = match and match.group(1 if pattern.groups else 0)
    if not group:
        raise DataError(
            f"group_pattern={pattern.pattern!r} finds no patient in {clip(text)!r}; make it match every file."
        )
    return group
