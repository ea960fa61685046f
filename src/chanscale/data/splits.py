"""Which images train, which choose the best epoch, and which are kept for the final figures."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from chanscale.data.dicom import name_file
from chanscale.data.readers import Side
from chanscale.data.sources import ImageSet, describe_label
from chanscale.errors import ArtifactError, SplitError, clip, one_line
from chanscale.files import write_atomically

SIDES: tuple[Side, ...] = ("train", "validation", "test")
_COLUMNS = ("name", "label", "group", "split")
_ATTEMPTS = 50
_TOLERANCE = 0.01  # of a class, on each side; or one image
_HINTS = (r"^(\d+)[_-]", r"^([^_]*\d)_", r"^([^-]*\d)-", r"^(.*\d)[_-]\d+\.")
_MIN_SHARE_OF_GROUPS = 0.05  # fewer names for so many files is a shooting date or a prefix, not a patient


@dataclass(frozen=True)
class Splits:
    """Indices into `ImageSet.records`, ascending; a side may be empty."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def side_of(self) -> dict[int, Side]:
        """The side of each image, by its index."""
        return {index: side for side, own in zip(SIDES, astuple(self), strict=True) for index in own}


def split_images(images: ImageSet, *, validation: float, test: float, seed: int) -> Splits:
    """Put each group on one side, so that every side has about its share of every class.

    `validation` and `test` are shares of the images; 0 leaves the side empty. Sides that the source itself
    gives are taken whole; those that it does not give are drawn from its training images, as shares of these.
    The same seed gives the same split. Raises SplitError if a group stands on two given sides, or if no split
    has every class on every side.
    """
    given = {record.split for record in images.records}
    if None in given and len(given) > 1:
        count = sum(record.split is None for record in images.records)
        raise SplitError(
            f"{count} of {len(images)} images of {images.source} have no split; "
            "give all of them one, or none."
        )
    sides = np.array([SIDES.index(record.split or "train") for record in images.records])
    _check_groups(images, sides)
    if not np.any(sides == 0):
        raise SplitError(f"{images.source} gives no image to train on; give some images the split train.")
    drawn = {
        side: share for side, share in ((1, validation), (2, test)) if share > 0 and not np.any(sides == side)
    }
    if drawn:
        pool = np.flatnonzero(sides == 0)
        sides[pool] = _draw(images, pool, drawn, np.random.default_rng(seed))
    _check_classes(images, sides, {0, *drawn})
    return _to_splits(sides)


def suggest_group_pattern(images: ImageSet) -> str | None:
    """Return a `group_pattern` if no patient is known, but file names look as if they shared some.

    It is a hint to print, not something to apply unasked: NIH's '00000061_012.png' gives '^(\\d+)[_-]'.
    """
    names = [PurePosixPath(record.name).name for record in images.records if record.path is not None]
    if images.has_groups or not names:
        return None
    return next((hint for hint in _HINTS if _looks_like_patients(hint, names)), None)


def write_splits(path: Path, images: ImageSet, splits: Splits) -> None:
    """Write a CSV table of name, label, group and split, a row for each image; whole or not at all."""
    side_of = splits.side_of
    rows = [
        (record.name, describe_label(record, images.classes), record.group, side_of[index])
        for index, record in enumerate(images.records)
    ]
    text = io.StringIO()
    # The module quotes the line's end that it writes, and no other, which would be one when it reads.
    returns = any("\r" in cell for row in rows for cell in row)
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)
    writer.writerows([_COLUMNS, *rows])
    write_atomically(path, text.getvalue())


def read_splits(path: Path, images: ImageSet) -> Splits:
    """Read what `write_splits` wrote, for the same images in any order.

    Raises ArtifactError if the file is missing or damaged, SplitError if it was written for other images.
    """
    rows = _read_rows(path)
    names = [record.name for record in images.records]
    strangers = sorted(set(names) ^ rows.keys())
    if strangers:
        raise SplitError(
            f"{path} and {images.source} differ in {len(strangers)} images, such as {clip(strangers[0])}; "
            "use the images that the split was made for, or make a new split."
        )
    for record in images.records:
        label, name = rows[record.name]["label"], describe_label(record, images.classes)
        if label != name:
            raise SplitError(
                f"{path} has {clip(record.name)} as {clip(label)!r}, {images.source} as {clip(name)!r}; "
                "make a new split."
            )
    sides = np.array([SIDES.index(rows[name]["split"]) for name in names])
    _check_groups(images, sides)
    return _to_splits(sides)


def read_test_names(path: Path) -> frozenset[str]:
    """Return the images that a file of `write_splits` has as test. Raises ArtifactError."""
    return frozenset(name for name, row in _read_rows(path).items() if row["split"] == "test")


def read_groups(path: Path) -> dict[str, str]:
    """Return the patient of each image that a file of `write_splits` has, by its name. Raises ArtifactError."""
    return {name: row["group"] for name, row in _read_rows(path).items()}


