"""How long networks take for an image: side by side in one process, taking turns, so that all meet the same machine."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter

import numpy as np
import torch

from chanscale.export.denormals import denormals_flushed
from chanscale.export.runtime import Floats, Run

WARM_UP = 2
LEAST_ROUNDS = 5
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Timing:
    """Seconds that a batch took: median and quartiles over `rounds`."""

    median: float
    low: float
    high: float
    rounds: int


def time_in_turns(
    networks: Mapping[str, Run], pixels: Floats, *, seconds: float, progress: Progress | None = None
) -> dict[str, Timing]:
    """Return how long each of `networks` takes for `pixels` (N, C, H, W), which they compute in turns.

    Rounds go on for about `seconds`, and for five at least; the order is turned about each time. Some runs before
    them are not counted.
    """
    for run in networks.values():
        for _ in range(WARM_UP):
            run(pixels)
    taken: dict[str, list[float]] = {name: [] for name in networks}
    began = perf_counter()
    for turn in count(1):
        for name in list(networks)[:: 1 if turn % 2 else -1]:
            start = perf_counter()
            networks[name](pixels)
            taken[name].append(perf_counter() - start)
        spent = perf_counter() - began
        if progress:
            progress(int(min(spent, seconds)), int(seconds))
        if turn >= LEAST_ROUNDS and spent >= seconds:
            break
    return {name: _summarise(times) for name, times in taken.items()}


def _summarise(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times))


def draw_pixels(batch: int, channels: int, image_size: int) -> Floats:
    """Return raw pixels (N, C, S, S) to time networks on: noise, since no time depends on what an image shows."""
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (batch, channels, image_size, image_size)).astype(np.float32)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads, for a while, and flush denormals."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with denormals_flushed():
            yield
    finally:
        torch.set_num_threads(before)
