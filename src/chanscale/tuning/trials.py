"""One trial of a search: what it is, how it is run, and the file it leaves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from chanscale.comparison.cells import IDLE_OPTIONS, configure_learning, digest, digest_images
from chanscale.comparison.folds import learning_and_test
from chanscale.config import FitConfig
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, split_images
from chanscale.errors import BudgetError, DataError, InexactRemovalError, TrainingError, one_line
from chanscale.files import read_json, to_json, write_atomically
from chanscale.pipeline import scale_and_select
from chanscale.run_figures import describe_resources
from chanscale.run_images import open_path
from chanscale.tuning.stopping import Rival, Stopped, TrialWatcher

FORMAT = "chanscale-trial/1"
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
"""How a trial may end: with a network, early, or with options that lead to none."""

Result = dict[str, Any]


@dataclass(frozen=True)
class TrialSpec:
    """All that a process, here or elsewhere, has to know to run a trial.

    `images`: digest of the list of images, without those `skipped`. `searched`: the options of `config` that are its
    own. `rivals`: the trials that it may fall behind.
    """

    number: int
    data: Path
    images: str
    skipped: tuple[str, ...]
    config: FitConfig
    searched: tuple[str, ...]
    rivals: tuple[Rival, ...]

    @property
    def digest(self) -> str:
        """A digest of all that its figures follow from."""
        facts = self._facts()
        facts.pop("data")  # the same images may lie elsewhere
        facts["config"] = {k: v for k, v in facts["config"].items() if k not in IDLE_OPTIONS}
        return digest(facts)

    def to_json(self) -> str:
        """Return one line; `from_json` takes it back."""
        return json.dumps(self._facts())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the spec that `to_json` wrote."""
        facts = json.loads(text)
        facts |= {name: tuple(facts[name]) for name in ("skipped", "searched")}
        rivals = tuple(Rival(rival["cost"], tuple(rival["aucs"])) for rival in facts["rivals"])
        own = {"data": Path(facts["data"]), "config": FitConfig.build(facts["config"]), "rivals": rivals}
        return cls(**facts | own)

    def run(self) -> Result:
        """Return what came of the trial. Raises ChanscaleError."""
        return run_trial(self)

    def write(self, folder: Path, result: Result) -> Path:
        """Write the file of the trial into `folder`, whole or not at all, and return its path."""
        path = trial_path(folder, result["number"])
        write_atomically(path, to_json(result) + "\n")
        return path

    def _facts(self) -> dict[str, Any]:
        own = {"data": str(self.data), "config": self.config.model_dump(mode="json")}
        return {
            "number": self.number, "images": self.images, "skipped": self.skipped, "searched": self.searched,
            "rivals": [asdict(rival) for rival in self.rivals], **own,
        }  # fmt: skip


def run_trial(spec: TrialSpec) -> Result:
    """Fit with the options of the trial, judge it on validation images, and return what came of it.

    Test images are not decoded. Options that lead to no network are a result, too. Raises ChanscaleError.
    """
    learning = _open_learning(spec)
    watcher = TrialWatcher(spec.rivals, of=spec.config.budget_of)
    began = perf_counter()
    try:
        run = scale_and_select(
            spec.config.backbone, learning, config=configure_learning(spec.config), watcher=watcher
        )
    except Stopped:
        outcome = {"state": STOPPED, "validation_auc": max(watcher.aucs), **_describe_row(watcher.row)}
    except (TrainingError, BudgetError, InexactRemovalError) as error:
        outcome = {"state": FAILED, "reason": one_line(error)}
    else:
        outcome = {"state": COMPLETE, **_describe_run(run.metrics)}
    seconds = round(perf_counter() - began, 2)
    return {
        "format": FORMAT, "digest": spec.digest, "number": spec.number,
        "options": {name: getattr(spec.config, name) for name in spec.searched},
        **outcome, "aucs": watcher.aucs, "epochs": watcher.row.get("epoch", -1) + 1, "seconds": seconds,
        **describe_resources(),
    }  # fmt: skip


def split_search(images: ImageSet, config: FitConfig) -> Splits:
    """Return the sides that all trials share, which are those of a fit with the same options. Raises SplitError."""
    return split_images(images, validation=config.validation, test=config.test, seed=config.seed)


def read_trial(path: Path) -> Result | None:
    """Return what a trial wrote, or None where it is missing or damaged."""
    try:
        result: Result = read_json(path)
        whole = result["format"] == FORMAT and path == trial_path(path.parent, result["number"])
        whole = whole and isinstance(result["options"], dict) and _is_told(result)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole else None


def trial_path(folder: Path, number: int, suffix: str = ".json") -> Path:
    """Return where the file of a trial lies."""
    return folder / f"{number:04}{suffix}"


def _open_learning(spec: TrialSpec) -> ImageSet:
    images = open_path(spec.data, spec.config).without(spec.skipped)
    if digest_images(images) != spec.images:
        raise DataError(
            f"the images of {spec.data} have changed since the search was begun; use another --out"
        )
    return learning_and_test(images, split_search(images, spec.config))[0]


def _describe_run(metrics: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {of: {name: metrics[of][name] for name in ("kept", "removed")} for of in ("parameters", "macs")}
    return {"validation_auc": metrics["validation_auc"], **sizes}


def _describe_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {of: {"kept": row[of], "removed": row[f"{of}_removed"]} for of in ("parameters", "macs")}


def _is_told(result: Result) -> bool:
    """Whether a trial says why it failed, or else has all its figures."""
    if result["state"] == FAILED:
        return isinstance(result["reason"], str)
    sizes = [result[of][name] for of in ("parameters", "macs") for name in ("kept", "removed")]
    figures = [result[name] for name in ("validation_auc", "epochs", "seconds")] + sizes + result["aucs"]
    return all(isinstance(figure, int | float) for figure in figures)
