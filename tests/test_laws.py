"""The laws of the method, each on every network of the table, and on VGG16 with its real weights."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from chanscale.artifact import load_model, save_model
from chanscale.attaching import merge_scales
from chanscale.backbones import find_backbone, load_backbone
from chanscale.classifier import to_channels_last
from chanscale.errors import EmptySelectionError
from chanscale.group_scales import scale_parameters
from chanscale.pruning import mask_channels, prune_channels
from chanscale.scaling import ChannelScale
from chanscale.selection import ChannelSelection, select_channels
from chanscale.weights import cache_path
from networks import (
    NETWORKS,
    TRUNKS,
    attach,
    build,
    build_classifier,
    describe,
    images,
    inputs,
    relative_difference,
    renew_statistics,
    require_slices,
    same_tensors,
    set_scales,
    widths_of,
)

# Of the largest output. A sum of 100 fp32 products is sure to about 1e-7; a scale folded in adds as much.
ROUNDING = 2e-6
ROUNDING_VGG16 = 1e-5  # 13 layers, sums of 4,608 products, and a head that divides by small deviations

every_network = pytest.mark.parametrize("name", NETWORKS)
every_trunk = pytest.mark.parametrize("name", TRUNKS)


@every_network
@torch.no_grad()
def test_1_attached_equals_original(name):
    original, x = build(name), inputs(name)
    assert torch.equal(attach(original)(x), original(x))


@every_network
def test_1_attached_equals_original_while_it_trains(name):
    original, x = build(name), inputs(name)
    attached = attach(original).train()
    for module in attached.modules():
        if isinstance(module, nn.Dropout) or not list(module.parameters(recurse=False)):
            module.training = False
    assert torch.equal(attached(x), original(x))


@every_network
@torch.no_grad()
def test_2_pruned_equals_masked(name):
    scaled, x = attach(build(name)), inputs(name)
    selection = set_scales(scaled)
    pruned = prune_channels(scaled, selection)
    assert relative_difference(pruned(x), scaled(x)) < ROUNDING
    assert selection.widths == widths_of(pruned) != widths_of(scaled)


@every_network
@torch.no_grad()
def test_2_pruned_equals_masked_whatever_the_scales(name):
    model, x = build(name), inputs(name)
    for unpruned in (model, attach(model)):
        selection = every_other_channel(model)
        masked, pruned = mask_channels(unpruned, selection), prune_channels(unpruned, selection)
        assert relative_difference(pruned(x), masked(x)) < ROUNDING
        assert relative_difference(pruned(x), unpruned(x)) > 100 * ROUNDING


@every_network
@torch.no_grad()
def test_3_merged_equals_scaled(name):
    original, x = build(name), inputs(name)
    scaled = attach(original)
    selection = set_scales(scaled)
    for model in (scaled, prune_channels(scaled, selection)):
        merged = merge_scales(model)
        assert relative_difference(merged(x), model(x)) < ROUNDING
        assert kinds(merged) == kinds(original)


@every_trunk
@torch.no_grad()
def test_4_reloaded_equals_saved(name, tmp_path):
    trunk, x = build(name), inputs(name)
    scaled = to_channels_last(attach(build_classifier(trunk)))  # as training leaves it
    kept = dict(set_scales(scaled).kept)
    model = renew_statistics(prune_channels(scaled, ChannelSelection(kept)))
    loaded, info = load_model(
        save_model(model, describe(model, kept), tmp_path / "m.safetensors"), trunk=trunk
    )
    assert same_tensors(loaded, model)
    assert torch.equal(loaded(x), model(x))
    assert info.widths == widths_of(model)


@every_network
def test_5_training_leaves_every_weight_a_slice_of_the_original(name):
    original, x = build(name), inputs(name)
    before = copy.deepcopy(original.state_dict())
    scaled = attach(original)
    optimizer = torch.optim.SGD([p for p in scaled.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        scaled.train()(x).square().mean().backward()
        optimizer.step()
    assert all((scale != 1).any() for scale in scale_parameters(scaled).values())
    kept = set_scales(scaled).kept
    require_slices(prune_channels(scaled, ChannelSelection(kept)), original, kept)
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())


@every_network
def test_6_removing_nothing_or_all_is_an_error(name):
    scaled = attach(build(name))
    with pytest.raises(EmptySelectionError, match="removes no channel"):
        select_channels(scaled, threshold=0.5)
    with pytest.raises(EmptySelectionError, match="removes all"):
        select_channels(scaled, threshold=1)
    name, width = next(iter(widths_of(scaled).items()))
    with pytest.raises(EmptySelectionError, match="keeps every channel"):
        prune_channels(scaled, ChannelSelection({name: torch.arange(width)}))
    with pytest.raises(EmptySelectionError, match="keeps none"):
        prune_channels(scaled, ChannelSelection({name: torch.arange(0)}))


@pytest.fixture(scope="module")
def vgg16():
    if not cache_path("vgg16").exists():
        pytest.skip("needs the weights of VGG16: run `chanscale weights fetch vgg16`")
    return load_backbone("vgg16", weights=cache_path("vgg16"))


@torch.no_grad()
def test_laws_1_to_4_hold_for_vgg16(vgg16, tmp_path):
    model, x = build_classifier(vgg16), images(2, side=64)
    model.preprocessing = find_backbone("vgg16").preprocessing()
    scaled = to_channels_last(attach(renew_statistics(model)))
    model = to_channels_last(model)
    assert torch.equal(scaled(x), model(x))
    selection = set_scales(scaled, zeros=0.5)
    renew_statistics(scaled)
    pruned = prune_channels(scaled, selection)
    assert relative_difference(pruned(x), scaled(x)) < ROUNDING_VGG16
    require_slices(pruned, model, selection.kept)
    merged = merge_scales(pruned)
    assert relative_difference(merged(x), pruned(x)) < ROUNDING_VGG16
    assert kinds(merged) == kinds(model)
    info = describe(pruned, dict(selection.kept), backbone="vgg16")
    loaded, _ = load_model(save_model(pruned, info, tmp_path / "m.safetensors"))
    assert same_tensors(loaded, pruned)
    assert torch.equal(loaded(x), pruned(x))


def every_other_channel(model):
    return ChannelSelection({name: torch.arange(0, width, 2) for name, width in widths_of(model).items()})


def kinds(model):
    """Return how many layers of each class there are, and make sure that none of them is ours."""
    found = Counter(type(module) for module in model.modules())
    assert not any(kind is ChannelScale or kind.__name__.startswith("Frozen") for kind in found)
    return found
