"""Measure what twenty models in one process take: rebuilt from deltas, loaded from their files, and whole networks.

    python benchmarks/deltas.py runs/mine

Prints a table of resident memory and seconds, each row from a process of its own. The run's scales are changed a little
for each of the models, so that no two are alike; the run is only read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from chanscale.artifact import load_model, parse_info, read_model, save_model
from chanscale.backbones import load_backbone
from chanscale.delta import Restorer, save_delta
from chanscale.scaling import ChannelScale

WAYS = ("deltas", "model files", "whole networks")


def main() -> None:
    """Read the command line, make the models, print the table; or, called by itself, measure one way."""
    options = parse_options()
    if options.way:
        print(json.dumps(measure(options.way, options.run, options.count)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make_models(options.run, Path(folder), options.count)
        print(f"delta: {size:,} bytes; model file: {model_file(options.run).stat().st_size:,} bytes")
        print(f"| | MB before | with 1 | with {options.count} | seconds for 1 | for {options.count} |")
        print("|---" * 6 + "|")
        for way in WAYS:
            before, one, all_of_them, first, seconds = run_alone(way, Path(folder), options.count)
            memory = f"{before:.0f} | {one:.0f} | {all_of_them:.0f}"
            print(f"| {way} | {memory} | {first:.1f} | {seconds:.1f} |", flush=True)


def make_models(run: Path, folder: Path, count: int) -> int:
    """Write `count` model files and their deltas, with other scales each; return the bytes of the first delta."""
    model, info = load_model(run)
    scales = [module for module in model.modules() if isinstance(module, ChannelScale)]
    with torch.no_grad():
        for index in range(count):
            for scale in scales:
                scale.weight.mul_(1 + index / 1000)
            file = save_model(model, info, folder / f"{index}.safetensors")
            save_delta(file, folder / f"{index}.delta")
    return (folder / "0.delta").stat().st_size


def run_alone(way: str, folder: Path, count: int) -> list[float]:
    """Return what `measure` does, in a process of its own."""
    arguments = [sys.executable, __file__, str(folder), "--count", str(count), "--way", way]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, folder: Path, count: int) -> list[float]:
    """Return resident megabytes without a model, with one and with `count`; seconds for one and for all."""
    load, held, began = loader(way, folder), [], perf_counter()
    before = resident()
    held.append(load(0))
    one, first = resident(), perf_counter() - began
    held += [load(index) for index in range(1, count)]
    return [before, one, resident(), first, perf_counter() - began]


def loader(way: str, folder: Path) -> Callable[[int], Any]:
    """Return what gives the model of an index."""
    if way == "deltas":
        restorer = Restorer()
        return lambda index: restorer.restore(folder / f"{index}.delta")
    if way == "model files":
        return lambda index: load_model(folder / f"{index}.safetensors")
    file = folder / "0.safetensors"
    name = parse_info(read_model(file)[1], file).backbone
    return lambda _: load_backbone(name)


def resident() -> float:
    """Return the megabytes that this process holds."""
    return psutil.Process().memory_info().rss / 1e6


def model_file(run: Path) -> Path:
    """Return the model file of a run folder."""
    return run / "model.safetensors" if run.is_dir() else run


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
