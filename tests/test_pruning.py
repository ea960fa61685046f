import copy

import pytest
import torch
from torch import nn

from chanscale.config import FitConfig
from chanscale.errors import EmptySelectionError, InexactRemovalError, ModelError
from chanscale.pruning import check_removal, mask_channels, output_change, prune_channels, run_in_double
from chanscale.removal import remove_channels
from chanscale.selection import ChannelSelection
from chanscale.slicing import keep_inputs, keep_outputs
from chanscale.state import make_optimizer
from networks import (
    NETWORKS,
    attach,
    build,
    build_classifier,
    images,
    know_groups,
    plain_trunk,
    same_tensors,
    set_scales,
    widths_of,
)


def storages(model):
    """Return the addresses of the tensors of `model` that hold anything."""
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("transform", [prune_channels, mask_channels])
def test_the_copy_is_independent_and_the_original_unchanged(name, transform):
    model = attach(build(name))
    selection = set_scales(model)
    # One group alone: the tensors that are not cut must be copied as well.
    group = next(iter(selection.kept))
    before = copy.deepcopy(model)
    pruned = transform(model, ChannelSelection({group: selection.kept[group]}))
    assert not storages(model) & storages(pruned)
    with torch.no_grad():
        for tensor in pruned.state_dict().values():
            tensor.zero_()
    assert same_tensors(model, before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


def test_layers_say_their_new_widths():
    model = attach(build_classifier(build("batch norm")))
    pruned = prune_channels(model, ChannelSelection({name: torch.arange(3) for name in widths_of(model)}))
    assert list(widths_of(pruned).values()) == [3, 3, 3]
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d):
            assert tuple(layer.weight.shape[:2]) == (layer.out_channels, layer.in_channels)
        if isinstance(layer, nn.BatchNorm2d):
            assert len(layer.running_mean) == layer.num_features == 3
    assert pruned.head.linear.in_features == len(pruned.head.mean) == 3


def test_memory_format_and_trainability_are_kept():
    model = attach(plain_trunk()).to(memory_format=torch.channels_last)
    pruned = prune_channels(model, set_scales(model))
    trainable = {name for name, parameter in pruned.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert pruned[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_an_inexact_removal_is_refused():
    model = build_classifier()
    selection = ChannelSelection({name: torch.arange(2) for name in widths_of(model)})
    pruned, masked = prune_channels(model, selection), mask_channels(model, selection)
    assert check_removal(pruned, masked, images(side=32)) < 1e-8
    with pytest.raises(InexactRemovalError, match="removing channels changed the output by"):
        check_removal(pruned, model, images(side=32))
    pruned.trunk[0].weight.data[0, 0, 0, 0] = torch.nan  # a NaN is not small either
    with pytest.raises(InexactRemovalError):
        check_removal(pruned, masked, images(side=32))


@pytest.mark.parametrize(
    ("kept", "error", "words"),
    [
        ({"9": [0]}, ModelError, "names '9', which is no channel group that can be pruned; have 0, 3"),
        ({"0": []}, EmptySelectionError, "keeps none of the 8 channels of '0'"),
        ({"0": list(range(8))}, EmptySelectionError, "keeps every channel: there is nothing to remove"),
        ({}, EmptySelectionError, "keeps every channel"),
        ({"0": [1, 0]}, ModelError, r"must ascend within 0..7; got \[1, 0\]"),
        ({"0": [1, 1]}, ModelError, "must ascend"),
        ({"0": [-1, 2]}, ModelError, "must ascend"),
        ({"0": [3, 8]}, ModelError, "must ascend"),
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", [prune_channels, mask_channels])
def test_a_selection_that_does_not_fit_is_an_error(transform, kept, error, words):
    selection = ChannelSelection(
        {name: torch.tensor(indices, dtype=torch.int64) for name, indices in kept.items()}
    )
    with pytest.raises(error, match=words):
        transform(know_groups(plain_trunk()), selection)


def test_layers_of_unknown_kind_are_refused_by_name():
    with pytest.raises(ModelError, match="cannot remove output channels of a GELU"):
        keep_outputs(nn.GELU(), torch.arange(2))
    with pytest.raises(ModelError, match="cannot remove input channels of a GELU"):
        keep_inputs(nn.GELU(), torch.arange(2))


class Borrowing(nn.Module):
    """A weight that is used by another module than its own, as attention does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return nn.functional.conv2d(self.first(x), self.second.weight, self.second.bias)


def test_a_change_is_measured_where_a_module_borrows_a_weight():
    model, x = Borrowing().eval(), images()
    assert output_change(model, copy.deepcopy(model), x) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "shape", [(3, 3, 9, 9), (1, 3, 9, 9), (3, 9, 9)], ids=["batch", "one", "not a batch"]
)
def test_in_double_a_network_says_what_it_would_as_a_whole(shape):
    model, x = plain_trunk().train(), torch.randn(shape)
    wanted = copy.deepcopy(model).double().eval()(x.double())
    assert torch.allclose(run_in_double(model, x), wanted, rtol=1e-12, atol=0)
    assert model.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


class ByName(nn.Module):
    """Counts how often any copy of it runs."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        ByName.runs += 1
        return self.conv(input=x)


def test_in_double_a_convolution_may_be_called_by_name():
    ByName.runs = 0
    assert run_in_double(ByName(), images()).dtype == torch.float64
    assert ByName.runs == 1  # it would be run again as a whole copy


@torch.no_grad()
def test_where_a_network_has_to_be_copied_it_is_given_what_it_was_given_first():
    class InPlace(Borrowing):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, x = InPlace(), images().double()
    wanted = copy.deepcopy(model).double()(x.clone())
    assert torch.allclose(run_in_double(model, x), wanted, rtol=1e-12, atol=0)


def test_a_weight_that_two_layers_hold_stays_one():
    model = know_groups(plain_trunk())
    model.one, model.other = nn.Linear(3, 2), nn.Linear(3, 2)
    model.other.weight = model.one.weight
    pruned = prune_channels(model, ChannelSelection({next(iter(widths_of(model))): torch.arange(2)}))
    assert pruned.other.weight is pruned.one.weight
    assert pruned.other.weight is not model.other.weight


def test_a_network_that_no_longer_runs_is_an_inexact_removal():
    model = plain_trunk()
    broken = copy.deepcopy(model)
    broken[3] = nn.Conv2d(5, 16, 3)
    with pytest.raises(InexactRemovalError, match="does not run any more"):
        output_change(model, broken, images())


def test_scales_without_a_gradient_have_no_moments_and_that_is_no_error():
    model = attach(build_classifier())
    optimizer = make_optimizer(model, FitConfig())
    kept = {name: torch.arange(width) for name, width in widths_of(model).items()}
    selection = set_scales(model)
    removal = remove_channels(model, optimizer, kept, selection, example=images(2, side=32))
    renewed = make_optimizer(removal.model, FitConfig())
    removal.restore(renewed)
    assert not renewed.state
