"""Grey images seen once instead of three times: the same outputs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from chanscale.artifact import load_model, save_model
from chanscale.backbones import Preprocessing
from chanscale.errors import ConfigError, ModelError, UnreadableImageError
from chanscale.folding import fold_grey
from chanscale.pipeline import scale_and_select
from chanscale.predictions import predict_images
from networks import (
    build_classifier,
    describe,
    norm_trunk,
    plain_trunk,
    randomise,
    relative_difference,
    renew_statistics,
)
from tiny_fits import tiny_classifier, tiny_config, tiny_images

ROUNDING = 1e-5  # sums of three products, rounded to fp32 before the convolution and not after it

GREY = torch.rand(4, 1, 32, 32)

PREPROCESSINGS = {
    "shifted": Preprocessing(scale=2.0, mean=(0.9, 1.0, 1.1), std=(0.5, 0.6, 0.7)),
    "bgr": Preprocessing(order="bgr", scale=255.0, mean=(103.9, 116.8, 123.7)),
    "none": Preprocessing(),
}

TRUNKS = {
    "padded": lambda: randomise(plain_trunk()),
    "padded by a layer of its own": lambda: nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), *randomise(norm_trunk())
    ),
    "strided": lambda: nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.ReLU()),
}


def classifier(preprocessing, trunk):
    model = build_classifier(trunk)
    model.preprocessing = preprocessing
    return renew_statistics(model)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("name", PREPROCESSINGS)
@torch.no_grad()
def test_folded_equals_replicated_up_to_the_border(name, trunk):
    model = classifier(PREPROCESSINGS[name], TRUNKS[trunk]())
    folded = fold_grey(model, GREY)
    assert relative_difference(folded.feature_map(GREY), model.feature_map(GREY)) < ROUNDING
    first = next(layer for layer in folded.modules() if isinstance(layer, nn.Conv2d))
    assert first.in_channels == first.weight.shape[1] == 2
    assert folded.preprocessing.folded
    assert not model.preprocessing.folded


def test_what_cannot_be_folded_says_why():
    model = classifier(PREPROCESSINGS["none"], randomise(plain_trunk()))
    folded = fold_grey(model, GREY)
    with pytest.raises(ModelError, match="nothing to fold"):
        fold_grey(folded, GREY)
    with pytest.raises(ModelError, match=r"folded for grey images, \(N, 1, H, W\). Got \(2, 3, 32, 32\)"):
        folded(torch.rand(2, 3, 32, 32))


class Beside(nn.Module):
    """The image is used twice: by the convolution, and by a sum behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.second(self.first(x) + x.mean(1, keepdim=True))


def test_an_image_that_is_used_beside_the_first_convolution_is_refused():
    with pytest.raises(ModelError, match="used beside the first convolution"):
        fold_grey(classifier(PREPROCESSINGS["shifted"], Beside()), GREY)


def save(path, shape):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(path)


def test_a_folded_run_reloads(tmp_path):
    plain = scale_and_select(tiny_classifier().trunk, tiny_images().images, config=tiny_config())
    run = scale_and_select(
        tiny_classifier().trunk,
        tiny_images().images,
        config=tiny_config(fold_grey=True),
        out=tmp_path / "run",
    )
    x = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        assert (
            relative_difference(run.model(x), plain.model(x)) < 1e-3
        )  # the head divides by small deviations
        program, _ = load_model(tmp_path / "run")
        torch.testing.assert_close(program(x), run.model(x))
        loaded, info = load_model(tmp_path / "run", trunk=tiny_classifier().trunk)
        assert torch.equal(loaded(x), run.model(x))
    assert info.preprocessing["folded"]
    save(tmp_path / "grey.png", (32, 32))
    save(tmp_path / "colour.png", (32, 32, 3))
    with pytest.raises(
        UnreadableImageError, match=r"colour\.png is in colour, and the model takes grey images"
    ):
        predict_images(loaded, info, [tmp_path / "grey.png", tmp_path / "colour.png"])
    told = predict_images(loaded, info, [tmp_path / "colour.png", tmp_path / "grey.png"], skip_bad=True)
    assert (len(told.names), len(told.skipped)) == (1, 1)
    layers = [layer for layer in loaded.trunk.modules() if isinstance(layer, nn.Conv2d)]
    kept = sum(layer.weight.numel() + layer.bias.numel() for layer in layers)
    assert run.metrics["parameters"]["kept"] == kept < plain.metrics["parameters"]["kept"]
    assert run.metrics["macs"]["kept"] < plain.metrics["macs"]["kept"]
    assert run.metrics["parameters"]["trunk"] == plain.metrics["parameters"]["trunk"]
    path = save_model(loaded, describe(loaded, {}), tmp_path / "again.safetensors")
    assert path.exists()


def test_images_with_colour_are_not_folded(tmp_path):
    images = tiny_images(channels=3).images
    with pytest.raises(ConfigError, match="these have colour"):
        scale_and_select(
            tiny_classifier().trunk, images, config=tiny_config(fold_grey=True), out=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []
