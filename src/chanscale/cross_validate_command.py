"""The command that fits a model for each fold, and judges each on what it did not see; `cli` adds it to the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chanscale.cli_options import (
    ConfigFileOption,
    DataArgument,
    JsonOption,
    merge_config,
    with_config_options,
)
from chanscale.commands import require_outside, warn_about_patients
from chanscale.config import FitConfig
from chanscale.display import complain, describe_rows, out, say, show_json, watching
from chanscale.wording import percent

if TYPE_CHECKING:
    from chanscale.crossval.plan import Member
    from chanscale.crossval.validation import CrossValidation

COLUMNS = ("", "pooled", "95 % interval", "folds", "sd, folds", "sd, repeats")


@with_config_options
def cross_validate(
    data: DataArgument,
    out_folder: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to make, or one that was begun.")
    ],
    folds: Annotated[int, typer.Option(min=2, help="Parts, by patient; each is left out once.")] = 5,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often the images are dealt to folds anew; it may grow.")
    ] = 1,
    config_file: ConfigFileOption = None,
    as_json: JsonOption = False,
    *,
    given: dict[str, Any],
) -> None:
    """Fit a model for each fold, judged on unseen patients.

    The share --test is in no fold, and says whether the average of the models is better than one (0: none). Each fold
    leaves a run folder. The same command goes on where it was stopped.
    """
    config = merge_config(given, config_file)
    require_outside(data, out_folder)
    found = _validate(data, out_folder, folds, repeats, config)
    if as_json:
        show_json({"folder": str(out_folder), **found.figures})
    else:
        _show(found)


def _validate(data: Path, out_folder: Path, folds: int, repeats: int, config: FitConfig) -> "CrossValidation":
    from chanscale.crossval.folder import CrossFolder
    from chanscale.crossval.plan import CrossPlan
    from chanscale.crossval.validation import cross_validate as validate
    from chanscale.run_images import open_path

    images = open_path(data, config)
    warn_about_patients(images, config.group_pattern, "who may then stand in several folds")
    plan, folder = CrossPlan(folds, repeats, config), CrossFolder(out_folder)
    if there := folder.count_done(plan):
        complain(f"{there} of {len(plan.members)} runs are there")
    try:
        with watching(config) as watcher:
            return validate(
                config.backbone, data, out=out_folder, folds=folds, repeats=repeats, config=config,
                watcher=watcher, on_fold=_tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        complain(f"{folder.count_done(plan)} of {len(plan.members)} runs are there; the same command goes on")
        raise


def _tell(member: "Member", done: int, total: int, metrics: Mapping[str, Any]) -> None:
    removed = percent(metrics["parameters"]["removed"])
    complain(
        f"{done}/{total} {member.name}: AUC {_number(metrics['auc']['value'])}, {removed} removed, "
        f"{metrics['seconds']:.0f} s"
    )


def _show(found: "CrossValidation") -> None:
    from chanscale.crossval.averaging import describe_average

    figures = found.figures
    out.print(describe_rows(COLUMNS, [_to_row(name, figures) for name in figures["pooled"]]))
    images, members = figures["images"], len(figures["members"])
    patients = f" of {figures['patients']} patients" if "patients" in figures else ""
    say(f"{images['folds']} images{patients} in the folds, {members} runs.")
    say(
        f"Intervals: bootstrap over {'patients' if patients else 'images'}. Folds share training images, so that "
        "they are too narrow (Bengio & Grandvalet 2004)."
    )
    say(describe_average(figures["ensemble"]))
    say(f"Figures, tables and runs: {found.folder}")


def _to_row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    pooled, folds, repeats = (figures[part][name] for part in ("pooled", "over_folds", "over_repeats"))
    return (
        name, _number(pooled["value"]), f"{_number(pooled['low'])} to {_number(pooled['high'])}",
        _number(folds["value"]), _number(folds["standard_deviation"]), _number(repeats["standard_deviation"]),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
