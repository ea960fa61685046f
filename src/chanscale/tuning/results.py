"""What a search comes to, as files: figures, the Pareto front, and a configuration for each point of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chanscale.config import FitConfig
from chanscale.data.splits import Splits
from chanscale.errors import TrainingError
from chanscale.files import to_json, write_atomically
from chanscale.run_figures import describe_machine
from chanscale.tuning.folder import FRONT, SearchFolder, SearchPlan
from chanscale.tuning.front import choose, find_front
from chanscale.tuning.space import SPACE
from chanscale.tuning.trials import COMPLETE, FAILED, STOPPED, Result
from chanscale.wording import counted

FORMAT = "chanscale-tuning/1"
RESULT, BEST, PLOT = "tuning.json", "best.yaml", "pareto.png"
MACHINE = ("format", "digest", "peak_memory_bytes", "threads", "versions")
"""What stands in the file of a trial, and is not told again."""


@dataclass(frozen=True)
class Tuning:
    """A search: its figures, as in tuning.json; what to fit with, as in best.yaml; and its folder."""

    figures: dict[str, Any]
    best: FitConfig
    folder: Path


def write_tuning(folder: SearchFolder, plan: SearchPlan, splits: Splits, *, within: float) -> Tuning:
    """Write what follows from the trials that are there, and return it. Raises TrainingError when none has ended."""
    results = folder.results()
    front = find_front(results, of=plan.of)
    if not front:
        raise TrainingError(
            f"none of {counted(len(results), 'trial')} in {folder.out} came to an end; see the reasons in "
            f"{folder.trials}"
        )
    best = choose(front, within=within)
    figures = {
        "format": FORMAT, "objectives": ["validation_auc", *([plan.of] if plan.of else [])],
        "search": {name: [SPACE[name].low, SPACE[name].high] for name in plan.searched},
        "images": {
            "train": len(splits.train), "validation": len(splits.validation), "test_unseen": len(splits.test),
        },
        "trials": [_describe(result) for result in results],
        "count": _count(results), "front": [result["number"] for result in front],
        "best": best["number"], "within": within, "notes": [warn_of_optimism(len(results), splits)],
        **describe_machine(),
    }  # fmt: skip
    _write_configs(folder, plan, front, best)
    _draw(folder, results, front, best, plan, splits)
    write_atomically(folder.out / RESULT, to_json(figures) + "\n")
    return Tuning(figures, plan.configure(best["options"]), folder.out)


def warn_of_optimism(trials: int, splits: Splits) -> str:
    """Return why the validation AUC of what was chosen is not what to expect of it."""
    return (
        f"The validation AUC of the best of {counted(trials, 'trial')} is optimistic: the same "
        f"{len(splits.validation)} images chose it, and the best epoch of each. No trial has seen a test image; a fit "
        "with the chosen options is judged on them."
    )


def _describe(result: Result) -> Result:
    return {name: value for name, value in result.items() if name not in MACHINE}


def _count(results: Sequence[Result]) -> dict[str, int]:
    states = Counter(result["state"] for result in results)
    return {state: states[state] for state in (COMPLETE, STOPPED, FAILED)}


def _write_configs(folder: SearchFolder, plan: SearchPlan, front: Sequence[Result], best: Result) -> None:
    (folder.out / FRONT).mkdir(exist_ok=True)
    texts = {
        f"trial-{result['number']}.yaml": plan.configure(result["options"]).to_yaml() for result in front
    }
    for path in (folder.out / FRONT).glob("trial-*.yaml"):
        if path.name not in texts:
            path.unlink()  # it was on the front of fewer trials
    for name, text in texts.items():
        write_atomically(folder.out / FRONT / name, text)
    write_atomically(folder.out / BEST, plan.configure(best["options"]).to_yaml())


def _draw(
    folder: SearchFolder,
    results: Sequence[Result],
    front: Sequence[Result],
    best: Result,
    plan: SearchPlan,
    splits: Splits,
) -> None:
    if plan.of is None:
        return  # with the budget fixed, all trials keep about the same
    from chanscale.plotting import to_png
    from chanscale.tuning.plots import draw_pareto

    figure = draw_pareto(results, front, best=best, of=plan.of, images=len(splits.validation))
    write_atomically(folder.out / PLOT, to_png(figure))
