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
