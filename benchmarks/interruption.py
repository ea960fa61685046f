"""Whether a run that is killed and gone on with ends as one that was left alone, byte for byte.

    python benchmarks/interruption.py fit --random 20 --named
    python benchmarks/interruption.py fit --random 4 --backbone efficientnet_lite0 --size 64
    python benchmarks/interruption.py compare --random 4
    python benchmarks/interruption.py cross-validate --random 4

Each trial is a process that is ended by SIGKILL and SIGINT in turns: at a random moment, one in each equal part of the
time that an undisturbed run takes, or (`--named`) in the midst of a write or a removal. The same command then goes on,
is ended once more at a random moment, and goes on to its end. After each end, every file must be whole, or have a
temporary name. The last lines are the table of docs/benchmarks/reliability.md.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from PIL import Image
from safetensors import safe_open

TESTS = Path(__file__).parents[1] / "tests"
FORK = multiprocessing.get_context("fork")
NAMED = (
    "config.yaml:1", "splits.csv:1", "depth.json:1", "checkpoint.safetensors:1", "checkpoint.safetensors:2",
    "checkpoint.safetensors:3", "checkpoint.safetensors:5", "removal:1", "removal:2", "model.safetensors:1",
    "novelty.safetensors:1", "metrics.json:1", "history.csv:1", "report.html:1", "rename:1",
)  # fmt: skip
"""Moments of a fit: half of a file is written, for the n-th time; channels are removed; the folder has its name."""
SIGNALS = (signal.SIGKILL, signal.SIGINT)
VARYING = frozenset({"seconds", "peak_memory_bytes"})
"""What no two runs have alike."""
TEMPORARY = re.compile(r"\..*(\.tmp|lock)$")


@dataclass(frozen=True)
class Job:
    """A command that writes to `out`; `folder` is where it runs."""

    command: str
    data: Path
    folder: Path
    options: tuple[str, ...]

    @property
    def out(self) -> Path:
        """What the command leaves when it is done."""
        return self.folder / "out"

    @property
    def arguments(self) -> list[str]:
        """The command line, as it is now to be given."""
        unfinished = (self.folder / "out.partial").exists()
        return [self.command, str(self.data), "--out", str(self.out), *self.options] + (
            ["--resume"] if unfinished else []
        )

    def run(self, *, seconds: float | None = None, end: int = signal.SIGKILL, at: str = "") -> "Ending":
        """Run the command, ended by the signal after some seconds, or `at` a named moment."""
        with tempfile.TemporaryFile("w+") as words:
            began = perf_counter()
            process = FORK.Process(target=run_child, args=(self.arguments, words.fileno(), at, end))
            process.start()
            process.join(seconds)
            if process.is_alive():
                end_process(process.pid, end)
                process.join()
            words.seek(0)
            return Ending(process.exitcode, perf_counter() - began, words.read().strip().splitlines())


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit code, its seconds, and what it said."""

    code: int
    seconds: float
    words: list[str]

    @property
    def place(self) -> str:
        """The last progress that was told before the end."""
        told = [line for line in self.words if not line.startswith(("interrupted", "error", "warning"))]
        return re.split(r"[:(]", told[-1])[0].strip() if told else "the start"

    def require_clean(self, end: int) -> None:
        """Check that the process was killed, or said in a line that it was interrupted, or was done by then."""
        if "Traceback" in " ".join(self.words):
            print(*self.words, sep="\n")
            raise SystemExit("an interrupt ended in a traceback")
        allowed = {0, -end, 130} if end == signal.SIGINT else {0, -end}
        if self.code not in allowed:
            print(*self.words, sep="\n")
            raise SystemExit(f"the process ended with {self.code}")


# --- a trial


