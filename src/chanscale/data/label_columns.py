"""Several labels an image: a column of a table for each, with 1, 0, or nothing where it is unknown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from chanscale.errors import DataError, clip

UNKNOWN = -1
"""What a label is where nobody has told whether it holds."""
OWN_COLUMNS = ("path", "label", "group", "split")
"""The columns of a table that are no labels."""
_WORDS = {"1": 1, "0": 0, "": UNKNOWN, "-1": UNKNOWN, "nan": UNKNOWN}


def find_label_columns(columns: Sequence[str], wanted: Sequence[str] | None, table: Path) -> tuple[str, ...]:
    """Return the columns of a table that are labels; none where the one column `label` holds the class.

    `wanted`: their names; default: where there is no column `label`, all that are not ours. Raises DataError.
    """
    if twice := [name for name in OWN_COLUMNS if columns.count(name) > 1]:
        raise DataError(f"{table} has the column {twice[0]} twice; rename one, or remove it.")
    if "path" in columns and "label" in columns and wanted is None:
        return ()
    found = tuple(name for name in columns if name not in OWN_COLUMNS) if wanted is None else tuple(wanted)
    if "path" not in columns or not found:
        raise DataError(
            f"{table} must have the columns path and label (and may have group and split), or path and a column for "
            f"each of several labels, got {clip(', '.join(sorted(columns))) or 'none'}."
        )
    if missing := [name for name in found if name not in columns]:
        raise DataError(f"{table} has no column {clip(missing[0])!r}; it has {clip(', '.join(columns))}.")
    if repeated := [name for name in found if columns.count(name) > 1 or found.count(name) > 1]:
        raise DataError(f"{table} has the label {clip(repeated[0])!r} twice; rename one, or remove it.")
    return found


def read_labels(row: Mapping[str, str], columns: Sequence[str], where: str) -> dict[str, int]:
    """Return whether each label of a line holds: 1, 0, or -1 where it is unknown. Raises DataError.

    An uncertain label, which CheXpert writes as -1, counts as unknown.
    """
    return {name: _read_label(row[name], name, where) for name in columns}


def _read_label(word: str, name: str, where: str) -> int:
    try:
        return _WORDS[word.lower().removesuffix(".0")]
    except KeyError:
        raise DataError(
            f"{where}: wanted 1, 0, or nothing (unknown) for the label {clip(name)!r}, got {clip(word)!r}; call the "
            "column `label` if it holds the class of each image, or say which columns are several labels with "
            "label_columns (--label-columns)."
        ) from None
