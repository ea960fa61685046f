"""What an explanation says is what the network computed: sums, chains, receptive fields, circuits, patches."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chanscale.artifact import ModelInfo
from chanscale.data.images import FULL_RANGE, read_image
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError, ModelError
from chanscale.explain.chains import find_chain, gain_of, scale_behind
from chanscale.explain.circuits import averaging_inputs, trace_back
from chanscale.explain.decomposition import decompose
from chanscale.explain.evidence import name_subject, show_class_map
from chanscale.explain.naming import ChannelNames, name_channels
from chanscale.explain.patches import cut_patch, find_patches
from chanscale.explain.receptive_fields import find_receptive_field
from chanscale.explain.saliency import grad_cam, integrated_gradients
from chanscale.explain.training_maps import decompose_mean, survey_training
from chanscale.scaling import add_scale
from chanscale.vgg import VGG16Trunk
from networks import TRUNKS, attach, build_classifier, images, norm_trunk, plain_trunk, randomise, set_scales

TWO, THREE = ("no", "yes"), ("a", "b", "c")
INFO = ModelInfo("vgg16", TWO, {}, {}, 32, 3)


def build(classes=TWO, *, constant=0):
    """Return a scaled classifier whose first `constant` features never vary."""
    model = attach(build_classifier(classes=classes))
    set_scales(model, zeros=0.2)
    model.head.variance[:constant] = 0
    return model.eval()


# --- the logit taken apart


@pytest.mark.parametrize("classes", [TWO, THREE])
@pytest.mark.parametrize("constant", [0, 3, 12])
def test_bias_and_contributions_add_up_to_the_logit(classes, constant):
    model, batch = build(classes, constant=constant), images(3, 32)
    parts = decompose(model.head, model.feature_map(batch))
    outputs = 1 if len(classes) == 2 else 3
    assert parts.contributions.shape == (3, outputs, 12)
    assert (parts.contributions[:, :, :constant] == 0).all()
    sums = parts.bias + parts.contributions.sum(2)
    largest = max(float(parts.contributions.abs().max()), 1.0)
    # fp32, in which the model adds, against fp64.
    assert float((sums - model(batch)).detach().abs().max()) < 1e-5 * largest
    assert torch.allclose(sums, parts.logits, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("classes", [TWO, THREE])
def test_the_mean_of_the_class_map_is_the_logit(classes):
    model = build(classes, constant=2)
    parts = decompose(model.head, model.feature_map(images(3, 32)))
    assert parts.class_maps.shape == (3, parts.bias.numel(), 4, 4)
    assert torch.allclose(parts.class_maps.mean((2, 3)), parts.logits, rtol=1e-9)


def test_features_that_are_no_maps_are_refused():
    with pytest.raises(ModelError, match=r"must end in feature maps \(N, C, h, w\). Got \(2, 12\)"):
        decompose(build().head, torch.rand(2, 12))


def test_decomposing_changes_no_model():
    model = build()
    before = model.head.linear.weight
    decompose(model.head, model.feature_map(images(1, 32)))
    assert model.head.linear.weight is before
    assert model.head.linear.weight.dtype == torch.float32


# --- captum


@pytest.mark.parametrize("classes", [TWO, THREE])
def test_grad_cam_is_the_class_map_but_for_a_constant_and_a_positive_factor(classes):
    pytest.importorskip("captum", reason="needs: pip install 'chanscale[explain]'")
    model, batch = build(classes), images(2, 32)
    target = len(classes) - 2
    maps = decompose(model.head, model.feature_map(batch)).class_maps[:, target]
    rest = maps - grad_cam(model, batch, target) * maps[0].numel()
    assert float(rest.std()) < 1e-5 * float(maps.abs().max())


def test_integrated_gradients_sum_to_the_change_of_the_logit():
    pytest.importorskip("captum", reason="needs: pip install 'chanscale[explain]'")
    model, batch = build(THREE), images(2, 32)
    found, missed = integrated_gradients(model, batch, 1, steps=64)
    change = (model(batch) - model(torch.zeros_like(batch)))[:, 1].detach()
    assert found.shape == (2, 32, 32)
    assert torch.allclose(found.sum((1, 2)) - missed, change, rtol=1e-3)
    assert float((missed / change).abs().max()) < 0.05


def test_without_captum_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r"pip install 'chanscale\[explain\]'"):
        grad_cam(build(), images(1, 32), 0)


def test_a_model_that_lets_no_gradient_through_has_no_integrated_gradients():
    pytest.importorskip("captum", reason="needs: pip install 'chanscale[explain]'")

    class Deaf(nn.Module):
        def forward(self, x):
            return x.detach().mean((1, 2, 3))[:, None]

    with pytest.raises(ModelError, match="no gradient reaches the pixels"):
        integrated_gradients(Deaf(), images(1, 8), 0)


# --- chains


class Residual(nn.Module):
    """Adds in place, as ResNets do: the tensor is that of the norm, and its values are not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.relu(x))
        y += x
        return self.last(self.relu(y))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.again(self.again(self.first(x)))


