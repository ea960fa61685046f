"""The network that is exported says what `predict` says: the resize, the map of the evidence, and all of it."""

import numpy as np
import pytest
import torch

from chanscale.data.images import FULL_RANGE, read_image
from chanscale.export.agreement import TOLERANCE, compare, predict_image, raw_pixels
from chanscale.export.deployed import deploy, flush_denormals
from chanscale.export.examples import draw_examples, spread
from chanscale.export.lanczos import LanczosResize, lanczos_weights
from chanscale.folding import fold_grey
from chanscale.heads import PooledHead
from chanscale.programs import takes_grey_alone
from networks import attach, build_classifier, describe, images, set_scales


def scaled(classes=("no", "yes")):
    """A classifier with scales that are not 1, and what its file would say."""
    model = attach(build_classifier(classes=classes))
    info = describe(model, dict(set_scales(model, zeros=0.0).kept))
    # The statistics of the images that it will see, or every answer would be 0 or 1.
    seen = [read_image(np.moveaxis(image, 0, -1), size=32) for image in draw_examples(grey_only=False)]
    pixels = np.stack([np.broadcast_to(levels, (3, 32, 32)) for levels in seen]) / np.float32(FULL_RANGE)
    with torch.no_grad():
        model.eval().head.set_statistics(model.head.pool(model.feature_map(torch.from_numpy(pixels))))
    return model, info


def run_of(deployed):
    with torch.no_grad():
        return lambda pixels: deployed(torch.from_numpy(pixels))[0].detach().numpy()


# --- the resize


@pytest.mark.parametrize(
    "shape", [(256, 256), (112, 112), (100, 300), (777, 1024), (50, 60), (112, 200), (1, 3)]
)
def test_the_resize_in_the_graph_is_that_of_the_reader(shape):
    levels = np.random.default_rng(0).integers(0, FULL_RANGE + 1, shape).astype(np.uint16)
    wanted = read_image(levels, size=112).astype(np.float64)
    found = LanczosResize(112)(torch.from_numpy(levels.astype(np.float32))[None, None])
    difference = np.abs(found.round().clamp(0, FULL_RANGE)[0].numpy() - wanted)
    assert difference.max() <= 1  # of 65,536 levels: sums in fp32 that were to be rounded the other way
    assert np.mean(difference > 0) < 0.02


def test_what_has_the_size_is_not_filtered():
    assert torch.allclose(lanczos_weights(32, 32), torch.eye(32), atol=1e-7)


def test_the_weights_of_each_pixel_add_up_to_one():
    for length in (5, 32, 100):
        weights = lanczos_weights(length, 32)
        assert weights.shape == (32, length)
        assert torch.allclose(weights.sum(1), torch.ones(32), atol=1e-6)


# --- the map


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("sides", [(5,), (4, 7), (2, 3, 4)])
def test_the_mean_of_the_class_map_is_the_logit(outputs, sides):
    head = PooledHead(6, outputs).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = 1e-3 * torch.rand(4, 6, *sides)
    features[:, 2] = 0.5  # a channel that never varies
    head.set_statistics(head.pool(features))
    with torch.no_grad():
        found, logits = head.class_map(features), head(features)
    assert found.shape == (4, outputs, *sides)
    assert torch.allclose(found.flatten(2).mean(2), logits, atol=1e-5)
    assert found.std() > 0.1


# --- all of it


@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_deployed_equals_predicted_on_grey_and_colour_of_any_size(classes):
    model, info = scaled(classes)
    agreement = compare(run_of(deploy(model, info)), model, info, draw_examples(grey_only=False))
    assert agreement.images == 8
    assert agreement.difference < TOLERANCE
    found = [predict_image(model, info, image)[0] for image in draw_examples(grey_only=False)]
    assert np.ptp(found, axis=0).min() > 0.01  # the images differ, and so do the answers


def test_a_difference_is_found():
    model, info = scaled()
    other, _ = scaled()
    torch.nn.init.normal_(other.head.linear.weight)
    assert compare(run_of(deploy(other, info)), model, info, draw_examples(grey_only=False)).difference > 0.01


def test_a_folded_network_takes_grey_alone():
    model, info = scaled()
    folded = fold_grey(model, images(2, 32)[:, :1])
    assert takes_grey_alone(folded)
    assert not takes_grey_alone(model)
    grey = list(draw_examples(grey_only=True))
    assert {len(image) for image in grey} == {1}
    assert compare(run_of(deploy(folded, info)), folded, info, grey).difference < TOLERANCE


def test_deploying_leaves_the_model_as_it_was():
    model, info = scaled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deployed = deploy(model, info)
    assert not any("channel_scale" in name for name in deployed.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_denormals_become_zero_and_nothing_else():
    layer = torch.nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1e-40, -1e-40], [1.2e-38, -3.0]])
    flush_denormals(layer)
    assert layer.weight.tolist() == [[0, 0], [pytest.approx(1.2e-38), -3]]


def test_raw_pixels_of_eight_bits_are_whole_numbers():
    levels = np.arange(256, dtype=np.uint16).reshape(1, 16, 16) * np.uint16(257)
    assert np.array_equal(raw_pixels(levels)[0, 0], np.arange(256).reshape(16, 16))


def test_a_spread_takes_the_ends_and_no_image_twice():
    assert spread(range(100, 200), 3) == [100, 149, 199]
    assert spread([4, 7], 50) == [4, 7]
