"""A folder that long work fills over several calls: one process at a time, and always with the same options."""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from chanscale.config import FitConfig, before_it_existed
from chanscale.errors import ArtifactError, ConfigError, one_line
from chanscale.files import claiming, read_json, write_atomically
from chanscale.wording import printable


def require_own(out: Path, file: str, *, what: str) -> None:
    """Raise ArtifactError unless `out` is new, empty, or a folder with `file`, as one that holds `what` has it.

    A process that is stopped before it wrote the file leaves hidden files and an empty folder.
    """
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; choose another --out")
    if out.exists() and not (out / file).exists() and any(map(_holds_something, out.iterdir())):
        raise ArtifactError(f"{out} holds something else than {what}; choose another --out")


def _holds_something(path: Path) -> bool:
    return not path.name.startswith(".") and not (path.is_dir() and not any(path.iterdir()))


@contextmanager
def sole_worker(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which is there. Raises ArtifactError."""
    with claiming(folder):
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


@contextmanager
def working_in(out: Path, *, plan: Path, parts: Path, written: Iterable[Path], what: str) -> Iterator[None]:
    """Keep other processes out of `out` and its folder of `parts`, which are made. Raises ArtifactError.

    `plan`: the file that says that a folder is one of `what`. `written`: the folders whose files this work writes.
    """
    require_own(out, plan.name, what=what)
    with claiming(out):
        parts.mkdir(parents=True, exist_ok=True)
    with sole_worker(out):
        for folder in written:
            for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
        yield


def read_plan(path: Path, *, wanted: str) -> dict[str, Any]:
    """Return what a folder was begun with, in the format that is `wanted`. Raises ArtifactError."""
    try:
        facts: dict[str, Any] = read_json(path)
        known = facts["format"] == wanted
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({one_line(error)}); use another --out") from error
    if not known:
        raise ArtifactError(f"{path} is of another version of chanscale; use another --out")
    return facts


def require_same_plan(
    out: Path, noted: Mapping[str, Any], wanted: Mapping[str, Any], *, idle: Set[str], own: str = "folds"
) -> None:
    """Raise ConfigError unless `out` was begun with the options and images that are wanted, `idle` aside.

    Raises ArtifactError where it is not noted with what. `own`: the fact that such a plan has besides those of a fit.
    """
    if not (isinstance(noted.get("config"), dict) and own in noted and "images" in noted):
        raise ArtifactError(f"the plan in {out} is damaged; use another --out")
    begun, asked = (facts["config"] | {own: facts[own]} for facts in (noted, wanted))
    require_same_options(out, begun, asked, idle=idle)
    if noted["images"] != wanted["images"]:
        raise ConfigError(f"{out} was begun with other images; use the same, or another --out")


def note_failure(path: Path, error: str) -> Path:
    """Write why a part of the work failed, beside where its file would lie, and return the path."""
    write_atomically(path, printable(error).rstrip() + "\n")
    return path


def require_same_options(
    out: Path, begun: Mapping[str, Any], asked: Mapping[str, Any], *, idle: Set[str]
) -> None:
    """Raise ConfigError unless `out` was begun with the options that are asked for, those in `idle` left aside.

    An option that there was not when it was begun counts as what it came to then.
    """
    begun = {name: before_it_existed(name) for name in FitConfig.model_fields} | dict(begun)
    for name in sorted({*begun, *asked} - idle):
        if begun.get(name) != asked.get(name):
            raise ConfigError(
                f"{out} was begun with {name}={begun.get(name)!r}, not {asked.get(name)!r}; "
                "use the same options, or another --out"
            )
