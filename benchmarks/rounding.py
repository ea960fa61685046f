"""Measure which widths a CPU computes well: a 3 x 3 convolution between layers of one width, for each width.

    python benchmarks/rounding.py --threads 1

Prints nanoseconds for a thousand MACs in ONNX Runtime and in PyTorch: the median over rounds in which the widths take
turns; then the means over widths that are a multiple of 4, 8, 16 or 32, and of no higher power of two among them.
"""

import argparse
from functools import partial

import numpy as np
import torch
from torch import nn

from chanscale.export.latency import time_in_turns, torch_threads
from chanscale.export.runtime import open_session
from chanscale.programs import quiet

STEPS = (1, 4, 8, 16, 32)
LAYERS = 4


def main() -> None:
    """Time every width in turns, in both runtimes, and print the tables."""
    options = parse_options()
    widths = list(range(options.narrowest, options.widest + 1, options.step))
    pixels = {
        width: np.random.default_rng(0).random((1, width, options.side, options.side), np.float32)
        for width in widths
    }
    networks = {width: build(width) for width in widths}
    with torch_threads(options.threads):
        taken = {
            "ONNX Runtime": measure(
                {w: to_session(n, pixels[w], options.threads) for w, n in networks.items()}, options
            ),
            "PyTorch": measure({w: partial(run_eager, n, pixels[w]) for w, n in networks.items()}, options),
        }
    macs = {width: LAYERS * 9 * width**2 * options.side**2 for width in widths}
    costs = {
        name: {w: 1e12 * seconds / macs[w] for w, seconds in times.items()} for name, times in taken.items()
    }
    print("| width |", " | ".join(f"{name}, ns / 1000 MACs" for name in costs), "|")
    print("|---" * (1 + len(costs)) + "|")
    for width in widths:
        print(f"| {width} |", " | ".join(f"{found[width]:.1f}" for found in costs.values()), "|")
    for step in STEPS:
        members = [width for width in widths if find_step(width) == step]
        if members:
            means = " | ".join(f"{np.mean([found[w] for w in members]):.1f}" for found in costs.values())
            print(f"| **multiples of {step}** | {means} |")


def find_step(width: int) -> int:
    """Return the largest of the steps that `width` is a multiple of."""
    return max(step for step in STEPS if width % step == 0)


def build(width: int) -> nn.Sequential:
    """Return convolutions between layers of `width` channels, with the ReLUs that networks have."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)


def to_session(network: nn.Sequential, pixels: np.ndarray, threads: int) -> partial:
    """Return what runs `network` in ONNX Runtime."""
    with quiet(), torch.no_grad():
        graph = torch.onnx.export(
            network, (torch.from_numpy(pixels),), dynamo=True, verbose=False
        ).model_proto
    session = open_session(graph.SerializeToString(), threads=threads)
    return partial(session.run, None, {session.get_inputs()[0].name: pixels})


@torch.inference_mode()
def run_eager(network: nn.Sequential, pixels: np.ndarray) -> torch.Tensor:
    """Run `network` in PyTorch."""
    return network(torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last))


def measure(runs: dict[int, partial], options: argparse.Namespace) -> dict[int, float]:
    """Return the median seconds of each width."""
    turns = {str(width): (lambda _, run=run: run()) for width, run in runs.items()}
    timings = time_in_turns(turns, np.zeros(1, np.float32), seconds=options.seconds)
    return {width: timings[str(width)].median for width in runs}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--narrowest", type=int, default=16)
    parser.add_argument("--widest", type=int, default=64)
    parser.add_argument("--step", type=int, default=4)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
