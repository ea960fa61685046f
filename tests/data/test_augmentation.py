import math

import pytest
import torch
from torch import Tensor

from chanscale.data import Strength, augment

STILL = Strength(rotation=0, shift=0, zoom=(1, 1), mirror=0, brightness=0, contrast=0, gamma=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(height: int = 33, width: int = 33, *, y: float = 0, x: float = 0) -> Tensor:
    """Return a soft round spot at (y, x) in pixels from the centre, shape (1, 1, height, width)."""
    rows = torch.arange(height) - (height - 1) / 2 - y
    columns = torch.arange(width) - (width - 1) / 2 - x
    return torch.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 8)[None, None]


def centroid(image: Tensor) -> tuple[float, float]:
    height, width = image.shape[-2:]
    mass = image.squeeze() / image.sum()
    y = (mass.sum(1) * (torch.arange(height) - (height - 1) / 2)).sum()
    x = (mass.sum(0) * (torch.arange(width) - (width - 1) / 2)).sum()
    return float(y), float(x)


def test_the_same_generator_state_gives_the_same_images() -> None:
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(augment(images, generator=generator(1)), augment(images, generator=generator(1)))
    assert not torch.equal(augment(images, generator=generator(1)), augment(images, generator=generator(2)))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(torch.rand(2, 1, 8, 8, generator=generator()), generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_dtype_and_range_are_kept_and_the_original_too(channels: int) -> None:
    images = (torch.rand(8, channels, 20, 24) * 1.4 - 0.2).clamp(0, 1)
    before = images.clone()
    result = augment(images, generator=generator(), strength=Strength(brightness=0.5, contrast=0.9))
    assert (result.shape, result.dtype) == (images.shape, torch.float32)
    assert (float(result.min()), float(result.max())) == (0, 1)
    assert torch.equal(images, before)


def test_no_strength_changes_nothing() -> None:
    images = torch.rand(4, 3, 16, 12)
    # The grid's coordinates are rounded to float32.
    torch.testing.assert_close(
        augment(images, generator=generator(), strength=STILL), images, atol=1e-5, rtol=0
    )


def test_each_image_draws_its_own_change() -> None:
    result = augment(torch.rand(1, 1, 16, 16).expand(6, -1, -1, -1), generator=generator())
    assert len({tuple(image.flatten().tolist()) for image in result}) == 6


def test_a_sure_mirror_swaps_left_and_right() -> None:
    images = torch.rand(3, 1, 16, 12)
    strength = Strength(**(vars(STILL) | {"mirror": 1}))
    torch.testing.assert_close(
        augment(images, generator=generator(), strength=strength), images.flip(-1), atol=1e-5, rtol=0
    )


def test_half_are_mirrored_by_default() -> None:
    images = blob(x=6).expand(200, -1, -1, -1)
    strength = Strength(**(vars(STILL) | {"mirror": 0.5}))
    left = [centroid(image)[1] < 0 for image in augment(images, generator=generator(), strength=strength)]
    assert 70 < sum(left) < 130  # four standard deviations


def test_shift_stays_within_its_share_of_the_side() -> None:
    images = blob(41, 61).expand(100, -1, -1, -1)
    strength = Strength(**(vars(STILL) | {"shift": 0.1}))
    moved = torch.tensor(
        [centroid(i) for i in augment(images, generator=generator(), strength=strength)]
    ).abs()
    limits = torch.tensor([4.1, 6.1])
    assert torch.all(moved < limits + 0.1)
    assert torch.all(moved.amax(0) > 0.8 * limits)


@pytest.mark.parametrize(("height", "width"), [(61, 61), (41, 61)])
def test_rotation_turns_without_stretching(height: int, width: int) -> None:
    images = blob(height, width, x=12).expand(100, -1, -1, -1)
    strength = Strength(**(vars(STILL) | {"rotation": 30}))
    places = [centroid(image) for image in augment(images, generator=generator(), strength=strength)]
    radii = torch.tensor([math.hypot(y, x) for y, x in places])
    angles = torch.tensor([math.degrees(math.atan2(y, x)) for y, x in places])
    torch.testing.assert_close(radii, torch.full_like(radii, 12), atol=0.1, rtol=0)
    assert float(angles.min()) < -24
    assert float(angles.max()) > 24
    assert float(angles.abs().max()) < 30.5


def test_zoom_magnifies_within_its_limits() -> None:
    images = blob(61, 61, x=10).expand(100, -1, -1, -1)
    strength = Strength(**(vars(STILL) | {"zoom": (0.8, 1.5)}))
    places = torch.tensor([centroid(i)[1] for i in augment(images, generator=generator(), strength=strength)])
    assert 7.9 < float(places.min()) < 8.5
    assert 14 < float(places.max()) < 15.1


def test_tone_is_one_curve_for_the_whole_image_that_never_falls() -> None:
    ramp = torch.linspace(0.2, 0.8, 256).view(1, 1, 16, 16).expand(20, -1, -1, -1)
    strength = Strength(**(vars(Strength()) | {"rotation": 0, "shift": 0, "zoom": (1, 1), "mirror": 0}))
    result = augment(ramp, generator=generator(), strength=strength).flatten(1)
    assert torch.all(result.diff(dim=1) >= -1e-6)
    assert float((result - ramp.flatten(1)).abs().max()) > 0.05
