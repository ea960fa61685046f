"""Groups of any network: what is not protected can be removed without a trace, and the rest says why."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from architectures import monai_networks, own_networks, randomise
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations

from chanscale.attaching import attach_scales
from chanscale.coupling import couple_channels
from chanscale.errors import UnsupportedTopologyError
from chanscale.inspection import inspect_network
from chanscale.proof import channel_groups, halve, remove_coupled, run_masked
from chanscale.pruning import ROUNDING, relative_change
from networks import build_classifier, same_tensors

NETWORKS = {
    name: network for name, network in own_networks().items() if name not in ("VGG16", "EfficientNet-Lite0")
}

PROTECTED = {
    "sigmoid activation": "changes the output",
    "hard-coded view": "does not run without them",
    "grouped convolution on parts": "not each channel has as many positions in left.0",
    "grouped convolution, one output each": "makes one channel of each group of channels",
    "group norm": "GroupNorm) computes over all channels",
}


def build(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return randomise(make()).double(), torch.randn(shape, dtype=torch.float64)


@pytest.fixture(scope="module", params=NETWORKS)
def found(request):
    model, example = build(request.param)
    return request.param, model, example, channel_groups(model, example)


@torch.no_grad()
def test_half_of_the_channels_of_all_free_groups_go_without_a_trace(found):
    _, model, example, groups = found
    free = [group for group in groups if group.protected is None]
    if not free:
        assert all(group.protected for group in groups)
        return
    kept = halve(free)
    wanted, pruned = run_masked(model, free, kept, example), remove_coupled(model, free, kept)
    assert relative_change(wanted, pruned(example)) <= ROUNDING
    assert relative_change(model(example), wanted) > 1e-4
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_is_left_of_a_weight_is_a_slice_of_it(found):
    _, model, _, groups = found
    free = [group for group in groups if group.protected is None]
    if free:
        pruned = remove_coupled(model, free, halve(free))
        for name, weight in pruned.named_parameters():
            whole = model.get_parameter(name)
            values = set(whole.flatten().tolist())
            assert set(weight.flatten().tolist()) <= values


def test_every_group_is_reported(found):
    _, model, example, groups = found
    report = inspect_network(model, example)
    assert [(row.name, row.protected) for row in report.groups] == [(g.name, g.protected) for g in groups]
    assert all(row.parameters > 0 and row.macs > 0 for row in report.groups)
    assert 0 <= report.prunable <= 1


def test_the_network_is_left_as_it_was(found):
    name, model, _, _ = found
    fresh, _ = build(name)
    assert same_tensors(model, fresh)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", PROTECTED)
def test_what_is_not_exact_is_protected_with_the_reason(name):
    model, example = build(name)
    reasons = [group.protected for group in channel_groups(model, example) if group.protected]
    assert any(PROTECTED[name] in reason for reason in reasons)


def test_in_front_of_a_frozen_norm_a_zero_is_not_enough():
    """A scale belongs behind the norm: the probe finds out where one stands in front of it."""
    model, example = build("pre-activation")
    [group] = [group for group in channel_groups(model, example) if group.name == "stem"]
    assert {slot.layer for slot in group.sites} == {"norm1", "norm2", "norm3"}
    assert {"stem", "first", "second"} <= set(group.layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_maps_of_the_trace_are_let_go(name):
    """The graph refers to itself; it would hold them, and the weights, until Python's collector came by."""
    maps = []
    model, example = build(name)
    for layer in [module for module in model.modules() if isinstance(module, _ConvNd)]:
        layer.register_forward_hook(lambda *call: maps.append(weakref.ref(call[-1])))
    gc.disable()
    try:
        couple_channels(model, example)
        held = [it for it in maps if it() is not None]
    finally:
        gc.enable()
    assert maps
    assert not held


def test_channels_of_a_concatenation_lie_where_they_were_put():
    model, example = build("concatenate")
    groups = {group.name: group for group in couple_channels(model, example)}
    [head] = groups["right.0"].inputs
    assert head.positions == tuple(range(16, 24))
    assert head.channels == tuple(range(8))


