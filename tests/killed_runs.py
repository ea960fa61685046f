"""A process that runs a command line again and again, ended each time in the midst of a write, until it is done.

    python killed_runs.py ARGUMENTS, with a JSON list of [file, count, signal] on stdin

Each run is a fork, so that torch is imported once. It is ended when half of the file is written for the count-th time.
What it leaves is copied to `after-0`, `after-1`, ... in the current folder; stdout has the exit code of each run.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import chanscale.pipeline  # noqa: F401
import tiny_backbone
from chanscale import cli, files

REPLACE = files._replace


def end_in(name: str, count: int, end: int) -> None:
    """End this process when half of the file is written for the count-th time."""
    left = [None] * count

    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            left.pop()
        if not left:
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), end)
        REPLACE(path, data)

    files._replace = write


def run(arguments: list[str], moment: list | None) -> int:
    """Run the command in a fork, and return how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    if moment:
        end_in(*moment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = cli.run(arguments)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    tiny_backbone.register()
    for number, moment in enumerate([*json.load(sys.stdin), None]):
        unfinished = Path("run.partial")
        code = run(sys.argv[1:] + ["--resume"] * unfinished.exists(), moment)
        sys.stdout.write(f"{code}\n")
        if unfinished.exists():
            shutil.copytree(unfinished, f"after-{number}")
