"""Cells run in processes of their own, a few at a time, so that the peak memory of each is its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self, TypeVar

import torch

CELL_PROGRAM = (sys.executable, "-P", "-m", "chanscale.comparison.cell_process")
"""What is started for each cell; it reads a spec from stdin, and its argument is where the cell's file goes.

-P: no module of the working folder is run.
"""


class Spec(Protocol):
    """All that a process, here or elsewhere, has to know to run one cell, or what else leaves one file."""

    @property
    def data(self) -> Path:
        """Where the images lie."""

    @property
    def digest(self) -> str:
        """A digest of all that the result follows from, which stands in the result."""

    def to_json(self) -> str:
        """Return one line; `from_json` takes it back."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the spec that `to_json` wrote."""

    def run(self) -> dict[str, Any]:
        """Return what came of it. Raises ChanscaleError."""

    def write(self, folder: Path, result: dict[str, Any]) -> Path:
        """Write its file into `folder`, whole or not at all, and return the path."""


AnySpec = TypeVar("AnySpec", bound=Spec)

CellRunner = Callable[[AnySpec], str | None]
"""Runs one cell, here or elsewhere, so that its file lies in the folder; returns what went wrong, in lines."""


class CellProcesses:
    """Runs each cell in a process on this machine, which ends with this one.

    `program`: what is started for each instead of CELL_PROGRAM.
    """

    def __init__(self, folder: Path, *, jobs: int, program: Sequence[str] | None = None) -> None:
        self.folder, self._program = folder, program or CELL_PROGRAM
        self._threads = max(1, torch.get_num_threads() // jobs)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = Lock(), False

    def run(self, spec: Spec) -> str | None:
        """Run one cell to its end; return None, or the words of the process that failed."""
        with self._starting() as process:
            if process is None:
                return "stopped"
            assert process.stdin
            assert process.stderr
            with suppress(OSError):  # it may be gone already: its exit code says more
                process.stdin.write(spec.to_json().encode() + b"\n")
            words = process.stderr.read().decode(errors="backslashreplace").strip()
            return _describe_end(process.wait(), words)

    def stop(self) -> None:
        """End all cells that run, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    @contextmanager
    def _starting(self) -> Iterator[subprocess.Popen[bytes] | None]:
        with self._lock:
            process = None if self._stopped else self._start()
        if process is None:
            yield None
            return
        try:
            # Its stdin is held open until it is done: the cell ends when it closes, however this process may end.
            with process:
                yield process
        finally:
            with self._lock:
                self._running.discard(process)

    def _start(self) -> subprocess.Popen[bytes]:
        pipe, threads = subprocess.PIPE, str(self._threads)
        process = subprocess.Popen(
            [*self._program, str(self.folder)],
            stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, bufsize=0,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        self._running.add(process)
        return process


def run_cells(
    specs: Iterable[AnySpec],
    run: CellRunner[AnySpec],
    *,
    jobs: int,
    stop: Callable[[], None] = lambda: None,
) -> Generator[tuple[AnySpec, str | None], None, None]:
    """Run the cells, `jobs` at a time, and yield each with what `run` returned, as it ends.

    A spec is taken when there is room for it, so that it may follow from what was yielded. Left early, by an error or
    an interrupt, it calls `stop`, and begins no further cell.
    """
    coming = iter(specs)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, spec): spec for spec in islice(coming, jobs)}
        try:
            while waiting:
                done = next(as_completed(waiting))
                yield waiting.pop(done), done.result()
                waiting |= {pool.submit(run, spec): spec for spec in islice(coming, 1)}
        finally:
            if not all(future.done() for future in waiting):
                pool.shutdown(wait=False, cancel_futures=True)
                stop()


def _describe_end(code: int, words: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        return f"{words}\nthe process was ended by {name}; it may have lacked memory".lstrip()
    return words or f"the process ended with exit code {code}"
