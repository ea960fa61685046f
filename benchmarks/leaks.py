"""What share of altered copies `chanscale leaks` finds, and how often it takes two exposures for one.

    python benchmarks/leaks.py ../shared/data/nih-opacity --group-pattern '^(\\d+)_'
    python benchmarks/leaks.py ../shared/data/pneumoniamnist.npz --every 20
    python benchmarks/leaks.py --speed 1000 10000
    python benchmarks/leaks.py phantoms --cost 10000

Images are altered in every way; then all pairs of the set are gone through. One half of the patients is there to choose
thresholds by, the other to judge them: a column for each. `--cost` measures one search of so many images, one in four
of which is an altered copy: all pairs are compared, and of the candidates a sample is laid on each other, whose price
and whose mistakes are then counted for all.
"""

import argparse
import io
import resource
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from chanscale.data import decode_images, open_images, read_image
from chanscale.data.loading import source_of
from chanscale.data.sources import ImageSet
from chanscale.leaks.candidates import find_candidates
from chanscale.leaks.thumbnails import SIDE, thumbnails
from chanscale.leaks.twins import SAME, SURE, measure_agreement

SAMPLE = 1000
"""Candidates that are laid on each other to know what one takes."""

Small = NDArray[np.uint8]
Change = Callable[[Image.Image], Image.Image]


def main() -> None:
    """Print the tables that were asked for."""
    options = parse_options()
    if options.speed:
        print_speed(options.speed)
        return
    images = open_images(options.data, group_pattern=options.group_pattern)
    if options.cost:
        print_cost(images, options.cost)
        return
    print_copies(images, options.every)
    print_others(images)


# --- copies


def save_as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return what a JPEG of this quality holds."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("L")


def resize(image: Image.Image, factor: float) -> Image.Image:
    """Return the image with `factor` times as many pixels a side."""
    size = round(factor * image.width), round(factor * image.height)
    return image.resize(size, Image.Resampling.BICUBIC)


