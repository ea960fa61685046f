"""The VGG16 trunk."""

import torch
from torch import nn

from chanscale.vgg import VGG16Trunk

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's vgg16().features


def test_trunk_bears_torchvision_names():
    trunk = VGG16Trunk()
    assert len(trunk.features) == 31
    assert list(trunk.state_dict()) == [
        f"features.{i}.{part}" for i in CONVOLUTIONS for part in ("weight", "bias")
    ]
    assert all(isinstance(trunk.features[i + 1], nn.ReLU) for i in CONVOLUTIONS)
    assert [i for i, layer in enumerate(trunk.features) if isinstance(layer, nn.MaxPool2d)] == [
        4,
        9,
        16,
        23,
        30,
    ]


def test_trunk_returns_the_last_feature_map():
    with torch.no_grad():
        assert VGG16Trunk()(torch.rand(2, 3, 32, 64)).shape == (2, 512, 1, 2)


def test_random_trunk_neither_fades_nor_explodes():
    torch.manual_seed(0)
    with torch.no_grad():
        assert 0.1 < VGG16Trunk()(torch.randn(2, 3, 64, 64)).std() < 10
