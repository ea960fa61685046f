"""In front of the head, scales tell nothing: which channels stay is what the head's weights say."""

import pytest
import torch
from torch import nn

from chanscale.channels import free_groups
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.epochs import EpochRunner
from chanscale.group_scales import GroupScales, scale_parameters
from chanscale.last_layer import LEAST, drop_rounding, find_last
from chanscale.progress import Watcher
from chanscale.schedule import plan_epochs
from chanscale.selection import WidthRule
from chanscale.shrinking import BudgetPenalty
from chanscale.training import start
from networks import attach, build_classifier, images, know_groups, plain_trunk, randomise
from tiny_fits import SPLITS, tiny_classifier, tiny_config, tiny_images

LAST = "trunk.6"


def backward(model):
    """Fill the gradients of all scales with those of some loss, as in training."""
    model.train()
    for scale in scale_parameters(model).values():
        scale.requires_grad_(True)
    pixels = images(12, side=32)
    targets = torch.arange(12).remainder(2).float()
    loss = nn.functional.binary_cross_entropy_with_logits(model(pixels)[:, 0], targets)
    loss.backward()
    return scale_parameters(model)


def test_a_scale_that_the_heads_standardisation_cancels_has_a_gradient_of_0_and_others_keep_theirs():
    model = attach(build_classifier(randomise(plain_trunk((8, 16, 16)))))
    scales = backward(model)
    before = {layer: scale.grad.clone() for layer, scale in scales.items()}
    assert before[LAST].any()
    assert before[LAST].abs().max() < 1e-3 * before["trunk.3"].abs().max()
    drop_rounding(GroupScales(model).last, scales)
    assert not scales[LAST].grad.any()
    assert all(torch.equal(scales[layer].grad, before[layer]) for layer in ("trunk.0", "trunk.3"))


def test_a_scale_that_is_not_cancelled_keeps_its_gradient():
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.SiLU())
    model = attach(build_classifier(randomise(trunk)))
    scales = backward(model)
    before = scales["trunk.2"].grad.clone()
    drop_rounding(GroupScales(model).last, scales)
    assert before.any()
    assert torch.equal(scales["trunk.2"].grad, before)


def test_a_scale_without_a_gradient_gets_none():
    model = attach(build_classifier(randomise(plain_trunk((8, 16, 16)))))
    scales = scale_parameters(model)
    drop_rounding(GroupScales(model).last, scales)
    assert all(scale.grad is None for scale in scales.values())


@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_a_channel_is_used_as_much_as_the_heads_weights_for_it_are_large(classes):
    model = build_classifier(randomise(plain_trunk((8, 16, 16))), classes=classes)
    found = find_last(model, free_groups(model))
    assert list(found) == [LAST]
    sizes = model.head.linear.weight.detach().norm(dim=0)
    torch.testing.assert_close(found[LAST].uses(), (sizes / sizes.mean()).clamp_min(LEAST))


def test_a_group_that_something_else_reads_too_is_none_of_the_last():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            stem = self.stem(x).relu()
            return torch.cat([stem, self.body(stem).relu()], 1)

    model = know_groups(build_classifier(randomise(Branching())), images(2, 32))
    assert list(find_last(model, free_groups(model))) == ["trunk.body"]


def test_in_the_last_layer_those_channels_stay_that_the_head_makes_most_of():
    config = tiny_config(concavity=0.0, scale_epochs=2)
    classifier, data = tiny_classifier(), tiny_images()
    state = start(classifier, data, SPLITS, config)
    cost = trunk_cost(classifier, free_groups(classifier), data.batch([0])[0])
    penalty = BudgetPenalty(cost, WidthRule(), config)
    runner = EpochRunner(data, SPLITS, penalty, config, Watcher())
    moments = [moment for moment in plan_epochs(config) if moment.phase == "scale"]
    runner._train(state, moments[0])
    scales = GroupScales(state.model)
    last = scales.parameters[LAST].detach()
    uses = scales.last[LAST].uses()
    selection, _ = penalty.select_within(scales, 0.5)
    kept = selection.kept[LAST]
    gone = torch.tensor([index for index in range(len(last)) if index not in kept.tolist()])
    assert len(gone)
    assert (last * uses)[kept].min() >= (last * uses)[gone].max()


def test_the_penalty_weighs_a_channel_less_the_more_the_head_makes_of_it():
    model = attach(build_classifier(randomise(plain_trunk((8, 16, 16)))))
    scales = GroupScales(model)
    cost = trunk_cost(model, free_groups(model), images(1, side=32))
    penalty = BudgetPenalty(cost, WidthRule(), FitConfig(weigh_by="uniform"))
    weights = penalty._weigh(scales)
    torch.testing.assert_close(weights[LAST] * scales.last[LAST].uses(), torch.ones(16))
    assert weights["trunk.0"] == weights["trunk.3"] == 1
