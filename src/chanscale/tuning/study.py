"""What Optuna keeps of a search: the parameters of each trial, what came of it, and which to try next."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chanscale.errors import ArtifactError, ConfigError, one_line
from chanscale.tuning.space import distributions
from chanscale.tuning.trials import COMPLETE, STOPPED, Result

if TYPE_CHECKING:
    from optuna import Study

NAME = "chanscale"
AT_RANDOM = 6
"""Trials that have ended before those that follow are drawn near the best of them."""

Asked = tuple[int, dict[str, Any]]
"""A trial's number and parameters."""


def require_optuna() -> None:
    """Raise ConfigError unless Optuna is installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tune needs Optuna, which is not installed here: pip install 'chanscale[tune]'"
        ) from error


class Trials:
    """The trials in a journal, which is made with the parameters `first` for trial 0.

    `of`: what is to be small besides a large AUC, `parameters` or `macs`; None: the AUC is all. What is drawn for a
    trial follows from `seed`, its number, and the trials that have ended: a search that was stopped goes on as it
    would have. Raises ArtifactError.
    """

    def __init__(
        self, journal: Path, names: Sequence[str], *, first: dict[str, Any], of: str | None, seed: int
    ) -> None:
        self._distributions = distributions(names)
        self._of, self._seed = of, seed
        mend_journal(journal)
        try:
            self._study = _open(journal, of)
        except Exception as error:  # Optuna raises whatever it stumbles over
            raise ArtifactError(f"{journal} is damaged ({one_line(error)}); use another --out") from error
        if not self._study.trials:
            self._study.enqueue_trial(first)

    def ask(self) -> Asked:
        """Return another trial."""
        from optuna.samplers import TPESampler

        number = len(self._study.trials)
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        self._study.sampler = TPESampler(n_startup_trials=AT_RANDOM, seed=seed)
        trial = self._study.ask(self._distributions)
        return trial.number, trial.params

    def asked(self) -> list[Asked]:
        """Return all trials there are, in order; without one that was killed before all of it was noted."""
        trials = self._study.get_trials(deepcopy=False)
        return [
            (trial.number, trial.params)
            for trial in trials
            if trial.params.keys() == self._distributions.keys()
        ]

    def tell(self, result: Result) -> None:
        """Note what came of a trial, if it is not noted."""
        from optuna.trial import TrialState

        states = {COMPLETE: TrialState.COMPLETE, STOPPED: TrialState.PRUNED}
        state = states.get(result["state"], TrialState.FAIL)
        values = self._values(result) if state == TrialState.COMPLETE else None
        self._study.tell(result["number"], values, state=state, skip_if_finished=True)

    def _values(self, result: Result) -> list[float]:
        auc = [result["validation_auc"]]
        # Half as large counts the same from any size.
        return auc if self._of is None else [*auc, math.log10(result[self._of]["kept"])]


def mend_journal(path: Path) -> None:
    """Take away what a process left in or beside a journal that was killed while it wrote: half a line, or a lock.

    For a folder that no other process works in.
    """
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.exists():
        text = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _open(journal: Path, of: str | None) -> "Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    if journal.stat().st_size:
        return optuna.load_study(storage=storage, study_name=NAME)
    maximise, minimise = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    directions = [maximise] if of is None else [maximise, minimise]
    return optuna.create_study(storage=storage, study_name=NAME, directions=directions)
