"""What scale-and-select is compared with, on a network and images that take a second."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from chanscale.attaching import attach_scales
from chanscale.backbones import BACKBONES
from chanscale.baselines import BASELINES, LEARNING_RATES, slimming
from chanscale.baselines.cutting import Target
from chanscale.baselines.fine_tuning import FineTuner
from chanscale.baselines.last_block import find_last_block
from chanscale.baselines.magnitude import rank_by_magnitude
from chanscale.baselines.scratch import draw_weights
from chanscale.baselines.slimming import find_gammas, rank_by_gamma, shrink
from chanscale.baselines.taylor import taylor_importance
from chanscale.channels import carry_groups, free_groups
from chanscale.costs import trunk_cost
from chanscale.errors import BudgetError, ConfigError, ModelError
from chanscale.learning import Learner
from chanscale.progress import Watcher
from chanscale.selection import WidthRule
from chanscale.training import fit
from networks import build_classifier, norm_trunk, randomise, require_slices, same_tensors
from tiny_fits import SPLITS, WIDTHS, tiny_classifier, tiny_config, tiny_images

DATA = tiny_images()
COST = trunk_cost(tiny_classifier(), free_groups(tiny_classifier()), DATA.batch([0])[0])
PRUNING = ("random", "select-only", "taylor-frozen", "magnitude", "taylor", "slimming")
BY_STRENGTH = ("head", "best-layer", "select-only")
EPOCHS = {"random": [2, 3]}
NORMED = {"slimming"}


def classifier_for(method):
    return tiny_normed() if method in NORMED else tiny_classifier()


def tiny_normed():
    """Return a fresh network with batch norms, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build_classifier(randomise(norm_trunk()))


def train(method, model=None, *, config=None, **options):
    return BASELINES[method](
        model or classifier_for(method), DATA, SPLITS, config or tiny_config(), Watcher(), **options
    )


