"""The folder that an explanation is written to, and what its files are called."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from chanscale.errors import ConfigError
from chanscale.files import require_absent
from chanscale.wording import printable

_RESERVED = frozenset(
    {
        "index",
        "patches",
        "con",
        "prn",
        "aux",
        "nul",
        *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
    }
)
"""What is written beside the images, and what Windows keeps for devices."""
_LONGEST = 150
"""Bytes of a name: file systems take 255, and something is put before and behind."""


def require_new_folder(folder: Path, *, beside: Sequence[Path]) -> None:
    """Check that `folder` can be made, before the work; it must lie outside of the folders of images, `beside`.

    Raises ArtifactError, ConfigError.
    """
    require_absent(folder)
    for images in beside:
        if images.is_dir() and folder.resolve().is_relative_to(images.resolve()):
            raise ConfigError(f"--out {folder} lies in the images' folder {images}; choose one beside it")
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(
            f"{folder} cannot be made: {parent} is no folder that can be written to; name another --out"
        )


def file_names(images: Sequence[str]) -> list[str]:
    """Return a name for what is written of each image, without a suffix: no two are the same, on any system."""
    taken = set(_RESERVED)
    return [_find_name(Path(image).stem, taken) for image in images]


def _find_name(stem: str, taken: set[str]) -> str:
    plain = plain_name(stem)
    number, name = 1, plain
    while name.casefold() in taken:
        number += 1
        name = f"{plain}_{number}"
    taken.add(name.casefold())
    return name


def plain_name(text: str) -> str:
    """Return `text` as any file system takes it: letters, digits, `.`, `-` and `_`."""
    plain = re.sub(r"[^\w.-]+", "_", printable(text)).strip("._")
    return plain.encode()[:_LONGEST].decode(errors="ignore") or "image"


def shown_name(name: str) -> str:
    """Return a name that stands on one line: what cannot be printed is escaped."""
    safe = printable(name)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in safe)
