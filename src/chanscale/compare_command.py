"""The command that compares ways to use a pretrained network; `cli` adds it to the others."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chanscale.cli_options import (
    ConfigFileOption,
    RayCpusOption,
    RayOption,
    merge_config,
    with_config_options,
)
from chanscale.commands import require_outside, warn_about_patients
from chanscale.comparison.place import Place
from chanscale.config import READING, FitConfig
from chanscale.display import complain, describe_rows, out, say
from chanscale.errors import ConfigError
from chanscale.wording import are_there, percent

if TYPE_CHECKING:
    from chanscale.comparison.cells import CellSpec, Result
    from chanscale.comparison.grid import GridFolder, Plan
    from chanscale.comparison.processes import CellProcesses
    from chanscale.comparison.ray_cells import RayCells
    from chanscale.comparison.table import Row

FAILED_CELLS = 1
SHOWN = ("method", "images", "cells", "test AUC", "ours less it", "removed", "seconds")
"""The columns of the table that a terminal has room for."""


@with_config_options
def compare(
    out_folder: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder of the grid, new or begun.")
    ],
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="Images, as for fit; not needed with --table.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Baselines; those that cut also as METHOD@BUDGET; chanscale, also with options of its own: "
            "chanscale@BUDGET+OPTION=VALUE."
        ),
    ] = "head,full,chanscale",
    folds: Annotated[
        int,
        typer.Option(
            min=1, help="Parts, by patient; each is test once. 1: another split for each seed, as fit's."
        ),
    ] = 5,
    only_folds: Annotated[str | None, typer.Option(help="Run these folds alone, e.g. 0,1.")] = None,
    sizes: Annotated[
        str,
        typer.Option(
            help="Numbers of training images, e.g. 25,50,100,all; at most as many images validate, and a smaller set "
            "lies in a larger."
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds of the cells, e.g. 0,1,2; --seed fixes the folds.")] = "0",
    tries: Annotated[
        int,
        typer.Option(
            min=1, max=3, help="Learning rates of each method, a cell each; the best by validation counts."
        ),
    ] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cells at a time, which share the cores; 1, or all that a cluster has room for."
        ),
    ] = None,
    ray: RayOption = None,
    ray_cpus: RayCpusOption = None,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing; draw the table from the cells that are there.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="With --table: print the AUC of METHOD, less that of each other, instead of ours; write nothing.",
        ),
    ] = None,
    config_file: ConfigFileOption = None,
    *,
    given: dict[str, Any],
) -> None:
    """Compare methods over folds, seeds and numbers of images.

    Each cell runs in a process of its own and leaves one file; a table is drawn from all. The same command goes on
    where it was stopped.
    """
    from chanscale.comparison.grid import GridFolder

    folder = GridFolder(out_folder)
    failed = 0
    if against is not None:
        if not table:
            raise ConfigError("--against goes with --table")
        _print_against(folder, against)
        return
    if not table:
        if data is None:
            raise ConfigError(
                "name the images, DATA; or draw the table of cells that are there, with --table"
            )
        require_outside(data, out_folder)
        place = Place(jobs, ray, ray_cpus)
        config = merge_config(given, config_file)
        _require_heeded(given, config)
        plan = _make_plan(methods, sizes, folds, only_folds, seeds, tries, config)
        failed = _run_missing(plan, data, folder, place)
    _draw(folder, failed)
    if failed:
        raise typer.Exit(FAILED_CELLS)


def _require_heeded(given: Mapping[str, Any], config: FitConfig) -> None:
    """Raise ConfigError for an option of the command line that no cell would heed."""
    from chanscale.comparison.cells import configure_learning

    heeded = configure_learning(config)
    for name in sorted({*READING, "speed"} & given.keys()):
        if getattr(config, name) != (told := getattr(heeded, name)):
            raise ConfigError(
                f"methods are compared as they come from training: every cell has {name}={told!r}; leave --{name} out"
            )


def _make_plan(
    methods: str,
    sizes: str,
    folds: int,
    only_folds: str | None,
    seeds: str,
    tries: int,
    config: FitConfig,
) -> "Plan":
    from chanscale.baselines import BASELINES
    from chanscale.comparison.grid import Plan
    from chanscale.comparison.methods import parse_methods

    names = _read_list(methods)
    if not names:
        raise ConfigError(f"--methods must be names, separated by commas. Got {methods!r}.")
    chosen = tuple(range(folds)) if only_folds is None else _read_numbers("only-folds", only_folds)
    if max(chosen) >= folds:
        raise ConfigError(f"--only-folds must be below {folds}, the number of --folds. Got {max(chosen)}.")
    return Plan(
        parse_methods(names, BASELINES, config), _read_sizes(sizes), folds, chosen,
        _read_numbers("seeds", seeds), config, tries,
    )  # fmt: skip


def _run_missing(plan: "Plan", data: Path, folder: "GridFolder", place: Place) -> int:
    """Run the cells that are not there; return how many failed."""
    from chanscale.catalogue import require_network
    from chanscale.run_images import open_path

    require_network(plan.config.backbone)
    images = open_path(data, plan.config)
    warn_about_patients(images, plan.config.group_pattern, "who may then stand in several folds")
    # All that can be wrong with the plan is said before the folder is touched.
    plan.specs(data, images, "32-true")
    opening = place.opening(folder.cells, device=plan.config.device, tell=complain)
    with opening as runner, folder.working():
        precision = folder.begin(plan, images)
        specs = plan.specs(data, images, precision, younger=folder.find_younger())
        missing = folder.missing(specs)
        there = len(specs) - len(missing)
        complain(f"{plan.describe()}; {are_there(there)}")
        jobs = place.jobs or (len(missing) if place.ray else 1)
        return _run(missing, folder, runner, jobs=max(1, jobs), done=there, total=len(specs))


def _run(
    specs: Sequence["CellSpec"],
    folder: "GridFolder",
    runner: "CellProcesses | RayCells",
    *,
    jobs: int,
    done: int,
    total: int,
) -> int:
    from chanscale.comparison.processes import run_cells

    failed, told = 0, set[str]()
    began, there = monotonic(), done
    try:
        lent = folder.lend_channels(specs)
        with closing(run_cells(lent, runner.run, jobs=jobs, stop=runner.stop)) as cells:
            for spec, error in cells:
                done, failed = done + 1, failed + bool(error)
                result, words = _settle(spec, error, folder)
                left = _describe_rest(monotonic() - began, done - there, total - done)
                complain(f"{done}/{total} {spec.cell.name}: {words}{left}")
                for warning in result.get("warnings", ()):
                    if warning not in told:
                        told.add(warning)
                        complain(f"warning: {warning}")
    except KeyboardInterrupt:
        complain(f"{done - failed} of {total} cells are there; the same command goes on")
        raise
    return failed


def _describe_rest(seconds: float, ran: int, left: int) -> str:
    """Return how long the cells that are `left` may take, by those that `ran`; nothing of less than two minutes."""
    minutes = seconds / ran * left / 60
    if minutes < 2:
        return ""
    return f"; about {minutes:.0f} min to go" if minutes < 120 else f"; about {minutes / 60:.0f} h to go"


def _settle(spec: "CellSpec", error: str | None, folder: "GridFolder") -> "tuple[Result, str]":
    """Note how a cell ended; return what came of it, and that in one line."""
    from chanscale.comparison.cells import cell_path, read_cell

    result = read_cell(cell_path(folder.cells, spec.cell)) if error is None else None
    if result is None:
        error = error or "it left no file"
        return {}, f"failed: {error.splitlines()[-1]} ({folder.note_failure(spec.cell, error)})"
    folder.note_success(spec.cell)
    auc = "not defined" if result["auc"] is None else f"{result['auc']:.3f}"
    return result, f"AUC {auc}, {percent(result['parameters']['removed'])} removed, {result['seconds']:.0f} s"


def _print_against(folder: "GridFolder", method: str) -> None:
    from chanscale.comparison.drawing import compare_with

    _print(*compare_with(folder, method), reference=method)


def _draw(folder: "GridFolder", failed: int) -> None:
    from chanscale.comparison.drawing import draw_grid
    from chanscale.errors import ArtifactError

    try:
        rows, damaged = draw_grid(folder)
    except ArtifactError as error:
        if not failed:
            raise
        complain(f"warning: {error}")  # the exit code is that of the cells
        return
    _print(rows, damaged)
    say(f"Table and plots: {folder.out}")


def _print(rows: "Sequence[Row]", damaged: Sequence[Path], *, reference: str = "ours") -> None:
    from chanscale.comparison.table import COLUMNS

    for path in damaged:
        complain(f"warning: {path} is damaged and left out; run the grid again to mend it")
    shown = [COLUMNS.index(name) for name in SHOWN]
    titles = [name.replace("ours", reference) for name in SHOWN]
    out.print(describe_rows(titles, [[row.to_cells()[place] for place in shown] for row in rows]))


def _read_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _read_sizes(text: str) -> tuple[int | None, ...]:
    parts = _read_list(text)
    numbers = _read_numbers(
        "sizes", ",".join(part for part in parts if part != "all"), least=1, empty="all" in parts
    )
    return (*numbers, None) if "all" in parts else numbers


def _read_numbers(option: str, text: str, *, least: int = 0, empty: bool = False) -> tuple[int, ...]:
    parts = _read_list(text)
    if not (parts or empty) or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ConfigError(
            f"--{option} must be whole numbers from {least}, separated by commas. Got {text!r}."
        )
    return tuple(dict.fromkeys(map(int, parts)))
