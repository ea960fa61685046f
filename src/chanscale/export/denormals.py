"""Denormal numbers, which processors are slow with: flushed to zero for a while, never for longer."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_DENORMAL = np.array([2e-39], np.float32)


@contextmanager
def denormals_flushed(flushed: bool = True) -> Iterator[None]:
    """Let the calling thread flush denormals, or not; it does as before afterwards, whatever was set meanwhile."""
    before = flushes_denormals()
    torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes_denormals() -> bool:
    """Return whether the calling thread flushes denormals, which it tells by what it makes of one."""
    return not (_DENORMAL / 2).any()