def test_every_layer_of_a_plain_network_is_in_its_chain():
    chain = find_chain(VGG16Trunk().eval(), images(1, 32))
    assert chain.stop is None
    assert [step.name for step in chain.steps] == [f"features.{index}" for index in range(31)]
    assert len(chain.convolutions) == 13


@pytest.mark.parametrize(
    ("trunk", "steps", "reason"),
    [
        (Residual, ["relu", "last"], "what relu takes is no single layer's output, but a sum"),
        (Joined, ["last"], "what last takes is no single layer's output"),
        (Twice, ["again"], "again is called more than once"),
        (TRUNKS["functional"], [], "what the head takes is no single layer's output"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()), ["2"], "1 (GroupNorm) may mix"),
    ],
)  # fmt: skip
def test_where_the_layers_are_no_chain_it_stops_and_says_so(trunk, steps, reason):
    chain = find_chain(trunk().eval(), images(1, 16))
    assert [step.name for step in chain.steps] == steps
    assert reason in chain.stop
    assert find_receptive_field(chain) is None


# --- receptive fields


@pytest.mark.parametrize("name", sorted(TRUNKS.keys() - {"functional"}))
def test_no_pixel_outside_of_the_receptive_field_counts(name):
    trunk = randomise(TRUNKS[name]()).eval()
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    field = find_receptive_field(find_chain(trunk, pixels.detach()))
    maps = trunk(pixels)
    for row, column in ((0, 0), (maps.shape[2] // 2, maps.shape[3] // 3), (maps.shape[2] - 1, 0)):
        [gradient] = torch.autograd.grad(maps[0, :, row, column].sum(), pixels, retain_graph=True)
        left, top, right, bottom = field.box(row, column, side=64)
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 64
        gradient[:, :, top:bottom, left:right] = 0
        assert gradient.abs().max() == 0


def test_every_pixel_of_the_receptive_field_counts_where_all_weights_are_positive():
    trunk = TRUNKS["strides and paddings"]().eval()
    for parameter in trunk.parameters():
        nn.init.constant_(parameter, 0.1)
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    field = find_receptive_field(find_chain(trunk, pixels.detach()))
    [gradient] = torch.autograd.grad(trunk(pixels)[0, 0, 16, 16], pixels)
    rows, columns = gradient[0, 0].nonzero().T
    # Dilation leaves gaps, and the outermost pixels count.
    seen = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    assert seen == field.box(16, 16, side=64)


# --- names


def describe(backbone, kept, **more):
    return ModelInfo(backbone, TWO, kept, {}, 32, 3, **more)


def test_a_channel_of_vgg16_bears_its_published_name_and_its_original_index():
    trunk = nn.Sequential()
    trunk.features = VGG16Trunk().features[:3]
    chain = find_chain(trunk.eval(), images(1, 8), prefix="trunk.")
    kept = {"trunk.features.0": list(range(64)), "trunk.features.2": [1, 5, 63]}
    names = name_channels(describe("vgg16", kept), chain.convolutions)
    assert names.name("trunk.features.2", 1).text == "conv1_2 #5 of 64"
    assert names.name("trunk.features.2", 2).original == 63
    assert names.labels["trunk.features.28"] == "conv5_3"


def test_a_layer_that_no_run_describes_has_no_original_index():
    chain = find_chain(plain_trunk((4, 5)).eval(), images(1, 8), prefix="trunk.")
    info = describe("MyNet", {"trunk.0": [2, 3, 6, 7]}, rebuilt_by="program")
    names = name_channels(info, chain.convolutions)
    assert names.name("trunk.0", 2).text == "0 #6"
    assert names.name("trunk.3", 1).text == "3, kept channel 1"
    assert names.name("trunk.3", 1).original is None


def test_a_depthwise_convolution_has_the_channels_of_what_feeds_it():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).eval()
    chain = find_chain(trunk, images(1, 8), prefix="trunk.")
    info = describe("MyNet", {"trunk.0": [1, 2, 8, 9]}, rebuilt_by="program")
    assert name_channels(info, chain.convolutions).name("trunk.1", 2).text == "1 #8"


# --- circuits


def hand_made():
    """Three convolutions of one pixel; the last channel 0 is fed by 1 of the second, and that by 2 of the first."""
    first, second, third = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        for layer in (first, second, third):
            layer.bias.zero_()
        first.weight.copy_(torch.eye(3).mul(torch.tensor([1.0, 2.0, 4.0]))[:, :, None, None])
        second.weight.copy_(torch.tensor([[9.0, 0, 0], [1, 1, 3]])[:, :, None, None])
        third.weight.copy_(torch.tensor([[0.1, -2]])[:, :, None, None])
    trunk = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).eval()
    add_scale(second)
    second.channel_scale.weight.data = torch.tensor([1.0, 0.5])
    return trunk


