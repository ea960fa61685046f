"""The run folder: built beside its place, moved there when it is whole."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from chanscale.artifact import ModelInfo, load_model, save_model
from chanscale.checkpoint import load_checkpoint, save_checkpoint
from chanscale.classifier import Classifier
from chanscale.config import TIMING, FitConfig
from chanscale.crossval.plan import plan_above
from chanscale.data.loading import Progress
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, read_splits, write_splits
from chanscale.depth import WHOLE, Depth
from chanscale.errors import ArtifactError, ConfigError, DataError, ModelError, one_line
from chanscale.files import claiming, is_full, read_json, require_absent, to_json, write_atomically
from chanscale.novelty.detector import Verdict
from chanscale.novelty.fitting import fit_novelty
from chanscale.novelty.storage import NOVELTY, save_novelty
from chanscale.programs import PROGRAM, save_program, takes_grey_alone
from chanscale.report import write_history, write_plots
from chanscale.report_page.material import Material
from chanscale.report_page.writing import REPORT, write_report
from chanscale.state import TrainingState

_log = logging.getLogger(__name__)


class RunFolder:
    """One run on disk. Until `finish`, everything lies in `<out>.partial`, from where `--resume` goes on."""

    def __init__(self, out: Path, config: FitConfig, *, resume: bool = False) -> None:
        self._resume = resume
        self.out = out if out.name else out.absolute()
        if not self.out.name:
            raise ArtifactError(f"{out} is no folder to make; choose one in it as --out")
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.config = config
        self._lock = FileLock(self.partial / ".lock", timeout=0)

    @classmethod
    def open(cls, out: Path, config: FitConfig, *, resume: bool) -> "RunFolder":
        """Check that the run can be written to `out`; writes nothing. Raises ArtifactError, ConfigError."""
        folder = cls(out, config, resume=resume)
        require_absent(out)
        if folder.partial.exists() and not resume:
            raise ArtifactError(
                f"{folder.partial} holds an unfinished run; go on with --resume, or remove it"
            )
        if resume and not folder.partial.exists():
            raise ArtifactError(f"there is no unfinished run at {folder.partial}; start one without --resume")
        if resume:
            folder._require_same_config()
        return folder

    def begin(self, images: ImageSet, splits: Splits) -> None:
        """Take the unfinished folder, and write `config.yaml` and `splits.csv`. Raises ArtifactError.

        Raises it, too, when another process works there, or has begun a run since this one was opened.
        """
        with claiming(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if not self._resume and any(not path.name.startswith(".") for path in self.partial.iterdir()):
                self.release()
                raise ArtifactError(f"{self.partial} was begun by another process; choose another --out")
            write_atomically(self.partial / "config.yaml", self.config.to_yaml())
            write_splits(self.partial / "splits.csv", images, splits)

    def read_splits(self, images: ImageSet) -> Splits | None:
        """Return the split of an interrupted run, if it had one.

        Raises SplitError when `images` are not those of the run: images it was trained on could become test images.
        """
        path = self.partial / "splits.csv"
        return read_splits(path, images) if path.exists() else None

    def note_depth(self, depth: Depth) -> None:
        """Write `depth.json`."""
        write_atomically(self._depth, to_json(depth.to_dict()) + "\n")

    def read_depth(self) -> Depth | None:
        """Return where the trunk of an interrupted run ends, if that was found. Raises ArtifactError."""
        if not self._depth.exists():
            return WHOLE if self._checkpoint.exists() else None  # of a version that used all of every trunk
        try:
            return Depth.from_dict(read_json(self._depth))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArtifactError(
                f"cannot resume from {self._depth} ({one_line(error)}); delete its folder and fit again"
            ) from error

    @property
    def has_epoch(self) -> bool:
        """Whether an interrupted run had finished an epoch."""
        return self._checkpoint.exists()

    def load(self, whole: Classifier) -> tuple[TrainingState, dict[str, Any]] | None:
        """Return the state of an interrupted run and its notes, if it had finished an epoch.

        `whole`: the classifier that it began with; it carries its groups.
        """
        if not self.has_epoch:
            return None
        return load_checkpoint(self._checkpoint, self.config, whole=whole)

    def save(self, state: TrainingState, notes: Mapping[str, Any]) -> None:
        """Save `state` and `notes`, so that the run can go on after any interruption."""
        save_checkpoint(state, notes, self._checkpoint)

    def finish(self, run: Material, *, progress: Progress | None = None) -> ModelInfo:
        """Write the model, the figures, the plots and the report, and move the folder to its place.

        `progress` hears of the images that the detector of unusual ones reads. Returns what the model's file says, with
        what it can be rebuilt by.
        """
        info, metrics = run.info, run.metrics
        assert isinstance(run.model, Classifier)  # as everything that was trained is
        if info.rebuilt_by == "program":
            info = self._export(run.model, info)
        metrics["rebuilt_by"] = info.rebuilt_by
        path = save_model(run.model, info, self.partial / "model.safetensors")
        metrics["bytes"]["model"] = path.stat().st_size
        metrics["novelty"] = self._detect(run, progress)
        write_atomically(self.partial / "metrics.json", to_json(metrics) + "\n")
        write_history(self.partial / "history.csv", run.history)
        write_plots(self.partial, run.history, run.widths, info.widths, metrics)
        self._report(replace(run, info=info))
        for left in self.partial.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        self.release()
        self.partial.rename(self.out)
        # Last: whoever is killed before that loses no epoch.
        (self.out / self._checkpoint.name).unlink(missing_ok=True)
        return info

    def _export(self, model: Classifier, info: ModelInfo) -> ModelInfo:
        try:
            digest = save_program(model, _shape_of_program(model, info), self.partial / PROGRAM)
        except ModelError as error:
            _log.warning("%s; the run can be loaded with the original network alone", error)
            return replace(info, rebuilt_by="network")
        return replace(info, program=digest)

    def _detect(self, run: Material, progress: Progress | None) -> dict[str, Any]:
        """Write what tells images unlike those of training, where they are enough; return what metrics.json says."""
        try:
            # As it will be loaded: the hooks of training apply a ReLU with the scale, and show other features.
            model, _ = load_model(self.partial)
            detector = fit_novelty(model, run.images, run.splits, progress=progress)
            told = {"rate": detector.rate, "margin": detector.margin, "images": len(detector.usual)}
            if run.splits.test:
                judged = detector.judge(model, run.images, run.splits.test, progress=progress)
                told |= _count_verdicts(judged.verdicts)
            save_novelty(detector, self.partial)
        except (ArtifactError, DataError) as error:  # the first of a network that no name rebuilds
            return {"reason": one_line(error)}
        except Exception as error:  # whatever it is, a trained model is not lost for a detector beside it
            if is_full(error):  # nor is it now: the run goes on when there is room
                raise
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            _log.warning("no %s was written (%s); predict will flag no image", NOVELTY, reason)
            return {"reason": reason}
        return told

    def _report(self, run: Material) -> None:
        try:
            write_report(replace(run, plan=plan_above(self.out)), self.partial / REPORT)
        except Exception as error:  # whatever it is, a trained model is not lost for a page about it
            if is_full(error):
                raise
            _log.warning(
                "no %s was written (%s); try `chanscale report %s --images DATA`",
                REPORT, one_line(error)[:200], self.out,
            )  # fmt: skip

    def discard(self) -> None:
        """Remove the unfinished folder, if this process works in it; what is finished stays."""
        if self._lock.is_locked:
            self.release()
            shutil.rmtree(self.partial, ignore_errors=True)

    def release(self) -> None:
        """Let another process work in the unfinished folder, if this one did."""
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    @property
    def _depth(self) -> Path:
        return self.partial / "depth.json"

    @property
    def _checkpoint(self) -> Path:
        return self.partial / "checkpoint.safetensors"

    def _require_same_config(self) -> None:
        if all(path.name.startswith(".") for path in self.partial.iterdir()):
            return  # killed before the configuration was written, which comes first
        begun = FitConfig.read(self.partial / "config.yaml")
        changed = [
            name
            for name in FitConfig.model_fields
            if name not in TIMING and getattr(begun, name) != getattr(self.config, name)
        ]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{self.partial} was begun with {name}={getattr(begun, name)!r}, not {getattr(self.config, name)!r}; "
                f"resume with the same options"
            )


class FollowedFolder(RunFolder):
    """The same folder, as the other processes of a job have it: they read, and the first one writes."""

    def begin(self, images: ImageSet, splits: Splits) -> None:
        """Write nothing."""

    def note_depth(self, depth: Depth) -> None:
        """Write nothing."""

    def save(self, state: TrainingState, notes: Mapping[str, Any]) -> None:
        """Write nothing."""

    def finish(self, run: Material, *, progress: Progress | None = None) -> ModelInfo:
        """Write nothing."""
        del progress
        return run.info


def _shape_of_program(model: Classifier, info: ModelInfo) -> tuple[int, ...]:
    """Return (C, *) to export `model` for: in colour wherever it can see colour, as a model that is rebuilt does."""
    if takes_grey_alone(model) or info.space is not None:
        return info.shape
    return 3, *info.shape[1:]


def _count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the shares of the test images that are flagged, and that are near ties."""
    return {
        "test_flagged": sum(verdict.flagged for verdict in verdicts) / len(verdicts),
        "test_near_ties": sum(verdict.near_tie for verdict in verdicts) / len(verdicts),
    }
