"""The pointing game and the energy inside a box, on maps whose answer is known."""

import numpy as np
import pytest
import torch
from pointing import ChangedImages, read_boxes
from pointing_models import split_set

from chanscale.data.loading import decode_images
from chanscale.data.splits import SIDES
from chanscale.errors import ConfigError
from chanscale.explain.pointing import Box, centre_map, cover, energy_inside, enlarge, points_at
from test_cli import draw
from tiny_fits import tiny_images

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


# --- the benchmark


@pytest.fixture
def boxed(tmp_path):
    """A set of 40 patients of two images each, of which six have a box on one image."""
    data = draw(tmp_path / "images", patients=40)
    named = [path.name for path in sorted((data / "spot").iterdir())][::2][:6]
    rows = "".join(f"{name},8,8,16,16\n" for name in named)
    (data / "boxes.csv").write_text("image,x,y,width,height\n" + rows, encoding="utf-8")
    return data, named


def test_no_patient_with_a_box_is_trained_on(boxed):
    data, named = boxed
    images = split_set(data, r"^(\d+)_")
    sides = {side: {r.group for r in images.records if r.split == side} for side in SIDES}
    assert {name.partition("_")[0] for name in named} <= sides["test"]
    assert not sides["test"] & (sides["train"] | sides["validation"])
    assert not sides["train"] & sides["validation"]
    tested = [record.label for record in images.records if record.split == "test"]
    assert (tested.count(0), tested.count(1)) == (8, 12)  # a fifth of 40, and all images of six patients


def test_boxes_are_read_in_shares_of_their_image(boxed):
    data, named = boxed
    images = decode_images(split_set(data, r"^(\d+)_"), image_size=32)
    boxes = read_boxes(data, images)
    assert {images.images.records[index].name for index in boxes} == {f"spot/{name}" for name in named}
    assert {box for found in boxes.values() for box in found} == {(0.25, 0.25, 0.5, 0.5)}


def test_blanked_images_keep_what_is_not_blank():
    images = tiny_images()
    blank = ChangedImages(images, lambda pixels: torch.where(torch.arange(32) < 16, 0.5, pixels))
    before, after = images.batch([3, 5])[0], blank.batch([3, 5])[0]
    assert torch.equal(before[..., 16:], after[..., 16:])
    assert after[..., :16].sub(0.5).abs().max() < 1e-5
