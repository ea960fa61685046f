"""Write the lock files: exact versions, and the SHA-256 of every file that a package index has of each.

    make lock    # or: python tools/lock.py, where `uv` is installed

requirements.lock is for the demo, requirements-dev.lock for tests and CI; versions are those of constraints.txt. The
CUDA packages that torch from PyPI wants on Linux have a file of their own: the small build of torch wants none of them.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_WHEELS = ROOT / "tools" / "torch-cpu.sha256"
"""Digests of the small build of torch, as `sha256sum` prints them: that build is on an index of its own."""

CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
HASH = "    --hash=sha256:"
HEADER = "# Written by `make lock`, from {}; installed by tools/install_locked.py. Not to be edited.\n"


class LockError(Exception):
    """No lock can be written."""


def main() -> None:
    """Write all lock files, or none; exit with 2 and one line where that fails."""
    try:
        locks = make_locks()
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path, text in locks.items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(split_entries(text))} packages")


def make_locks() -> dict[Path, str]:
    """Return the text of each lock file. Raises LockError."""
    runtime = compile_lock("pyproject.toml", "-c", "constraints.txt")
    dev = compile_lock("pyproject.toml", "-c", "constraints.txt", "--extra", "dev")
    tools = compile_lock("tools/requirements.in", "-c", "constraints.txt")
    plain, cuda = (
        HEADER.format("pyproject.toml and constraints.txt"),
        HEADER.format("what torch of PyPI needs"),
    )
    return {
        ROOT / "requirements.lock": plain + join(runtime, cuda=False),
        ROOT / "requirements-dev.lock": plain + join(dev, cuda=False),
        ROOT / "requirements-cuda.lock": cuda + join(runtime, cuda=True),
        ROOT / "tools" / "requirements.lock": HEADER.format("tools/requirements.in and constraints.txt")
        + join(tools, cuda=False),
    }


def compile_lock(*arguments: str) -> dict[str, str]:
    """Return what `uv pip compile` finds, for all platforms: the name of a package -> its entry. Raises LockError."""
    # The uv of the environment that this runs in, else the one on the path.
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise LockError("`uv` must be there to lock; run `make lock`, which installs it.")
    options = (
        "--universal",
        "--generate-hashes",
        "--python-version",
        "3.11",
        "--no-annotate",
        "--no-header",
        "-q",
    )
    done = subprocess.run(
        (uv, "pip", "compile", *options, *arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LockError(f"uv could not lock {arguments[0]}: {' '.join(done.stderr.split())[:400]}")
    return with_cpu_wheels(split_entries(done.stdout))


def split_entries(text: str) -> dict[str, str]:
    """Return the entries of a lock by package: a line `name==version`, and a line for each hash."""
    found = re.findall(r"^(([A-Za-z0-9._-]+)==.*\n(?:[ \t]+.*\n)*)", text, flags=re.MULTILINE)
    return {name: entry for entry, name in found}


def with_cpu_wheels(entries: dict[str, str]) -> dict[str, str]:
    """Return the entries, with the small builds among the hashes of torch. Raises LockError without any of its version.

    `torch==2.13.0` also means `2.13.0+cpu`, which pip prefers wherever an index has it.
    """
    if "torch" not in entries:
        return entries
    version = re.match(r"torch==([^\s;]+)", entries["torch"])
    digests = cpu_digests(version[1] if version else "")
    more = "".join(f" \\\n{HASH}{digest}" for digest in digests)
    return entries | {"torch": entries["torch"].rstrip("\n") + more + "\n"}


def cpu_digests(version: str) -> list[str]:
    """Return the digests of the small builds of a version of torch. Raises LockError when there is none."""
    lines = [line.split() for line in CPU_WHEELS.read_text(encoding="utf-8").splitlines()]
    digests = [digest for digest, name in lines if name.startswith(f"torch-{version}+cpu-")]
    if not digests:
        raise LockError(
            f"{CPU_WHEELS.name} must have the wheels of torch {version}+cpu. Copy their names and digests "
            "from https://download.pytorch.org/whl/cpu/torch/."
        )
    return digests


def join(entries: dict[str, str], *, cuda: bool) -> str:
    """Return the entries of CUDA packages, or of all others, as the text of a lock."""
    chosen: Iterable[str] = (entry for name, entry in entries.items() if bool(CUDA.fullmatch(name)) == cuda)
    return "".join(chosen)


if __name__ == "__main__":
    main()
