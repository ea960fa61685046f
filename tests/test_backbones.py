"""The table of backbones, and the preprocessing that belongs to each."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from chanscale import backbones, weights
from chanscale.backbones import (
    BACKBONES,
    Backbone,
    Preprocessing,
    build_backbone,
    find_backbone,
    load_backbone,
)
from chanscale.errors import ConfigError


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_counts_in_the_table_are_true(name):
    counted = sum(parameter.numel() for parameter in build_backbone(name).parameters())
    assert counted == BACKBONES[name].trunk_parameters < BACKBONES[name].full_parameters


@pytest.mark.parametrize("name", BACKBONES)
def test_manifest_lists_every_tensor_of_the_trunk(name):
    state = build_backbone(name).state_dict()
    manifest = weights.read_manifest(name)
    assert {key: entry.shape for key, entry in manifest.items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")
    }
    assert len({entry.sha256 for entry in manifest.values()}) == len(manifest)
    assert {entry.dtype for entry in manifest.values()} == {"float32"}


@pytest.mark.parametrize("name", BACKBONES)
def test_name_tables_cover_every_tensor_once(name):
    for table in BACKBONES[name].names.values():
        assert set(table) == set(weights.read_manifest(name))


def test_every_pickle_in_the_table_has_a_digest():
    for backbone in BACKBONES.values():
        assert set(backbone.digests) == set(backbone.names) & {".pth"}


def test_vgg16_preprocessing_is_the_keras_one():
    pixels = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    # keras.applications.imagenet_utils, mode "caffe", written out for channels first
    wanted = pixels[:, ::-1] * np.float32(255) - np.float32([103.939, 116.779, 123.68]).reshape(1, 3, 1, 1)
    got = find_backbone("vgg16").preprocessing()(torch.from_numpy(pixels))
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_efficientnet_preprocessing_is_the_one_of_its_authors():
    pixels = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    # efficientnet_lite_builder.py: MEAN_RGB 127, STDDEV_RGB 128, on 0 to 255; not ImageNet's own figures
    wanted = (pixels * np.float32(255) - np.float32(127)) / np.float32(128)
    got = find_backbone("efficientnet_lite0").preprocessing()(torch.from_numpy(pixels))
    np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_grey_equals_the_same_grey_as_rgb(order):
    preprocessing = Preprocessing(order=order, scale=2.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    grey = torch.rand(2, 1, 4, 5)
    assert torch.equal(preprocessing(grey), preprocessing(grey.expand(-1, 3, -1, -1)))


def test_mean_and_std_follow_the_order_of_the_network():
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    out = Preprocessing(order="bgr", mean=(0.0, 0.0, 0.5), std=(1.0, 1.0, 0.25))(red)
    assert out.flatten().tolist() == [0.0, 0.0, 2.0]


def test_preprocessing_survives_json_exactly():
    before = Preprocessing(
        order="bgr", scale=255.0, mean=(103.939, 116.779, 123.68), std=(0.229, 0.224, 0.225)
    )
    after = Preprocessing.from_dict(json.loads(json.dumps(before.to_dict())))
    x = torch.rand(1, 3, 4, 4)
    assert after.to_dict() == before.to_dict()
    assert torch.equal(after(x), before(x))


def test_preprocessing_adds_nothing_to_a_state_dict():
    module = Preprocessing()
    assert not module.state_dict()
    assert not list(module.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_exports_with_a_free_batch(channels):
    module = find_backbone("vgg16").preprocessing().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.rand(2, channels, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.rand(5, channels, 8, 8)
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"order": "brg"}, "'brg'"),
        ({"scale": "255"}, "'255'"),
        ({"mean": (0.0,)}, "three numbers"),
        ({"mean": 0.5}, "three numbers"),
        ({"mean": (0.0, 0.0, float("nan"))}, "three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std not 0"),
    ],
)
def test_impossible_preprocessing_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Preprocessing(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"order": "rgb", "scale": 1.0, "mean": [0] * 3, "std": [1] * 3, "x": 1}]
)
def test_foreign_preprocessing_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="preprocessing must have"):
        Preprocessing.from_dict(settings)


@pytest.mark.parametrize("function", [find_backbone, build_backbone, load_backbone])
def test_unknown_backbone_lists_the_known_ones(function):
    with pytest.raises(ConfigError, match=r"one of efficientnet_lite0, vgg16\. Got 'vgg61' instead"):
        function("vgg61")


@pytest.fixture
def tiny(monkeypatch):
    entry = Backbone("tiny", _Tiny, Preprocessing, 100, 8, "MIT", "here")
    monkeypatch.setitem(BACKBONES, "tiny", entry)
    tensors = {"conv.weight": torch.full((2, 3, 1, 1), 0.5), "conv.bias": torch.tensor([1.0, -1.0])}
    monkeypatch.setattr(weights, "resolve_weights", lambda *_, **__: tensors)
    return tensors


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.norm = nn.Dropout()

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.usefixtures("tiny")
def test_a_new_backbone_is_one_entry():
    assert isinstance(build_backbone("tiny"), _Tiny)


def test_loaded_backbone_holds_the_weights_in_eval_mode(tiny):
    model = load_backbone("tiny")
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tiny.items())


@pytest.mark.usefixtures("tiny")
def test_loading_draws_no_random_numbers():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load_backbone("tiny")
    assert torch.equal(torch.rand(4), wanted)


def test_entries_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        backbones.BACKBONES["vgg16"].name = "other"
