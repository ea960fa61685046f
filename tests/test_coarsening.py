"""Grouped convolutions: which channels leave together, and what is left of the convolution."""

import copy

import pytest
import torch
from torch import nn

from chanscale.coarsening import DisjointSets
from chanscale.coupling import couple_channels
from chanscale.errors import ModelError
from chanscale.pruning import ROUNDING, prune_channels
from chanscale.rebuilding import install_tensors
from chanscale.selection import ChannelSelection
from chanscale.slicing import input_width, keep_outputs, leave_as_groups
from networks import NETWORKS, attach, build, images, inputs, know_groups, relative_difference, set_scales

GROUPED = [name for name in NETWORKS if "grouped" in name or "multiplier" in name]


def two_convs(channels, groups, outputs):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, outputs, 3, groups=groups), nn.ReLU(),
        nn.Conv2d(outputs, 2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "whole"),
    [(128, 2, 128, False), (128, 32, 128, True), (1024, 32, 1024, False), (16, 16, 32, True), (24, 1, 24, False)],
)  # fmt: skip
def test_whichever_leaves_more_to_choose_from(channels, groups, outputs, whole):
    assert leave_as_groups(nn.Conv2d(channels, outputs, 3, groups=groups)) is whole


def test_the_same_channels_of_each_of_few_wide_groups_leave():
    first, second, _ = couple_channels(two_convs(8, 2, 12), images())
    assert (first.name, first.width, second.name, second.width) == ("0", 4, "2", 6)
    assert (first.outputs[0].channels, first.size) == ((0, 1, 2, 3, 0, 1, 2, 3), 2)
    [taker] = first.inputs
    assert (taker.layer, taker.positions) == ("2", (0, 1, 2, 3))
    model = know_groups(two_convs(8, 2, 12))
    pruned = prune_channels(
        model, ChannelSelection({"0": torch.tensor([0, 2]), "2": torch.tensor([1, 4, 5])})
    )
    assert (pruned[2].in_channels, pruned[2].out_channels, pruned[2].groups) == (4, 6, 2)
    assert torch.equal(pruned[2].weight, model[2].weight[[1, 4, 5, 7, 10, 11]][:, [0, 2]])


def test_many_narrow_groups_leave_as_a_whole():
    first, _ = couple_channels(two_convs(8, 4, 12), images())
    assert first.width == 4
    assert [slot.layer for slot in first.inputs] == ["4"]
    assert [site.layer for site in first.sites] == ["2"]
    model = know_groups(two_convs(8, 4, 12))
    pruned = prune_channels(model, ChannelSelection({"0": torch.tensor([1, 3])}))
    assert (pruned[2].in_channels, pruned[2].out_channels, pruned[2].groups) == (4, 6, 2)
    assert torch.equal(pruned[2].weight, model[2].weight[[3, 4, 5, 9, 10, 11]])
    assert torch.equal(pruned[0].weight, model[0].weight[[2, 3, 6, 7]])


def test_partitions_that_have_nothing_in_common_tie_all_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1)
    )
    [tied] = [group for group in couple_channels(model, images()) if group.width == 1]
    assert (tied.name, tied.protected) == ("1", "grouped convolutions tie all of them to each other")


def test_a_transposed_grouped_convolution_is_protected():
    transposed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.Conv2d(8, 2, 1))
    first, second, _ = couple_channels(transposed, images())
    assert first.protected == second.protected == "1 is a grouped transposed convolution"


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPED)
def test_channels_leave_in_several_steps(name):
    model, x = attach(build(name).double()), inputs(name).double()
    for _ in range(2):
        selection = set_scales(model, zeros=0.2)
        pruned = prune_channels(model, selection)
        assert relative_difference(pruned(x), model(x)) < ROUNDING
        model = pruned


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPED)
def test_a_whole_network_takes_the_tensors_of_a_pruned_one(name):
    whole, x = build(name).double(), inputs(name).double()
    scaled = attach(whole)
    pruned = prune_channels(scaled, set_scales(scaled))
    again = copy.deepcopy(whole)
    install_tensors(again, pruned.state_dict())
    wanted = {n: m for n, m in pruned.named_modules() if hasattr(m, "groups")}
    for layer, conv in wanted.items():
        got = again.get_submodule(layer)
        assert (got.groups, got.in_channels, got.out_channels) == (
            conv.groups, conv.in_channels, conv.out_channels,
        )  # fmt: skip
    assert relative_difference(again(x), pruned(x)) < ROUNDING


def test_groups_of_different_widths_are_refused():
    with pytest.raises(ModelError, match=r"different widths: \[2, 1\]"):
        keep_outputs(nn.Conv2d(8, 8, 3, groups=2), torch.tensor([0, 1, 4]))


def test_inputs_count_within_a_group():
    assert input_width(nn.Conv2d(8, 8, 3, groups=2)) == 4
    assert input_width(nn.Conv2d(8, 8, 3)) == 8


def test_sets_that_share_a_member_are_one():
    sets = DisjointSets()
    sets.join([(0, 3), (0, 2)])
    sets.join([(1, 1), (1, 0)])
    assert sets.find((0, 3)) == (0, 2)
    sets.join([(1, 1), (0, 3)])
    assert {sets.find(member) for member in sets.members} == {(0, 2)}
    assert sets.find((5, 5)) == (5, 5)
