"""From images to a search: trials one after the other, or a few at a time, and what they come to."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from chanscale.catalogue import require_network
from chanscale.comparison.cells import digest_images
from chanscale.comparison.place import Place
from chanscale.comparison.processes import run_cells
from chanscale.config import FitConfig, FixedPrecision
from chanscale.data.sources import ImageSet
from chanscale.errors import ArtifactError, ConfigError, TrainingError
from chanscale.progress import Watcher
from chanscale.run_images import list_readable
from chanscale.tuning.folder import SearchFolder, SearchPlan
from chanscale.tuning.results import Tuning, write_tuning
from chanscale.tuning.space import choose_options, to_options, to_params
from chanscale.tuning.stopping import Rival
from chanscale.tuning.study import Asked, Trials, require_optuna
from chanscale.tuning.trials import FAILED, Result, TrialSpec, split_search

TRIAL_PROGRAM = (sys.executable, "-P", "-m", "chanscale.tuning.trial_process")
"""What is started for each trial; -P: no module of the working folder is run."""


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended: its result, or, where its process was lost, in what words; `done` of `total` have ended."""

    number: int
    result: Result | None
    error: str | None
    done: int
    total: int


Listener = Callable[[TrialEnd], None]

_log = logging.getLogger(__name__)


def tune(
    model: str,
    data: str | Path,
    *,
    out: str | Path,
    trials: int = 30,
    search: Sequence[str] | None = None,
    within: float = 0.01,
    config: FitConfig | None = None,
    jobs: int = 1,
    ray: str | None = None,
    ray_cpus: int | None = None,
    on_trial: Listener | None = None,
) -> Tuning:
    """Search for options of `scale_and_select` by validation images; no trial sees a test image.

    `model`: the name of a backbone, or of a library's network. `data`: a folder, CSV or npz file. `search`: names of
    options; default: all that can be searched and are not set in `config`. With the budget among them, a small
    network counts beside a large AUC, and there is a Pareto front; `best` is the smallest of it that is `within` of
    the largest AUC. Trials run `jobs` at a time, here or on the Ray at the address `ray`. What is in `out` is not run
    again. Raises ChanscaleError.
    """
    require_network(model)
    require_optuna()
    place = Place(jobs, ray, ray_cpus)
    config = (config or FitConfig()).model_copy(update={"backbone": model})
    _require_sense(trials, within)
    plan = SearchPlan(config, choose_options(config, search))
    images = list_readable(Path(data), config, Watcher())
    splits = split_search(images, config)
    folder = SearchFolder(Path(out))
    opening = place.opening(folder.trials, device=config.device, tell=_log.warning, program=TRIAL_PROGRAM)
    with opening as runner, folder.working():
        precision = folder.begin(plan, images)
        work = _Search(Path(data), images, plan, folder, precision, trials)
        with closing(run_cells(work.specs(), runner.run, jobs=jobs, stop=runner.stop)) as ended:
            for spec, error in ended:
                end = work.settle(spec.number, error)
                if on_trial:
                    on_trial(end)
        return write_tuning(folder, plan, splits, within=within)


class _Search:
    """The trials of a search in their order: which are still to be run, and what is noted when one has ended."""

    def __init__(
        self, data: Path, images: ImageSet, plan: SearchPlan, folder: SearchFolder, precision: FixedPrecision,
        total: int,
    ) -> None:  # fmt: skip
        self.plan, self.folder, self.total = plan, folder, total
        self._data, self._listed, self._skipped = data.absolute(), digest_images(images), images.skipped
        self._shared = plan.config.model_copy(update={"precision": precision})
        self._trials = Trials(
            folder.journal, plan.searched, first=to_params(plan.config, plan.searched), of=plan.of,
            seed=plan.config.seed,
        )  # fmt: skip
        self._note_results()

    def specs(self) -> Iterator[TrialSpec]:
        """Yield the trials that are not there: those that were begun, and then new ones, up to `total`."""
        begun = self._trials.asked()[: self.total]
        yield from (self._spec(asked) for asked in begun if self.folder.result(asked[0]) is None)
        for _ in range(self.total - len(begun)):
            yield self._spec(self._trials.ask())

    def settle(self, number: int, error: str | None) -> TrialEnd:
        """Note how a trial ended, and return it. Raises TrainingError when not even the first one could be run."""
        result = self.folder.result(number) if error is None else None
        if result is None:
            path = self.folder.note_failure(number, error or "it left no file")
            error = f"{(error or 'it left no file').splitlines()[-1]} ({path})"
            if not self.folder.results():
                raise TrainingError(f"trial {number} failed, and no other has ended: {error}")
        else:
            self._trials.tell(result)
            self.folder.note_success(number)
        return TrialEnd(number, result, error, len(self.folder.results()), self.total)

    def _note_results(self) -> None:
        """Tell Optuna of trials that ended before a process was killed. Raises ArtifactError for those of others."""
        asked = dict(self._trials.asked())
        for result in self.folder.results():
            if to_options(asked.get(result["number"], {})) != result["options"]:
                raise ArtifactError(
                    f"trial {result['number']} of {self.folder.trials} is not that of {self.folder.journal}; "
                    "use another --out"
                )
            self._trials.tell(result)

    def _spec(self, asked: Asked) -> TrialSpec:
        number, params = asked
        config = FitConfig.build(self._shared.model_dump() | to_options(params))
        return TrialSpec(
            number, self._data, self._listed, self._skipped, config, self.plan.searched, self._rivals(number)
        )

    def _rivals(self, number: int) -> tuple[Rival, ...]:
        """Return the earlier trials that left a network; with the budget fixed, none of them is larger."""
        of = self.plan.of
        return tuple(
            Rival(result[of]["kept"] if of else 0.0, tuple(result["aucs"]))
            for result in self.folder.results()
            if result["number"] < number and result["state"] != FAILED
        )


def _require_sense(trials: int, within: float) -> None:
    if trials < 1:
        raise ConfigError(f"a search needs 1 trial at least. Got {trials}.")
    if not 0 <= within < 0.5:
        raise ConfigError(f"`within` must be a difference of AUC, from 0 to below 0.5. Got {within}.")