NAMES = ChannelNames({}, {"0": [10, 20, 30], "2": [4, 7], "4": [0]}, {"0": 64, "2": 32, "4": 8})


def trace(trunk, pixels, names=NAMES, **options):
    chain, sums = find_chain(trunk, pixels), {}
    with averaging_inputs(chain, sums), torch.no_grad():
        trunk(pixels)
    return trace_back(chain, {name: total / len(pixels) for name, total in sums.items()}, names, 0, **options)


def test_the_circuit_of_a_network_made_by_hand_is_the_one_built_in():
    circuit = trace(hand_made(), torch.ones(2, 3, 4, 4), top=2)
    # The first makes 1, 2, 4; the second 9 and 0.5 (1 + 2 + 12) = 7.5; the third sees 0.1 x 9 and 2 x 7.5.
    assert circuit.channel.text == "4 #0 of 8"
    strongest, weaker = circuit.feeders
    assert strongest.channel.text == "2 #7 of 32"
    assert (strongest.strength, weaker.strength) == pytest.approx((15, 0.9))
    assert strongest.share == pytest.approx(15 / 15.9)
    assert (strongest.excites, weaker.excites) == (False, True)
    assert [feeder.channel.original for feeder in strongest.feeders] == [30, 20]
    assert strongest.feeders[0].strength == pytest.approx(0.5 * 3 * 4)
    assert strongest.feeders[0].stop == "these are the colours of the image"


def test_the_circuit_reads_as_a_tree_and_stops_where_it_was_asked_to():
    text = trace(hand_made(), torch.ones(1, 3, 4, 4), top=1, depth=1).to_text()
    assert text == "4 #0 of 8\n└─ 2 #7 of 32  − 94.3 %"
    whole = trace(hand_made(), torch.ones(1, 3, 4, 4), top=1).to_dict()
    assert whole["feeders"][0]["feeders"][0]["channel"]["original"] == 30


def test_a_circuit_stops_at_a_sum_and_says_so():
    circuit = trace(Residual().eval(), images(2, 8))
    assert circuit.feeders == ()
    assert "what relu takes is no single layer's output" in circuit.stop
    assert circuit.stop in circuit.to_text()


def test_a_channel_of_a_grouped_convolution_is_fed_by_its_own_group():
    trunk = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)).eval()
    chain, sums, pixels = find_chain(trunk, images(1, 8)), {}, images(1, 8)
    with averaging_inputs(chain, sums), torch.no_grad():
        trunk(pixels)
    circuit = trace_back(chain, sums, ChannelNames({}, {}, {}), 3, top=6)
    assert sorted(feeder.channel.position for feeder in circuit.feeders) == [3, 4, 5]


def test_the_shares_of_all_feeders_sum_to_one():
    trunk = attach(randomise(plain_trunk((6, 5))))
    set_scales(trunk, zeros=0.1)
    pixels = images(3, 16)
    circuit = trace(trunk.eval(), pixels, ChannelNames({}, {}, {}), top=6, depth=1)
    assert sum(feeder.share for feeder in circuit.feeders) == pytest.approx(1)


