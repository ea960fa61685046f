"""How much memory is free: on the machine, and below the limits of a container or a batch job."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Version(NamedTuple):
    """Where a version of Linux's control groups keeps its figures, in bytes."""

    controller: str
    limit: str
    used: str
    idle: str


# Of the file pages that count as used, the kernel takes back those that are idle before it refuses anything.
_VERSION_2 = _Version("", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take; `root` is where /proc and /sys are looked for."""
    limits = [left for group, version in _find_groups(root) if (left := _left_in(group, version)) is not None]
    return max(0, min([int(psutil.virtual_memory().available), *limits]))


def _find_groups(root: Path) -> Iterator[tuple[Path, _Version]]:
    """Give this process's groups and all above them; in a container, only the topmost may be visible."""
    for version in (_VERSION_2, _VERSION_1):
        top = root / "sys/fs/cgroup" / version.controller
        own = top / _own_group(root, version.controller).lstrip("/")
        yield from ((group, version) for group in (own, *own.parents) if group.is_relative_to(top))


def _own_group(root: Path, controller: str) -> str:
    # Each line is `number:controllers:group`; version 2 names no controllers.
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            return group
    return ""


def _left_in(group: Path, version: _Version) -> int | None:
    limit, used = (_read(group / name).strip() for name in (version.limit, version.used))
    if not limit.isdigit():  # `max`, or no such group
        return None
    return int(limit) - int(used or 0) + _idle_in(group, version)


def _idle_in(group: Path, version: _Version) -> int:
    figures = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    return int(figures.get(version.idle, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
