"""Channels that only leave together, since a grouped convolution needs all of its groups to be of one size.

Either the same channels of every group of the convolution leave, and it keeps its groups; or whole groups leave.
`leave_as_groups` says which. Then several channels that were traced make one, which lies at several positions.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import replace

from torch.nn.modules.conv import _ConvNd

from chanscale.channels import Axis, ChannelGroup, ScaleSite, Slot
from chanscale.slicing import leave_as_groups

Member = tuple[int, ...]
"""A channel: the index of the group that was traced, and that of a channel of it. Or such a group: its index."""

Convs = Mapping[str, _ConvNd]


def coarsen(groups: Sequence[ChannelGroup], convs: Convs) -> list[ChannelGroup]:
    """Return the `groups` with those channels made one that the grouped convolutions `convs` hold together.

    `convs`: all that are not depthwise, by name. Groups that come to share a channel become one.
    """
    same, reasons = _tie(groups, convs)
    families = DisjointSets()
    for channel in same.members:
        families.join((channel[:1], same.find(channel)[:1]))
    coarse = []
    for first in (index for index in range(len(groups)) if families.find((index,)) == (index,)):
        family = {index: group for index, group in enumerate(groups) if families.find((index,)) == (first,)}
        why = next((reasons[index] for index in family if index in reasons), None)
        coarse.append(_merge(family, same, convs, why) if (first,) in families.members else groups[first])
    return coarse


class DisjointSets:
    """Sets that share no member, each known by the smallest of its members."""

    def __init__(self) -> None:
        self._parents: dict[Member, Member] = {}

    @property
    def members(self) -> KeysView[Member]:
        """All that was ever joined."""
        return self._parents.keys()

    def find(self, member: Member) -> Member:
        """Return the smallest member of the set that `member` is in."""
        while (parent := self._parents.get(member, member)) != member:
            self._parents[member] = self._parents[parent]
            member = parent
        return member

    def join(self, members: Iterable[Member]) -> None:
        """Make one set of those that the `members` are in."""
        members = tuple(members)
        roots = [self.find(member) for member in members]
        for member in (*members, *roots):
            self._parents[member] = min(roots)


def _tie(groups: Sequence[ChannelGroup], convs: Convs) -> tuple[DisjointSets, dict[int, str]]:
    """Return which channels leave together, and for some groups why none of theirs can."""
    owners: dict[tuple[Axis, str, int], list[Member]] = defaultdict(list)
    for index, group in enumerate(groups):
        for axis, slot in group.slots():
            if slot.layer in convs:
                for position, channel in zip(slot.positions, slot.channels, strict=True):
                    owners[axis, slot.layer, position].append((index, channel))
    same = DisjointSets()
    reasons: dict[int, str] = {}
    for name, conv in convs.items():
        for places in _places_that_tie(conv):
            found = [owners.get((axis, name, position), []) for axis, position in places]
            tied = [channel for each in found for channel in each]
            if tied:
                same.join(tied)
            if not all(found):
                reasons |= {index: f"{name} ties them to channels that have to stay" for index, _ in tied}
    return same, reasons


def _places_that_tie(conv: _ConvNd) -> Iterator[list[tuple[Axis, int]]]:
    """Yield the positions along the inputs and outputs of a grouped convolution that leave together."""
    count = conv.groups
    widths: dict[Axis, int] = {"inputs": conv.in_channels // count, "outputs": conv.out_channels // count}
    if leave_as_groups(conv):
        for group in range(count):
            yield [(axis, group * width + i) for axis, width in widths.items() for i in range(width)]
    else:
        for axis, width in widths.items():
            for i in range(width):
                yield [(axis, group * width + i) for group in range(count)]


def _merge(
    family: Mapping[int, ChannelGroup], same: DisjointSets, convs: Convs, why: str | None
) -> ChannelGroup:
    """Return the one group that those of the `family`, by index, are; protected if there is a reason `why`."""
    channels = [(index, channel) for index, group in family.items() for channel in range(group.width)]
    order = {root: new for new, root in enumerate(sorted({same.find(channel) for channel in channels}))}
    number: dict[Member, int] = {channel: order[same.find(channel)] for channel in channels}
    parts = tuple(family.values())
    relus = {site.layer: site.relu for part in parts for site in part.sites}
    sites = _gather(((index, slot) for index, group in family.items() for slot in group.sites), number)
    inputs = _gather(((index, slot) for index, group in family.items() for slot in group.inputs), number)
    merged = ChannelGroup(
        name=parts[0].name,
        width=len(order),
        outputs=_gather(((index, slot) for index, group in family.items() for slot in group.outputs), number),
        inputs=tuple(_within_one_group(slot, convs) for slot in inputs if not _goes_along(slot, convs)),
        sites=tuple(ScaleSite(**vars(slot), relu=relus[slot.layer]) for slot in sites),
        protected=next((part.protected for part in parts if part.protected), why),
    )
    if merged.width == 1:
        merged = merged.protect("grouped convolutions tie all of them to each other")
    return _name(merged, parts, convs)


def _gather(slots: Iterable[tuple[int, Slot]], number: Mapping[Member, int]) -> tuple[Slot, ...]:
    """Return one slot for each layer, with the new `number` of each channel; a slot comes with its group's index."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for index, slot in slots:
        channels = (number[index, channel] for channel in slot.channels)
        found[slot.layer].update(zip(slot.positions, channels, strict=True))
    return tuple(_to_slot(layer, held) for layer, held in found.items())


def _to_slot(layer: str, held: Mapping[int, int]) -> Slot:
    positions = tuple(sorted(held))
    return Slot(layer, positions, tuple(held[position] for position in positions))


def _goes_along(slot: Slot, convs: Convs) -> bool:
    """Whether the inputs of the layer leave with its outputs, as those of a depthwise convolution do."""
    return slot.layer in convs and leave_as_groups(convs[slot.layer])


def _within_one_group(slot: Slot, convs: Convs) -> Slot:
    """Return a slot of inputs as the weight of a grouped convolution has them: all of its groups share an axis."""
    if slot.layer not in convs:
        return slot
    width = convs[slot.layer].in_channels // convs[slot.layer].groups
    held = {p % width: channel for p, channel in zip(slot.positions, slot.channels, strict=True)}
    return _to_slot(slot.layer, held)


def _name(merged: ChannelGroup, parts: Sequence[ChannelGroup], convs: Convs) -> ChannelGroup:
    """Return the group, named by a convolution that has each of its channels equally often, if there is one."""
    slots = {slot.layer: slot for slot in merged.outputs}
    for name in (*(part.name for part in parts), *(layer for layer in slots if layer in convs)):
        counts = [slots[name].channels.count(channel) for channel in range(merged.width)]
        if len(set(counts)) == 1:
            return replace(merged, name=name)
    return merged.protect(f"not each channel has as many positions in {merged.name}")
