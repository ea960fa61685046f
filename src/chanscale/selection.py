"""Which channels stay: by a threshold on the scales, or the best that fit a budget."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import floor, gcd

import torch
from torch import Tensor, nn

from chanscale.channels import ChannelGroup, Kept, free_groups
from chanscale.costs import TrunkCost
from chanscale.errors import BudgetError, EmptySelectionError, clip
from chanscale.group_scales import GroupScales

Widths = Mapping[str, int]
"""How many channels each group has, by its name."""


@dataclass(frozen=True)
class ChannelSelection:
    """The channels that stay in each group: ascending indices, shape (kept,), by the group's name."""

    kept: Kept

    @property
    def widths(self) -> dict[str, int]:
        """How many channels stay in each group."""
        return {name: len(kept) for name, kept in self.kept.items()}


@dataclass(frozen=True)
class WidthRule:
    """What widths a selection may leave: at least `minimum`, rounded up to a multiple of `round_to`.

    Groups named in `unrounded` are only held to the minimum. Kernels of a CPU work on blocks of channels
    (16 fp32 values fill one AVX-512 register), so that a width in between costs as much as the next multiple.
    `sizes`: how many channels of a layer one of a group is, where it is not 1; the layer's are what the rule is for.
    A layer that holds a part of a group keeps the minimum of that part, by which the group may come to a few more.
    """

    minimum: int = 1
    round_to: int = 1
    unrounded: frozenset[str] = frozenset()
    sizes: Widths = field(default_factory=dict)

    def apply(self, name: str, wanted: int, width: int) -> int:
        """Return the width that `wanted` channels out of `width` lead to."""
        multiple = 1 if name in self.unrounded else self.round_to // gcd(self.round_to, self._size(name))
        rounded = -(-max(wanted, self.least(name)) // multiple) * multiple
        return min(rounded, width)

    def least(self, name: str) -> int:
        """Return how many channels of a group the minimum is."""
        return max(-(-self.minimum // self._size(name)), 1)

    def floor(self, name: str, width: int) -> int:
        """Return the least width that a group of `width` channels can come to."""
        return self.apply(name, 1, width)

    def _size(self, name: str) -> int:
        return self.sizes.get(name, 1)


def select_channels(model: nn.Module, *, threshold: float, rule: WidthRule | None = None) -> ChannelSelection:
    """Keep the channels whose norm, |scale| where there is one, is above `threshold`, and what the rule adds.

    `model`: with scales. Raises EmptySelectionError when that would empty a group, or remove nothing at all.
    """
    importance = GroupScales(model).norms()
    for name, values in importance.items():
        if not (values > threshold).any():
            raise EmptySelectionError(
                f"threshold={threshold:g} removes all {len(values)} channels of {name!r}; "
                f"the largest scale is {values.max():.2g}. Use a threshold below it"
            )
    selection = keep_above(
        importance, threshold=threshold, rule=rule or WidthRule(), groups=free_groups(model)
    )
    if selection.widths == {name: len(values) for name, values in importance.items()}:
        smallest = min(float(values.min()) for values in importance.values())
        raise EmptySelectionError(
            f"threshold={threshold:g} removes no channel; the smallest scale is {smallest:.2g}. "
            "Train longer, or use a threshold above it"
        )
    return selection


def keep_above(
    importance: Mapping[str, Tensor],
    *,
    threshold: float,
    rule: WidthRule,
    groups: Iterable[ChannelGroup] = (),
) -> ChannelSelection:
    """Keep each group's channels above `threshold`, and the next best ones until its width obeys the rule.

    `groups`: those of the network, where a layer may hold a part of one.
    """
    wanted = {name: int((values > threshold).sum()) for name, values in importance.items()}
    largest = by_size(importance)
    return _take(largest, _apply(rule, wanted, importance), spare(largest, groups, rule))


def keep_within(
    importance: Mapping[str, Tensor], *, cost: TrunkCost, of: str, limit: float, rule: WidthRule
) -> tuple[ChannelSelection, float]:
    """Remove the least important channels of all groups, one after the other, until the cost is at most `limit`.

    Returns the selection and the importance of the last channel removed (0 when none had to go). It never
    goes further below the limit than the last step of one group's width. Raises BudgetError when the rule
    forbids to go that far.
    """
    names = list(importance)
    values = torch.cat([importance[name] for name in names]).cpu()
    order = values.argsort(stable=True)
    group_of = torch.cat([torch.full((len(importance[name]),), i) for i, name in enumerate(names)])[order]
    largest = by_size(importance)
    spared = spare(largest, cost.groups, rule)

    def widths_after(removed: int) -> dict[str, int]:
        gone = torch.bincount(group_of[:removed], minlength=len(names)).tolist()
        return _apply(rule, {n: len(importance[n]) - g for n, g in zip(names, gone, strict=True)}, importance)

    def cost_after(removed: int) -> int:
        return cost.of(of, _keep(largest, widths_after(removed), spared))

    low, high = 0, len(order)
    if cost_after(high) > limit:
        raise BudgetError(_explain_excess(cost, of, limit, least=cost_after(high)))
    while low < high:  # the cost falls with every removal, so the first that fits is found by bisection
        middle = (low + high) // 2
        low, high = (low, middle) if cost_after(middle) <= limit else (middle + 1, high)
    last = float(values[order[low - 1]]) if low else 0.0
    return _take(largest, widths_after(low), spared), last


def _explain_excess(cost: TrunkCost, of: str, limit: float, *, least: int) -> str:
    """Say why the smallest widths allowed, which hold `least`, are above `limit`, and what to do."""
    told = f"at most {limit:,.0f} {of} are to be kept, but the smallest widths allowed hold {least:,}"
    ones = cost.of(of, {name: torch.arange(1) for name in cost.widths})
    if ones <= limit:
        return f"{told}. Lower the budget, min_channels or round_to"
    stuck = next((f" ({group.name}: {group.protected})" for group in cost.groups if group.protected), "")
    most = floor(1000 * (1 - least / cost.original(of))) / 1000  # rounded down: what is proposed must do
    return (
        f"{told}, and one channel in each layer that can lose any would hold {ones:,}{clip(stuck)}. "
        f"Lower the budget to {most:g}"
    )


def spare(
    largest: Mapping[str, Tensor], groups: Iterable[ChannelGroup], rule: WidthRule
) -> dict[str, Tensor]:
    """Return the channels that stay in any case where layers hold parts of a group, the best of each part.

    Else all of a part could go, and the layer with it. `largest`: as `by_size` returns them.
    """
    spared = {}
    for group in groups:
        if group.name in largest and group.parts:
            order, least = largest[group.name].tolist(), rule.least(group.name)
            best = [[channel for channel in order if channel in part][:least] for part in group.parts]
            spared[group.name] = torch.tensor(sorted({*chain(*best)}))
    return spared


def _apply(rule: WidthRule, wanted: Widths, importance: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: rule.apply(name, width, len(importance[name])) for name, width in wanted.items()}


def by_size(importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the channels of each group, the most important first."""
    # Stable, where `topk` is not: equal scales are told apart in the same way on every machine.
    return {name: values.cpu().argsort(descending=True, stable=True) for name, values in importance.items()}


def _keep(largest: Mapping[str, Tensor], widths: Widths, spared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    best = {name: order[: widths[name]] for name, order in largest.items()}
    return best | {name: torch.unique(torch.cat([best[name], channels])) for name, channels in spared.items()}


def _take(largest: Mapping[str, Tensor], widths: Widths, spared: Mapping[str, Tensor]) -> ChannelSelection:
    kept = _keep(largest, widths, spared)
    return ChannelSelection({name: indices.sort().values for name, indices in kept.items()})
