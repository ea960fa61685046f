"""Which layers share channels: the unit that is scaled, selected and removed, told as plain positions.

A network carries its groups along: `attach_scales` puts them there, and every removal renumbers them.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

from torch import Tensor, nn

from chanscale.errors import EmptySelectionError, ModelError

Model = TypeVar("Model", bound=nn.Module)

Axis = Literal["outputs", "inputs"]

Kept = Mapping[str, Tensor]
"""Ascending indices of the channels that stay in each group, shape (kept,), by the group's name."""


@dataclass(frozen=True)
class Slot:
    """Where channels of a group lie along the outputs, or the inputs, of a layer.

    `positions[i]` of the layer holds channel `channels[i]` of the group. Behind a flatten, a channel has several
    positions; in a concatenation, the positions begin somewhere in the middle.
    """

    layer: str
    positions: tuple[int, ...]
    channels: tuple[int, ...]

    def holding(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """Return the positions that hold the `chosen` channels."""
        wanted = set(chosen)
        return tuple(p for p, c in zip(self.positions, self.channels, strict=True) if c in wanted)


@dataclass(frozen=True)
class ScaleSite(Slot):
    """A layer behind which a scale must sit; `relu` follows it directly, and may be computed together with it."""

    relu: str | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are there, or not, in all of these layers at once.

    `name`: the convolution that the channels are counted in, one by one, or several to a channel where grouped
    convolutions hold them together. `outputs` make or pass them on, `inputs` take them
    in. `sites`: those of the outputs behind which a scale must sit; where all of them are 0, a channel can go.
    `protected`: why no channel can be removed, or None. Layers are named as `model.get_submodule` takes them.
    """

    name: str
    width: int
    outputs: tuple[Slot, ...]
    inputs: tuple[Slot, ...]
    sites: tuple[ScaleSite, ...]
    protected: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer of the group once, those that make the channels first."""
        return tuple(dict.fromkeys(slot.layer for slot in (*self.outputs, *self.inputs)))

    @property
    def size(self) -> int:
        """How many channels of the layer `name` one channel of the group is: more than one for grouped convolutions."""
        return next(len(slot.positions) // self.width for slot in self.outputs if slot.layer == self.name)

    @cached_property
    def parts(self) -> tuple[frozenset[int], ...]:
        """The channels that a layer holds, for each that holds some of them and not all, as in a concatenation."""
        held = dict.fromkeys(frozenset(slot.channels) for _, slot in self.slots())
        return tuple(part for part in held if len(part) < self.width)

    def slots(self) -> Iterator[tuple[Axis, Slot]]:
        """Yield every slot with its axis."""
        yield from (("outputs", slot) for slot in self.outputs)
        yield from (("inputs", slot) for slot in self.inputs)

    def protect(self, reason: str) -> Self:
        """Return the group, protected for `reason`."""
        return replace(self, protected=self.protected or reason)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it cannot change: copies of a network share its groups


def carry_groups(model: Model, groups: Iterable[ChannelGroup]) -> Model:
    """Let `model`, in place, know its groups; return it."""
    model._channel_groups = tuple(groups)  # type: ignore[assignment]
    return model


def carried_groups(model: nn.Module) -> tuple[ChannelGroup, ...] | None:
    """Return the groups that `model` carries, if it does."""
    found: tuple[ChannelGroup, ...] | None = model.__dict__.get("_channel_groups")
    return found


def free_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """Return the groups of `model` that are not protected. Raises ModelError when it does not carry its groups."""
    groups = carried_groups(model)
    if groups is None:
        raise ModelError(
            "the network does not know its channel groups; call channel_groups(model, example), then attach_scales"
        )
    return tuple(group for group in groups if group.protected is None)


def removed_positions(groups: Iterable[ChannelGroup], kept: Kept) -> dict[tuple[Axis, str], list[int]]:
    """Return which positions of each axis of each layer, ascending, go when only the channels `kept` stay."""
    gone: dict[tuple[Axis, str], set[int]] = defaultdict(set)
    for group in groups:
        if group.name in kept:
            removed = set(range(group.width)) - set(kept[group.name].tolist())
            for axis, slot in group.slots():
                gone[axis, slot.layer].update(slot.holding(removed))
    return {where: sorted(positions) for where, positions in gone.items() if positions}


def shrink_groups(groups: Iterable[ChannelGroup], kept: Kept) -> tuple[ChannelGroup, ...]:
    """Return the groups as they are when only the channels `kept` are left, renumbered."""
    groups = tuple(groups)
    gone = removed_positions(groups, kept)
    return tuple(_shrink(group, kept, gone) for group in groups)


def require_fit(groups: Iterable[ChannelGroup], kept: Kept) -> None:
    """Raise ModelError unless `kept` fits the `groups`, EmptySelectionError if it keeps none of one, or all."""
    free = {group.name: group for group in groups if group.protected is None}
    for name, indices in kept.items():
        if name not in free:
            raise ModelError(
                f"the selection names {name!r}, which is no channel group that can be pruned; have {', '.join(free)}"
            )
        _require_indices(indices, free[name])
    if all(len(indices) == free[name].width for name, indices in kept.items()):
        raise EmptySelectionError("the selection keeps every channel: there is nothing to remove")


def _require_indices(kept: Tensor, group: ChannelGroup) -> None:
    if len(kept) == 0:
        raise EmptySelectionError(f"the selection keeps none of the {group.width} channels of {group.name!r}")
    ascending = bool((kept[1:] > kept[:-1]).all())
    if not ascending or kept[0] < 0 or kept[-1] >= group.width:
        raise ModelError(
            f"the indices for {group.name!r} must ascend within 0..{group.width - 1}; got {kept.tolist()[:8]}"
        )


def _shrink(group: ChannelGroup, kept: Kept, gone: Mapping[tuple[Axis, str], list[int]]) -> ChannelGroup:
    stay = kept[group.name].tolist() if group.name in kept else range(group.width)
    index = {channel: new for new, channel in enumerate(stay)}

    def renumber(axis: Axis, slots: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(_renumber(slot, index, gone.get((axis, slot.layer), [])) for slot in slots)

    return replace(
        group,
        width=len(stay),
        outputs=renumber("outputs", group.outputs),
        inputs=renumber("inputs", group.inputs),
        sites=renumber("outputs", group.sites),
    )


def _renumber(slot: Slot, index: Mapping[int, int], gone: list[int]) -> Slot:
    pairs = [(p, index[c]) for p, c in zip(slot.positions, slot.channels, strict=True) if c in index]
    return replace(
        slot,
        positions=tuple(p - bisect_left(gone, p) for p, _ in pairs),
        channels=tuple(c for _, c in pairs),
    )
