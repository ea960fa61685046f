"""Whether memory stays flat: many fits in one process, a large set streamed, many predictions.

    python benchmarks/soak.py fits --count 200
    python benchmarks/soak.py stream --count 100000
    python benchmarks/soak.py predictions --count 10000

The network is that of the tests, so that what is measured is what goes on around it. Large sets are a few hundred
phantoms under many names (hard links), in a temporary folder. Each line has the resident memory of the process.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import psutil

from chanscale import FitConfig, scale_and_select
from chanscale.data import BatchLoader, decode_images, open_images, split_images
from chanscale.data.phantoms import write_phantoms
from chanscale.ensemble import load_predictor
from chanscale.novelty.storage import find_novelty
from chanscale.predictions import predict_images
from chanscale.run_figures import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny_backbone

T = TypeVar("T")
DISTINCT, SIDE = 500, 64
"""Phantoms that are drawn, and their size in pixels."""
CONFIG = FitConfig(
    backbone=tiny_backbone.NAME, image_size=32, budget=0.5, round_to=1, scale_epochs=1, refine_epochs=1,
    precision="32-true", device="cpu", depth="full", group_pattern=r"^(\d+)_",
)  # fmt: skip


def main() -> None:
    """Run the part that was asked for, in a folder that is removed afterwards."""
    options = parse_options()
    tiny_backbone.register()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.folder) as folder:
        PARTS[options.part](Path(folder), options.count)


def soak_fits(folder: Path, count: int) -> None:
    """Fit `count` times in this process, each into a run folder that is then removed."""
    data = write_phantoms(folder / "data", count=40, image_size=SIDE, seed=0)
    for done in range(1, count + 1):
        began = perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            scale_and_select(tiny_backbone.NAME, data, config=CONFIG, out=Path(runs) / "run")
        if done in (1, 5) or done % 10 == 0:
            tell(f"fit {done}", perf_counter() - began)


def soak_stream(folder: Path, count: int) -> None:
    """List, split, and decode `count` images that are not to be held, and train on them."""
    data = multiply(folder, count)
    tell("before")
    images = timed("listed", lambda: open_images(data, group_pattern=CONFIG.group_pattern), count)
    splits = timed("split", lambda: split_images(images, validation=0.15, test=0.2, seed=0), count)
    decoded = timed(
        "headers read", lambda: decode_images(images, image_size=CONFIG.image_size, cache_bytes=0), count
    )
    timed("streamed", lambda: stream(BatchLoader(decoded, range(count), batch_size=20)), count)
    print(f"{len(splits.train)} of {count} to train on, cached: {decoded.cached}")
    timed("decoded and held", lambda: decode_images(images, image_size=CONFIG.image_size), count)
    config = CONFIG.model_copy(update={"cache_gib": 0.0})
    run = timed("fitted", lambda: scale_and_select(config.backbone, data, config=config, out=folder / "run"))
    print({path.name: path.stat().st_size for path in sorted(run.folder.iterdir())})


def soak_predictions(folder: Path, count: int) -> None:
    """Predict `count` images of a folder in one call, then as many one by one."""
    run = folder / "run"
    data = write_phantoms(folder / "few", count=120, image_size=SIDE, seed=0)
    scale_and_select(tiny_backbone.NAME, data, config=CONFIG, out=run)
    model, info = load_predictor(run)
    detector = find_novelty(run)
    many = multiply(folder, count)
    tell("before")
    timed("a folder", lambda: predict_images(model, info, [many], detector=detector).to_csv(), count)
    paths = sorted(many.rglob("*.png"))
    began = perf_counter()
    for done, path in enumerate(paths, start=1):
        predict_images(model, info, [path], detector=detector).to_dicts()
        if done in (1, 100) or done % 1000 == 0:
            tell(f"one by one {done}", perf_counter() - began)


PARTS: dict[str, Callable[[Path, int], None]] = {
    "fits": soak_fits, "stream": soak_stream, "predictions": soak_predictions,
}  # fmt: skip


def multiply(folder: Path, count: int) -> Path:
    """Return a folder of `count` names for a few hundred phantoms, two of each patient."""
    few = write_phantoms(folder / "distinct", count=DISTINCT, image_size=SIDE, seed=0)
    for place in sorted(path for path in few.iterdir() if path.is_dir()):
        target = folder / "many" / place.name
        target.mkdir(parents=True)
        films = sorted(place.iterdir())
        odd = place.name == "opacity"
        for index in range(count // 2):
            os.link(films[index % len(films)], target / f"{index - index % 2 + odd:07d}_{index % 2}.png")
    return folder / "many"


def stream(loader: BatchLoader) -> int:
    """Return how many images came."""
    return sum(len(batch.labels) for batch in loader.epoch())


def timed(what: str, work: Callable[[], T], count: int | None = None) -> T:
    """Do the work, and tell how long it took and what the process then holds."""
    began = perf_counter()
    done = work()
    tell(what, perf_counter() - began, count)
    return done


def tell(what: str, seconds: float | None = None, count: int | None = None) -> None:
    """Print a line: seconds, images a second, memory held now and at most."""
    words = [f"{what}:"]
    words += [] if seconds is None else [f"{seconds:.1f} s"]
    words += [f"{count / seconds:,.0f} images/s"] if seconds and count else []
    held, most = psutil.Process().memory_info().rss, describe_machine()["peak_memory_bytes"]
    print(*words, f"{held / 1e6:,.1f} MB held, {most / 1e6:,.1f} MB at most", flush=True)


def parse_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, required=True, help="fits, images or predictions")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
