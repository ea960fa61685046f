"""Scales by group: tied channels have one norm, and one soft threshold."""

import pytest
import torch
from torch.nn import functional as F

from chanscale.errors import ModelError
from chanscale.group_scales import GroupScales, scale_parameters
from chanscale.scaling import soft_threshold
from networks import NETWORKS, attach, build, inputs, know_groups, plain_trunk, set_scales


def scaled(name="pre-activation", zeros=0.4):
    model = attach(build(name), inputs(name))
    set_scales(model, zeros=zeros)
    return model, GroupScales(model)


def by_hand(model, scales):
    """Return the scales of each channel, from the sites themselves."""
    found = {name: [[] for _ in range(width)] for name, width in scales.widths.items()}
    for group in model._channel_groups:
        if group.protected is None:
            for site in group.sites:
                weight = model.get_submodule(site.layer).channel_scale.weight
                for position, channel in zip(site.positions, site.channels, strict=True):
                    found[group.name][channel].append(weight[position].detach())
    return {name: [torch.stack(values) for values in channels] for name, channels in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_norm_is_the_root_mean_square_of_all_scales_of_a_channel(name):
    model, scales = scaled(name)
    for group, channels in by_hand(model, scales).items():
        wanted = torch.stack([values.square().mean().sqrt() for values in channels])
        torch.testing.assert_close(scales.norms()[group], wanted)


def test_one_scale_alone_has_its_size_for_a_norm_to_the_last_bit():
    model = attach(plain_trunk())
    weight = model[0].channel_scale.weight
    weight.data.copy_(torch.randn(8) * torch.logspace(-20, 3, 8))
    assert torch.equal(GroupScales(model).norms()["0"], weight.detach().abs())


def test_one_scale_alone_is_soft_thresholded_to_the_last_bit():
    model = attach(plain_trunk())
    weight, step = model[0].channel_scale.weight, torch.rand(8)
    weight.data.normal_()
    before, scales = weight.detach().clone(), GroupScales(model)
    scales.shrink(
        {name: step if name == "0" else torch.zeros(width) for name, width in scales.widths.items()}
    )
    assert torch.equal(weight.detach(), soft_threshold(before, step))


def test_tied_channels_shrink_along_their_direction_and_reach_0_together():
    model, scales = scaled(zeros=0.1)
    before, norms = by_hand(model, scales), scales.norms()
    steps = {name: 0.5 * torch.ones(width) for name, width in scales.widths.items()}
    [name] = [name for name, channels in before.items() if len(channels[0]) == 3]
    steps[name][5] = torch.inf
    scales.shrink(steps)
    for channel, (old, new) in enumerate(zip(before[name], by_hand(model, scales)[name], strict=True)):
        left = max(0.0, float(norms[name][channel] - steps[name][channel]))
        if left == 0:
            assert not new.any()
        else:
            torch.testing.assert_close(new, old / norms[name][channel] * left)
            assert F.cosine_similarity(new, old, dim=0) > 0.9999
    assert not by_hand(model, scales)[name][5].any()


def test_anchored_the_largest_share_has_a_mean_of_1_and_zeros_stay():
    _, scales = scaled()
    for scale in scales.parameters.values():
        scale.data.mul_(0.01)
    zeros = {name: norms == 0 for name, norms in scales.norms().items()}
    scales.anchor(0.25)
    for name, norms in scales.norms().items():
        assert float(norms.topk(round(len(norms) / 4)).values.mean()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(norms == 0, zeros[name])


def test_a_group_that_is_0_is_not_stretched():
    _, scales = scaled()
    for scale in scales.parameters.values():
        scale.data.zero_()
    scales.anchor(0.25)
    assert not any(scale.any() for scale in scales.parameters.values())


def test_the_gradient_of_the_norms_is_that_of_autograd():
    model, scales = scaled()
    for scale in scales.parameters.values():
        scale.data.normal_()
        scale.grad = torch.zeros_like(scale)
    slopes = {name: torch.rand(width) for name, width in scales.widths.items()}
    scales.add_to_gradients(slopes)
    total = torch.zeros(())
    for group in model._channel_groups:
        if group.protected is None:
            squares = torch.zeros(group.width)
            for site in group.sites:
                weight = model.get_submodule(site.layer).channel_scale.weight
                squares = squares.index_add(
                    0, torch.tensor(site.channels), weight[torch.tensor(site.positions)].square()
                )
            # n sites, and slope * n * rms: the group lasso's weight, sqrt(n), times the norm of n values.
            count = len(group.sites)
            total = total + (slopes[group.name] * count * (squares / count).sqrt()).sum()
    wanted = torch.autograd.grad(total, list(scales.parameters.values()))
    for scale, gradient in zip(scales.parameters.values(), wanted, strict=True):
        torch.testing.assert_close(scale.grad, gradient)


def test_scales_are_told_by_the_layer_that_they_stand_behind():
    model, scales = scaled()
    assert set(scale_parameters(model)) == {"norm1", "norm2", "norm3"}
    assert len(scales.widths) == 1


def test_without_scales_there_is_nothing_to_group():
    with pytest.raises(ModelError, match="call attach_scales first"):
        GroupScales(know_groups(plain_trunk()))
