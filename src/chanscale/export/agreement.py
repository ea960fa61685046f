"""What was exported against the model it was made of, on whole images: from raw pixels to probabilities."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier, probabilities
from chanscale.data.images import FULL_RANGE, Pixels, read_image
from chanscale.errors import InexactExportError
from chanscale.export.deployed import WHITE
from chanscale.export.runtime import Floats, Run
from chanscale.programs import Program

TOLERANCE = 1e-4
"""Largest difference of a probability that an export may have."""


@dataclass(frozen=True)
class Agreement:
    """The largest `difference` of a probability, over so many `images`."""

    images: int
    difference: float


def compare(run: Run, model: Classifier | Program, info: ModelInfo, images: Iterable[Pixels]) -> Agreement:
    """Return how far `run` is from what `chanscale predict` says of `images`.

    They are (C, H, W), 16 bits, of any size, or volumes (1, S, S, S) as they were read.
    """
    differences = [
        np.abs(run(raw_pixels(image)) - predict_image(model, info, image)).max() for image in images
    ]
    return Agreement(len(differences), float(np.max(differences)))  # nan, if any is


def require_agreement(agreement: Agreement, where: str) -> None:
    """Raise InexactExportError when a probability differs by more than 1e-4, or is not a number."""
    if not agreement.difference <= TOLERANCE:
        raise InexactExportError(
            f"{where} gives probabilities that differ by {agreement.difference:.1e} from PyTorch's, over "
            f"{agreement.images} images (at most {TOLERANCE:.0e} is allowed); nothing was written"
        )


@torch.no_grad()
def predict_image(model: Classifier | Program, info: ModelInfo, image: Pixels) -> Floats:
    """Return the probabilities (1, K) of an image (C, *), 16 bits, the way `chanscale predict` finds them."""
    whole = info.space is not None  # a volume has its size since it was read
    resized = image if whole else read_image(np.moveaxis(image, 0, -1), size=info.image_size)
    images = torch.from_numpy(resized.astype(np.float32)).div_(FULL_RANGE)[None]
    found: Floats = probabilities(model(images), multilabel=model.multilabel).numpy()
    return found


def raw_pixels(image: Pixels) -> Floats:
    """Return (1, C, *), 0 to 255, of an image (C, *), 16 bits: what a deployed model takes."""
    pixels: Floats = image[None].astype(np.float32) / np.float32(FULL_RANGE / WHITE)
    return pixels