def test_the_scale_of_a_channel_is_the_one_behind_its_convolution():
    trunk = attach(randomise(plain_trunk((6, 5, 4))))
    set_scales(trunk, zeros=0.1)
    steps = find_chain(trunk.eval(), images()).behind("3")
    assert [scale_behind(steps, channel) for channel in range(5)] == trunk[3].channel_scale.weight.tolist()


def test_the_gain_of_a_norm_is_its_weight_over_its_deviation():
    trunk = randomise(norm_trunk()).eval()
    steps = find_chain(trunk, images(1, 16)).behind("4")
    norm = trunk[5]
    wanted = norm.weight[3] / (norm.running_var[3] + norm.eps).sqrt()
    assert gain_of(steps, 3) == pytest.approx(float(wanted.detach()))
    assert scale_behind(steps, 3) is None


# --- training images


def spotted(count=5, shape=(64, 32)):
    """Return dark images, of which image n has a spot 8 pixels high that is the brighter the larger n is."""
    records = []
    for index in range(count):
        pixels = np.full(shape, 10, np.uint8)
        pixels[40:48, 20:24] = 30 * index + 130
        records.append(ImageRecord(f"{index}.png", index % 2, str(index), pixels=pixels))
    return ImageSet(Path("spots"), TWO, tuple(records)), Splits(tuple(range(count - 1)), (), (count - 1,))


def bright_model():
    trunk = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU()).eval()
    model = build_classifier(trunk)
    with torch.no_grad():
        trunk[0].weight[0], trunk[0].weight[1] = 1, -1
        trunk[0].bias.zero_()
    return model.eval()


def test_the_patch_that_excites_a_channel_is_where_the_spot_was_planted():
    model, (records, splits) = bright_model(), spotted()
    training = survey_training(model, records, splits, image_size=32)
    field = find_receptive_field(find_chain(model.trunk, images(1, 32)))
    patches = find_patches(training, field, 0, image_size=32, top=2)
    assert [patch.record.name for patch in patches] == ["3.png", "2.png"]  # 4.png is no training image
    left, top, right, bottom = patches[0].box
    assert 19 <= left < right <= 25
    assert 19 <= top < bottom <= 25  # 40 to 48 of 64 rows, in a square of 32
    pixels = cut_patch(patches[0])
    assert pixels.shape == (6, 3)  # three pixels of the square are six rows of the file
    assert pixels.max() == 220


def test_a_channel_that_nothing_excites_has_no_patch():
    model, (records, splits) = bright_model(), spotted()
    with torch.no_grad():
        model.trunk[0].bias[1] = -100
    training = survey_training(model, records, splits, image_size=32)
    field = find_receptive_field(find_chain(model.trunk, images(1, 32)))
    assert find_patches(training, field, 1, image_size=32) == ()
    assert training.count_active(1) == 0


def test_the_mean_of_the_relative_map_is_the_logit_less_the_mean_training_logit():
    model, (records, splits) = bright_model(), spotted()
    training = survey_training(model, records, splits, image_size=32)
    usual = decompose_mean(model, training)
    pixels = torch.rand(2, 1, 32, 32)
    parts = decompose(model.head, model.feature_map(pixels))
    shown = show_class_map(parts, name_subject(INFO, 0), 1, usual, 4)
    wanted = float(parts.logits[1, 0] - usual.logits[0, 0])
    assert shown.relative
    assert float(shown.values.mean()) == pytest.approx(wanted, rel=1e-9)
    batch = torch.stack([to_pixels(record) for record in records.records[:4]])
    # fp32, in which the model runs, and the means of its answers.
    assert float(model(batch).detach().mean()) == pytest.approx(float(usual.logits[0, 0]), rel=1e-4)


def to_pixels(record):
    return torch.from_numpy(read_image(record.pixels, size=32).astype(np.float32) / FULL_RANGE)


def test_the_absolute_map_says_that_its_frame_comes_from_the_padding():
    model = build()
    parts = decompose(model.head, model.feature_map(images(1, 32)))
    shown = show_class_map(parts, name_subject(INFO, 0), 0, None)
    assert not shown.relative
    assert "comes from the padding" in shown.caption
    assert float(shown.values.mean()) == pytest.approx(float(parts.logits[0, 0]), rel=1e-9)
