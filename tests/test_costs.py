import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.backbones import build_backbone
from chanscale.channels import free_groups
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.errors import BudgetError
from chanscale.heads import PooledHead
from chanscale.proof import channel_groups
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection, WidthRule, keep_within
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


class ReadsWeights(nn.Module):
    """Uses weights in other ways than a call of their layer; `unused` is not used at all."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.read = nn.Conv2d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 4, batch_first=True)
        self.unused = nn.Linear(8, 100)
        self.factor = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = F.conv2d(self.factor * self.stem(x).relu(), self.read.weight, self.read.bias, padding=1)
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.attention(rows, rows, rows)[0]
        return self.recurrent(rows)[0].transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_that_are_used_without_a_call_of_their_layer_count_and_stay(frozen):
    model = ReadsWeights().requires_grad_(not frozen)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    cost = trunk_cost(model, (), images())
    assert cost.loose == {
        "read.weight": 8 * 8 * 9, "attention.in_proj_weight": 24 * 8, "attention.out_proj.weight": 8 * 8,
        "recurrent.weight_ih_l0": 12 * 8, "recurrent.weight_hh_l0": 12 * 4,
    }  # fmt: skip
    assert cost.parameters() == 8 * 3 * 9 + 8 + sum(cost.loose.values())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


class ReadsOther(nn.Module):
    """A convolution that another module's forward computes."""

    def __init__(self, width):
        super().__init__()
        self.other = nn.Conv2d(width, width, 3)

    def forward(self, x):
        return F.conv2d(x, self.other.weight)


def test_what_cannot_go_bounds_the_budget():
    model = build_classifier(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), ReadsOther(16), nn.Conv2d(16, 8, 3))
    )
    example = images()
    cost = trunk_cost(model, channel_groups(model, example), example)
    assert cost.loose == {"trunk.2.other.weight": 16 * 16 * 9}
    whole = 3 * 16 * 9 + 16 + 16 * 16 * 9 + 16 * 8 * 9 + 8
    assert cost.parameters() == whole
    importance = {name: torch.ones(width) for name, width in cost.widths.items()}
    limit = cost.limit("parameters", 0.9)
    with pytest.raises(BudgetError, match="hold"):
        keep_within(importance, cost=cost, of="parameters", limit=limit, rule=WidthRule())
