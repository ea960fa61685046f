"""Where a trunk can be cut: the places between modules that run one behind the other, up to its output."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.errors import ModelError
from chanscale.modes import device_of, hooked, in_eval
from chanscale.pruning import share


@dataclass(frozen=True)
class Cut:
    """The trunk ends behind `layer`; the modules `without` are left out. All are named as within the trunk."""

    layer: str
    without: tuple[str, ...]


@dataclass(frozen=True)
class _Call:
    """What a module was given and returned, held so that nothing else takes their place."""

    given: object
    returned: object


def find_cuts(
    trunk: nn.Module, inputs: Tensor, *, narrow: Callable[[list[Cut]], list[Cut]] = list
) -> list[Cut]:
    """Return the places where `trunk` can end, from its input to its output, the whole trunk not among them.

    A place counts when all that follows is one module behind the other, up to what the trunk returns for `inputs`
    (N, C, *), and when the next of them holds a convolution: a cut in front of an activation would lack it. Of the
    places, those that `narrow` leaves are tried, with one image.
    """
    inputs = inputs[:1].to(device_of(trunk))
    modules = dict(trunk.named_modules())
    cuts = narrow(
        [
            cut
            for cut in _cuts_in("", modules, _note_calls(trunk, inputs))
            if any(isinstance(module, _ConvNd) for module in modules[cut.without[0]].modules())
        ]
    )
    outputs = _copy_outputs(trunk, [cut.layer for cut in cuts], inputs)
    return [cut for cut in cuts if _returns(trunk, cut, inputs, outputs[cut.layer])]


def cut_trunk(trunk: nn.Module, without: Iterable[str]) -> nn.Module:
    """Return `trunk`, on the same tensors, with an identity in place of the modules `without`.

    Raises ModelError for a module that is not there.
    """
    shorter = share(trunk)
    for name in without:
        parent, _, child = name.rpartition(".")
        try:
            shorter.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"the network has no module {name!r} to leave out") from error
        setattr(shorter.get_submodule(parent), child, nn.Identity())
    return shorter


@torch.no_grad()
def _note_calls(trunk: nn.Module, inputs: Tensor) -> dict[str, _Call]:
    """Return the call of each module that takes one argument, as they end; one called twice has none."""
    calls: dict[str, _Call | None] = {}

    def note(name: str) -> object:
        def hook(
            _: nn.Module, given: tuple[object, ...], keywords: dict[str, object], returned: object
        ) -> None:
            lone = len(given) == 1 and not keywords and isinstance(returned, Tensor)
            calls[name] = _Call(given[0], returned) if lone and name not in calls else None

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True) for name, module in trunk.named_modules()
    ]
    with hooked(handles), in_eval(trunk):
        trunk(inputs)
    return {name: call for name, call in calls.items() if call}


@torch.no_grad()
def _copy_outputs(trunk: nn.Module, layers: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Return what each of the `layers` makes of `inputs`, as it is before anything writes into it."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *call: outputs.update({name: call[-1].clone()})

    handles = [trunk.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    with hooked(handles), in_eval(trunk):
        trunk(inputs)
    return outputs


def _returns(trunk: nn.Module, cut: Cut, inputs: Tensor, wanted: Tensor) -> bool:
    """Tell whether `trunk`, cut, returns what its last layer did: nothing in between wrote into it, or needs it."""
    shorter = cut_trunk(trunk, cut.without)
    try:
        with in_eval(shorter), torch.no_grad():
            returned: object = shorter(inputs)
    except Exception:  # whatever a forward raises that misses a module of its own
        return False
    return isinstance(returned, Tensor) and torch.equal(returned, wanted)


def _cuts_in(name: str, modules: dict[str, nn.Module], calls: dict[str, _Call]) -> Iterator[Cut]:
    """Yield the cuts within the module `name`, each with what has to be left out of it."""
    chain = _find_chain(name, modules, calls)
    for place, member in enumerate(chain):
        later = tuple(chain[place + 1 :])
        for cut in _cuts_in(member, modules, calls):
            yield Cut(cut.layer, (*cut.without, *later))
        if later:
            yield Cut(member, later)


def _find_chain(name: str, modules: dict[str, nn.Module], calls: dict[str, _Call]) -> list[str]:
    """Return the children of `name`, in order, each of which takes what the one before returned, up to its output."""
    if name not in calls:
        return []
    prefix = f"{name}." if name else ""
    children = {prefix + child for child, _ in modules[name].named_children()}
    chain: list[str] = []
    wanted = calls[name].returned
    # From the back. Modules that write in place return what they were given: the one called last comes first.
    for child in (called for called in reversed(calls) if called in children):
        if calls[child].returned is not wanted:
            break
        chain.insert(0, child)
        wanted = calls[child].given
    return chain
