"""The EfficientNet-Lite0 trunk: its shape, its padding, and what the published weights make of an image."""

import math

import pytest
import torch
from torch import nn

from chanscale.backbones import load_backbone
from chanscale.efficientnet_lite import EfficientNetLite0Trunk, efficientnet_lite0_names
from chanscale.weights import cache_path

REAL_WEIGHTS = cache_path("efficientnet_lite0")  # before a fixture moves the cache


@pytest.fixture(scope="module")
def trunk():
    """A trunk with random weights, in eval mode."""
    return EfficientNetLite0Trunk().eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (64, 96), (75, 112), (224, 224)])
def test_trunk_returns_the_last_feature_map(trunk, size):
    with torch.no_grad():
        y = trunk(torch.rand(2, 3, *size))
    assert y.shape == (2, 1280, size[0] // 32, size[1] // 32)
    assert 0 <= y.min() <= y.max() <= 6


def test_trunk_has_the_published_blocks(trunk):
    kernels = [block.depthwise.conv.kernel_size[0] for block in trunk.blocks]
    widths = [block.project.conv.out_channels for block in trunk.blocks]
    assert kernels == [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    assert widths == [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    assert [i for i, block in enumerate(trunk.blocks) if block.has_skip] == [2, 4, 6, 7, 9, 10, 12, 13, 14]
    assert all(norm.eps == 1e-3 for norm in trunk.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_block_adds_its_input_where_the_shapes_allow_it():
    block = EfficientNetLite0Trunk().eval().blocks[2]
    nn.init.zeros_(block.project.norm.weight)
    x = torch.randn(1, 24, 8, 8)
    assert torch.equal(block(x), x)


def test_even_sizes_are_padded_as_in_tensorflow(trunk):
    """tf.nn.convolution, padding "SAME": ceil(size / stride) outputs, the odd pixel on the right and below."""
    strided = [module for module in trunk.modules() if hasattr(module, "pad")]
    assert [layer.conv.kernel_size[0] for layer in strided] == [3, 3, 5, 3, 5]
    for layer in strided:
        kernel, size = layer.conv.kernel_size[0], 16
        total = (math.ceil(size / 2) - 1) * 2 + kernel - size
        assert layer.pad.padding == (total // 2, total - total // 2) * 2


def test_the_count_of_batches_need_not_be_loaded_but_statistics_must(trunk):
    state = {key: tensor for key, tensor in trunk.state_dict().items() if "num_batches" not in key}
    assert set(state) == set(efficientnet_lite0_names())
    trunk.load_state_dict(state)
    del state["blocks.3.expand.norm.running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.3\.expand\.norm\.running_var"):
        trunk.load_state_dict(state)


@pytest.mark.skipif(
    not REAL_WEIGHTS.exists(),
    reason="no EfficientNet-Lite0 in the cache: run `chanscale weights fetch efficientnet_lite0`",
)
@pytest.mark.parametrize(
    ("size", "channels", "means"),
    [
        ((224, 224), [113, 576, 1242, 989], [4.307465, 3.911306, 3.709598, 3.340800]),
        ((96, 160), [576, 113, 1263, 338], [6.0, 5.188400, 4.713594, 4.670767]),
    ],
)
def test_features_are_those_of_the_published_network(size, channels, means):
    """Against efficientnet-lite-pytorch 0.1.0 with its weights: its four largest channels of a made-up image."""
    x = (torch.arange(3 * size[0] * size[1]) % 251).view(1, 3, *size) / 125 - 1
    with torch.no_grad():
        pooled = load_backbone("efficientnet_lite0", weights=REAL_WEIGHTS)(x).mean((2, 3))[0]
    # The order of fp32 sums differs between machines; it moves a feature by 1e-5 against fp64.
    torch.testing.assert_close(pooled[channels], torch.tensor(means), rtol=0, atol=1e-4)
    assert pooled.topk(4).indices.tolist() == channels
