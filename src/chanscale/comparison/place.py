"""Where cells run: in processes here, or on a Ray."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chanscale.errors import ConfigError

if TYPE_CHECKING:
    from chanscale.comparison.processes import CellProcesses
    from chanscale.comparison.ray_cells import RayCells


@dataclass(frozen=True)
class Place:
    """How many cells run at a time, on which Ray, and on how many CPUs of it. Raises ConfigError."""

    jobs: int | None = None
    ray: str | None = None
    ray_cpus: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"--jobs must be 1 at least. Got {self.jobs}.")
        if self.ray == "":
            raise ConfigError("--ray must be local, auto, host:port or ray://host:port. Got ''.")
        if self.ray_cpus and self.ray is None:
            raise ConfigError("--ray-cpus is for cells on Ray: name one with --ray, or leave it out")

    @contextmanager
    def opening(
        self, folder: Path, *, device: str, tell: Callable[[str], None], program: Sequence[str] | None = None
    ) -> "Iterator[CellProcesses | RayCells]":
        """Give what runs cells, whose files go into `folder`; `program`, in processes. Raises ConfigError."""
        from chanscale.comparison.processes import CellProcesses
        from chanscale.comparison.ray_cells import joined_ray

        jobs = self.jobs or 1
        if self.ray is None:
            yield CellProcesses(folder, jobs=jobs, program=program)
            return
        with joined_ray(self.ray, folder, jobs=jobs, cpus=self.ray_cpus, device=device, tell=tell) as cells:
            yield cells
