"""The folder of a cross-validation: what it was begun with, its runs, and what they come to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from chanscale.comparison.cells import digest_images
from chanscale.config import DECODING, FixedPrecision
from chanscale.crossval.plan import CrossPlan, Member
from chanscale.data.sources import ImageSet
from chanscale.data.splits import write_splits
from chanscale.devices import find_precision
from chanscale.errors import ArtifactError, ConfigError, one_line
from chanscale.files import claiming, read_json, to_json, write_atomically
from chanscale.working_folder import require_own, require_same_options, sole_worker

FORMAT = "chanscale-cross-plan/1"


class CrossFolder:
    """A cross-validation on disk: `plan.json`, a run for each fold in `runs/`, tables, and figures."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs = out / "runs"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep other processes out of the folder, which is made. Raises ArtifactError."""
        require_own(self.out, self._plan.name, what="a cross-validation")
        with claiming(self.out):
            self.runs.mkdir(parents=True, exist_ok=True)
        with sole_worker(self.out):
            for left in self.out.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
            yield

    def begin(self, plan: CrossPlan, images: ImageSet) -> FixedPrecision:
        """Note the plan and which images are in no fold; return the precision that all runs have.

        It is measured once. Raises ConfigError when the folder was begun with other options or images; there may be
        more repeats than then.
        """
        fixed = {"config": plan.config.model_dump(mode="json"), "folds": plan.folds}
        listed, noted = digest_images(images), self._read() if self._plan.exists() else None
        if noted is None:
            noted = {
                "format": FORMAT, **fixed, "images": listed, "precision": find_precision(plan.config),
            }  # fmt: skip
        self._require_same(noted, fixed | {"images": listed})
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
        return self.out / "plan.json"

    def _read(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = read_json(self._plan)
            known = facts["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self._plan} is damaged ({one_line(error)}); use another --out") from error
        if not known:
            raise ArtifactError(f"{self._plan} is of another version of chanscale; use another --out")
        return facts

    def _require_same(self, noted: dict[str, Any], wanted: dict[str, Any]) -> None:
        begun, asked = (facts["config"] | {"folds": facts["folds"]} for facts in (noted, wanted))
        require_same_options(self.out, begun, asked, idle=DECODING)
        if noted["images"] != wanted["images"]:
            raise ConfigError(f"{self.out} was begun with other images; use the same, or another --out")