@cache
def trained(method):
    """Return what a method makes of its network, once."""
    return train(method)


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize("method", BASELINES)
def test_the_same_seed_gives_the_same_network_and_leaves_the_given_one_alone(method):
    first, history = trained(method)
    model = classifier_for(method)
    before, flags = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(99)  # no random number may come from the global generator
    middle = {"lr": LEARNING_RATES[method][1]} if method in LEARNING_RATES else {}
    again, same = train(method, model, **middle)
    assert same_tensors(again, first)
    assert without_seconds(same) == without_seconds(history)
    assert same_tensors(model, before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", BASELINES)
def test_the_classifier_returned_is_that_of_the_chosen_row(method):
    model, history = trained(method)
    (chosen,) = (row for row in history if row["chosen"])
    learner = Learner(DATA, SPLITS, tiny_config(), Watcher())
    assert learner.validate(model)["validation_auc"] == pytest.approx(chosen["validation_auc"])
    eligible = [row for row in history if row.get("parameters_removed") != 0 or method not in PRUNING]
    assert chosen["validation_auc"] == max(row["validation_auc"] for row in eligible)


@pytest.mark.parametrize("method", BASELINES)
def test_history_has_a_row_for_each_epoch_or_penalty(method):
    _, history = trained(method)
    assert all(0 <= row["validation_auc"] <= 1 for row in history)
    if method in BY_STRENGTH:
        assert [row["c"] for row in history] == sorted({row["c"] for row in history})
    else:
        assert [row["epoch"] for row in history] == EPOCHS.get(method, [0, 1, 2, 3])


@pytest.mark.parametrize("method", PRUNING)
def test_methods_that_prune_meet_the_budget_within_the_allowed_widths(method):
    model, _ = trained(method)
    before = classifier_for(method)
    cost = trunk_cost(before, free_groups(before), DATA.batch([0])[0])
    left = {group.name: group.width for group in free_groups(model)}
    limit = (1 - tiny_config().budget) * cost.parameters()
    assert count_trunk(model) <= limit
    assert cost.parameters({name: torch.arange(width) for name, width in left.items()}) == count_trunk(model)
    last = list(left)[-1]
    assert all(width % 4 == 0 for name, width in left.items() if name != last)


def count_trunk(model):
    """Return the parameters of the convolutions of `model`."""
    return sum(
        parameter.numel()
        for layer in model.trunk.modules()
        if isinstance(layer, nn.Conv2d)
        for parameter in layer.parameters(recurse=False)
    )


@pytest.mark.parametrize("method", ["head", "scale"])
def test_a_frozen_trunk_stays_as_it_was(method):
    model, _ = trained(method)
    require_slices(model, classifier_for(method), {})


def test_scales_are_trained_without_a_removal():
    model, history = trained("scale")
    scales = [parameter for name, parameter in model.named_parameters() if "channel_scale" in name]
    assert [len(scale) for scale in scales] == list(WIDTHS.values())
    *others, last = scales
    assert all((scale != 1).any() for scale in others)
    assert torch.equal(last, torch.ones_like(last))  # the head's standardisation cancels it
    assert all(row["widths"] == WIDTHS for row in history)


def test_select_only_keeps_our_channels_as_they_were_published():
    model, _ = trained("select-only")
    kept = fit(tiny_classifier(), DATA, SPLITS, tiny_config()).kept
    require_slices(model, tiny_classifier(), kept)
    assert not any("channel_scale" in name for name in model.state_dict())


def test_random_has_our_widths_and_slices_of_other_channels():
    model, _ = trained("random")
    ours = fit(tiny_classifier(), DATA, SPLITS, tiny_config()).kept
    assert {g.name: g.width for g in free_groups(model)} == {name: len(kept) for name, kept in ours.items()}
    first, whole = model.trunk[0].weight, tiny_classifier().trunk[0].weight
    drawn = [next(i for i, w in enumerate(whole) if torch.equal(w, mine)) for mine in first]
    assert drawn == sorted(set(drawn))
    other, _ = train("random", config=tiny_config(seed=1))
    # A layer that loses nothing is the same with any seed; the budget takes something from one of them.
    assert any(not torch.equal(other.trunk[i].weight, model.trunk[i].weight) for i in (0, 3, 6))


def test_taylor_frozen_leaves_slices_behind():
    model, _ = trained("taylor-frozen")
    whole = tiny_classifier().trunk[0].weight
    assert all(any(torch.equal(w, mine) for w in whole) for mine in model.trunk[0].weight)


def test_last_block_trains_the_last_block_alone():
    before, (model, _) = tiny_classifier(), trained("last-block")
    block = find_last_block(before, DATA.batch([0])[0])
    assert block == ["trunk.6"]
    for name, parameter in before.named_parameters():
        trains = name.startswith(("trunk.6.", "head."))
        assert torch.equal(model.get_parameter(name), parameter) != trains, name


def test_last_block_holds_the_norms_in_front_of_it():
    before = tiny_normed()
    model, _ = train("last-block", before)
    block = find_last_block(before, DATA.batch([0])[0])
    assert block == ["trunk.8", "trunk.9"]
    for name, tensor in before.trunk.state_dict().items():
        trains = name.startswith(("8.", "9."))
        assert torch.equal(model.trunk.state_dict()[name], tensor) != trains, name


@pytest.mark.parametrize(
    ("backbone", "first", "count"),
    [("vgg16", "trunk.features.24", 3), ("efficientnet_lite0", "trunk.blocks.11.depthwise.conv", 30)],
)
def test_the_last_block_is_the_stage_of_deepest_resolution(backbone, first, count):
    trunk = BACKBONES[backbone].build()
    block = find_last_block(build_classifier(trunk), torch.rand(1, 3, 64, 64))
    assert block[0] == first
    assert len(block) == count


def test_where_the_resolution_never_falls_the_last_third_is_the_last_block():
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(6)]
    block = find_last_block(build_classifier(nn.Sequential(*layers)), torch.rand(1, 3, 32, 32))
    assert block == ["trunk.4", "trunk.5"]


