"""Measure how many images are flagged that differ from the training images of a run, and how many that do not.

    python benchmarks/novelty.py runs/mine --images ../shared/data/nih-opacity --group-pattern '^(\\d+)_'

A detector is fitted on the training and validation images of each run, then judges the test images, as they are and
changed, phantoms, and crops of photographs (scikit-learn's and scikit-image's own: pip install scikit-image). Prints a
table with 95 % bootstrap intervals; of test images, over patients; then the mean and range over the runs. Runs are only
read.
"""

import argparse
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.data.images import FULL_RANGE, read_image
from chanscale.data.loading import DecodedImages, decode_images, source_of
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import ImageRecord, ImageSet, open_images
from chanscale.data.splits import Splits, read_splits
from chanscale.metrics import resample
from chanscale.novelty.detector import Judgement
from chanscale.novelty.fitting import fit_novelty

Pixels = NDArray[np.integer]


def blur(images: Tensor) -> Tensor:
    """Return images of an eighth of the detail."""
    size = images.shape[2:]
    small = F.interpolate(images, scale_factor=1 / 8, mode="area")
    return F.interpolate(small, size=size, mode="bilinear")


def crop(images: Tensor) -> Tensor:
    """Return one quarter of each image, in turn, as large as the whole was."""
    height, width = images.shape[2] // 2, images.shape[3] // 2
    places = [(place // 2 % 2 * height, place % 2 * width) for place in range(len(images))]
    parts = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, places, strict=True)]
    return F.interpolate(torch.stack(parts), scale_factor=2, mode="bicubic").clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: 1 - x,
    "rotated by 90 degrees to the left": lambda x: x.rot90(1, (2, 3)),
    "rotated by 90 degrees to the right": lambda x: x.rot90(-1, (2, 3)),
    "upside down": lambda x: x.flip(2),
    "mirrored": lambda x: x.flip(3),
    "low contrast (a quarter)": lambda x: 0.5 + (x - 0.5) / 4,
    "blurred": blur,
    "cropped to a quarter": crop,
}


