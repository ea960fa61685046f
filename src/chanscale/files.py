"""Files that are whole or not there at all, and what is written to them."""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from chanscale.errors import ArtifactError, ConfigError

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas of this kind


def require_writable(path: Path) -> None:
    """Check that a file can be written to `path`, before the work that it is to hold. Raises ConfigError."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file to write in it")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} to write {path.name} to; make it, or name another")
    if not os.access(path if _is_special(path) else folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written; name another file")


def user_folder(variable: str, *below_home: str) -> Path | None:
    """Return where chanscale keeps what is a user's, which need not exist; None for a user without a home folder.

    It is $CHANSCALE_HOME, or `chanscale` in the folder that `variable` names, or in that folder of the home.
    """
    if own := os.environ.get("CHANSCALE_HOME"):
        return Path(os.path.expanduser(own))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if folder := os.environ.get(variable):
        return Path(folder) / "chanscale"
    try:
        return Path.home().joinpath(*below_home, "chanscale")
    except RuntimeError:  # no HOME, and no such user on this machine: as in some containers
        return None


def require_absent(path: Path) -> None:
    """Check that nothing lies at `path`, where a file or a folder is to be made. Raises ArtifactError."""
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists already; remove it, or name another --out")


def require_new(path: Path, suffix: str, *, renewed: Path | None = None) -> None:
    """Check, before the work, that `path` can become a new file, and that its name does not belie its `suffix`.

    `renewed`: where the same command leaves its own file, which it may write again. A file without content, a pipe and
    a device are written to. Raises ConfigError, and ArtifactError for a file that holds something.
    """
    require_writable(path)
    if path.suffix.lower() not in ("", suffix) and not _is_special(path):
        raise ConfigError(f"{path} is not called {suffix}, which is what is written; name another --out")
    own = renewed is not None and path.absolute() == renewed.absolute()
    if is_file(path) and path.stat().st_size and not own:
        # It may be anything: no word of removing it.
        raise ArtifactError(f"{path} exists already; name another --out")


@contextmanager
def claiming(folder: Path) -> Iterator[None]:
    """Say in one line why `folder` cannot be taken: its lock is held, or it cannot be written. Raises ArtifactError."""
    try:
        yield
    except Timeout as error:
        raise ArtifactError(f"another process works in {folder}; let it end, or stop it") from error
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder`, which takes its name at the end, and is removed if that is not reached.

    Raises ArtifactError where it cannot be written.
    """
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.tmp")
    try:
        with claiming(folder):
            partial.mkdir()
        yield partial
        require_absent(folder)  # made meanwhile: a rename would take the place of an empty folder
        with claiming(folder):
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` under a temporary name beside `path`, then rename it; the folder must exist.

    A link, or a device such as /dev/stdout, is written to as it is. Bytes of a file name that are no UTF-8
    are written as they came. Raises OSError, which names `path`.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    try:
        if _is_special(path):
            path.write_bytes(data)
        else:
            _replace(path, data)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _is_special(path: Path) -> bool:
    return os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a machine that restarts may have the name without the content
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_full(error: BaseException) -> bool:
    """Tell whether the system refused because the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def describe_refusal(error: OSError) -> str:
    """Return in one line what the system refused, and why; of a full disk, what to do."""
    reason = "the disk is full; make room on it" if is_full(error) else error.strerror or error
    return f"{error.filename or 'input or output'}: {reason}"


def is_file(path: Path) -> bool:
    """Tell whether a file is there; where its folder may not be read, Path.is_file would raise: here, no."""
    return os.path.isfile(path)  # noqa: PTH113


def exists(path: Path) -> bool:
    """Tell whether a path leads somewhere; where its folder may not be read, no, like `is_file`."""
    return os.path.exists(path)  # noqa: PTH110


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises OSError, and ValueError for what is none."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Return what JSON text holds. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json(value: Any) -> str:
    """Return JSON that any parser takes: a figure that is not defined (nan) becomes null."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
