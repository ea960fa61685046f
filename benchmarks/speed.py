"""Measure how many images a second training passes, at each value of what `chanscale fit` tries, side by side.

    python benchmarks/speed.py ../shared/data/nih-opacity --depth features.18 --seconds 120

A step is a micro-batch forth and back through the scaled network, as in training. All ways take turns, the order turned
about each time; prints a table of medians and quartiles, by the clock and by the processor, beside PyTorch's defaults
(contiguous, fp32, all threads). `--bf16` adds bf16, which takes minutes where it is emulated; `--compile` adds
torch.compile, and says how long compiling took: in training, each removal of channels would have it compile anew.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import perf_counter, process_time

import torch

from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits, split_images
from chanscale.depth import choose_depth, end_trunk
from chanscale.pipeline import open_classifier
from chanscale.progress import Watcher
from chanscale.run_images import load_images
from chanscale.speed.choice import Choice
from chanscale.speed.steps import TrainingStep

LEAST = 5

Ways = dict[str, Callable[[], float]]


def main() -> None:
    """Time every way in turns, and print the table."""
    options = parse_options()
    parts = open_parts(options)
    step = TrainingStep(*parts)
    ways = list_ways(step, options)
    if options.compile:
        ways |= compile_way(TrainingStep(*parts))
    began = perf_counter()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in count(1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            start = process_time()
            taken[name].append((ways[name](), process_time() - start))
        if turn >= LEAST and perf_counter() - began > options.seconds:
            break
    show(taken, step.images)


def open_parts(options: argparse.Namespace) -> tuple[Classifier, DecodedImages, Splits, FitConfig]:
    """Return what a fit of these images trains."""
    config = FitConfig(
        image_size=options.image_size, micro_batch=options.micro_batch, backbone=options.backbone,
        depth=options.depth, group_pattern=options.group_pattern, device="cpu",
    )  # fmt: skip
    images = load_images(options.data, config, Watcher())
    splits = split_images(images.images, validation=config.validation, test=config.test, seed=0)
    _, whole = open_classifier(config.backbone, images, splits, config, Watcher())
    depth = choose_depth(whole, images, splits, config, Watcher())
    return end_trunk(whole, depth, images.batch(splits.train[:2])[0]), images, splits, config


def list_ways(step: TrainingStep, options: argparse.Namespace) -> Ways:
    """Return what takes a step in each way, by name; each has taken its first. PyTorch's defaults come first."""
    most = torch.get_num_threads()
    choices = {}
    for threads in sorted({most, *(most >> power for power in range(1, most.bit_length()))}, reverse=True):
        for layout in (False, True):
            name = f"{'channels_last' if layout else 'contiguous'}, fp32, threads: {threads}"
            choices[name] = Choice(precision="32-true", channels_last=layout, threads=threads)
    if options.bf16:
        bf16 = Choice(precision="bf16-mixed", threads=most)
        choices[f"channels_last, bf16, threads: {most}"] = bf16
    ways: Ways = {name: lambda choice=choice: step.time(choice) for name, choice in choices.items()}
    for way in ways.values():
        way()
    return ways


def compile_way(step: TrainingStep) -> Ways:
    """Return the step of a compiled trunk on one thread, and say how long its first took."""
    choice = Choice(precision="32-true", threads=1)
    step.network(torch.device("cpu"), channels_last=True)[0].trunk.compile(dynamic=False)
    began = perf_counter()
    step.time(choice)
    print(f"Compiling took {perf_counter() - began:.0f} s.\n", flush=True)
    return {"channels_last, fp32, threads: 1, compiled": lambda: step.time(choice)}


def show(taken: dict[str, list[tuple[float, float]]], images: int) -> None:
    """Print a row for each way."""
    rates = {name: [images / seconds for seconds, _ in turns] for name, turns in taken.items()}
    plain = statistics.median(next(iter(rates.values())))
    print("| way | images a second (quartiles) | beside the defaults | processor, ms an image | turns |")
    print("|---|---|---|---|---|")
    for name, found in rates.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        spent = 1000 * statistics.median(processor for _, processor in taken[name]) / images
        print(
            f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {median / plain:.2f} | {spent:.0f} | {len(found)} |"
        )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="vgg16")
    parser.add_argument("--depth", default="full")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--micro-batch", type=int, default=5)
    parser.add_argument("--group-pattern", default=r"^(\d+)_")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
