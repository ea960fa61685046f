import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chanscale.channels import ChannelGroup, Slot
from chanscale.costs import LayerCost, TrunkCost, trunk_cost
from chanscale.errors import BudgetError, EmptySelectionError, ModelError
from chanscale.group_scales import scale_parameters
from chanscale.proof import channel_groups, remove_coupled
from chanscale.selection import WidthRule, keep_above, keep_within, select_channels
from networks import attach, images, know_groups, plain_trunk


def chain_cost(widths):
    """Return the cost of a chain of 3 x 3 convolutions, from an RGB image of 64 pixels."""
    inputs = [3, *widths]
    layers = [LayerCost(str(i), width, inputs[i], 9, True, 64) for i, width in enumerate(widths)]
    groups = []
    for i, width in enumerate(widths):
        every = tuple(range(width))
        groups.append(
            ChannelGroup(str(i), width, (Slot(str(i), every, every),), (Slot(str(i + 1), every, every),), ())
        )
    return TrunkCost(tuple(layers), tuple(groups))


def first_of(widths):
    """Return so many channels of each group; in a chain, which they are does not matter to the cost."""
    return {name: torch.arange(width) for name, width in widths.items()}


@st.composite
def cases(draw):
    """Draw importances with ties and zeros, a rule, what is counted, and a share to keep."""
    widths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    value = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 1.0, 7.0])
    importance = {
        str(index): torch.tensor(draw(st.lists(value, min_size=width, max_size=width)))
        for index, width in enumerate(widths)
    }
    rule = WidthRule(
        minimum=draw(st.integers(1, 4)),
        round_to=draw(st.sampled_from([1, 2, 4, 16])),
        unrounded=frozenset({str(len(widths) - 1)}),
    )
    return importance, rule, draw(st.sampled_from(["parameters", "macs"])), draw(st.floats(0, 1))


def widths_of(importance):
    return {name: len(values) for name, values in importance.items()}


def neighbour(rule, name, width, whole):
    """Return the next width above `width` that the rule allows."""
    return next(rule.apply(name, wanted, whole) for wanted in range(width + 1, whole + 1))


@given(cases())
def test_within_a_limit_is_met_and_not_overshot_by_more_than_one_width_step(case):
    importance, rule, of, share = case
    whole = widths_of(importance)
    cost = chain_cost(list(whole.values()))
    limit = share * cost.of(of)
    smallest = {name: rule.apply(name, 0, width) for name, width in whole.items()}
    if cost.of(of, first_of(smallest)) > limit:
        with pytest.raises(BudgetError, match=f"at most .* {of} are to be kept"):
            keep_within(importance, cost=cost, of=of, limit=limit, rule=rule)
        return
    selection, last = keep_within(importance, cost=cost, of=of, limit=limit, rule=rule)
    widths = selection.widths
    assert cost.of(of, first_of(widths)) <= limit
    narrowed = [name for name in whole if widths[name] < whole[name]]
    wider = [widths | {name: neighbour(rule, name, widths[name], whole[name])} for name in narrowed]
    assert not narrowed or any(cost.of(of, first_of(one_more)) > limit for one_more in wider)
    assert all(rule.apply(name, width, whole[name]) == width for name, width in widths.items())
    removed = torch.cat([values[~is_kept(values, selection.kept[n])] for n, values in importance.items()])
    assert last == 0 or last >= removed.max()


@given(cases())
def test_the_largest_of_each_group_stay_whatever_the_width_is_rounded_to(case):
    importance, rule, _, threshold = case
    selection = keep_above(importance, threshold=threshold, rule=rule)
    for name, values in importance.items():
        kept = selection.kept[name]
        stays = is_kept(values, kept)
        assert (kept[1:] > kept[:-1]).all()
        assert len(kept) == rule.apply(name, int((values > threshold).sum()), len(values))
        assert stays[values > threshold].all()
        assert stays.all() or values[stays].min() >= values[~stays].max()


