"""The images of a run: listed, and decoded, as its options say."""

from functools import partial
from pathlib import Path

from chanscale.catalogue import require_kind
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages, decode_images
from chanscale.data.sources import ImageSet, open_images
from chanscale.data.volumes import VolumeSpace
from chanscale.errors import ConfigError
from chanscale.progress import Watcher


def load_images(data: str | Path | ImageSet, config: FitConfig, watcher: Watcher) -> DecodedImages:
    """Open and decode the images as `config` says. Raises DataError."""
    if isinstance(data, ImageSet) and config != config.already_opened():
        raise ConfigError(
            "`positive`, `group_pattern` and `label_columns` say how to open a path; an ImageSet is open already"
        )
    images = data if isinstance(data, ImageSet) else open_path(Path(data), config)
    require_kind(config.backbone, images.dimensions)
    return decode_images(
        images,
        image_size=config.image_size,
        space=_choose_space(images, config),
        workers=config.decoders,
        cache_bytes=None if config.cache_gib is None else int(config.cache_gib * 2**30),
        skip_bad=config.skip_bad,
        progress=partial(watcher.on_step, "decoding images"),
    )


def list_readable(data: Path, config: FitConfig, watcher: Watcher) -> ImageSet:
    """Return the images that a fit would split; those that it would skip must be known before others are dealt out."""
    return load_images(data, config, watcher).images if config.skip_bad else open_path(data, config)


def _choose_space(images: ImageSet, config: FitConfig) -> VolumeSpace | None:
    """Return how the volumes are to be read; None for pictures. Raises ConfigError."""
    if images.dimensions == 3:
        return VolumeSpace(config.spacing, config.window)
    if config.spacing is not None or config.window is not None:
        raise ConfigError("spacing and window are for volumes, and these are pictures; leave them out")
    return None


def open_path(path: Path, config: FitConfig) -> ImageSet:
    """List the images of a folder, table or array file as `config` says. Raises DataError, ConfigError."""
    if config.label_columns is not None and path.suffix.lower() != ".csv":
        raise ConfigError(f"`label_columns` is for a CSV table, and {path} is none; leave it out")
    open_as = partial(
        open_images, path, group_pattern=config.group_pattern, skip_bad=config.skip_bad, frames=config.frames,
        label_columns=config.columns,
    )  # fmt: skip
    images = open_as()
    if config.positive is None:
        return images
    if images.is_multilabel:
        raise ConfigError(
            "`positive` is for images of one class each, and these have several labels; leave it out"
        )
    others = tuple(name for name in images.classes if name != config.positive)
    if len(images.classes) != 2 or len(others) != 1:
        raise ConfigError(
            f"positive={config.positive!r} must be one of two classes; have {', '.join(images.classes)}"
        )
    return open_as(classes=(*others, config.positive))
