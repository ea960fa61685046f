import math

import numpy as np
import pytest
import torch

from chanscale.novelty.facts import NOTHING
from chanscale.novelty.spectrum import OUTSIDE, RINGS, measure_spectra, place_frequencies

SIZE = 64


@pytest.fixture
def images():
    return torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def wave(down, across, size=SIZE):
    """A wave of so many cycles an image, (1, 1, size, size), of amplitude 0.25."""
    y, x = (torch.arange(size) / size,) * 2
    phase = 2 * math.pi * (down * y[:, None] + across * x)
    return (0.5 + 0.25 * phase.cos())[None, None]


def test_a_mirrored_image_has_the_same_spectrum(images):
    for dims in ((2,), (3,), (2, 3)):
        torch.testing.assert_close(measure_spectra(images.flip(dims)), measure_spectra(images))


def test_a_quarter_turn_exchanges_the_halves_of_each_ring():
    size = 128  # none of the parts is empty
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(2))
    turned = measure_spectra(images.rot90(1, (2, 3))).reshape(3, RINGS, 2)
    torch.testing.assert_close(turned.flip(2), measure_spectra(images).reshape(3, RINGS, 2))


def test_brightness_does_not_matter_and_contrast_moves_all_parts_alike(images):
    found = measure_spectra(images / 2)
    torch.testing.assert_close(measure_spectra(images / 2 + 0.4), found, atol=1e-5, rtol=0)
    # NOTHING is added to both, so they differ a little from ln 4.
    torch.testing.assert_close(
        measure_spectra(images) - found, torch.full_like(found, math.log(4)), atol=1e-3, rtol=0
    )


def test_white_noise_has_its_variance_in_each_part():
    noise = torch.from_numpy(np.random.default_rng(3).normal(0, 0.1, (400, 1, SIZE, SIZE)))
    power = measure_spectra(noise).exp().mean(0)
    torch.testing.assert_close(power, torch.full_like(power, 0.01), rtol=0.1, atol=0)


@pytest.mark.parametrize(("down", "across"), [(12, 0), (0, 12), (25, 3), (3, 25), (30, 31)])
def test_a_wave_is_in_its_part_alone(down, across):
    places = place_frequencies(SIZE)
    filled = [part for part in range(2 * RINGS) if (places == part).any()]
    [found] = measure_spectra(wave(down, across))
    assert filled[int(found.argmax())] == places[down, across] != OUTSIDE


def test_what_is_blank_has_no_power():
    blank = measure_spectra(torch.full((1, 1, SIZE, SIZE), 0.5))
    torch.testing.assert_close(blank, torch.full_like(blank, 2 * math.log(NOTHING)))


@pytest.mark.parametrize("size", [32, 33, 48, 112, 224])
def test_each_frequency_is_in_one_part_at_most_and_both_halves_are_as_large(size):
    places = place_frequencies(size)
    assert places.shape == (size, size)
    counts = torch.bincount(places[places != OUTSIDE], minlength=2 * RINGS).reshape(RINGS, 2)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert measure_spectra(torch.rand(2, 3, size, size)).shape == (2, int((counts > 0).sum()))
    assert (places[0, 0], places[1, 0]) == (OUTSIDE, OUTSIDE)


def test_an_image_has_the_same_spectrum_in_any_batch(images):
    together = measure_spectra(images)
    assert all(torch.equal(measure_spectra(images[n : n + 1])[0], row) for n, row in enumerate(together))