def try_moments(job: Job, trials: list[tuple[str, dict[str, Any]]], whole: Job, rng: random.Random) -> None:
    """End the job at each moment, go on, and print a row of the table for each."""
    print("| moment | ended by | it stood at | there then | goes on, ended again at | the same at the end |")
    print("|---|---|---|---|---|---|", flush=True)
    length = measure(whole)
    for number, (name, how) in enumerate(trials):
        first, second = SIGNALS[number % 2], SIGNALS[(number + 1) % 2]
        own = replace(job, folder=job.folder / f"trial-{number}")
        own.folder.mkdir()
        how = {"seconds": length * how["share"]} if "share" in how else how
        ended = own.run(end=first, **how)
        ended.require_clean(first)
        there, kept = check_whole(own), parts_done(own)
        if not is_done(own):
            again = own.run(seconds=length * rng.random(), end=second)
            again.require_clean(second)
            check_whole(own)
            gone_on = f"{describe(second, again)}, {again.place}"
        else:
            gone_on = "not needed"
        last = own.run() if not is_done(own) else None
        same = compare_outcomes(own, whole)
        same += "" if kept.items() <= parts_done(own).items() else "; parts were done again"
        assert last is None or last.code == 0, last.words
        print(
            f"| {name} | {describe(first, ended)} | {ended.place} | {there} | "
            f"{gone_on} | {same} |", flush=True,
        )  # fmt: skip


def describe(end: int, ended: Ending) -> str:
    """Return which signal ended a process, or that it was done before."""
    return "nothing: done" if ended.code == 0 else signal.Signals(end).name


def measure(job: Job) -> float:
    """Run the job undisturbed, unless it is there; return its seconds."""
    ended = job.run()
    if ended.code != 0:
        print(*ended.words, sep="\n")
        raise SystemExit("the undisturbed run failed")
    check_whole(job)
    print(f"<!-- undisturbed: {ended.seconds:.1f} s -->", flush=True)
    return ended.seconds


def is_done(job: Job) -> bool:
    """Tell whether the command has come to its end."""
    result = {"fit": "", "compare": "table.md", "cross-validate": "cross_validation.json"}[job.command]
    return (job.out / result).exists()


def parts_done(job: Job) -> dict[str, int]:
    """Return when each cell or run of the job that is whole was written, so that none is seen to be done again."""
    parts = [*job.out.glob("cells/*.json"), *job.out.glob("runs/*/model.safetensors")]
    return {str(path): path.stat().st_mtime_ns for path in parts if "partial" not in str(path)}


def end_process(pid: int, end: int) -> None:
    """Send a signal: Ctrl-C to all processes of the child, as a terminal does, a kill to it alone."""
    with suppress(ProcessLookupError):  # it ended meanwhile
        leads = os.getpgid(pid) == pid  # not yet, in its first moment
        (os.killpg if end == signal.SIGINT and leads else os.kill)(pid, end)


# --- what is whole, and what is the same


def check_whole(job: Job) -> str:
    """Check that each file parses or has a temporary name; return what there is, in words."""
    paths = [path for path in sorted(job.folder.rglob("*")) if path.is_file()]
    for path in paths:
        if not TEMPORARY.fullmatch(path.name):
            READERS[path.suffix](path)
    names = [path.name for path in paths]
    if is_done(job) and job.command == "fit":
        left = [name for name in names if name.startswith(".") or name.startswith("checkpoint")]
        return "the run" + (f", and {', '.join(left)}" if left else "")
    halves = sum(name.endswith(".tmp") for name in names)
    whole = sum(not name.startswith(".") for name in names)
    return f"{whole} whole files" + (f", {halves} temporary" if halves else "") if names else "nothing"


