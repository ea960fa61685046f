"""The pointing game and the energy inside a box, on maps whose answer is known."""

import numpy as np
import pytest
import torch

from chanscale.errors import ConfigError
from chanscale.explain.pointing import Box, centre_map, cover, energy_inside, enlarge, points_at

QUARTER = Box(0.0, 0.0, 0.5, 0.5)


def test_a_box_covers_its_share_of_an_image_of_any_size():
    for side in (4, 14, 112):
        assert cover([QUARTER], side=side).mean() == 0.25
    assert cover([QUARTER, Box(0.5, 0.5, 0.5, 0.5)], side=8).mean() == 0.5
    assert cover([QUARTER, QUARTER], side=8).mean() == 0.25


def test_rows_are_y_and_columns_are_x():
    mask = cover([Box(x=0.75, y=0.0, width=0.25, height=0.5)], side=4)
    assert mask[:, 3].tolist() == [True, True, False, False]
    assert not mask[:, :3].any()


def test_a_box_that_holds_no_pixel_is_refused():
    with pytest.raises(ConfigError, match="hold a pixel of an image of 4 x 4"):
        cover([Box(0.0, 0.0, 0.01, 0.01)], side=4)


def test_a_map_points_where_it_is_largest():
    mask = cover([QUARTER], side=8)
    values = np.zeros((8, 8))
    values[1, 2] = 1.0
    assert points_at(values, mask) == 1.0
    assert points_at(-values, mask) < 0.3  # the rest of the image is the largest
    values[6, 6] = 2.0
    assert points_at(values, mask) == 0.0


def test_a_flat_map_points_by_chance_and_has_its_energy_spread():
    mask = cover([QUARTER], side=8)
    for value in (0.0, 3.0, -1.0):
        assert points_at(np.full((8, 8), value), mask) == 0.25
        assert energy_inside(np.full((8, 8), value), mask) == 0.25


def test_energy_counts_only_what_is_positive():
    mask = cover([QUARTER], side=8)
    values = np.where(mask, 1.0, -5.0)
    assert energy_inside(values, mask) == 1.0
    values[7, 7] = 16.0  # as much as the 16 pixels of the box
    assert energy_inside(values, mask) == 0.5


def test_neither_depends_on_the_unit_of_a_map():
    mask = cover([Box(0.2, 0.3, 0.4, 0.3)], side=16)
    values = np.random.default_rng(0).normal(size=(16, 16))
    assert points_at(7 * values, mask) == points_at(values, mask)
    assert energy_inside(7 * values, mask) == pytest.approx(energy_inside(values, mask), abs=1e-12)


def test_an_enlarged_map_keeps_its_place_and_its_mean():
    values = torch.zeros(4, 4)
    values[0, 3] = 16.0
    large = enlarge(values, side=64)
    assert large.shape == (64, 64)
    assert np.unravel_index(large.argmax(), large.shape)[0] < 16
    assert np.unravel_index(large.argmax(), large.shape)[1] >= 48
    assert enlarge(torch.ones(7, 7), side=112) == pytest.approx(1.0)


def test_the_centre_map_points_at_the_middle():
    values = centre_map(9)
    assert np.unravel_index(values.argmax(), values.shape) == (4, 4)
    assert values == pytest.approx(values[::-1, ::-1])
    assert points_at(values, cover([Box(0.4, 0.4, 0.2, 0.2)], side=9)) == 1.0
