"""From images to findings: the one call for a set, and the one for a run under way."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.artifact import load_model, model_path
from chanscale.config import Frames, split_names
from chanscale.data.loading import DecodedImages, decode_images
from chanscale.data.readers import Side
from chanscale.data.sources import ImageSet, open_images
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.leaks.findings import KINDS, Findings, judge_twins, require_paths
from chanscale.leaks.thumbnails import SIDE, thumbnails
from chanscale.leaks.twins import SAME, SURE, find_twins
from chanscale.own_images import open_own_images
from chanscale.progress import Watcher


def find_leaks(
    data: Path | str,
    *,
    run: Path | str | None = None,
    group_pattern: str | None = None,
    frames: Frames | None = None,
    label_columns: str | None = None,
    skip_bad: bool = False,
    workers: int = 2,
    table: Path | None = None,
    watcher: Watcher | None = None,
) -> Findings:
    """Return the pairs of images that show one exposure, and what they spoil.

    `run`: a run folder whose sides, patients and frames count; without, the sides are those that `data` itself gives,
    `frames` says which of a DICOM file's are taken, default: the first, and `label_columns` which columns of a table
    are labels, as for `fit`.
    `table`: where `write_groups` is to write later; checked before the work. Raises DataError, ArtifactError,
    ConfigError.
    """
    watcher = watcher or Watcher()
    images, sides = _open(
        Path(data), Path(run) if run else None, group_pattern, frames, label_columns, skip_bad
    )
    if table is not None:
        require_paths(images, table)
    decoded = decode_images(
        images, image_size=SIDE, workers=workers, skip_bad=skip_bad,
        progress=partial(watcher.on_step, "decoding images"),
    )  # fmt: skip
    kept = decoded.images
    return _search(decoded, [sides[record.name] for record in kept.records], watcher, SAME)


def leaks_of_fit(
    images: DecodedImages, splits: Splits, *, watcher: Watcher | None = None
) -> tuple[dict[str, Any], str | None]:
    """Return what to note of the twins among the images of a run, and what to warn of in one line, if anything.

    Only pairs beyond doubt count: nobody asked. Pixels that are decoded already are not read again.
    """
    side_of = splits.side_of
    found = _search(images, [side_of.get(index) for index in range(len(images))], watcher or Watcher(), SURE)
    noted = found.to_dict()
    figures = {name: noted[name] for name in ("pairs", "kinds", "test_images_with_twins")}
    return figures, describe(found) if found.pairs else None


def describe(found: Findings) -> str:
    """Return what was found, in one line."""
    counts = [f"{found.count(kind)} {words}" for kind, words in KINDS.items() if found.count(kind)]
    pairs = f"{len(found.pairs)} pair{'' if len(found.pairs) == 1 else 's'} of images"
    spoiled = found.spoiled("test")
    verb = "has" if spoiled == 1 else "have"
    share = f"; {spoiled} of the test images {verb} a twin on another side" if spoiled else ""
    return f"{pairs} look like one exposure ({found.sure} beyond doubt): {', '.join(counts)}{share}"


def _open(
    data: Path,
    run: Path | None,
    group_pattern: str | None,
    frames: Frames | None,
    label_columns: str | None,
    skip_bad: bool,
) -> tuple[ImageSet, dict[str, Side | None]]:
    if run is None:
        images = open_images(
            data, group_pattern=group_pattern, skip_bad=skip_bad, frames=frames or "first",
            label_columns=None if label_columns is None else split_names(label_columns),
        )  # fmt: skip
        return images, {record.name: record.split for record in images.records}
    if group_pattern is not None:
        raise ConfigError(
            f"{run} knows its patients; group_pattern={group_pattern!r} is for images without a run"
        )
    if frames is not None:
        raise ConfigError(f"{run} knows its frames; frames={frames!r} is for images without a run")
    if label_columns is not None:
        raise ConfigError(
            f"{run} knows its labels; label_columns={label_columns!r} is for images without a run"
        )
    images, splits = open_own_images(data, model_path(run), load_model(run)[1])
    return images, {images.records[index].name: side for index, side in splits.side_of.items()}


def _search(decoded: DecodedImages, sides: list[Side | None], watcher: Watcher, least: float) -> Findings:
    small = thumbnails(decoded, progress=partial(watcher.on_step, "making thumbnails"))
    twins = find_twins(small, files=_number_files(decoded.images), least=least, watcher=watcher)
    return judge_twins(decoded.images, sides, twins)


def _number_files(images: ImageSet) -> NDArray[np.intp]:
    """Return the number of each image's file, (N,): frames of one look alike, and stay together."""
    numbers: dict[Path | str, int] = {}
    keys = (record.path or record.name for record in images.records)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
