"""Run a network as it will be used, or watch it run, and give it back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def device_of(model: nn.Module) -> torch.device:
    """Return where the first tensor of `model` is; the CPU if it has none."""
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def threads_given_back() -> Iterator[None]:
    """Let PyTorch take as many threads as before again afterwards, whatever was set meanwhile."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take the hooks of these `handles` off again afterwards."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_noted(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Give a dict that fills with the modules of `model` that are called meanwhile, by name, as their calls end."""
    called: dict[str, nn.Module] = {}
    with hooked(
        module.register_forward_hook(lambda layer, *_, name=name: called.update({name: layer}))
        for name, module in model.named_modules()
    ):
        yield called
