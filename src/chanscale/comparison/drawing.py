"""What a comparison comes to, as files: a table, a row for each cell, and the pictures."""

from collections.abc import Sequence
from pathlib import Path

from chanscale.comparison.cells import Result
from chanscale.comparison.grid import GridFolder
from chanscale.comparison.plots import draw_accuracy_size, draw_small_data
from chanscale.comparison.table import Row, make_rows, to_csv, to_markdown
from chanscale.errors import ArtifactError
from chanscale.files import write_atomically
from chanscale.plotting import to_png


def draw_grid(folder: GridFolder) -> tuple[list[Row], list[Path]]:
    """Write what follows from the cells that are there; return the rows of the table, and damaged cells.

    `table.md`, `cells.csv`, `accuracy_size.png` and, of several sizes, `small_data.png`. Raises ArtifactError when
    there is no cell.
    """
    noted = folder.read()
    results, damaged = _read_results(folder)
    rows = make_rows(results, noted["methods"])
    there = {path.stem for path in folder.cells.glob("*.json")} - {path.stem for path in damaged}
    missing = len(set(noted["cells"]) - there)
    _write(folder.out, rows, results, missing)
    return rows, damaged


def compare_with(folder: GridFolder, method: str) -> tuple[list[Row], list[Path]]:
    """Return the rows with differences from `method` instead of ours, and damaged cells; write nothing.

    Raises ArtifactError when there is no cell, ConfigError when there is none of `method`.
    """
    noted = folder.read()
    results, damaged = _read_results(folder)
    return make_rows(results, noted["methods"], against=method), damaged


def _read_results(folder: GridFolder) -> tuple[list[Result], list[Path]]:
    results, damaged = folder.results()
    if not results:
        raise ArtifactError(f"no cell of {folder.out} has been run to its end: there is nothing to draw")
    return results, damaged


def _write(out: Path, rows: Sequence[Row], results: Sequence[Result], missing: int) -> None:
    write_atomically(out / "table.md", to_markdown(rows, missing=missing))
    write_atomically(out / "cells.csv", to_csv(results))
    write_atomically(out / "accuracy_size.png", to_png(draw_accuracy_size(rows)))
    if len({row.size for row in rows}) > 1:
        write_atomically(out / "small_data.png", to_png(draw_small_data(rows)))
