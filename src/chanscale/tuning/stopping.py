"""When a trial is stopped early: it is behind the median of those that left no larger a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from chanscale.progress import Watcher
from chanscale.schedule import Moment

WITNESSES = 4
"""Earlier trials that must speak against one: the median of fewer is luck."""


class Stopped(Exception):  # noqa: N818
    """A trial is not worth its other epochs."""


@dataclass(frozen=True)
class Rival:
    """What an earlier trial left, and its validation AUC in each epoch from the one that met the budget."""

    cost: float
    aucs: tuple[float, ...]


def falls_behind(aucs: Sequence[float], cost: float, rivals: Sequence[Rival]) -> bool:
    """Whether the best of `aucs` so far is below the median that `rivals` of no larger `cost` had in this epoch.

    Optuna's form of the median rule (Golovin et al. 2017, sec. 3.2.2), among those alone: a small network is not
    measured by larger ones, and what is stopped was beaten, so far, by one that is no larger.
    """
    epoch = len(aucs) - 1
    seen = [rival.aucs[epoch] for rival in rivals if rival.cost <= cost and len(rival.aucs) > epoch]
    return len(seen) >= WITNESSES and max(aucs) < median(seen)


class TrialWatcher(Watcher):
    """Notes the epochs of a trial that meet the budget, and raises Stopped in the one that decides against it.

    `of`: what the cost of `rivals` is, `parameters` or `macs`.
    """

    def __init__(self, rivals: Sequence[Rival], *, of: str) -> None:
        self.rivals, self.of = rivals, of
        self.aucs: list[float] = []
        self.row: dict[str, Any] = {}

    def on_epoch(self, moment: Moment, row: dict[str, Any]) -> None:
        """Note the epoch; stop the trial if it has fallen behind, unless it has ended."""
        self.row = row
        if moment.phase == "scale" and not moment.ends_phase:
            return  # larger than it is to be, and so better than it can stay
        self.aucs.append(row["validation_auc"])
        if not moment.ends_stage and falls_behind(self.aucs, row[self.of], self.rivals):
            raise Stopped