@pytest.mark.parametrize("build", [tiny_classifier, tiny_normed])
def test_bias_trains_biases_alone(build):
    before = build()
    model, _ = train("bias", before)
    for name, tensor in before.trunk.state_dict().items():
        # A bias in front of a norm that stands still is trained too.
        assert torch.equal(model.trunk.state_dict()[name], tensor) != name.endswith("bias"), name


def test_bias_needs_one():
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    with pytest.raises(ConfigError, match="no layer of the network has a bias"):
        train("bias", build_classifier(trunk))


@pytest.mark.parametrize("build", [tiny_classifier, tiny_normed])
def test_scratch_knows_nothing_of_the_weights_given(build):
    config = tiny_config(budget=0.5)
    first, history = train("scratch", build(), config=config)
    other = build()
    with torch.no_grad():
        for tensor in (*other.trunk.parameters(), *other.trunk.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1)
    again, same = train("scratch", other, config=config)
    assert same_tensors(again, first)
    assert without_seconds(same) == without_seconds(history)


def test_scratch_refuses_weights_that_it_cannot_draw():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

    with pytest.raises(ModelError, match=r"the weights of 0 \(Gain\) cannot be drawn anew"):
        draw_weights(nn.Sequential(Gain()), seed=0)


def test_full_trains_every_weight():
    model, _ = trained("full")
    for name, parameter in tiny_classifier().named_parameters():
        assert not torch.equal(model.get_parameter(name), parameter), name


def test_slimming_refuses_a_network_without_batch_norms():
    with pytest.raises(ConfigError, match="the network has none; use magnitude or taylor") as caught:
        train("slimming", tiny_classifier())
    assert "\n" not in str(caught.value)


def test_slimming_ranks_by_gamma():
    model = tiny_normed()
    ranked = rank_by_gamma(model)
    for name, norm in GAMMAS.items():
        torch.testing.assert_close(ranked[name], model.trunk[norm].weight.detach().abs())


GAMMAS = {"trunk.0": 1, "trunk.4": 5, "trunk.8": 9}


def half_dead():
    """Return a network whose every second channel, of two layers, gets no gradient: its ReLU never opens."""
    model = tiny_normed()
    with torch.no_grad():
        for conv, norm in ((model.trunk[0], model.trunk[1]), (model.trunk[4], model.trunk[5])):
            norm.weight.fill_(1)
            norm.bias.zero_()
            conv.weight[1::2], norm.bias[1::2] = 0, -1
            if conv.bias is not None:
                conv.bias.zero_()
        model.trunk[1].weight[1], model.trunk[1].weight[3] = 2, -2
    return model


def test_slimming_takes_the_mean_off_gammas_that_nothing_holds_and_less_off_useful_ones(monkeypatch):
    before = half_dead()
    mean = torch.cat([before.trunk[norm].weight.detach() for norm in GAMMAS.values()]).abs().mean()
    ranked, epochs = [], []
    monkeypatch.setattr(
        slimming, "rank_by_gamma", lambda model: ranked.append(rank_by_gamma(model)) or ranked[-1]
    )
    validate = FineTuner.validate
    # The first epoch is the best, and is not what is cut.
    monkeypatch.setattr(
        FineTuner,
        "validate",
        lambda *of: validate(*of) | {"validation_auc": 1 / (epochs.append(1) or len(epochs))},
    )
    train("slimming", before)
    for name in ("trunk.0", "trunk.4"):
        whole, left = before.trunk[GAMMAS[name]].weight.detach().abs(), ranked[-1][name]
        torch.testing.assert_close(left[1::2], (whole[1::2] - mean).clamp_min(0), atol=1e-5, rtol=0)
        common = left[1::2][whole[1::2] == 1].max()
        assert common < 0.05
        assert left[::2].mean() > 0.2


