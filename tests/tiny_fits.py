"""A task and a network so small that training takes a second: bright against dark patches, 32 px."""

from pathlib import Path

import numpy as np
import torch

from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages, decode_images
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.splits import Splits
from networks import build_classifier, plain_trunk, randomise

WIDTHS = {"trunk.0": 8, "trunk.3": 16, "trunk.6": 16}
SPLITS = Splits(train=tuple(range(24)), validation=tuple(range(24, 40)), test=())


def tiny_images(count: int = 40, channels: int = 1) -> DecodedImages:
    """Return random images of two classes in turn; the second has a patch that is a little brighter."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(count):
        pixels = rng.integers(0, 200, (32, 32)).astype(np.uint8)
        pixels[8:16, 8:16] += 25 * (index % 2)
        if channels > 1:
            pixels = np.stack([pixels] * channels, axis=-1)
        records.append(ImageRecord(name=f"{index}.png", label=index % 2, group=str(index), pixels=pixels))
    images = ImageSet(Path("tiny"), ("no", "yes"), tuple(records))
    return decode_images(images, image_size=32, workers=0)


def tiny_classifier() -> Classifier:
    """Return a fresh network, the same each time, whose groups have the widths of `WIDTHS`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_classifier(randomise(plain_trunk(tuple(WIDTHS.values()))))


def tiny_config(**options) -> FitConfig:
    """Return a configuration of two epochs and two, with `options` in place of the defaults."""
    defaults = {
        "image_size": 32, "budget": 0.7, "scale_epochs": 2, "refine_epochs": 2, "round_to": 4,
        "batch_size": 8, "micro_batch": 4, "workers": 0, "precision": "32-true", "device": "cpu", "depth": "full",
        "speed": "off",  # whatever else the machine does meanwhile
    }  # fmt: skip
    return FitConfig(**{**defaults, **options})
