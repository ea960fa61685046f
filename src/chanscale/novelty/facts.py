"""What can be said of an image by its pixels alone, a number each, with the words for too little and too much."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
OCTAVES = 4
NOTHING = 1 / 1024
"""The least detail that is told from none: a quarter of a grey level in 8 bits."""


@dataclass(frozen=True)
class Fact:
    """A number of each image. `step`: a change that is worth a mention, however alike the training images are.

    `less`, `more`: what is said of an image that has less of it, or more, than the training images; None: nothing is.
    """

    name: str
    step: float
    less: str | None
    more: str | None


FACTS = (
    Fact("brightness", 0.01, "darker than {}", "brighter than {}"),
    Fact("contrast", 0.005, "less contrast than {}", "more contrast than {}"),
    Fact("darkest", 0.01, "its darkest parts are darker than in {}", "its darkest parts are brighter than in {}"),
    Fact(
        "brightest", 0.01, "its brightest parts are darker than in {}", "its brightest parts are brighter than in {}"
    ),
    Fact("detail", 0.05, "less sharp than {}", "noisier or sharper than {}"),
    Fact("colour", 0.01, "less colour than {}", "more colour than {}"),
    Fact("shape", 0.1, "narrower than {}", "wider than {}"),
    # More pixels than the network sees are no surprise: the image is made smaller, as all are.
    Fact("size", 0.35, "fewer pixels than {}", None),
)  # fmt: skip
"""What is told one by one; `Fact.name` is a column of `measure_facts`."""

SHAPE = ("shape", "size")
"""The facts that a file tells, and not its pixels."""

COLUMNS = (
    *(fact.name for fact in FACTS if fact.name not in SHAPE), *(f"level {level}" for level in LEVELS[1:-1]),
    *(f"octave {octave}" for octave in range(1, OCTAVES)), "red", "blue",
)  # fmt: skip
"""What `measure_facts` returns, in order."""


def to_grey(images: Tensor) -> Tensor:
    """Return (N, 1, H, W), the mean over the channels of images (N, C, H, W)."""
    return images.mean(1, keepdim=True)


def measure_facts(images: Tensor) -> Tensor:
    """Return the `COLUMNS` of images (N, 1 or 3, H, W) in [0, 1], shape (N, len(COLUMNS)), float64."""
    grey = to_grey(images).double()
    flat = grey.flatten(1)
    levels = torch.quantile(flat, torch.tensor(LEVELS, dtype=flat.dtype), dim=1).T
    octaves = measure_octaves(grey)
    hue = images.double().mean((2, 3))
    hue = hue - hue.mean(1, keepdim=True)
    saturation = (images.amax(1) - images.amin(1)).double().mean((1, 2))
    first = [flat.mean(1), flat.std(1), levels[:, 0], levels[:, -1], octaves[:, 0], saturation]
    return torch.cat([torch.stack(first, 1), levels[:, 1:-1], octaves[:, 1:], hue[:, [0, -1]]], 1)


def measure_octaves(grey: Tensor) -> Tensor:
    """Return what is lost each time images (N, 1, H, W) are made half as large: ln of its r.m.s., (N, OCTAVES)."""
    found = []
    for _ in range(OCTAVES):
        half = F.avg_pool2d(grey, 2, ceil_mode=True)
        lost = grey - F.interpolate(half, scale_factor=2)[..., : grey.shape[2], : grey.shape[3]]
        found.append((lost.square().mean((1, 2, 3)) + NOTHING**2).log() / 2)
        grey = half
    return torch.stack(found, 1)


def measure_shape(width: int, height: int, image_size: int) -> tuple[float, float]:
    """Return the facts of a file: ln of width / height; ln of its shorter side / `image_size`, or 0 if above."""
    return math.log(width / height), min(0.0, math.log(min(width, height) / image_size))
