import copy

import pytest
import torch
from torch import nn

from chanscale.attaching import attach_scales, merge_scales, replace_module, scale_weight
from chanscale.channels import channel_groups
from chanscale.errors import ModelError
from chanscale.selection import scale_parameters
from networks import NETWORKS, build, build_classifier, images, plain_trunk, same_tensors, set_scales

every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
def test_every_group_gets_one_scale_of_ones_and_they_alone_are_trained(name):
    original = build(name)
    scaled = attach_scales(original)
    scales = scale_parameters(scaled, channel_groups(scaled))
    assert {n: len(scale) for n, scale in scales.items()} == {
        g.name: g.width for g in channel_groups(original)
    }
    assert all((scale == 1).all() and scale.dtype == torch.float32 for scale in scales.values())
    linear = {id(p) for layer in scaled.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    trainable = {id(parameter) for parameter in scaled.parameters() if parameter.requires_grad}
    assert trainable == {id(scale) for scale in scales.values()} | linear


@every_network
@pytest.mark.parametrize("transform", [attach_scales, merge_scales])
def test_the_original_is_left_as_it_was(name, transform):
    model = build(name)
    if transform is merge_scales:
        model = attach_scales(model)
        set_scales(model)
    before, layers = copy.deepcopy(model), list(model.modules())
    with torch.no_grad():
        transform(model)(images())
    assert same_tensors(model, before)
    assert list(model.modules()) == layers
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


def test_frozen_weights_are_shared_and_the_head_is_copied():
    model = build_classifier(plain_trunk())
    scaled = attach_scales(model)
    assert scaled.trunk[0].weight.data_ptr() == model.trunk[0].weight.data_ptr()
    assert scaled.head.linear.weight.data_ptr() != model.head.linear.weight.data_ptr()


def test_merged_weights_are_not_shared():
    scaled = attach_scales(plain_trunk())
    merged = merge_scales(scaled)
    assert all(p.data_ptr() != q.data_ptr() for p in merged.parameters() for q in scaled.parameters())


def test_scales_are_attached_once_and_merged_once():
    model = plain_trunk()
    with pytest.raises(ModelError, match="merge_scales takes them out"):
        attach_scales(attach_scales(model))
    with pytest.raises(ModelError, match="no channel scales to merge"):
        merge_scales(model)
    with pytest.raises(ModelError, match="no channel scales to merge"):
        merge_scales(merge_scales(attach_scales(model)))


def test_scales_are_attached_again_after_a_merge():
    model, x = plain_trunk(), images()
    again = attach_scales(merge_scales(attach_scales(model)))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))  # scales of 1: nothing was rounded


def test_a_weight_is_scaled_by_output_channel():
    weight, scale = torch.randn(3, 2, 5, 5), torch.tensor([0.0, -2.0, 0.5])
    assert torch.equal(scale_weight(weight, scale)[1], weight[1] * -2)
    assert torch.equal(scale_weight(torch.ones(3), scale), scale)


def test_a_module_is_replaced_under_every_name_it_has():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Sequential(relu))
    replace_module(model, "1.0", nn.Identity())
    assert isinstance(model[0], nn.Identity)
    assert model[0] is model[1][0]
