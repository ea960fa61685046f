"""Where images and labels come from: a folder per class, a CSV table, or a MedMNIST `.npz` file.

Nothing is decoded here; unreadable images come to light in `chanscale.data.loading`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from chanscale.data.readers import Row, Side, read_rows
from chanscale.errors import DataError
from chanscale.files import is_file
from chanscale.wording import printable


@dataclass(frozen=True)
class ImageRecord:
    """One labelled image, not decoded.

    `name` is unique within the set: the path relative to the root, or 'train/17' in an `.npz`. `label` is an
    index into the classes. `group` is the patient, or the name itself where no patient is known. `split` is
    the side that the source itself puts the image on. Either `path` or `pixels` is there.
    """

    name: str
    label: int
    group: str
    split: Side | None = None
    path: Path | None = None
    pixels: NDArray[np.generic] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one source; `skipped` names those left out because they are unreadable.

    Classes are in alphabetical order (whole numbers: by value). With two classes, index 1 is the positive
    one.
    """

    source: Path
    classes: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, shape (len,)."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in class order."""
        found = Counter(record.label for record in self.records)
        return {name: found[index] for index, name in enumerate(self.classes)}

    @property
    def has_groups(self) -> bool:
        """Whether a patient is known for any image."""
        return any(record.group != record.name for record in self.records)

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
                f"none of the {len(self)} images in {self.source} is readable; the first is {names[0]}."
            )
        return replace(self, records=kept, skipped=self.skipped + tuple(names))


def open_images(
    path: Path | str,
    *,
    group_pattern: str | None = None,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
) -> ImageSet:
    """List the images and labels of a folder, a table or an array file.

    - A folder holds a folder per class; subfolders of a class belong to it. Hidden files, other suffixes and
      images outside a class folder are passed over.
    - A `.csv` has the columns path and label, and may have group and split (train, val or validation, test).
      Paths are relative to the table and stay below its folder, so that the two can be moved together.
    - A `.npz` has MedMNIST's keys `{train,val,test}_{images,labels}`; its splits are the official ones.

    `group_pattern` is searched in the file name (in the whole relative path if the pattern has a '/'); its
    first group, or else its whole match, names the patient. `classes` gives the names and their order, as
    when a model is evaluated: then a class may be absent, and no other may appear. With `skip_bad`, rows
    whose file is missing are left out. Raises DataError.
    """
    source = Path(path)
    rows = read_rows(source)
    missing = [row.name for row in rows if row.path is not None and not is_file(row.path)]
    if missing and not skip_bad:
        advice = "Mend the links" if source.is_dir() else "Paths are relative to the table; correct them"
        raise DataError(
            f"{len(missing)} of {len(rows)} images named in {source} are not there, such as {missing[0]}. "
            f"{advice}, or leave these out with skip_bad (--skip-bad)."
        )
    _check_names(rows, source)
    names = _order_classes({row.label for row in rows}) if classes is None else classes
    images = ImageSet(source, names, _to_records(rows, names, group_pattern, source))
    images = images.without(missing) if missing else images
    if classes is None:
        _check_classes(images)
    return images


def _check_names(rows: list[Row], source: Path) -> None:
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise DataError(
            f"{source} names {len(repeated)} images more than once, such as {repeated[0]}. Keep one of each."
        )
    foreign = [row.label for row in rows if printable(row.label) != row.label]
    if foreign:  # the model's file holds the classes, as text
        raise DataError(f"the class {foreign[0]!r} of {source} is no valid UTF-8; rename its folder.")


def _order_classes(names: set[str]) -> tuple[str, ...]:
    numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def _check_classes(images: ImageSet) -> None:
    if len(images.classes) < 2:
        raise DataError(f"{images.source} has only the class {images.classes[0]!r}; wanted two or more.")
    few = {name: count for name, count in images.counts.items() if count < 2}
    if few:
        name, count = next(iter(few.items()))
        raise DataError(
            f"class {name!r} of {images.source} has {count} image{'' if count == 1 else 's'}; "
            "wanted two or more. Add images, or remove the class."
        )


def _to_records(
    rows: list[Row], classes: tuple[str, ...], group_pattern: str | None, source: Path
) -> tuple[ImageRecord, ...]:
    pattern = _compile(group_pattern)
    if pattern is not None and any(row.group for row in rows):
        raise DataError(
            f"{source} has a group column and group_pattern={group_pattern!r} was given; use one of them."
        )
    index = {name: i for i, name in enumerate(classes)}
    unknown = sorted({row.label for row in rows} - index.keys())
    if unknown:
        raise DataError(
            f"{source} has the class {unknown[0]!r}; wanted only {', '.join(map(repr, classes))}."
        )
    return tuple(
        ImageRecord(row.name, index[row.label], _find_group(row, pattern), row.split, row.path, row.pixels)
        for row in rows
    )


def _compile(group_pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if group_pattern is None else re.compile(group_pattern)
    except re.error as error:
        raise DataError(f"group_pattern={group_pattern!r} is not a regular expression: {error}.") from error


def _find_group(row: Row, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return row.group or row.name
    text = row.name if "/" in pattern.pattern else PurePosixPath(row.name).name
    match = pattern.search(text)
    group = match and match.group(1 if pattern.groups else 0)
    if not group:
        raise DataError(
            f"group_pattern={pattern.pattern!r} finds no patient in {text!r}; make it match every file."
        )
    return group
