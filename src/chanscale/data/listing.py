"""Which files below a folder are images; none vanishes unsaid."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from chanscale.data.dicom import DICOM_SUFFIXES, is_listed
from chanscale.data.images import IMAGE_SUFFIXES
from chanscale.data.volumes import is_volume
from chanscale.errors import DataError
from chanscale.files import exists


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder and below it, sorted; hidden ones and other suffixes are passed over.

    A file without a suffix is an image if its content is DICOM; a DICOMDIR is none.
    Links are followed, and each folder is entered once. A link that leads nowhere is listed if its name is
    that of an image: reading it says what is wrong. Raises DataError for a folder that cannot be listed.
    """
    real = folder.resolve()
    seen = {real, *real.parents}  # a link to one of these would go round in circles
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        # Links last: of the names that a folder has, its own is taken.
        entries = sorted(_shown(place, folders), key=lambda entry: (entry.is_symlink(), entry))
        folders[:] = [entry.name for entry in entries if _is_new(entry, seen)]
        images = _shown(place, files)
        _refuse_lost(images)
        found += [path for path in images if _is_image(path)]
    return sorted(found)


def list_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, less hidden ones. Raises DataError if it cannot be listed."""
    try:
        entries = _shown(folder, (entry.name for entry in folder.iterdir()))
        _refuse_lost(entries)
        return sorted(entry for entry in entries if entry.is_dir())
    except OSError as error:
        _refuse(error)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES - DICOM_SUFFIXES or is_volume(path) or is_listed(path)


def _refuse_lost(paths: Iterable[Path]) -> None:
    """Raise DataError for a link that leads nowhere, and that may have led to a folder of images."""
    for path in paths:
        if not path.suffix and path.is_symlink() and not exists(path):
            raise DataError(f"{path} is a link that leads nowhere; mend it, or remove it.")


def _shown(place: str | Path, names: Iterable[str]) -> list[Path]:
    return [Path(place, name) for name in names if not name.startswith(".") and name != "__MACOSX"]


def _is_new(folder: Path, seen: set[Path]) -> bool:
    """Tell whether a folder is met for the first time, under whatever name, and note it."""
    real = folder.resolve()
    new = real not in seen
    seen.add(real)
    return new


def _refuse(error: OSError) -> NoReturn:
    raise DataError(
        f"cannot list the folder {error.filename} ({error.strerror}); make it readable, or move it away."
    ) from error
