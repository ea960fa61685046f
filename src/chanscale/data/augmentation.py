"""Mild random changes of a batch of radiographs, on whatever device it is.

Torch-native: see docs/decisions/0002-torch-native-augmentation.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chanscale.data.volume_motions import place_volumes


@dataclass(frozen=True)
class Strength:
    """How far each change may go. Each image draws its own values, uniformly unless said otherwise.

    rotation: degrees, either way; of volumes about each axis. shift: share of the side, either way, on each axis.
    zoom: smallest and largest magnification. mirror: probability of swapping left and right. brightness: added,
    either way, on the scale 0 to 1. contrast: largest relative change of the distance to the image's mean. gamma:
    largest exponent; its inverse is the smallest, uniform in the logarithm.
    """

    rotation: float = 10.0
    shift: float = 0.08
    zoom: tuple[float, float] = (0.9, 1.15)
    mirror: float = 0.5
    brightness: float = 0.08
    contrast: float = 0.15
    gamma: float = 1.2


MILD = Strength()


def augment(images: Tensor, *, generator: torch.Generator, strength: Strength = MILD) -> Tensor:
    """Return changed copies of `images`, (N, C, H, W) or (N, C, D, H, W) in [0, 1], each moved and toned by itself.

    All randomness comes from `generator`, which may be on the CPU when the images are not. What comes into
    view from outside repeats the border.
    """
    return _tone(_warp(images, generator, strength), generator, strength)


def _warp(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    theta = _draw_theta(images, generator, strength).to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _draw_theta(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    count = len(images)
    if images.dim() == 4:
        return _draw_affine(count, images.shape[-2] / images.shape[-1], generator, strength)
    angles = _uniform(3 * count, generator, -1, 1).view(count, 3) * math.radians(strength.rotation)
    magnified = _uniform(count, generator, *strength.zoom)
    mirrored = _uniform(count, generator, 0, 1) < strength.mirror
    shift = 2 * strength.shift  # [-1, 1] is two units long
    shifts = _uniform(3 * count, generator, -shift, shift).view(count, 3)
    return place_volumes(angles, magnified, mirrored, shifts)


def _draw_affine(count: int, aspect: float, generator: torch.Generator, strength: Strength) -> Tensor:
    """Return the maps (N, 2, 3) from places in the result to places in the image, both in [-1, 1]."""
    angle = _uniform(count, generator, -1, 1) * math.radians(strength.rotation)
    scale = 1 / _uniform(count, generator, *strength.zoom)
    flip = torch.where(_uniform(count, generator, 0, 1) < strength.mirror, -1.0, 1.0)
    # The axes of an image that is not square have different units; rotation needs equal ones.
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 2 * strength.shift  # [-1, 1] is two units long
    across, down = (_uniform(count, generator, -shift, shift) for _ in range(2))
    rows = (torch.stack([flip * cos, -sin * aspect, across]), torch.stack([flip * sin / aspect, cos, down]))
    return torch.stack(rows).permute(2, 0, 1)


def _tone(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    count = len(images)
    log_gamma = math.log(strength.gamma)
    gamma = _per_image(_uniform(count, generator, -log_gamma, log_gamma).exp(), images)
    contrast = _per_image(_uniform(count, generator, 1 - strength.contrast, 1 + strength.contrast), images)
    brightness = _per_image(_uniform(count, generator, -strength.brightness, strength.brightness), images)
    curved = images.clamp(0, 1).pow(gamma)
    mean = curved.mean(dim=tuple(range(1, images.dim())), keepdim=True)
    return ((curved - mean) * contrast + mean + brightness).clamp(0, 1)


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images).view(-1, *[1] * (images.dim() - 1))
