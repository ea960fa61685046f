import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.backbones import build_backbone
from chanscale.channels import free_groups
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.heads import PooledHead
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from networks import NETWORKS, attach, build, build_classifier, images, inputs, set_scales


def counted(model, example):
    """Return the parameters of the convolutions and linear layers of `model`, and the MACs of a pass of one image."""
    macs = []

    def count(layer, inputs, output):
        # A transposed convolution applies its filters at each place of its input.
        places = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
        macs.append(places[0].numel() * layer.weight[0].numel())

    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)]
    called = []
    hooks = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    hooks += [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(example[:1])
    for hook in hooks:
        hook.remove()
    plain = [p for layer in set(called) for p in (layer.weight, layer.bias) if p is not None]
    return sum(p.numel() for p in plain), sum(macs)


def vgg16_cost(side):
    """Cost VGG16 at `side` pixels; the output sizes are those of a quarter of the side, times 16."""
    with torch.device("meta"):
        trunk = build_backbone("vgg16")
    return trunk_cost(trunk, (), torch.empty(1, 3, side, side, device="meta"))


def test_vgg16_has_14_714_688_parameters_and_15_35_gmacs():
    cost = vgg16_cost(224)
    assert cost.parameters() == 14_714_688
    assert cost.macs() == 15_346_630_656  # 15.35 G, as published for the convolutions at 224 px
    assert vgg16_cost(112).macs() * 4 == cost.macs()


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_of_what_is_kept_equal_those_of_the_pruned_network(name):
    model, x = attach(build(name)), inputs(name)
    cost = trunk_cost(model, free_groups(model), x)
    assert (cost.parameters(), cost.macs()) == counted(model, x)
    kept = set_scales(model).kept
    pruned = prune_channels(model, ChannelSelection(kept))
    assert (cost.parameters(kept), cost.macs(kept)) == counted(pruned, x)
    assert cost.parameters(kept) < cost.parameters()
    for again in (trunk_cost(pruned, free_groups(pruned), x), cost.keep(kept)):
        assert (again.parameters(), again.macs()) == counted(pruned, x)
        assert again.widths == {name: len(indices) for name, indices in kept.items()}


@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_a_channel_costs_what_its_removal_saves(what):
    model = build_classifier()
    cost = trunk_cost(model, free_groups(model), images(1, side=32))
    for name, saved in cost.per_channel(what).items():
        for gone in (0, 3):
            kept = {name: torch.tensor([c for c in range(cost.widths[name]) if c != gone])}
            assert saved == cost.of(what) - cost.of(what, kept) > 0


def test_the_head_is_no_part_of_the_trunk():
    model = build_classifier()
    names = {layer.name for layer in trunk_cost(model, free_groups(model), images(1, side=32)).layers}
    assert names == {"trunk.0", "trunk.3", "trunk.6"}
    assert isinstance(model.head, PooledHead)


def test_measuring_leaves_mode_and_hooks_alone():
    model = build("batch norm").train()
    trunk_cost(model, free_groups(model), images(2))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert model[1].num_batches_tracked == 0


def test_a_convolution_that_is_never_called_costs_nothing():
    model = build("functional")
    cost = trunk_cost(model, free_groups(model), images(1))
    model.spare = nn.Conv2d(3, 99, 3)
    assert trunk_cost(model, free_groups(model), images(1)) == cost


def test_without_convolutions_there_is_no_cost():
    assert TrunkCost((), ()).of("parameters") == TrunkCost((), ()).of("macs") == 0
