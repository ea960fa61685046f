import pytest
import torch
from torch import nn

from chanscale.attaching import attach_scales
from chanscale.backbones import build_backbone
from chanscale.channels import channel_groups
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.pruning import prune_channels
from networks import NETWORKS, build, build_classifier, images, set_scales


def counted(model):
    """Return the parameters of the convolutions of `model`, and their MACs, from a pass of one image."""
    macs = []

    def count(conv, _inputs, output):
        macs.append(output[0].numel() * conv.weight[0].numel())

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convolutions]
    with torch.no_grad():
        model.eval()(images(1))
    for hook in hooks:
        hook.remove()
    return sum(p.numel() for c in convolutions for p in c.parameters(recurse=False)), sum(macs)


def vgg16_cost(side):
    """Cost VGG16 at `side` pixels; the output sizes are those of a quarter of the side, times 16."""
    with torch.device("meta"):
        trunk = build_backbone("vgg16")
    return trunk_cost(trunk, channel_groups(trunk), torch.empty(1, 3, side, side, device="meta"))


def test_vgg16_has_14_714_688_parameters_and_15_35_gmacs():
    cost = vgg16_cost(224)
    assert cost.parameters() == 14_714_688
    assert cost.macs() == 15_346_630_656  # 15.35 G, as published for the convolutions at 224 px
    assert vgg16_cost(112).macs() * 4 == cost.macs()


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_at_widths_equal_those_of_the_pruned_network(name):
    model = attach_scales(build(name))
    groups = channel_groups(model)
    cost = trunk_cost(model, groups, images(1))
    assert (cost.parameters(), cost.macs()) == counted(model)
    selection = set_scales(model)
    pruned = prune_channels(model, selection)
    assert (cost.parameters(selection.widths), cost.macs(selection.widths)) == counted(pruned)
    assert cost.parameters(selection.widths) < cost.parameters()
    again = trunk_cost(pruned, channel_groups(pruned), images(1))
    assert (again.parameters(), again.macs()) == counted(pruned)


@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_a_channel_costs_what_its_removal_saves(what):
    model = build_classifier()
    groups = channel_groups(model)
    cost = trunk_cost(model, groups, images(1, side=32))
    widths = {group.name: group.width - 1 for group in groups}
    for name, saved in cost.per_channel(what, widths).items():
        assert saved == cost.of(what, widths) - cost.of(what, {**widths, name: widths[name] - 1}) > 0


def test_measuring_leaves_mode_and_hooks_alone():
    model = build("batch norm").train()
    trunk_cost(model, channel_groups(model), images(2))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert model[1].num_batches_tracked == 0


def test_a_convolution_that_is_never_called_costs_nothing():
    model = build("functional")
    cost = trunk_cost(model, channel_groups(model), images(1))
    model.spare = nn.Conv2d(3, 99, 3)
    assert trunk_cost(model, channel_groups(model), images(1)) == cost


def test_without_convolutions_there_is_no_cost():
    assert TrunkCost(()).of("parameters") == TrunkCost(()).of("macs") == 0
