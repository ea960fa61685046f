"""Which groups lose channels without a trace: tried on the network itself, before anything is trained.

What a network computes from a zero cannot be read off its layers: a sigmoid makes 0.5 of it, a view mixes channels,
a hard-coded width breaks. So half of the channels of each group are set to 0 where their scales would sit, and
removed; a group whose pruned network does not say what the masked one says is protected, with the reason.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from chanscale.attaching import Model
from chanscale.coupling import CoupledGroup, couple_channels
from chanscale.errors import EmptySelectionError, one_line
from chanscale.pruning import ROUNDING
from chanscale.slicing import INPUT_WIDTHS, OUTPUT_WIDTHS, keep_inputs, keep_outputs

Removal = Mapping[str, Sequence[int]]
"""The channels to remove of each group, by its name."""


def find_groups(model: nn.Module, example: Tensor) -> tuple[CoupledGroup, ...]:
    """Return the groups of `model`, traced with `example` (N, C, *), those that are not exact protected.

    The model is not changed. Raises UnsupportedTopologyError when it cannot be traced.
    """
    groups = couple_channels(model, example)
    # In fp64, so that rounding cannot be taken for a difference, nor a small one for rounding.
    reference, inputs = copy.deepcopy(model).cpu().double().eval(), example.detach().cpu().double()
    open_groups = [group for group in groups if group.protected is None and group.width > 1]
    reasons = _find_inexact(reference, open_groups, inputs)
    reasons |= {group.name: "it has one channel" for group in groups if group.width == 1}
    return tuple(group.protect(reasons[group.name]) if group.name in reasons else group for group in groups)


def _find_inexact(model: nn.Module, groups: Sequence[CoupledGroup], example: Tensor) -> dict[str, str]:
    """Return the reason for each group that is not exact; by halves, since most networks have none or few."""
    reason = compare(model, groups, halve(groups), example) if groups else None
    if reason is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    middle = len(groups) // 2
    found = _find_inexact(model, groups[:middle], example) | _find_inexact(model, groups[middle:], example)
    # Two groups may each be exact alone and not together.
    left = [group for group in groups if group.name not in found]
    if len(left) == len(groups) or (found and compare(model, left, halve(left), example) is not None):
        return found | {group.name: f"not exact together with others: {reason}" for group in left}
    return found


def halve(groups: Iterable[CoupledGroup], *, seed: int = 0) -> dict[str, list[int]]:
    """Return half of the channels of each group, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: sorted(torch.randperm(group.width, generator=generator)[: group.width // 2].tolist())
        for group in groups
    }


@torch.no_grad()
def compare(
    model: nn.Module, groups: Sequence[CoupledGroup], removal: Removal, example: Tensor
) -> str | None:
    """Return how the network without the channels of `removal` differs from the one that has them at 0, or None."""
    wanted = run_masked(model, groups, removal, example)
    try:
        got = remove_coupled(model, groups, removal)(example)
    except Exception as error:  # whatever a forward that counts on the old widths raises
        return f"the network does not run without them ({one_line(error)[:120]})"
    difference = relative_change(wanted, got)
    return None if difference <= ROUNDING else f"removal changes the output by {difference:.1e} of its size"


def relative_change(wanted: Tensor, got: Tensor) -> float:
    """Return the largest difference of two outputs, relative to the largest value; infinite if shapes differ."""
    if wanted.shape != got.shape or not got.isfinite().all():
        return float("inf")
    return float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30))


def run_masked(model: nn.Module, groups: Iterable[CoupledGroup], removal: Removal, example: Tensor) -> Tensor:
    """Return the output for `example` of `model` with the channels of `removal` at 0 where their scales would sit."""
    silenced: dict[str, list[int]] = defaultdict(list)
    for group in groups:
        for slot in group.scales:
            silenced[slot.layer].extend(slot.holding(removal.get(group.name, ())))
    handles = [
        model.get_submodule(layer).register_forward_hook(_silence(positions))
        for layer, positions in silenced.items()
    ]
    try:
        output: Tensor = model(example)
        return output
    finally:
        for handle in handles:
            handle.remove()


def _silence(positions: list[int]) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor(positions, dtype=torch.long, device=output.device), 0)

    return hook


def remove_coupled(model: Model, groups: Iterable[CoupledGroup], removal: Removal) -> Model:
    """Return a copy of `model` without the channels of `removal`, each weight a bit-exact slice.

    Raises EmptySelectionError when that leaves a layer with none, or removes nothing.
    """
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group in groups:
        chosen = removal.get(group.name, ())
        for slot in group.outputs:
            gone["outputs", slot.layer].update(slot.holding(chosen))
        for slot in group.inputs:
            gone["inputs", slot.layer].update(slot.holding(chosen))
    if not any(gone.values()):
        raise EmptySelectionError("no channel was named: there is nothing to remove")
    pruned = copy.deepcopy(model)
    for (axis, name), positions in gone.items():
        layer = pruned.get_submodule(name)
        kept = torch.tensor([p for p in range(_count(layer, axis)) if p not in positions], dtype=torch.long)
        if len(kept) == 0:
            raise EmptySelectionError(f"nothing would be left of {name!r}; keep at least one channel")
        if positions:
            (keep_outputs if axis == "outputs" else keep_inputs)(layer, kept)
    return pruned


def _count(layer: nn.Module, axis: str) -> int:
    names = OUTPUT_WIDTHS if axis == "outputs" else INPUT_WIDTHS
    return int(next(getattr(layer, name) for name in names if hasattr(layer, name)))
