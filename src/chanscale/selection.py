"""Which channels stay: by a threshold on the scales, or the best that fit a budget."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chanscale.channels import ChannelGroup, channel_groups
from chanscale.costs import TrunkCost, Widths
from chanscale.errors import BudgetError, EmptySelectionError, ModelError


@dataclass(frozen=True)
class ChannelSelection:
    """The channels that stay in each group: ascending indices, shape (kept,), by the group's name."""

    kept: Mapping[str, Tensor]

    @property
    def widths(self) -> dict[str, int]:
        """How many channels stay in each group."""
        return {name: len(kept) for name, kept in self.kept.items()}


@dataclass(frozen=True)
class WidthRule:
    """What widths a selection may leave: at least `minimum`, rounded up to a multiple of `round_to`.

    Groups named in `unrounded` are only held to the minimum. Kernels of a CPU work on blocks of channels
    (16 fp32 values fill one AVX-512 register), so that a width in between costs as much as the next multiple.
    """

    minimum: int = 1
    round_to: int = 1
    unrounded: frozenset[str] = frozenset()

    def apply(self, name: str, wanted: int, width: int) -> int:
        """Return the width that `wanted` channels out of `width` lead to."""
        multiple = 1 if name in self.unrounded else self.round_to
        rounded = -(-max(wanted, self.minimum, 1) // multiple) * multiple
        return min(rounded, width)


def scale_parameters(model: nn.Module, groups: tuple[ChannelGroup, ...]) -> dict[str, nn.Parameter]:
    """Return the scale weights, shape (width,), of every group that has them, by the group's name.

    Raises ModelError when none has.
    """
    found = {
        group.name: model.get_submodule(group.scale).weight for group in groups if group.scale is not None
    }
    if not found:
        raise ModelError("the network has no channel scales; call attach_scales first")
    return found  # type: ignore[return-value]


def select_channels(model: nn.Module, *, threshold: float, rule: WidthRule | None = None) -> ChannelSelection:
    """Keep the channels whose |scale| is above `threshold`, and what the rule adds to them.

    Raises EmptySelectionError when that would empty a group, or remove nothing at all.
    """
    scales = scale_parameters(model, channel_groups(model))
    importance = {name: scale.detach().abs() for name, scale in scales.items()}
    for name, values in importance.items():
        if not (values > threshold).any():
            raise EmptySelectionError(
                f"threshold={threshold:g} removes all {len(values)} channels of {name!r}; "
                f"the largest scale is {values.max():.2g}. Use a threshold below it"
            )
    selection = keep_above(importance, threshold=threshold, rule=rule or WidthRule())
    if selection.widths == {name: len(values) for name, values in importance.items()}:
        smallest = min(float(values.min()) for values in importance.values())
        raise EmptySelectionError(
            f"threshold={threshold:g} removes no channel; the smallest scale is {smallest:.2g}. "
            "Train longer, or use a threshold above it"
        )
    return selection


def keep_above(importance: Mapping[str, Tensor], *, threshold: float, rule: WidthRule) -> ChannelSelection:
    """Keep each group's channels above `threshold`, and the next best ones until its width obeys the rule."""
    wanted = {name: int((values > threshold).sum()) for name, values in importance.items()}
    return _keep_largest(importance, _apply(rule, wanted, importance))


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

    def widths_after(removed: int) -> dict[str, int]:
        gone = torch.bincount(group_of[:removed], minlength=len(names)).tolist()
        return _apply(rule, {n: len(importance[n]) - g for n, g in zip(names, gone, strict=True)}, importance)

    low, high = 0, len(order)
    if cost.of(of, widths_after(high)) > limit:
        raise BudgetError(
            f"at most {limit:,.0f} {of} are to be kept, but the smallest widths allowed hold "
            f"{cost.of(of, widths_after(high)):,}. Lower the budget, min_channels or round_to"
        )
    while low < high:  # the cost falls with every removal, so the first that fits is found by bisection
        middle = (low + high) // 2
        low, high = (low, middle) if cost.of(of, widths_after(middle)) <= limit else (middle + 1, high)
    last = float(values[order[low - 1]]) if low else 0.0
    return _keep_largest(importance, widths_after(low)), last


def _apply(rule: WidthRule, wanted: Widths, importance: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: rule.apply(name, width, len(importance[name])) for name, width in wanted.items()}


def _keep_largest(importance: Mapping[str, Tensor], widths: Widths) -> ChannelSelection:
    # Stable, where `topk` is not: equal scales are told apart in the same way on every machine.
    orders = {name: values.cpu().argsort(descending=True, stable=True) for name, values in importance.items()}
    return ChannelSelection({name: order[: widths[name]].sort().values for name, order in orders.items()})
