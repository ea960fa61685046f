"""The folder of a search: what it was begun with, its trials, and what they come to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chanscale.comparison.cells import IDLE_OPTIONS, digest_images
from chanscale.config import FitConfig, FixedPrecision
from chanscale.data.sources import ImageSet
from chanscale.devices import find_precision
from chanscale.files import to_json, write_atomically
from chanscale.tuning.space import BUDGET
from chanscale.tuning.trials import Result, read_trial, trial_path
from chanscale.working_folder import note_failure, read_plan, require_same_plan, working_in

FORMAT = "chanscale-search/1"
FRONT = "front"
"""Where the configurations of the front lie."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search is: the options that all trials share, and the names of those that each has of its own."""

    config: FitConfig
    searched: tuple[str, ...]

    def __post_init__(self) -> None:
        self.config.require_one_process("a search")

    @property
    def of(self) -> str | None:
        """What is to be small besides a large AUC, `parameters` or `macs`; None where the budget is fixed."""
        return self.config.budget_of if BUDGET in self.searched else None

    def configure(self, options: dict[str, Any]) -> FitConfig:
        """Return the options of a fit with those of a trial. Raises ConfigError."""
        return FitConfig.build(self.config.model_dump() | options)


class SearchFolder:
    """A search on disk: `search.json`, Optuna's `journal.log`, a file for each trial in `trials/`, and results."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.trials = out / "trials"
        self.journal = out / "journal.log"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made. Raises ArtifactError."""
        written = (self.out, self.trials, self.out / FRONT)
        with working_in(self.out, plan=self._plan, parts=self.trials, written=written, what="a search"):
            yield

    def begin(self, plan: SearchPlan, images: ImageSet) -> FixedPrecision:
        """Note the plan; return the precision that all trials have, which is measured once.

        Raises ConfigError when the folder was begun with other options or images.
        """
        fixed = {
            "config": plan.config.model_dump(mode="json"), "search": list(plan.searched),
            "images": digest_images(images),
        }  # fmt: skip
        if self._plan.exists():
            noted = read_plan(self._plan, wanted=FORMAT)
        else:
            noted = {"format": FORMAT, **fixed, "precision": find_precision(plan.config)}
        require_same_plan(self.out, noted, fixed, idle=IDLE_OPTIONS, own="search")
        write_atomically(self._plan, to_json(noted) + "\n")
        return cast(FixedPrecision, noted["precision"])

    def results(self) -> list[Result]:
        """Return what the trials that are there came to, in order."""
        read = [read_trial(path) for path in sorted(self.trials.glob("*.json"))]
        return [result for result in read if result]

    def result(self, number: int) -> Result | None:
        """Return what a trial came to, or None where its file is missing or damaged."""
        return read_trial(trial_path(self.trials, number))

    def note_failure(self, number: int, error: str) -> Path:
        """Write why a trial was lost beside where it would lie, and return the path."""
        return note_failure(trial_path(self.trials, number, ".error"), error)

    def note_success(self, number: int) -> None:
        """Take away the error of an earlier try."""
        trial_path(self.trials, number, ".error").unlink(missing_ok=True)

    @property
    def _plan(self) -> Path:
        return self.out / "search.json"
