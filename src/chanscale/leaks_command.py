"""The command that finds near-duplicates in a set of images; `cli` adds it to the others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chanscale.cli_options import DataArgument, JsonOption, SkipOption
from chanscale.config import Frames
from chanscale.display import complain, describe_rows, out, say, show_json, watching

if TYPE_CHECKING:
    from chanscale.leaks.findings import Finding, Findings

FOUND = 1
SHOWN = 20


def leaks(
    data: DataArgument,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run of these images: its sides, patients and frames count."),
    ] = None,
    group_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression on the file name; its first group (or whole match) names the patient."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE",
            help="CSV to write, above the images, for fit: it puts twins, and their patients, in one group.",
        ),
    ] = None,
    frames: Annotated[
        Frames | None,
        typer.Option(
            help="Of DICOM files with several frames: take the first, or all, each as an image. Default: as the --run "
            "did, or the first."
        ),
    ] = None,
    label_columns: Annotated[
        str | None,
        typer.Option(help="Of a CSV table: the columns that are labels, separated by commas, as for fit."),
    ] = None,
    skip_bad: SkipOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Find images that show one exposure twice.

    Across sides, with two labels, or under two patients. Copies that were saved again, resized, cropped a little,
    turned by a degree or two, mirrored or inverted are found by their pixels. The exit code is 0 when there are none,
    1 when there are some, 2 after an error.
    """
    from chanscale.files import require_new
    from chanscale.leaks.findings import require_other_table, write_groups
    from chanscale.leaks.search import find_leaks

    if table is not None:
        require_other_table(data, table)
        require_new(table, ".csv")
    with watching() as watcher:
        found = find_leaks(
            data, run=run, group_pattern=group_pattern, frames=frames, label_columns=label_columns,
            skip_bad=skip_bad, table=table, watcher=watcher,
        )  # fmt: skip
    if table is not None:
        write_groups(found, table)
        complain(f"wrote {table}")
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found, table)
    if found.pairs:
        raise typer.Exit(FOUND)


def _show(found: "Findings", table: Path | None) -> None:
    from chanscale.leaks.search import describe

    if found.images.skipped:
        complain(f"warning: left out unreadable images: {len(found.images.skipped)}")
    if not found.pairs:
        say(f"No two of {len(found.images):,} images look like one exposure.")
        return
    # What spoils a test comes first.
    pairs = sorted(found.pairs, key=lambda pair: (pair.kinds[0] == "duplicate", -len(pair.kinds)))
    columns = ("image", "twin", "what", "sides", "labels", "agreement")
    out.print(describe_rows(columns, [_row(pair, found.images.classes) for pair in pairs[:SHOWN]], paths=2))
    if len(pairs) > SHOWN:
        say(f"and {len(pairs) - SHOWN:,} more, which --json has")
    say(f"{describe(found)}.")
    if table is None:
        say("--out FILE.csv, above the images, writes a table for fit in which twins are one group.")


def _row(pair: "Finding", classes: tuple[str, ...]) -> tuple[str, ...]:
    from chanscale.data.sources import describe_label
    from chanscale.explain.places import shown_name

    how = [word for word, so in (("mirrored", pair.mirrored), ("inverted", pair.inverted)) if so]
    cells = (
        pair.first.name, pair.second.name, ", ".join([*pair.kinds, *how]), _both(*pair.sides),
        _both(describe_label(pair.first, classes), describe_label(pair.second, classes)), f"{pair.agreement:.2f}",
    )  # fmt: skip
    return tuple(shown_name(cell) for cell in cells)


def _both(first: str | None, second: str | None) -> str:
    return (first or "") if first == second else f"{first}, {second}"
