"""What groups say, and what they say once channels are gone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from chanscale.channels import (
    ChannelGroup,
    ScaleSite,
    Slot,
    carried_groups,
    free_groups,
    removed_positions,
    shrink_groups,
)
from chanscale.errors import ModelError, UnsupportedTopologyError
from chanscale.proof import channel_groups
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from networks import (
    NETWORKS,
    attach,
    build,
    build_classifier,
    images,
    inputs,
    nested_trunk,
    norm_trunk,
    plain_trunk,
    set_scales,
    widths_of,
)


def slot(layer, width):
    return Slot(layer, tuple(range(width)), tuple(range(width)))


def test_groups_go_from_input_to_output_and_name_what_shares_their_channels():
    first, second, last = channel_groups(plain_trunk((8, 16, 12)), images())
    every = tuple(range(8))
    assert first == ChannelGroup(
        "0", 8, (slot("0", 8),), (slot("3", 8),), (ScaleSite("0", every, every, relu="1"),)
    )
    assert second.layers == ("3", "6")
    assert last.protected == "the network returns these channels"


def test_the_scale_stands_behind_the_last_norm():
    group, *_ = channel_groups(norm_trunk(), images())
    assert group.layers == ("0", "1", "4")
    [site] = group.sites
    assert (site.layer, site.relu) == ("1", "2")


def test_a_bare_trunk_keeps_the_channels_that_it_returns_and_a_head_takes_them_in():
    assert list(widths_of(build("plain"))) == ["0", "3"]
    with_head = free_groups(build_classifier(plain_trunk()))
    assert [group.name for group in with_head] == ["trunk.0", "trunk.3", "trunk.6"]
    assert [slot.layer for slot in with_head[-1].inputs] == ["head"]


def test_a_relu_for_all_is_taken_over_by_none():
    assert {site.relu for g in channel_groups(nested_trunk().eval(), images()) for site in g.sites} == {None}


class LeakyByHand(nn.Module):
    """What goes into the ReLU is used beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(self.relu(x) - 0.1 * x)


def test_a_relu_whose_input_is_used_elsewhere_is_not_taken_over():
    model, x = LeakyByHand().eval(), images()
    group, _ = channel_groups(model, x)
    assert [site.relu for site in group.sites] == [None]
    with torch.no_grad():
        assert torch.equal(attach(model)(x), model(x))


def test_groups_are_named_as_the_network_names_its_layers_first():
    assert list(widths_of(build("two names"))) == ["layers.0"]


def test_a_linear_layer_behind_a_flatten_takes_the_channels_in():
    *_, last = free_groups(build("flatten"))
    [taker] = last.inputs
    assert (last.name, taker.layer) == ("trunk.3", "hidden")
    assert taker.holding([1]) == tuple(range(16, 32))


@pytest.mark.parametrize("name", NETWORKS)
def test_after_a_removal_the_groups_are_those_that_a_new_trace_finds(name):
    model = build(name)
    pruned = prune_channels(model, set_scales(attach(model)))
    carried = {group.name: group for group in free_groups(pruned)}
    del pruned.__dict__["_channel_groups"]
    traced = {group.name: group for group in channel_groups(pruned, inputs(name)) if not group.protected}
    assert carried.keys() == traced.keys()
    for group, other in ((carried[key], traced[key]) for key in carried):
        assert group.width == other.width
        assert set(group.outputs) == set(other.outputs)
        assert set(group.inputs) == set(other.inputs)
        assert {site.layer for site in group.sites} == {site.layer for site in other.sites}


def test_positions_behind_those_removed_move_up():
    group = ChannelGroup("a", 3, (Slot("a", (0, 1, 2), (0, 1, 2)),), (Slot("b", (4, 5, 6), (0, 1, 2)),), ())
    other = ChannelGroup("c", 4, (), (Slot("b", (0, 1, 2, 3), (0, 1, 2, 3)),), ())
    kept = {"a": torch.tensor([0, 2]), "c": torch.tensor([3])}
    assert removed_positions((group, other), kept)["inputs", "b"] == [0, 1, 2, 5]
    slim, narrow = shrink_groups((group, other), kept)
    assert (slim.width, slim.inputs) == (2, (Slot("b", (1, 2), (0, 1)),))
    assert (narrow.width, narrow.inputs) == (1, (Slot("b", (0,), (0,)),))


def test_a_copy_carries_the_same_groups_and_a_bare_network_none():
    model = build("plain")
    assert carried_groups(copy.deepcopy(model)) is carried_groups(model)
    assert carried_groups(plain_trunk()) is None
    with pytest.raises(ModelError, match=r"channel_groups\(model, example\), then attach_scales"):
        prune_channels(plain_trunk(), ChannelSelection({"0": torch.arange(2)}))


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))],
)
def test_a_network_without_a_group_is_refused(model):
    with pytest.raises(UnsupportedTopologyError, match=r"cannot be traced|no convolution"):
        channel_groups(model, images())


def test_a_network_with_scales_that_does_not_know_its_groups_is_told_what_to_do():
    scaled = attach(build("plain"))
    del scaled.__dict__["_channel_groups"]
    with pytest.raises(ModelError, match="pass it through merge_scales first"):
        channel_groups(scaled, images())


def test_when_everything_is_protected_the_error_says_why():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    with pytest.raises(ModelError, match=r"no channel of the network can be removed: .*GroupNorm"):
        attach(model)


def test_a_weight_that_is_computed_from_others_protects_its_channels():
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
    layers[1] = parametrizations.weight_norm(layers[1])
    first, second, _ = channel_groups(nn.Sequential(*layers), images())
    assert "computed from other tensors" in second.protected
    assert first.protected
