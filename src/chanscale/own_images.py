"""The images that a run was made of, opened again, and which of them it was trained on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from chanscale.artifact import ModelInfo
from chanscale.config import FitConfig
from chanscale.crossval.plan import folder_above
from chanscale.data.sources import ImageSet, open_images
from chanscale.data.splits import Splits, read_groups, read_splits, read_test_names
from chanscale.errors import ArtifactError


def open_own_images(path: Path, file: Path, info: ModelInfo) -> tuple[ImageSet, Splits]:
    """Return the images at `path`, and the split of the run whose model file is `file`.

    Raises DataError when they are not that run's images, ArtifactError where the run does not say which they are.
    """
    config, splits = file.with_name("config.yaml"), file.with_name("splits.csv")
    if not (config.is_file() and splits.is_file()):
        raise ArtifactError(f"beside {file} lie no config.yaml and splits.csv, which tell its test images")
    options = FitConfig.read(config)
    images = open_images(
        path, group_pattern=options.group_pattern, classes=info.classes, frames=info.frames or options.frames,
        label_columns=info.label_columns, skip_bad=options.skip_bad,
    )  # fmt: skip
    images = _less_outer_test(images, file.parent)
    groups = read_groups(splits)
    if options.skip_bad:  # the split names those alone that could be read
        left_out = [record.name for record in images.records if record.name not in groups]
        images = images.without(left_out) if left_out else images
    images = _regroup(images, groups)
    return images, read_splits(splits, images)


def _less_outer_test(images: ImageSet, run: Path) -> ImageSet:
    """Return the images without those that a cross-validation, one of whose folds this run is, kept from all folds."""
    folder = folder_above(run)
    if folder is None:
        return images
    kept_out = read_test_names(folder / "splits.csv")
    return replace(images, records=tuple(record for record in images.records if record.name not in kept_out))


def _regroup(images: ImageSet, groups: Mapping[str, str]) -> ImageSet:
    """Return the images with the patients that the run knew: of an `ImageSet`, no option tells them."""
    records = tuple(replace(record, group=groups.get(record.name, record.group)) for record in images.records)
    return replace(images, records=records)


def judged_images(splits: Splits) -> tuple[int, ...]:
    """Return the images to judge what comes of a run on: the test images; where there are none, those of validation."""
    return splits.test or splits.validation
