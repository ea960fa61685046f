import copy

import pytest
import torch
from torch import nn

from chanscale.attaching import merge_scales, scale_weight
from chanscale.channels import free_groups
from chanscale.errors import ModelError
from chanscale.group_scales import GroupScales, scale_parameters
from networks import (
    NETWORKS,
    attach,
    build,
    build_classifier,
    images,
    inputs,
    plain_trunk,
    randomise,
    same_tensors,
    set_scales,
    widths_of,
)

every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
def test_every_site_gets_a_scale_of_ones_and_they_alone_are_trained(name):
    original = build(name)
    scaled = attach(original)
    scales = scale_parameters(scaled)
    assert set(scales) == {site.layer for group in free_groups(original) for site in group.sites}
    assert set(GroupScales(scaled).widths.items()) == set(widths_of(original).items())
    assert all((scale == 1).all() and scale.dtype == torch.float32 for scale in scales.values())
    others = (nn.Linear, nn.PReLU, nn.GroupNorm)
    linear = {id(p) for layer in scaled.modules() if isinstance(layer, others) for p in layer.parameters()}
    trainable = {id(parameter) for parameter in scaled.parameters() if parameter.requires_grad}
    assert trainable == {id(scale) for scale in scales.values()} | linear


@every_network
@pytest.mark.parametrize("transform", [attach, merge_scales])
def test_the_original_is_left_as_it_was(name, transform):
    model = build(name)
    if transform is merge_scales:
        model = attach(model)
        set_scales(model)
    before, layers = copy.deepcopy(model), list(model.modules())
    with torch.no_grad():
        transform(model)(inputs(name))
    assert same_tensors(model, before)
    assert list(model.modules()) == layers
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


def test_frozen_weights_are_shared_and_the_head_is_copied():
    model = build_classifier(plain_trunk())
    scaled = attach(model)
    assert scaled.trunk[0].weight.data_ptr() == model.trunk[0].weight.data_ptr()
    assert scaled.head.linear.weight.data_ptr() != model.head.linear.weight.data_ptr()


def test_merged_weights_are_not_shared():
    scaled = attach(plain_trunk())
    merged = merge_scales(scaled)
    assert all(p.data_ptr() != q.data_ptr() for p in merged.parameters() for q in scaled.parameters())


def test_scales_are_attached_once_and_merged_once():
    model = plain_trunk()
    with pytest.raises(ModelError, match="merge_scales takes them out"):
        attach(attach(model))
    with pytest.raises(ModelError, match="no channel scales to merge"):
        merge_scales(model)
    with pytest.raises(ModelError, match="no channel scales to merge"):
        merge_scales(merge_scales(attach(model)))


def test_scales_are_attached_again_after_a_merge():
    model, x = plain_trunk(), images()
    again = attach(merge_scales(attach(model)))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))  # scales of 1: nothing was rounded


def test_a_weight_is_scaled_by_output_channel():
    weight, scale = torch.randn(3, 2, 5, 5), torch.tensor([0.0, -2.0, 0.5])
    assert torch.equal(scale_weight(weight, scale)[1], weight[1] * -2)
    assert torch.equal(scale_weight(torch.ones(3), scale), scale)


def test_hooks_of_the_user_stay_and_run_before_the_scale():
    model, seen = plain_trunk(), []
    model[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    scaled = attach(model)
    scaled[0].channel_scale.weight.data.mul_(2)
    seen.clear()
    with torch.no_grad():
        out = scaled[0](images())
        assert torch.equal(out, (seen[0] * 2).relu())
        merge_scales(scaled)(images())
    assert len(seen) == 2


@torch.no_grad()
def test_a_layer_with_a_hook_that_changes_its_output_keeps_its_scale_behind_it_when_merged():
    model, x = plain_trunk(), images()
    model[0].register_forward_hook(lambda _layer, _inputs, output: output.clamp(max=0.1))
    scaled = attach(model)
    set_scales(scaled)
    torch.testing.assert_close(merge_scales(scaled)(x), scaled(x))


class ShiftedNorm(nn.BatchNorm2d):
    """A norm of the user's own that does more than scale and shift."""

    def forward(self, x):
        return super().forward(x).relu()


@torch.no_grad()
def test_a_layer_of_its_own_class_keeps_its_scale_behind_it_when_merged():
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), ShiftedNorm(8), nn.Conv2d(8, 4, 3))).eval()
    scaled = attach(model)
    set_scales(scaled)
    merged, x = merge_scales(scaled), images()
    torch.testing.assert_close(merged(x), scaled(x))
    assert type(merged[1]) is ShiftedNorm
    assert torch.equal(attach(model).train()(x), model(x))  # it stays in eval