def test_behind_a_flatten_a_channel_has_several_positions():
    model, example = build("flatten with positions")
    [group] = couple_channels(model, example)
    [linear] = group.inputs
    assert linear.holding([1]) == tuple(range(16, 32))


MONAI = (
    "MONAI ResNet-18 3-D", "MONAI DenseNet-121", "MONAI EfficientNet-B0", "MONAI SE-ResNet-50", "MONAI SE-ResNeXt-50",
)  # fmt: skip


SEGMENTERS = ("MONAI UNet", "MONAI BasicUNet, instance norm")


@pytest.mark.filterwarnings("ignore")  # of MONAI's own imports
@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_of_monai_keeps_the_channels_that_it_returns(name):
    make, shape = monai_networks()[name]
    groups = channel_groups(randomise(make()), torch.randn(shape))
    [last] = [group for group in groups if group.protected]
    assert (last.width, last.protected) == (2, "the network returns these channels")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of MONAI's own imports
@pytest.mark.parametrize("name", MONAI)
def test_networks_of_monai_lose_half_of_every_group_exactly(name):
    make, shape = monai_networks()[name]
    torch.manual_seed(0)
    model, example = randomise(make()).double(), torch.randn(shape, dtype=torch.float64)
    groups = channel_groups(model, example)
    free = [group for group in groups if group.protected is None]
    kept = halve(free)
    wanted, got = run_masked(model, free, kept, example), remove_coupled(model, free, kept)(example)
    assert relative_change(wanted, got) < ROUNDING
    assert len(free) == len(groups)


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(UnsupportedTopologyError, match="no convolution"):
        channel_groups(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(2, 3, 2, 2))


def test_an_example_of_the_wrong_shape_is_refused():
    model, _ = build("functions")
    with pytest.raises(UnsupportedTopologyError, match="cannot be traced"):
        channel_groups(model, torch.zeros(2, 5, 64, 64, dtype=torch.float64))


def test_a_head_of_zeros_hides_nothing():
    """As a network is before training: without stirring, any removal would pass."""
    model, example = build("sigmoid activation")
    nn.init.zeros_(model.head[2].weight)
    assert any("changes the output" in (g.protected or "") for g in channel_groups(model, example))


def test_a_report_counts_what_can_go():
    model, example = build("functions")
    report = inspect_network(model, example)
    first, second = report.groups
    assert (first.name, first.width, first.protected) == ("first", 16, None)
    assert first.parameters == 16 * (3 * 9 + 1) + 16 * 12 * 9
    assert first.macs == 16 * 27 * 62 * 62 + 16 * 12 * 9 * 29 * 29
    assert report.prunable == 1
    assert copy.deepcopy(second) == second


class Chunked(nn.Module):
    """Half of the channels at random can be as many on both sides of a split; the first ones are not."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        return (self.left(left) + self.right(right)).mean((2, 3))


def test_a_removal_that_is_even_by_chance_proves_nothing():
    [stem] = [
        group for group in channel_groups(Chunked().eval(), torch.rand(2, 3, 9, 9)) if group.name == "stem"
    ]
    assert stem.protected


class EveryOther(nn.Module):
    """Two strided slices of one map, of a width at which half of the channels at random can alternate."""

    def __init__(self):
        super().__init__()
        self.stem, self.even, self.odd = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 5, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.stem(x)
        return (self.even(x[:, ::2]) + self.odd(x[:, 1::2])).mean((2, 3))


def test_every_other_channel_is_no_slice_that_stays_when_some_go():
    [stem] = [
        group for group in channel_groups(EveryOther().eval(), torch.rand(2, 3, 9, 9)) if group.name == "stem"
    ]
    assert stem.protected


@pytest.mark.parametrize("norm", [nn.LocalResponseNorm, nn.CrossMapLRN2d])
def test_a_norm_across_neighbouring_channels_is_found_however_little_it_does(norm):
    """Three layers on, on faint images, its effect is below what passes for rounding."""
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), norm(5), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)
    )
    model, faint = build_classifier(trunk).eval(), 0.01 * torch.rand(2, 3, 9, 9)
    groups = channel_groups(model, faint)
    [first] = [group for group in groups if group.name == "trunk.0"]
    assert "removal changes the output" in first.protected
    assert not all(group.protected for group in groups)


def test_layers_that_torch_pruning_does_not_know_are_one_line():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rows, self.end = (
                nn.Conv2d(3, 8, 3),
                nn.GRU(8, 16, batch_first=True),
                nn.Linear(16, 4),
            )

        def forward(self, x):
            return self.end(self.rows(self.body(x).mean(3).transpose(1, 2))[0][:, -1])

    with pytest.raises(UnsupportedTopologyError, match="Recurrent cannot be traced: "):
        channel_groups(Recurrent(), torch.rand(2, 3, 9, 9))


class Peeking(nn.Module):
    """What goes into the ReLU is used where autograd does not look."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(self.relu(x) - 0.1 * x.detach())