def test_slimming_presses_gammas_of_channels_that_can_go():
    model = tiny_normed()
    first, *others = free_groups(model)
    gammas = find_gammas(carry_groups(model, (replace(first, protected="in use"), *others)))
    assert [id(gamma) for gamma in gammas] == [id(model.trunk[norm].weight) for norm in (5, 9)]
    before = copy.deepcopy(model)
    shrink(gammas, 0.4)
    for name, parameter in model.named_parameters():
        was = before.get_parameter(name).detach()
        pressed = (
            was.sign() * (was.abs() - 0.4).clamp_min(0)
            if name in ("trunk.5.weight", "trunk.9.weight")
            else was
        )
        torch.testing.assert_close(parameter.detach(), pressed)


def test_magnitude_is_the_l1_norm_of_filters():
    model = tiny_classifier()
    norms = model.trunk[3].weight.detach().abs().sum((1, 2, 3))
    torch.testing.assert_close(rank_by_magnitude(model, None)["trunk.3"], norms / norms.mean())


def test_taylor_importance_is_the_change_of_the_loss_to_first_order():
    """Against a difference quotient of the loss of each batch."""
    config = tiny_config(batch_size=24, augment=False)
    model = attach_scales(tiny_classifier(), free_groups(tiny_classifier()))
    learner = Learner(DATA, SPLITS, config, Watcher())
    ranked = taylor_importance(model, learner)
    scale = model.trunk[3].channel_scale.weight
    model.eval()

    def losses():
        with torch.enable_grad():
            return torch.tensor(
                [learner.backward(model, b, 0, i) for i, b in enumerate(learner.start_epoch(0))]
            )

    wanted = torch.zeros(3)
    for channel in range(len(wanted)):
        sides = []
        for step in (0.01, -0.01):
            with torch.no_grad():
                scale[channel] = 1 + step
            sides.append(losses())
        with torch.no_grad():
            scale[channel] = 1
        wanted[channel] = ((sides[0] - sides[1]) / 0.02).abs().sum()
    some = ranked["trunk.3"][: len(wanted)]
    torch.testing.assert_close(some / some.norm(), wanted / wanted.norm(), atol=0.02, rtol=0)
    # In training the head standardises by the batch, and would find the last layer worth nothing.
    assert ranked["trunk.6"].max() > 0.1


def test_a_group_that_is_not_ranked_stays_whole():
    target = Target(COST, WidthRule(), config=tiny_config(budget=0.3))
    selection = target.select({"trunk.3": torch.rand(16)})
    assert set(selection.kept) == {"trunk.3"}
    assert target.removed(selection) >= 0.3


@pytest.mark.parametrize("method", ["magnitude", "taylor", "slimming", "random"])
def test_methods_cut_in_one_shot_need_epochs_behind_it(method):
    with pytest.raises(ConfigError, match="use refine_epochs of at least 1"):
        train(method, config=tiny_config(refine_epochs=0))


@pytest.mark.parametrize("method", ["magnitude", "taylor", "taylor-frozen"])
def test_an_impossible_budget_is_an_error_before_any_epoch(method):
    epochs = []
    watcher = Watcher()
    watcher.on_epoch = lambda *heard: epochs.append(heard)
    with pytest.raises(BudgetError, match="Lower the budget"):
        BASELINES[method](tiny_classifier(), DATA, SPLITS, tiny_config(budget=0.9999), watcher)
    assert epochs == []


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_each_method_has_three_learning_rates(method):
    rates = LEARNING_RATES[method]
    assert len(rates) == 3
    assert list(rates) == sorted(rates)
    _, history = trained(method)
    _, other = train(method, lr=rates[2])
    assert without_seconds(other) != without_seconds(history)


def test_a_tolerance_does_not_lengthen_any_method():
    _, history = train("full", config=tiny_config(tolerance=0.02))
    assert len(history) == 4
    _, history = train("random", config=tiny_config(tolerance=0.49))
    assert len(history) == 2
