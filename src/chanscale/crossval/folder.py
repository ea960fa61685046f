"""The folder of a cross-validation: what it was begun with, its runs, and what they come to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from chanscale.comparison.cells import digest_images
from chanscale.config import TIMING, FixedPrecision
from chanscale.crossval.plan import FORMAT, PLAN, CrossPlan, Member
from chanscale.data.sources import ImageSet
from chanscale.data.splits import write_splits
from chanscale.devices import find_precision
from chanscale.files import to_json, write_atomically
from chanscale.working_folder import read_plan, require_same_plan, working_in


class CrossFolder:
    """A cross-validation on disk: `plan.json`, a run for each fold in `runs/`, tables, and figures."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs = out / "runs"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made. Raises ArtifactError."""
        with working_in(
            self.out, plan=self._plan, parts=self.runs, written=[self.out], what="a cross-validation"
        ):
            yield

    def begin(self, plan: CrossPlan, images: ImageSet) -> FixedPrecision:
        """Note the plan and which images are in no fold; return the precision that all runs have.

        It is measured once. Raises ConfigError when the folder was begun with other options or images; there may be
        more repeats than then.
        """
        fixed = {"config": plan.config.model_dump(mode="json"), "folds": plan.folds}
        listed, noted = digest_images(images), None
        if self._plan.exists():
            noted = read_plan(self._plan, wanted=FORMAT)
        if noted is None:
            noted = {
                "format": FORMAT, **fixed, "images": listed, "precision": find_precision(plan.config),
            }  # fmt: skip
        require_same_plan(self.out, noted, fixed | {"images": listed}, idle=TIMING)
        write_splits(self.out / "splits.csv", images, plan.keep_out(images))
        write_atomically(self.out / "config.yaml", plan.config.to_yaml())
        write_atomically(self._plan, to_json(noted) + "\n")
        return cast(FixedPrecision, noted["precision"])

    def run_of(self, member: Member) -> Path:
        """Return where the run of `member` lies."""
        return self.runs / member.name

    def is_begun(self, member: Member) -> bool:
        """Tell whether the run of `member` was interrupted, and can go on."""
        return (self.runs / f"{member.name}.partial").exists()

    def count_done(self, plan: CrossPlan) -> int:
        """Return how many runs of the plan are finished."""
        return sum(self.run_of(member).exists() for member in plan.members)

    @property
    def _plan(self) -> Path:
        return self.out / PLAN
