"""Processes of trials on the tiny backbone, and trials that run within the test's own process, which is quicker."""

import sys
from contextlib import contextmanager
from pathlib import Path

import tiny_backbone
from chanscale.comparison import cell_process
from chanscale.comparison.place import Place
from chanscale.errors import ChanscaleError, one_line
from chanscale.tuning.trials import TrialSpec

PROGRAM = (sys.executable, __file__)


class HereRunner:
    """Runs trials in this process; `lost` are the numbers of those whose process is lost."""

    def __init__(self, folder: Path, lost: set[int] | None = None):
        self.folder, self.lost, self.ran = folder, lost or set(), []

    def run(self, spec: TrialSpec) -> str | None:
        if spec.number in self.lost:
            return "Killed\nthe process was ended by SIGKILL; it may have lacked memory"
        self.ran.append(spec.number)
        try:
            spec.write(self.folder, spec.run())
        except ChanscaleError as error:
            return one_line(error)
        return None

    def stop(self) -> None:
        pass


def run_here(setattribute=setattr, lost: set[int] | None = None) -> list[HereRunner]:
    """Let all trials run in this process; the list fills with a runner for each search."""
    runners = []

    @contextmanager
    def opening(self, folder, **_):
        runners.append(HereRunner(folder, lost))
        yield runners[-1]

    setattribute(Place, "opening", opening)
    return runners


if __name__ == "__main__":
    tiny_backbone.register()
    cell_process.main(TrialSpec)