def read_tensors(path: Path) -> None:
    """Read every tensor of a file."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_html(path: Path) -> None:
    """Check that a page ends where pages do."""
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise SystemExit(f"{path} is cut off")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".yaml": lambda path: yaml.safe_load(path.read_bytes()),
    ".csv": lambda path: list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)),
    ".md": lambda path: path.read_text(encoding="utf-8"),
    ".png": lambda path: Image.open(path).load(),
    ".safetensors": read_tensors,
    ".html": read_html,
}


def compare_outcomes(job: Job, whole: Job) -> str:
    """Return whether both left the same files with the same content, or the name of the first that differs."""
    found, wanted = (dict(read_outcome(of)) for of in (job, whole))
    differing = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    return f"no: {', '.join(differing)}" if differing else f"{len(found)} files"


def read_outcome(job: Job) -> Iterator[tuple[str, object]]:
    """Yield each file's name and content, less what no two runs have alike; a report's name alone."""
    for path in sorted(path for path in job.folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(job.folder).as_posix(), path.read_bytes()
        if path.suffix == ".json":
            yield name, without_varying(json.loads(content))
        elif path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(content.decode()))
            yield name, [without_varying(row) for row in rows]
        else:
            # Reports and tables tell seconds and memory; pictures of a grid have the peak memory in them.
            yield name, None if path.suffix in (".html", ".md") else content


def without_varying(value: Any) -> Any:
    """Return what is read of a file without seconds and memory, however deep they lie."""
    if isinstance(value, dict):
        return {name: without_varying(part) for name, part in value.items() if name not in VARYING}
    return [without_varying(part) for part in value] if isinstance(value, list) else value


# --- the process that is ended


def load() -> None:
    """Load what a command needs, and the backbone of the tests, so that a child starts at once."""
    sys.path.append(str(TESTS))
    import chanscale.pipeline
    import tiny_cell
    from chanscale.comparison import processes

    tiny_cell.register()
    processes.CELL_PROGRAM = tiny_cell.PROGRAM
    assert chanscale.pipeline


def run_child(arguments: list[str], words: int, at: str, end: int) -> None:
    """Run a command in a session of its own, its words going to the file `words`, and end it where `at` says."""
    from chanscale.cli import run

    os.setsid()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the parent runs in the background
    os.dup2(words, sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if at:
        what, count = at.split(":")
        stop_at(what, int(count), end)
    code = run(arguments)
    sys.stderr.flush()
    os._exit(code)


def stop_at(what: str, count: int, end: int) -> None:
    """Let this process be ended at the `count`-th time that `what` happens."""
    from chanscale import epochs, files

    left = count

    def happens() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def write(path: Path, data: bytes, replace: Callable[[Path, bytes], None] = files._replace) -> None:
        if path.name == what and happens():
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), end)
        replace(path, data)

    def remove(*given: Any, removing: Callable[..., Any] = epochs.remove_channels, **options: Any) -> Any:
        removed = removing(*given, **options)
        if what == "removal" and happens():
            os.kill(os.getpid(), end)
        return removed

    def rename(path: Path, target: Path, renaming: Callable[..., Path] = Path.rename) -> Path:
        renamed = renaming(path, target)
        if what == "rename" and happens():
            os.kill(os.getpid(), end)
        return renamed

    files._replace, epochs.remove_channels, Path.rename = write, remove, rename


# --- the command line


OPTIONS = (
    "--budget=0.5", "--round-to=1", "--scale-epochs=3", "--refine-epochs=2", "--precision=32-true", "--device=cpu",
    "--group-pattern=^(\\d+)_", "--workers=0",
)  # fmt: skip
MORE = {
    "fit": (),
    "compare": ("--methods=head,chanscale", "--folds=2", "--tries=1"),
    "cross-validate": ("--folds=2", "--test=0.2"),
}


def main() -> None:
    """Draw the images, then try each moment."""
    options = parse_options()
    load()
    with tempfile.TemporaryDirectory(prefix="interruption-", dir=options.folder) as place:
        folder = Path(place)
        data = folder / "data"
        subprocess.run(
            [sys.executable, "-m", "chanscale", "phantom", str(data), "--count=60", "--size=64"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        given = (f"--backbone={options.backbone}", f"--image-size={options.size}")
        whole = Job(options.command, data, folder / "whole", (*given, *OPTIONS, *MORE[options.command]))
        whole.folder.mkdir()
        rng = random.Random(options.seed)
        trials: list[tuple[str, dict[str, Any]]] = [(name, {"at": name}) for name in NAMED if options.named]
        for part in range(options.random):
            share = (part + rng.random()) / options.random
            trials.append((f"{share:.0%} of the time", {"share": share}))
        try_moments(replace(whole, folder=folder), trials, whole, rng)


def parse_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=MORE)
    parser.add_argument("--random", type=int, default=20, help="random moments")
    parser.add_argument("--named", action="store_true", help="named moments of a fit, too")
    parser.add_argument("--backbone", default="tiny", help="tiny is that of the tests")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="fixes the random moments, as shares of the time")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
