"""Which epoch does what: stages that scale down to a budget, then refine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from chanscale.config import FitConfig

Phase = Literal["scale", "refine"]


@dataclass(frozen=True)
class Moment:
    """One epoch of the plan: epoch `index` of the `length` that its phase has, in a stage with one budget."""

    epoch: int
    stage: int
    budget: float
    phase: Phase
    index: int
    length: int
    ends_stage: bool

    @property
    def opens_stage(self) -> bool:
        """Whether this is the first epoch of its stage."""
        return self.phase == "scale" and self.index == 0

    @property
    def ends_phase(self) -> bool:
        """Whether this is the last epoch of its phase."""
        return self.index == self.length - 1


def stage_budgets(config: FitConfig) -> Iterator[float]:
    """Yield the share to remove in each stage: the budget and, with a tolerance, half of what is left, on."""
    budget = config.budget
    yield budget
    while config.tolerance is not None:
        budget = 1 - (1 - budget) / 2
        yield budget


def plan_epochs(config: FitConfig) -> Iterator[Moment]:
    """Yield every epoch in order; without end when there is a tolerance. Stages after the first take half."""
    epoch = 0
    for stage, budget in enumerate(stage_budgets(config)):
        share = 1 if stage == 0 else 2
        scale, refine = -(-config.scale_epochs // share), -(-config.refine_epochs // share)
        for index in range(scale + refine):
            phase: Phase = "scale" if index < scale else "refine"
            yield Moment(
                epoch=epoch, stage=stage, budget=budget, phase=phase,
                index=index if phase == "scale" else index - scale,
                length=scale if phase == "scale" else refine,
                ends_stage=index == scale + refine - 1,
            )  # fmt: skip
            epoch += 1
