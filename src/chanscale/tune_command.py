"""The command that searches for options by validation images; `cli` adds it to the others."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chanscale.cli_options import (
    ConfigFileOption,
    DataArgument,
    JsonOption,
    RayCpusOption,
    RayOption,
    merge_config,
    with_config_options,
)
from chanscale.commands import require_outside, warn_about_patients
from chanscale.display import complain, describe_rows, out, program, say, show_json
from chanscale.wording import are_there, counted, percent, shorten

if TYPE_CHECKING:
    from chanscale.tuning.results import Tuning
    from chanscale.tuning.search import TrialEnd

LOST_TRIALS = 1
COLUMNS = ("trial", "", "validation AUC", "kept", "removed", "MACs", "options")


@with_config_options
def tune(
    data: DataArgument,
    out_folder: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to make, or one that was begun.")
    ],
    trials: Annotated[
        int,
        typer.Option(
            min=1,
            help="Fits, with those that are there; it may grow. The first is as given, to three digits.",
        ),
    ] = 30,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="OPTIONS",
            help="Options to search, with commas between: budget, image_size, pressure, concavity, refine_lr, head_lr. "
            "Default: those that are not given. With the budget given, the AUC is all that counts.",
        ),
    ] = None,
    within: Annotated[
        float,
        typer.Option(min=0, help="best.yaml is the smallest network this close to the best validation AUC."),
    ] = 0.01,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time, which share the cores.")] = 1,
    ray: RayOption = None,
    ray_cpus: RayCpusOption = None,
    config_file: ConfigFileOption = None,
    as_json: JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Search for the options of a fit by validation images.

    How accurate, and how small, can it be? Test images are never looked at. Each trial runs in a process of its own and
    leaves one file; one that falls behind is stopped early. The same command goes on where it was stopped.
    """
    from chanscale.config import FitConfig
    from chanscale.run_images import open_path
    from chanscale.tuning.search import tune as run_search
    from chanscale.tuning.space import choose_options

    config = merge_config(given, config_file)
    require_outside(data, out_folder)
    warn_about_patients(
        open_path(data, config), config.group_pattern, "who may then stand on two sides of the split"
    )
    lost: list[int] = []

    def hear(end: "TrialEnd") -> None:
        complain(_describe_end(end))
        if end.result is None:
            lost.append(end.number)

    assert isinstance(config, FitConfig)
    names = None if search is None else [name.strip() for name in search.split(",") if name.strip()]
    over, there = ", ".join(choose_options(config, names)), are_there(_count_done(out_folder))
    complain(f"{counted(trials, 'trial')} over {over}; {there}")
    try:
        found = run_search(
            config.backbone, data, out=out_folder, trials=trials, search=names, within=within, config=config,
            jobs=jobs, ray=ray, ray_cpus=ray_cpus, on_trial=hear,
        )  # fmt: skip
    except KeyboardInterrupt:
        complain(
            f"{_count_done(out_folder)} of {counted(trials, 'trial')} are there; the same command goes on"
        )
        raise
    if as_json:
        show_json({"folder": str(out_folder), **found.figures})
    else:
        _show(found, data)
    if lost:
        complain(f"{len(lost)} of {counted(trials, 'trial')} were lost; the same command tries them again")
        raise typer.Exit(LOST_TRIALS)


def _count_done(out_folder: Path) -> int:
    from chanscale.tuning.folder import SearchFolder

    return len(SearchFolder(out_folder).results())


def _describe_end(end: "TrialEnd") -> str:
    """Return in one line how a trial ended."""
    name = f"{end.done}/{end.total} trial {end.number}"
    if end.result is None:
        return f"{name}: lost: {end.error}"
    result = end.result
    if result["state"] == "failed":
        return f"{name}: failed: {result['reason']}"
    stopped = f"stopped after epoch {result['epochs']}, " if result["state"] == "stopped" else ""
    parameters = result["parameters"]
    return (
        f"{name}: {stopped}validation AUC {result['validation_auc']:.3f}, {shorten(parameters['kept'])} parameters "
        f"({percent(parameters['removed'])} removed), {result['seconds']:.0f} s"
    )


def _show(found: "Tuning", data: Path) -> None:
    figures, folder = found.figures, found.folder
    out.print(describe_rows(COLUMNS, _rows(figures)))
    count = figures["count"]
    say(
        f"{counted(len(figures['trials']), 'trial')}: {count['complete']} ended, {count['stopped']} stopped early, "
        f"{count['failed']} failed."
    )
    say(
        f"Best: trial {figures['best']}, the smallest within {figures['within']:g} of the best validation AUC."
    )
    for note in figures["notes"]:
        say(note)
    config = shlex.quote(str(folder / "best.yaml"))
    say(f"Fit it: {program()} fit {shlex.quote(str(data))} --config {config} --out RUN")
    say(f"Figures, trials and a configuration for each row: {folder}")


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each point of the front, the smallest network first."""
    by_number = {result["number"]: result for result in figures["trials"]}
    return [_row(by_number[number], best=number == figures["best"]) for number in figures["front"]]


def _row(result: Mapping[str, Any], *, best: bool) -> tuple[str, ...]:
    return (
        str(result["number"]), "best" if best else "", f"{result['validation_auc']:.3f}",
        shorten(result["parameters"]["kept"]), percent(result["parameters"]["removed"]),
        shorten(result["macs"]["kept"]), " ".join(f"{name}={value:g}" for name, value in result["options"].items()),
    )  # fmt: skip
