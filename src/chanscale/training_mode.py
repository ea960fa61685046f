"""Training mode for a network of which nothing but scales and head may change, and what layers draw in it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chanscale.classifier import Classifier
from chanscale.errors import ModelError, one_line
from chanscale.modes import calls_noted, in_eval
from chanscale.pruning import share
from chanscale.scaling import freeze


def train_frozen(model: Classifier) -> Classifier:
    """Put `model`, in place, in training, but what could note something of each batch in eval; return it.

    The trunk is frozen: a norm of its user's own, with running statistics, would go on averaging.
    """
    model.train()
    for module in model.trunk.modules():
        if module._buffers:
            module.training = False
    return model


def require_same_layers(model: Classifier, example: Tensor) -> None:
    """Raise ModelError where the trunk of `model` does in training what it does not do in eval, as an auxiliary head.

    Such layers know nothing of removed channels. `example`: pixels (N, C, *). The model is not changed.
    """
    twin = share(model)
    for module in twin.trunk.modules():
        freeze(module)
    pixels = twin.preprocessing(example)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), generators_given_back():
        with in_eval(twin):
            wanted, used = _watch(twin.trunk, pixels)
        train_frozen(twin)
        try:
            got, used_in_training = _watch(twin.trunk, pixels)
        except Exception as error:  # whatever the user's forward raises
            raise ModelError(f"the network does not run in training: {one_line(error)[:200]}") from error
    if more := [name for name in used_in_training if name not in used]:
        outermost = min(more, key=lambda name: name.count("."))
        raise ModelError(
            f"the network calls {outermost!r} in training alone; switch such auxiliary outputs off "
            "(of torchvision's: `net.aux_logits = False`), and pass the network itself"
        )
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        kind = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ModelError(
            f"the network returns {kind} in training, and {tuple(wanted.shape)} in eval; wrap it in a module that "
            "returns the same in both"
        )


def _watch(trunk: nn.Module, pixels: Tensor) -> tuple[Any, list[str]]:
    """Return what `trunk` makes of `pixels`, and the names of the layers with weights in it that it called."""
    with calls_noted(trunk) as called:
        made = trunk(pixels.clone())
    return made, [
        name for name, layer in called.items() if name and next(layer.parameters(), None) is not None
    ]


def repeatable(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `compute` so that, called again, it draws from Python's and NumPy's generators what it drew at first.

    PyTorch's own are taken back by its checkpointing; layers that are skipped at random often ask the others.
    """
    first: list[Any] = []

    def again(x: Tensor) -> Tensor:
        if not first:
            first.append((random.getstate(), np.random.get_state()))
            return compute(x)
        with generators_given_back():
            _set_generators(first[0])
            return compute(x)

    return again


@contextmanager
def generators_given_back() -> Iterator[None]:
    """Let Python's and NumPy's generators go on afterwards where they were: what they draw next is their user's."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        _set_generators(before)


def seed_generators(seed: int) -> None:
    """Seed PyTorch's generators, Python's and NumPy's, of which layers may draw."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _set_generators(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
