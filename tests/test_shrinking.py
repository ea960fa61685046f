import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chanscale.channels import free_groups
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.group_scales import GroupScales
from chanscale.selection import WidthRule
from chanscale.shrinking import BudgetPenalty, Pace, channel_weights
from networks import attach, build_classifier, images, plain_trunk, widths_of

MODEL = build_classifier(plain_trunk((6, 12, 10)))
nn.init.ones_(
    MODEL.head.linear.weight
)  # it makes as much of every channel: scales alone tell them apart here
WIDTHS = widths_of(MODEL)
COST = trunk_cost(MODEL, free_groups(MODEL), images(1, side=32))
WEIGHTINGS = ["uniform", "parameters", "macs"]


def penalty(rule=None, **options):
    return BudgetPenalty(COST, rule or WidthRule(), FitConfig(**options))


def draw_scales(seed=0):
    """Return random scales; in a chain, a group is named as the layer that its one scale stands behind."""
    generator = torch.Generator().manual_seed(seed)
    scales = GroupScales(attach(MODEL))
    assert list(scales.parameters) == list(WIDTHS)
    for scale in scales.parameters.values():
        scale.data.copy_(torch.randn(len(scale), generator=generator) * 0.3 + 1)
    return scales


@st.composite
def phases(draw):
    """Draw what a penalty is made of, a budget, a number of batches, and a seed for what the data do."""
    options = {
        "concavity": draw(st.sampled_from([0.0, 1.0, 3.0, 8.0])),
        "budget_of": draw(st.sampled_from(["parameters", "macs"])),
    }
    rule = WidthRule(minimum=draw(st.integers(1, 2)), round_to=draw(st.sampled_from([1, 2, 4])))
    return rule, options, draw(st.floats(0.2, 0.6)), draw(st.integers(1, 20)), draw(st.integers(0, 10**6))


@pytest.mark.parametrize("weigh_by", WEIGHTINGS)
@settings(max_examples=25)
@given(phases())
@torch.no_grad()
def test_with_the_last_batch_the_budget_is_met_by_scales_that_are_exactly_0(weigh_by, phase):
    rule, options, budget, batches, seed = phase
    model = penalty(rule, weigh_by=weigh_by, **options)
    scales, generator = draw_scales(seed), torch.Generator().manual_seed(seed)
    for done in range(batches):
        for scale in (
            scales.parameters.values()
        ):  # the data pull every scale up or down, against the penalty or with it
            scale += 0.05 * torch.randn(len(scale), generator=generator)
        model.shrink(scales, Pace(budget, batches - done, batches))
    selection, pivot = model.select_within(scales, budget)
    of = options["budget_of"]
    assert COST.of(of, selection.kept) <= (1 - budget) * COST.of(of)
    assert pivot == 0
    for name, scale in scales.parameters.items():
        gone = torch.ones(len(scale), dtype=torch.bool)
        gone[selection.kept[name]] = False
        assert not scale[gone].any()


@pytest.mark.parametrize("weigh_by", WEIGHTINGS)
@pytest.mark.parametrize("concavity", [0.0, 3.0, 8.0])
@torch.no_grad()
def test_shrinking_brings_every_scale_nearer_to_0_and_none_beyond(weigh_by, concavity):
    scales = draw_scales()
    before = {name: scale.clone() for name, scale in scales.parameters.items()}
    step = penalty(weigh_by=weigh_by, concavity=concavity).shrink(scales, Pace(0.6, 3, 10))
    assert step > 0
    for name, scale in scales.parameters.items():
        assert (scale * before[name] >= 0).all()
        assert (scale.abs() < before[name].abs()).all()


def test_without_concavity_or_weights_all_scales_lose_the_same():
    scales = draw_scales()
    before = {name: scale.detach().clone() for name, scale in scales.parameters.items()}
    step = penalty(weigh_by="uniform", concavity=0.0).shrink(scales, Pace(0.6, 20, 20))
    for name, scale in scales.parameters.items():
        loss = before[name].abs() - scale.detach().abs()
        survivors = scale != 0
        assert torch.allclose(loss[survivors], torch.full_like(loss[survivors], step), atol=1e-6)