def crop(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Return the image less these shares at its edges."""
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.crop(tuple(map(round, box)))


def shift(image: Image.Image, share: float) -> Image.Image:
    """Return the image moved down and to the right; black comes in."""
    moved = Image.new("L", image.size)
    moved.paste(image, (round(share * image.width), round(share * image.height)))
    return moved


def redraw(image: Image.Image, curve: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Image.Image:
    """Return the image behind a curve on [0, 1]."""
    levels = curve(np.asarray(image) / 255).clip(0, 1)
    return Image.fromarray((levels * 255 + 0.5).astype(np.uint8))


def stamp(image: Image.Image) -> Image.Image:
    """Return the image with a label in a corner, over 3 % of it."""
    marked, (width, height) = image.copy(), image.size
    pen = ImageDraw.Draw(marked)
    pen.rectangle((0.62 * width, 0.04 * height, 0.95 * width, 0.14 * height), fill=0)
    pen.text((0.64 * width, 0.05 * height), "PORTABLE 12:04", fill=255)
    return marked


CHANGES: dict[str, Change] = {
    "as it is": lambda i: i,
    "JPEG, quality 60": lambda i: save_as_jpeg(i, 60),
    "JPEG, quality 30": lambda i: save_as_jpeg(i, 30),
    "half the size": lambda i: resize(i, 0.5),
    "double the size": lambda i: resize(i, 2),
    "2 % cut off each edge": lambda i: crop(i, 0.02, 0.02, 0.02, 0.02),
    "5 % cut off each edge": lambda i: crop(i, 0.05, 0.05, 0.05, 0.05),
    "5 % cut off one edge": lambda i: crop(i, 0.05, 0, 0, 0),
    "10 % cut off two edges": lambda i: crop(i, 0, 0, 0.1, 0.1),
    "moved by 3 % and 3 %": lambda i: shift(i, 0.03),
    "turned by 1 degree": lambda i: i.rotate(1, Image.Resampling.BICUBIC),
    "turned by 2 degrees": lambda i: i.rotate(2, Image.Resampling.BICUBIC),
    "brighter by 0.2": lambda i: redraw(i, lambda a: a + 0.2),
    "darker by 0.2": lambda i: redraw(i, lambda a: a - 0.2),
    "contrast 1.5": lambda i: redraw(i, lambda a: (a - 0.5) * 1.5 + 0.5),
    "contrast 0.6": lambda i: redraw(i, lambda a: (a - 0.5) * 0.6 + 0.5),
    "gamma 0.6": lambda i: redraw(i, lambda a: a**0.6),
    "gamma 1.6": lambda i: redraw(i, lambda a: a**1.6),
    "inverted": ImageOps.invert,
    "mirrored": ImageOps.mirror,
    "stamped label": stamp,
    "mirrored, inverted, 3 % cut, JPEG 50": lambda i: save_as_jpeg(
        ImageOps.mirror(ImageOps.invert(crop(i, 0.03, 0.03, 0.03, 0.03))), 50
    ),
}


def print_copies(images: ImageSet, every: int) -> None:
    """Print the share of copies that are found, of each half of the patients."""
    chosen = range(0, len(images), every)
    originals = [read_grey(images, index) for index in chosen]
    halves = [half[::every] for half in draw_halves([record.group for record in images.records])]
    whole = np.stack([shrink(image) for image in originals])
    print("| copy | found, half to choose by | found, other half | agreement: lowest, 5th percentile |")
    print("|---|---|---|---|")
    for name, change in CHANGES.items():
        altered = np.stack([shrink(change(image)) for image in originals])
        agreed = judge_copies(whole, altered)
        found = agreed >= SAME
        shares = " | ".join(f"{100 * found[half].mean():.1f} %" for half in halves)
        lowest, low = np.quantile(agreed, (0, 0.05))
        print(f"| {name} | {shares} | {lowest:.2f}, {low:.2f} |", flush=True)


def judge_copies(whole: Small, altered: Small) -> NDArray[np.float32]:
    """Return how well each copy agrees with its original, shape (N,), of all 2 N; 0 where they are no candidates."""
    small = np.concatenate([whole, altered])
    found = find_candidates(small)
    found = found.take(np.abs(found.first - found.second) == len(whole))
    agreed = np.zeros(len(whole), dtype=np.float32)
    agreed[np.minimum(found.first, found.second)] = measure_agreement(small, found)
    return agreed


def read_grey(images: ImageSet, index: int) -> Image.Image:
    """Return an image of the set, grey, as large as it is."""
    pixels = read_image(source_of(images.records[index]), size=None).mean(axis=0) / 257
    return Image.fromarray(pixels.astype(np.uint8))


def shrink(image: Image.Image) -> Small:
    """Return the thumbnail of an image, as the command makes it."""
    pixels = read_image(np.asarray(image), size=SIDE)[0] / 257
    return pixels.round().astype(np.uint8)


def draw_halves(groups: list[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images are of the one half of the patients, and which of the other."""
    patients = np.unique(groups)
    first = np.random.default_rng(0).permutation(patients)[: len(patients) // 2]
    inside = np.isin(groups, first)
    return inside, ~inside


# --- other exposures


def print_others(images: ImageSet) -> None:
    """Print how many pairs of a set are taken for one exposure, by whether they are of one patient."""
    decoded = decode_images(images, image_size=SIDE)
    groups = np.array([record.group for record in images.records])
    small = thumbnails(decoded)
    print("\n| pairs of | pairs | candidates | taken for one exposure | highest agreement |")
    print("|---|---|---|---|---|")
    for name, half in zip(("half to choose by", "other half"), draw_halves(list(groups)), strict=True):
        print_pairs(name, small[half], groups[half])
    print_pairs("all", small, groups)


def print_pairs(name: str, small: Small, groups: NDArray[np.str_]) -> None:
    """Print a row for the pairs of one patient, and one for those of two."""
    found = find_candidates(small)
    agreed = measure_agreement(small, found)
    together = groups[found.first] == groups[found.second]
    sizes = np.unique(groups, return_counts=True)[1]
    own = int((sizes * (sizes - 1) // 2).sum())
    total = len(small) * (len(small) - 1) // 2
    for kind, which, pairs in (("one patient", together, own), ("two patients", ~together, total - own)):
        flagged = int((agreed[which] >= SAME).sum())
        highest = max(agreed[which], default=0)
        print(f"| {name}: {kind} | {pairs:,} | {which.sum():,} | {flagged:,} | {highest:.2f} |", flush=True)


def print_speed(counts: list[int]) -> None:
    """Print seconds and memory for images of noise behind a blur, of which one in a hundred is a copy."""
    print("| images | candidates | seconds to compare | images a second | memory, MB |")
    print("|---|---|---|---|---|")
    for count in counts:
        small = draw_noise(count)
        before, begun = psutil.Process().memory_info().rss, perf_counter()
        found = find_candidates(small)
        compared = perf_counter() - begun
        print(
            f"| {count:,} | {len(found):,} | {compared:.0f} | {count / compared:,.0f} "
            f"| {(psutil.Process().memory_info().rss - before) / 1e6:.0f} |",
            flush=True,
        )


def print_cost(images: ImageSet, count: int) -> None:
    """Print what a search among `count` images takes, and what it finds and mistakes."""
    originals = 3 * count // 4
    small = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    changes = list(CHANGES.items())
    for index in range(count):
        change = changes[index % len(changes)][1] if index >= originals else changes[0][1]
        small[index] = shrink(change(read_grey(images, index % originals)))
    groups = np.array([images.records[index % originals].group for index in range(count)])
    begun = process_time()
    found = find_candidates(small)
    compared = process_time() - begun
    copies = np.abs(found.second - found.first) == originals
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(~copies))[:SAMPLE]
    begun = process_time()
    agreed, others = (
        measure_agreement(small, found.take(which)) for which in (np.flatnonzero(copies), chosen)
    )
    each = (process_time() - begun) / (len(agreed) + len(others))
    apart = groups[found.first[chosen]] != groups[found.second[chosen]]
    mistaken, sure = (
        (others[apart] >= least).mean() * (~copies).sum() * apart.mean() for least in (SAME, SURE)
    )
    print(
        f"images: {count:,}, of which copies: {count - originals:,}\n"
        f"comparing all pairs: {compared:.0f} s of processor time; candidates: {len(found):,}\n"
        f"laying a candidate on another: {1000 * each:.1f} ms, so all: {each * len(found):.0f} s\n"
        f"copies that are candidates: {copies.sum() / (count - originals):.1%}, "
        f"found: {(agreed >= SAME).sum() / (count - originals):.1%}, "
        f"beyond doubt: {(agreed >= SURE).sum() / (count - originals):.1%}\n"
        f"pairs of two patients taken for one exposure: about {mistaken:,.0f}, beyond doubt: about {sure:,.0f} "
        f"(of {apart.sum():,} in the sample: {(others[apart] >= SAME).sum():,}, {(others[apart] >= SURE).sum():,})\n"
        f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB"
    )


def draw_noise(count: int) -> Small:
    """Return thumbnails without content."""
    rng = np.random.default_rng(0)
    small = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    for index in range(count):
        coarse = rng.integers(0, 256, (12, 12), dtype=np.uint8)
        small[index] = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    small[count - count // 100 :] = small[: count // 100]
    return small


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--group-pattern")
    parser.add_argument("--every", type=int, default=1, help="Alter one image in so many.")
    parser.add_argument("--cost", type=int, help="Images to search once, copies among them.")
    parser.add_argument("--speed", type=int, nargs="+", help="Numbers of images to draw and compare.")
    options = parser.parse_args()
    if options.data is None and not options.speed:
        parser.error("name the images, or how many to draw for --speed")
    return options


if __name__ == "__main__":
    main()