def read_training_names(path: Path) -> frozenset[str]:
    """Return the images that a file of `write_splits` has as train or validation; of frames, the name of the file.

    Look an image up by its `name_file`: whoever took the first frame has seen the file. Raises ArtifactError.
    """
    return frozenset(name_file(name) for name, row in _read_rows(path).items() if row["split"] != "test")


def read_training_groups(path: Path) -> frozenset[str]:
    """Return the patients, where known, that a file of `write_splits` has as train or validation.

    Raises ArtifactError.
    """
    rows = _read_rows(path).items()
    return frozenset(row["group"] for name, row in rows if row["split"] != "test" and row["group"] != name)


def _draw(
    images: ImageSet, pool: NDArray[np.intp], shares: dict[int, float], rng: np.random.Generator
) -> NDArray[np.intp]:
    """Return the side of each image of the pool: a draw close to the shares, or the closest of many."""
    strata = images.strata[pool]
    members = _index_groups([images.records[index].group for index in pool])
    counts = np.array([strata[indices].sum(axis=0) for indices in members])
    targets = _find_targets(counts.sum(axis=0), shares)
    tolerance = np.maximum(1, _TOLERANCE * counts.sum(axis=0))
    best, least = np.zeros(len(members), dtype=np.intp), np.inf
    for _ in range(_ATTEMPTS):
        # In any order, not the largest group first: that would put all patients with many images in training.
        side_of_group, filled = _fill(counts, rng.permutation(len(members)), targets)
        lacking = np.sum((filled == 0) & (targets > 0))
        error = lacking * len(pool) + (np.abs(filled - targets) / tolerance).max()
        if error < least:
            best, least = side_of_group, error
        if least <= 1:
            break
    sides = np.zeros(len(pool), dtype=np.intp)
    for indices, side in zip(members, best, strict=True):
        sides[indices] = side
    return sides


def _find_targets(totals: NDArray[np.int64], shares: dict[int, float]) -> NDArray[np.float64]:
    """Return the wanted number of images, (sides, classes): one at least on each side that is drawn."""
    targets = np.zeros((len(SIDES), len(totals)))
    for side, share in shares.items():
        targets[side] = np.where(totals > 0, np.maximum(share * totals, 1), 0)
    targets[0] = totals - targets.sum(axis=0)
    return targets


def _fill(
    counts: NDArray[np.int64], order: NDArray[np.intp], targets: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Put each group where it most lessens the squared distance to the targets, in shares of each class."""
    weights = 1 / np.maximum(targets.sum(axis=0), 1) ** 2
    filled = np.zeros(targets.shape)
    closed = np.where(targets.sum(axis=1) == 0, np.inf, 0.0)
    sides = np.zeros(len(counts), dtype=np.intp)
    for group in order:
        cost = (weights * counts[group] * (2 * (filled - targets) + counts[group])).sum(axis=1) + closed
        sides[group] = np.argmin(cost)
        filled[sides[group]] += counts[group]
    return sides, filled


def _index_groups(groups: Sequence[str]) -> list[list[int]]:
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return list(members.values())


def _check_groups(images: ImageSet, sides: NDArray[np.intp]) -> None:
    side_of: dict[str, int] = {}
    for record, side in zip(images.records, sides.tolist(), strict=True):
        if side_of.setdefault(record.group, side) != side:
            raise SplitError(
                f"group {clip(record.group)!r} of {images.source} stands on two sides, "
                f"{SIDES[side_of[record.group]]} and {SIDES[side]} ({clip(record.name)}); "
                "put all images of a group on one side."
            )


def _check_classes(images: ImageSet, sides: NDArray[np.intp], wanted: set[int]) -> None:
    strata, names = images.strata, images.stratum_names
    for index, side in enumerate(SIDES):
        own = sides == index
        absent = np.flatnonzero(~strata[own].any(axis=0))
        if len(absent) and (own.any() or index in wanted):
            members = np.flatnonzero(strata[:, absent[0]])
            groups = len({images.records[member].group for member in members})
            raise SplitError(
                f"no split of {images.source} was found with every class on every side: "
                f"{side} has no {clip(names[absent[0]])!r}, which has {groups} group{'' if groups == 1 else 's'} "
                "(patients, or single images). Add images, change the shares, or use test=0."
            )


def _to_splits(sides: NDArray[np.intp]) -> Splits:
    train, validation, test = (tuple(np.flatnonzero(sides == side).tolist()) for side in range(len(SIDES)))
    return Splits(train, validation, test)


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        raise ArtifactError(f"cannot read the split {path}: {one_line(error)}") from error
    if not rows or not all(set(_COLUMNS) <= row.keys() and row["split"] in SIDES for row in rows):
        raise ArtifactError(
            f"{path} must have the columns {', '.join(_COLUMNS)}, "
            f"and one of {', '.join(SIDES)} in each row's split."
        )
    return {row["name"]: row for row in rows}


def _looks_like_patients(pattern: str, names: list[str]) -> bool:
    found = [re.search(pattern, name) for name in names]
    groups = {match.group(1) for match in found if match}
    return all(found) and max(_MIN_SHARE_OF_GROUPS * len(names), 2) <= len(groups) < len(names)
