"""What a cross-validation holds: which images each of its runs trains on, and which it never sees."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chanscale.comparison.folds import split_for_cell
from chanscale.config import FitConfig, FixedPrecision
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, split_images
from chanscale.errors import ArtifactError, ConfigError
from chanscale.working_folder import read_plan

SEEDS = 2**32
"""How many seeds there are."""

FORMAT, PLAN = "chanscale-cross-plan/1", "plan.json"
_MEMBER = re.compile(r"r(\d+)-f\d+")


@dataclass(frozen=True)
class Member:
    """One run of a cross-validation: that whose fold `fold` of repeat `repeat` is not trained on."""

    repeat: int
    fold: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"r{self.repeat}-f{self.fold}"


@dataclass(frozen=True)
class CrossPlan:
    """`repeats` times, the images are dealt to `folds` by patient, and each fold is left out once.

    `config.test`: the share that is in no fold. `config.seed` fixes that share and the first repeat, the next number
    the second repeat, and so on. Raises ConfigError.
    """

    folds: int
    repeats: int
    config: FitConfig

    def __post_init__(self) -> None:
        self.config.require_one_process("a cross-validation")
        if self.folds < 2 or self.repeats < 1:
            raise ConfigError(
                f"a cross-validation needs 2 folds and 1 repeat at least. Got {self.folds} and {self.repeats}."
            )

    @property
    def members(self) -> tuple[Member, ...]:
        """Every run, one repeat after the other."""
        return tuple(Member(repeat, fold) for repeat in range(self.repeats) for fold in range(self.folds))

    def keep_out(self, images: ImageSet) -> Splits:
        """Return which images are in no fold, as test; all others train. Raises SplitError.

        Where the source itself has test images, these are they, and all others are dealt.
        """
        splits = split_images(images, validation=0, test=self.config.test, seed=self.config.seed)
        return Splits(tuple(sorted(splits.train + splits.validation)), (), splits.test)

    def put_on_sides(self, learning: ImageSet, member: Member) -> ImageSet:
        """Return the images of all folds, each on its side in the run of `member`: its fold is test.

        Raises SplitError.
        """
        seed = self._seed(member)
        splits = split_for_cell(
            learning, fold=member.fold, folds=self.folds, fold_seed=seed, seed=seed, size=None,
            validation=self.config.validation, test=0,
        )  # fmt: skip
        side_of = splits.side_of
        records = (replace(record, split=side_of[i]) for i, record in enumerate(learning.records))
        return replace(learning, records=tuple(records))

    def configure(self, member: Member, precision: FixedPrecision) -> FitConfig:
        """Return the options of one run, at the precision that all have."""
        own = {"test": 0.0, "seed": self._seed(member), "precision": precision, "speed": "off"}
        return self.config.already_opened().model_copy(update=own)

    def _seed(self, member: Member) -> int:
        return (self.config.seed + member.repeat) % SEEDS


def take(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Return these images, which stand on no side."""
    records = tuple(replace(images.records[i], split=None) for i in indices)
    return replace(images, records=records)


def is_cross_folder(folder: Path) -> bool:
    """Tell whether a cross-validation was begun in `folder`: its plan lies there."""
    try:
        read_plan(folder / PLAN, wanted=FORMAT)
    except ArtifactError:
        return False
    return True


def folder_above(run: Path) -> Path | None:
    """Return the folder of the cross-validation that `run` belongs to; None where it belongs to none."""
    runs = run.absolute().parent
    return runs.parent if runs.name == "runs" and is_cross_folder(runs.parent) else None


def plan_above(run: Path) -> CrossPlan | None:
    """Return the plan of the cross-validation that `run` is a fold of, with as many repeats as it takes, if it is one.

    Raises ArtifactError, ConfigError.
    """
    folder, member = folder_above(run), _MEMBER.fullmatch(run.absolute().name)
    if folder is None or member is None:
        return None
    folds = read_plan(folder / PLAN, wanted=FORMAT).get("folds")
    if not isinstance(folds, int):
        raise ArtifactError(f"{folder / PLAN} does not say how many folds there are: it is damaged")
    return CrossPlan(folds, int(member[1]) + 1, FitConfig.read(folder / "config.yaml"))