@given(st.integers(0, 70), st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_a_rule_gives_the_least_allowed_width_that_is_enough(wanted, width, minimum, multiple):
    got = WidthRule(minimum, multiple).apply("a", wanted, width)
    assert got == width or (got % multiple == 0 and got >= max(wanted, minimum) > got - multiple)
    assert 1 <= got <= width
    unrounded = WidthRule(minimum, multiple, frozenset({"a"})).apply("a", wanted, width)
    assert unrounded == min(width, max(wanted, minimum, 1))


@pytest.mark.parametrize(
    ("size", "widths"), [(1, [16, 16, 32, 64]), (2, [8, 16, 24, 64]), (32, [1, 9, 17, 64])]
)
def test_a_rule_counts_the_channels_of_a_layer(size, widths):
    rule = WidthRule(minimum=4, round_to=16, sizes={"a": size})
    assert [rule.apply("a", wanted, 64) for wanted in (1, 9, 17, 64)] == widths


class PartlyAdded(nn.Module):
    """Two maps side by side, and what is added to both: one group, of which two layers hold a half each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.both, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 3)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.out((x + self.both(x)).relu())


@pytest.mark.parametrize("minimum", [1, 3])
def test_no_layer_that_holds_a_part_of_a_group_is_emptied(minimum):
    model, x = PartlyAdded().eval(), images()
    groups = channel_groups(model, x)
    (group,) = [group for group in groups if group.width == 16]
    importance = {group.name: torch.linspace(1, 2, 16)}  # all of `a` would go first
    rule, cost = WidthRule(minimum=minimum), trunk_cost(model, groups, x)
    half = cost.limit("parameters", 0.6)
    selections = [
        keep_within(importance, cost=cost, of="parameters", limit=half, rule=rule)[0],
        keep_above(importance, threshold=1.9, rule=rule, groups=groups),
    ]
    for selection in selections:
        kept = selection.kept[group.name]
        assert (kept < 8).sum() == minimum
        assert cost.parameters({group.name: kept}) <= half
        pruned = remove_coupled(model, groups, selection.kept)
        assert pruned.a.out_channels == minimum
        assert torch.isfinite(pruned(x)).all()


def is_kept(values, kept):
    return torch.zeros(len(values), dtype=torch.bool).index_fill(0, kept, True)


def scaled_trunk():
    model = attach(plain_trunk((4, 6)))
    first, *_ = scale_parameters(model).values()
    first.data.copy_(torch.tensor([0.5, -0.9, 0.0, 0.04]))
    return model


def test_a_threshold_keeps_the_channels_whose_magnitude_is_above_it():
    assert {
        name: kept.tolist() for name, kept in select_channels(scaled_trunk(), threshold=0.04).kept.items()
    } == {"0": [0, 1]}
    at_least_three = select_channels(scaled_trunk(), threshold=0.04, rule=WidthRule(minimum=3))
    assert at_least_three.kept["0"].tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        (
            0.9,
            r"threshold=0.9 removes all 4 channels of '0'; the largest scale is 0.9. Use a threshold below it",
        ),
        (-1, r"threshold=-1 removes no channel; the smallest scale is 0. Train longer"),
    ],
)
def test_a_threshold_that_removes_all_or_nothing_is_an_error(threshold, words):
    with pytest.raises(EmptySelectionError, match=words):
        select_channels(scaled_trunk(), threshold=threshold)


def test_rounding_that_gives_every_channel_back_is_an_error():
    with pytest.raises(EmptySelectionError, match="removes no channel"):
        select_channels(scaled_trunk(), threshold=0.04, rule=WidthRule(round_to=16))


def test_without_scales_there_is_nothing_to_select():
    with pytest.raises(ModelError, match="call attach_scales first"):
        select_channels(know_groups(plain_trunk((4, 6))), threshold=0.5)
    with pytest.raises(ModelError, match="does not know its channel groups"):
        select_channels(plain_trunk((4, 6)), threshold=0.5)


def test_a_budget_too_high_names_the_smallest_network_and_the_ways_out():
    cost = chain_cost([4, 6])
    importance = {"0": torch.ones(4), "1": torch.ones(6)}
    smallest, ones = (cost.parameters(first_of({"0": width, "1": width})) for width in (2, 1))
    told = f"parameters are to be kept, but the smallest widths allowed hold {smallest}"
    for limit, way_out in (
        (ones, ". Lower the budget, min_channels"),
        (10, f", and one channel .* hold {ones}"),
    ):
        with pytest.raises(BudgetError, match=f"at most {limit} {told}{way_out}"):
            keep_within(importance, cost=cost, of="parameters", limit=limit, rule=WidthRule(minimum=2))


def test_a_budget_that_no_width_can_meet_names_what_cannot_go():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.GroupNorm(2, 32)),
        images(),
    )
    cost = trunk_cost(model, channel_groups(model, x), x)
    importance = {name: torch.ones(width) for name, width in cost.widths.items()}
    words = (
        r"one channel in each layer that can lose any would hold .* \(2: .*\)\. Lower the budget to (0\.\d+)$"
    )
    with pytest.raises(BudgetError, match=words) as raised:
        keep_within(
            importance, cost=cost, of="parameters", limit=cost.limit("parameters", 0.99), rule=WidthRule()
        )
    budget = float(str(raised.value).rpartition(" ")[2])
    keep_within(
        importance, cost=cost, of="parameters", limit=cost.limit("parameters", budget), rule=WidthRule()
    )