def test_a_concave_penalty_spares_the_large_and_presses_the_small():
    scales = draw_scales()
    before = {name: scale.detach().clone() for name, scale in scales.parameters.items()}
    model = penalty(weigh_by="uniform", concavity=3.0)
    pivot = model.select_within(scales, 0.6)[1]
    step = model.shrink(scales, Pace(0.6, 10, 20))
    for name, scale in scales.parameters.items():
        loss = before[name].abs() - scale.detach().abs()
        assert (loss[before[name].abs() > 1.01 * pivot] < step).all()
        assert (loss[(before[name].abs() < 0.99 * pivot) & (scale.detach() != 0)] > step).all()


def test_channels_below_the_pivot_reach_0_before_it():
    scales, model = draw_scales(), penalty(weigh_by="uniform")
    selection, pivot = model.select_within(scales, 0.6)
    for done in range(20):
        model.shrink(scales, Pace(0.6, 20 - done, 20))
    assert pivot > 0
    # Nothing pulled at the scales: those that were the smallest are gone, and only those.
    assert {n: (s != 0).nonzero().flatten().tolist() for n, s in scales.parameters.items()} == {
        name: kept.tolist() for name, kept in selection.kept.items()
    }


@pytest.mark.parametrize("weigh_by", WEIGHTINGS)
def test_the_gradient_of_the_penalty_points_towards_0(weigh_by):
    scales = draw_scales()
    data = {name: torch.randn(len(scale)) for name, scale in scales.parameters.items()}
    for name, scale in scales.parameters.items():
        scale.data[0] = 0
        scale.grad = data[name].clone()
    penalty(weigh_by=weigh_by).add_gradient(scales, Pace(0.6, 10, 20), lr=0.01)
    for name, scale in scales.parameters.items():
        added = scale.grad - data[name]
        assert torch.equal(added.sign(), scale.detach().sign())
        assert added[0] == 0


def test_where_the_budget_is_met_already_the_gradient_of_the_penalty_is_nothing():
    """The pivot is 0 then, and so is the learning rate, which its step is measured by."""
    scales, model = draw_scales(), penalty()
    for scale in scales.parameters.values():
        scale.grad = torch.ones_like(scale)
    assert model.pivot(scales, Pace(0.0, 10, 20)) == 0
    assert model.add_gradient(scales, Pace(0.0, 10, 20), lr=0.0) == 0
    assert all(torch.equal(scale.grad, torch.ones_like(scale)) for scale in scales.parameters.values())


def test_what_has_reached_0_is_selected_but_never_beyond_the_budget():
    scales, model = draw_scales(), penalty(WidthRule(minimum=1))
    first = next(iter(scales.parameters.values()))
    first.data[:2] = 0
    assert model.select_reached(scales, 0.6).widths == {**WIDTHS, "trunk.0": 4}
    for scale in scales.parameters.values():
        scale.data[1:] = 0
    selection = model.select_reached(scales, 0.6)
    assert selection.kept.keys() == WIDTHS.keys()
    assert selection.widths == model.select_within(scales, 0.6)[0].widths
    assert sum(selection.widths.values()) > len(WIDTHS)


@pytest.mark.parametrize("weigh_by", WEIGHTINGS)
def test_weights_have_a_mean_of_1_over_all_channels(weigh_by):
    weights = channel_weights(weigh_by, COST)
    assert sum(weights[name] * width for name, width in WIDTHS.items()) == pytest.approx(sum(WIDTHS.values()))


def test_channels_that_cost_more_weigh_more_and_uniform_ones_weigh_the_same():
    assert set(channel_weights("uniform", COST).values()) == {1.0}
    for of in ("parameters", "macs"):
        saved, weights = COST.per_channel(of), channel_weights(of, COST)
        assert sorted(WIDTHS, key=saved.get) == sorted(WIDTHS, key=weights.get)
        assert len(set(weights.values())) == len(WIDTHS)


@torch.no_grad()
def test_channels_that_the_least_width_holds_are_not_pressed_to_nothing():
    model = penalty(WidthRule(round_to=4), weigh_by="uniform")
    scales = draw_scales()
    first, *others = scales.parameters.values()
    first.copy_(torch.linspace(0.1, 0.2, 6))  # less important than all that must go
    held, batches = first[2:].clone(), 10
    for done in range(batches):
        model.shrink(scales, Pace(0.6, batches - done, batches))
    assert (first[2:] > 0.7 * held).all()
    assert first[:2].tolist() == [0, 0]
    assert any((scale == 0).any() for scale in others)