def test_a_relu_is_not_taken_over_where_that_would_be_seen():
    model, x = Peeking().eval(), torch.rand(2, 3, 9, 9)
    groups = channel_groups(model, x)
    assert not any(site.relu for group in groups for site in group.sites)
    with torch.no_grad():
        assert torch.equal(attach_scales(model, groups)(x), model(x))


class Says(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.rule = nn.Conv2d(3, 4, 3), forward

    def forward(self, x):
        return self.rule(self.conv(x))


class Counting(nn.Module):
    """Says more at each call, which a copy of it would not tell: `calls` is a number or a buffer."""

    def __init__(self, calls, count):
        super().__init__()
        self.conv, self.count = nn.Conv2d(3, 4, 3), count
        if isinstance(calls, torch.Tensor):
            self.register_buffer("calls", calls)
        else:
            self.calls = calls

    def forward(self, x):
        self.count(self)
        return self.conv(x) * self.calls


def add(net):
    net.calls += 1


def replace_by_more(net):
    net.calls = net.calls + 1


@pytest.mark.parametrize("count", [add, replace_by_more])
@pytest.mark.parametrize("calls", [1, torch.tensor(1), torch.tensor(1.0)], ids=["number", "long", "float"])
def test_a_network_that_counts_its_calls_cannot_be_proven_and_is_not_made_to_count(calls, count):
    model = Counting(copy.copy(calls), count)
    with pytest.raises(UnsupportedTopologyError, match="something else each time"):
        channel_groups(model, torch.randn(2, 3, 8, 8))
    assert model.calls == 1


def test_a_network_may_work_in_place_on_what_it_is_given():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2).sub_(1))

    example = torch.rand(2, 3, 9, 9)
    seen = example.clone()
    [first] = channel_groups(InPlace(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), example)[:1]
    assert first.protected is None
    assert torch.equal(example, seen)


@pytest.mark.parametrize("size", [8, 15], ids=["even", "odd"])
def test_scales_take_over_their_relus_at_any_size_of_image(size):
    """That they may is seen by comparing bits, and sums over a batch may differ in the last one."""
    torch.manual_seed(0)
    widths = [3, 10, 12, 13]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(13, 2))
    groups = channel_groups(model.to(memory_format=torch.channels_last), torch.randn(2, 3, size, size))
    assert [site.relu for group in groups for site in group.sites] == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda x: (x, x), "returns a tuple; wrap it"),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), "something else each time"),
        (lambda x: nn.functional.conv2d(x, torch.ones(2, 4, 1, 1)), "does not run in fp64"),
        (lambda x: x.view(-1, 7, 1234), "cannot be traced: shape"),
        (lambda x: x * float("nan"), "returns nan"),
    ],
)
def test_what_cannot_be_proven_says_why(rule, words):
    with pytest.raises(UnsupportedTopologyError, match=words):
        channel_groups(Says(rule), torch.rand(2, 3, 9, 9))


def test_a_linear_layer_of_computed_weights_does_not_spoil_the_others():
    head = parametrizations.weight_norm(nn.Linear(6, 2))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )
    first, second = channel_groups(model.eval(), torch.rand(2, 3, 9, 9))
    assert first.protected is None
    assert "computed from other tensors" in second.protected