def compress(film: Pixels) -> Pixels:
    """Return a film as a JPEG file of quality 30 has it."""
    file = io.BytesIO()
    Image.fromarray(film).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def halve(film: Pixels) -> Pixels:
    """Return a film with half as many pixels a side."""
    return np.asarray(Image.fromarray(film).resize((film.shape[1] // 2, film.shape[0] // 2)))


def narrow(film: Pixels) -> Pixels:
    """Return a film in the middle three fifths of its window: what is darker is black, what is brighter white."""
    return np.clip((film / 255 - 0.2) / 0.6 * 255, 0, 255).round().astype(np.uint8)


REMADE: dict[str, Callable[[Pixels], Pixels]] = {
    "JPEG of quality 30": compress,
    "half as many pixels a side": halve,
    "three fifths of the window": narrow,
}
"""Changes of the files that a reader may not even see."""


@dataclass(frozen=True)
class Row:
    """Of one kind of images: how many, the share that is flagged, its interval, and what is said most often."""

    name: str
    count: int
    flagged: float
    interval: str
    reason: str


def main() -> None:
    """Read the command line; print a row for each kind of image and run, then for each kind."""
    options, rows = parse_options(), []
    print("| run | images | number | flagged | 95 % interval | commonest reason |\n" + "|---" * 6 + "|")
    for run in options.runs:
        for row in measure(run, options):
            told = row.name, str(row.count), f"{100 * row.flagged:.1f} %", row.interval, row.reason
            print(f"| {run.name} | {' | '.join(told)} |", flush=True)
            rows.append(row)
    print("\n| images | number | flagged: mean | least | most |\n" + "|---" * 5 + "|")
    for name in dict.fromkeys(row.name for row in rows):
        shares = [100 * row.flagged for row in rows if row.name == name]
        number = next(row.count for row in rows if row.name == name)
        print(f"| {name} | {number} | {np.mean(shares):.1f} % | {min(shares):.1f} % | {max(shares):.1f} % |")


def measure(run: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a run."""
    model, info = load_model(run)
    images = open_images(options.images, group_pattern=options.group_pattern, classes=info.classes)
    splits = read_splits(model_path(run).with_name("splits.csv"), images)
    data = decode_images(images, image_size=info.image_size)
    if options.develop:  # the test images are not looked at
        splits = Splits(splits.train, (), splits.validation)
    detector = fit_novelty(model, data, splits, rate=options.rate)
    yield tell("as they are", detector.judge(model, data, splits.test), groups_of(data, splits.test))
    for name, found in others(info, options.seed).items():
        judged = detector.judge(model, decode_images(found, image_size=info.image_size))
        yield tell(name, judged, np.array([record.group for record in found.records]))
    chosen = splits.test[:: -(-len(splits.test) // options.most)]
    for name, change in CHANGES.items():
        changed = changed_images(data, chosen, change)
        yield tell(name, detector.judge(model, changed), groups_of(data, chosen))
    for name, remake in REMADE.items():
        remade = decode_images(remade_images(data, chosen, remake), image_size=info.image_size)
        yield tell(name, detector.judge(model, remade), groups_of(data, chosen))


def groups_of(data: DecodedImages, indices: tuple[int, ...]) -> NDArray[np.str_]:
    """Return the patients of some images."""
    return np.array([data.images.records[index].group for index in indices])


def tell(name: str, judged: Judgement, groups: NDArray[np.str_]) -> Row:
    """Return a row: the share that is flagged, its interval over groups, and what is said most often."""
    flagged = np.array([verdict.flagged for verdict in judged.verdicts])
    rng = np.random.default_rng(0)
    low, high = np.percentile([flagged[rows].mean() for rows in resample(groups, 2000, rng)], [2.5, 97.5])
    told = Counter(verdict.reasons[0] for verdict in judged.verdicts if verdict.flagged).most_common(1)
    interval = f"{100 * low:.0f} to {100 * high:.0f} %" if len(groups) > 4 else ""
    reason = f"{told[0][0]} ({told[0][1]})" if told else ""
    return Row(name, len(flagged), float(flagged.mean()), interval, reason)


def changed_images(
    data: DecodedImages, indices: tuple[int, ...], change: Callable[[Tensor], Tensor]
) -> DecodedImages:
    """Return some images, changed; the shape of their files stays."""
    pixels = (change(data.batch(indices)[0]) * FULL_RANGE).round().numpy().astype(np.uint16)
    records = tuple(data.images.records[index] for index in indices)
    images = replace(data.images, records=records)
    return DecodedImages(images, image_size=data.image_size, channels=data.channels, cache=pixels)


def remade_images(
    data: DecodedImages, indices: tuple[int, ...], change: Callable[[Pixels], Pixels]
) -> ImageSet:
    """Return some films as other files would have them, 8 bits."""
    records = [data.images.records[index] for index in indices]
    films = [(read_image(source_of(record), size=None)[0] >> 8).astype(np.uint8) for record in records]
    remade = [replace(old, path=None, pixels=change(film)) for old, film in zip(records, films, strict=True)]
    return replace(data.images, records=tuple(remade))


def others(info: ModelInfo, seed: int) -> dict[str, ImageSet]:
    """Return images of other kinds, by name."""
    rng, side = np.random.default_rng(seed), 256
    photographs = [cut(picture, rng) for picture in open_photographs() for _ in range(4)]
    noise = rng.integers(0, 256, (5, side, side)).astype(np.uint8)
    soft = np.clip(rng.normal(128, 30, (5, side, side)), 0, 255).astype(np.uint8)
    phantoms, coarse = (
        [draw_phantom(seed, size=size, label=n % 2, patient=n).image for n in range(40)]
        for size in (side, side // 2)
    )
    found: dict[str, list[Pixels]] = {
        "black, white, grey": [np.full((side, side), level, np.uint8) for level in (0, 255, 128)],
        "noise": [*noise, *soft],
        "photographs": photographs,
        "photographs turned grey": [
            np.asarray(Image.fromarray(part).convert("L")) if part.ndim == 3 else part for part in photographs
        ],
        "phantoms": phantoms,
        "phantoms of half as many pixels a side": coarse,
    }
    return {name: as_set(pixels, info) for name, pixels in found.items()}


def as_set(pixels: list[Pixels], info: ModelInfo) -> ImageSet:
    """Return arrays as a set of images, each a patient of its own."""
    records = (ImageRecord(str(n), 0, str(n), pixels=array) for n, array in enumerate(pixels))
    return ImageSet(Path("made"), info.classes, tuple(records))


def cut(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a square part of a picture, drawn at random."""
    side = int(rng.integers(128, min(picture.shape[:2]) + 1))
    y, x = (int(rng.integers(0, length - side + 1)) for length in picture.shape[:2])
    return picture[y : y + side, x : x + side]


def open_photographs() -> list[Pixels]:
    """Return the photographs that scikit-learn and scikit-image bring, grey or RGB, 8 bits."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = (
        "astronaut",
        "brick",
        "camera",
        "chelsea",
        "coffee",
        "coins",
        "grass",
        "gravel",
        "moon",
        "rocket",
    )
    return [*load_sample_images().images, *(getattr(data, name)() for name in names)]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--group-pattern")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument(
        "--most", type=int, default=60, help="test images that are changed, at even distances"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--develop", action="store_true", help="judge the validation images instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
