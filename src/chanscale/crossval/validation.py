"""From images to a cross-validation: a run for each fold, in order, and what they come to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chanscale.catalogue import require_network
from chanscale.config import FitConfig, FixedPrecision
from chanscale.crossval.answers import Answers, ask_members
from chanscale.crossval.averaging import judge_average
from chanscale.crossval.figures import NOTES, judge_folds
from chanscale.crossval.folder import CrossFolder
from chanscale.crossval.plan import CrossPlan, Member, take
from chanscale.data.sources import ImageSet
from chanscale.decision_rules import require_support
from chanscale.ensemble import RESULT
from chanscale.files import to_json, write_atomically
from chanscale.pipeline import scale_and_select
from chanscale.progress import Watcher
from chanscale.report_page.material import read_metrics
from chanscale.run_figures import describe_machine
from chanscale.run_images import list_readable

FORMAT = "chanscale-cross-validation/1"

FoldListener = Callable[[Member, int, int, dict[str, Any]], None]
"""Hears of a finished run: which, how many there are now, of how many, and its metrics.json."""


@dataclass(frozen=True)
class CrossValidation:
    """A finished cross-validation: its figures, as in cross_validation.json, what the models said, and its folder."""

    figures: dict[str, Any]
    out_of_fold: Answers
    outer: Answers | None
    folder: Path


def cross_validate(
    model: str,
    data: str | Path,
    *,
    out: str | Path,
    folds: int = 5,
    repeats: int = 1,
    config: FitConfig | None = None,
    watcher: Watcher | None = None,
    on_fold: FoldListener | None = None,
) -> CrossValidation:
    """Fit `model` once for each fold of each repeat, by patient, and judge each on the images that it did not see.

    `model`: the name of a backbone, or of a library's network. `data`: a folder, CSV or npz file. `config.test`: the
    share that no fold has, and on which the average of all models is judged; 0: none. Each fold is a run folder in
    `out/runs`; those that are there are not run again, and one that was interrupted goes on. Raises ChanscaleError.
    """
    require_network(model)
    watcher = watcher or Watcher()
    config = (config or FitConfig()).model_copy(update={"backbone": model})
    plan, folder = CrossPlan(folds, repeats, config), CrossFolder(Path(out))
    images = list_readable(Path(data), config, watcher)
    splits = plan.keep_out(images)
    learning = take(images, splits.train)
    outer = take(images, splits.test) if splits.test else None
    for member in plan.members:
        # Says now what would otherwise end a run.
        sides = [record.split for record in plan.put_on_sides(learning, member).records]
        require_support(config, learning, [i for i, side in enumerate(sides) if side == "validation"])
    with folder.working():
        precision = folder.begin(plan, images)
        for member in plan.members:
            if not folder.run_of(member).exists():
                _run(member, plan, folder, learning, precision, watcher)
                if on_fold:
                    metrics = read_metrics(folder.run_of(member) / "metrics.json")
                    on_fold(member, folder.count_done(plan), len(plan.members), metrics)
        left_out, kept_out = ask_members(folder, plan, learning, outer, watcher)
        return _write(folder, plan, left_out, kept_out)


def _run(
    member: Member,
    plan: CrossPlan,
    folder: CrossFolder,
    learning: ImageSet,
    precision: FixedPrecision,
    watcher: Watcher,
) -> None:
    watcher.on_step(f"fitting {member.name}", plan.members.index(member) + 1, len(plan.members))
    scale_and_select(
        plan.config.backbone,
        plan.put_on_sides(learning, member),
        config=plan.configure(member, precision),
        out=folder.run_of(member),
        resume=folder.is_begun(member),
        watcher=watcher,
    )


def _write(
    folder: CrossFolder, plan: CrossPlan, left_out: Answers, kept_out: Answers | None
) -> CrossValidation:
    figures = {
        "format": FORMAT, "classes": list(left_out.images.classes), "folds": plan.folds, "repeats": plan.repeats,
        "images": {"folds": len(left_out.images), "test": len(kept_out.images) if kept_out else 0},
        **left_out.count_patients(),
        **judge_folds(left_out),
        "ensemble": judge_average(kept_out),
        "members": [_describe(member, folder) for member in plan.members],
        "notes": list(NOTES), **describe_machine(),
    }  # fmt: skip
    write_atomically(folder.out / "out_of_fold.csv", left_out.to_csv())
    if kept_out:
        write_atomically(folder.out / "outer_test.csv", kept_out.to_csv())
    write_atomically(folder.out / RESULT, to_json(figures) + "\n")
    return CrossValidation(figures, left_out, kept_out, folder.out)


def _describe(member: Member, folder: CrossFolder) -> dict[str, Any]:
    metrics = read_metrics(folder.run_of(member) / "metrics.json")
    return {
        "run": f"runs/{member.name}", "repeat": member.repeat, "fold": member.fold,
        "auc": metrics["auc"]["value"], "accuracy": metrics["accuracy"]["value"],
        "parameters": metrics["parameters"]["kept"], "removed": metrics["parameters"]["removed"],
        "macs": metrics["macs"]["kept"], "seconds": metrics["seconds"],
    }  # fmt: skip
