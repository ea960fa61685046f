"""What near-duplicates spoil, and the groups that would keep them together."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from chanscale.data.label_columns import UNKNOWN
from chanscale.data.readers import Side
from chanscale.data.sources import ImageRecord, ImageSet, describe_label
from chanscale.errors import ConfigError
from chanscale.files import write_atomically
from chanscale.leaks.twins import SURE, Twins

Kind = Literal["leak", "label conflict", "two patients", "duplicate"]
KINDS: dict[Kind, str] = {
    "leak": "on two sides of the split",
    "label conflict": "with two labels",
    "two patients": "under two patients",
    "duplicate": "on one side",
}


@dataclass(frozen=True)
class Finding:
    """Two records of one exposure, and their sides, where there are any; `agreement` is 0 to 1.

    `kinds`: a 'leak' stands on two sides, a 'duplicate' does not; it may have two labels, or two patients, besides.
    """

    first: ImageRecord
    second: ImageRecord
    sides: tuple[Side | None, Side | None]
    kinds: tuple[Kind, ...]
    agreement: float
    mirrored: bool
    inverted: bool


@dataclass(frozen=True)
class Findings:
    """All pairs that were found in a set; `groups` has a name for each record that joins patients and twins."""

    images: ImageSet
    pairs: tuple[Finding, ...]
    groups: tuple[str, ...]

    def count(self, kind: Kind) -> int:
        """Return the number of pairs of that kind."""
        return sum(kind in pair.kinds for pair in self.pairs)

    @property
    def sure(self) -> int:
        """Number of pairs that are one exposure beyond doubt; the others may be two films that look alike."""
        return sum(pair.agreement >= SURE for pair in self.pairs)

    def spoiled(self, side: Side) -> int:
        """Return how many images of a side have a twin on another."""
        leaks = (pair for pair in self.pairs if "leak" in pair.kinds)
        ends = (end for pair in leaks for end in zip((pair.first, pair.second), pair.sides, strict=True))
        return len({record.name for record, where in ends if where == side})

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "images": len(self.images),
            "skipped": list(self.images.skipped),
            "pairs": len(self.pairs),
            "sure": self.sure,
            "kinds": {kind: self.count(kind) for kind in KINDS},
            "test_images_with_twins": self.spoiled("test"),
            "findings": [_tell(pair, self.images.classes) for pair in self.pairs],
        }


def judge_twins(images: ImageSet, sides: Sequence[Side | None], twins: Sequence[Twins]) -> Findings:
    """Return what is wrong with these pairs of `images`; `sides` has that of each record."""
    pairs = tuple(_judge(images, sides, pair) for pair in twins)
    return Findings(images, pairs, _join_groups(images, twins))


def write_groups(findings: Findings, table: Path) -> None:
    """Write a CSV of path, labels and group that `fit` takes, in which twins share a group; whole or not at all.

    It has a row for each file, also of several frames, and no group for a file that is alone and of no known patient.
    It has no sides: those are to be drawn anew, by these groups. Raises ConfigError as `require_paths` does.
    """
    require_paths(findings.images, table)
    rows = {
        _path_below(table, record): (_label_cells(record, findings.images.classes), group, record.has_patient)
        for record, group in zip(findings.images.records, findings.groups, strict=True)
    }
    files = Counter(group for _, group, _ in rows.values())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = findings.images.classes if findings.images.is_multilabel else ("label",)
    writer.writerow(("path", *labels, "group"))
    for path, (cells, group, has_patient) in rows.items():
        writer.writerow((path, *cells, group if has_patient or files[group] > 1 else ""))
    write_atomically(table, text.getvalue())


def _label_cells(record: ImageRecord, classes: Sequence[str]) -> list[str]:
    if not record.labels:
        return [classes[record.label]]
    return ["" if label == UNKNOWN else str(label) for label in record.labels]


def require_paths(images: ImageSet, table: Path) -> None:
    """Check that a table at this place can name the images, and is not where they come from. Raises ConfigError."""
    require_other_table(images.source, table)
    for record in images.records:
        _path_below(table, record)


def require_other_table(source: Path, table: Path) -> None:
    """Check that a table is not to take the place of that of the images. Raises ConfigError."""
    if table.resolve() == source.resolve():
        raise ConfigError(f"{table} is the table of the images itself; name another file beside it")


def _judge(images: ImageSet, sides: Sequence[Side | None], pair: Twins) -> Finding:
    first, second = images.records[pair.first], images.records[pair.second]
    where = sides[pair.first], sides[pair.second]
    kinds: list[Kind] = ["leak" if where[0] != where[1] else "duplicate"]
    if contradict(first, second):
        kinds.append("label conflict")
    if first.has_patient and second.has_patient and first.group != second.group:
        kinds.append("two patients")
    return Finding(first, second, where, tuple(kinds), pair.agreement, pair.mirrored, pair.inverted)


def contradict(first: ImageRecord, second: ImageRecord) -> bool:
    """Return whether two images have different classes, or one has a label that the other is known to lack."""
    if not first.labels:
        return first.label != second.label
    pairs = zip(first.labels, second.labels, strict=True)
    return any(one != other and UNKNOWN not in (one, other) for one, other in pairs)


def _join_groups(images: ImageSet, twins: Sequence[Twins]) -> tuple[str, ...]:
    """Return for each record the first patient, in the order of the set, of all that hang together with it."""
    groups = list(dict.fromkeys(record.group for record in images.records))
    number = {group: index for index, group in enumerate(groups)}
    of = [number[record.group] for record in images.records]
    one, other = [of[pair.first] for pair in twins], [of[pair.second] for pair in twins]
    links = coo_array((np.ones(len(one)), (one, other)), shape=(len(groups), len(groups)))
    _, joined = connected_components(links, directed=False)
    _, leaders = np.unique(joined, return_index=True)
    return tuple(groups[leaders[joined[index]]] for index in of)


def _path_below(table: Path, record: ImageRecord) -> str:
    if record.path is None:
        raise ConfigError(f"{table} cannot name {record.name}: an .npz holds no files; use --json instead")
    folder, path = table.resolve().parent, record.path.absolute()
    for place in (path, path.parent.resolve() / path.name):
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
    raise ConfigError(
        f"{table} does not lie above the images, such as {record.name}: paths of a table are relative to it. "
        f"Name a file in {path.parent.parent} instead"
    )


def _tell(pair: Finding, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "kinds": list(pair.kinds),
        "images": [pair.first.name, pair.second.name],
        "sides": list(pair.sides),
        "labels": [describe_label(record, classes) for record in (pair.first, pair.second)],
        "patients": [pair.first.group, pair.second.group],
        "agreement": pair.agreement,
        "mirrored": pair.mirrored,
        "inverted": pair.inverted,
    }
