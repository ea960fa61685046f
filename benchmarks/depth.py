"""What a linear head reads behind each layer of a pretrained network, from few images and from many.

    python benchmarks/depth.py ../shared/data/nih-opacity --group-pattern '^(\\d+)_'

Patient-grouped folds, drawn four times; of the training images of each, n are drawn by patient. One pass over the
images, then logistic regressions. It prints the table of docs/benchmarks/method.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from chanscale.comparison.folds import order_images
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.depth import END, FOLDS, draw_folds, features_behind, find_allowed, judge_probe
from chanscale.pipeline import open_classifier
from chanscale.progress import Watcher
from chanscale.run_images import load_images


def main() -> None:
    """Read the images once, fit the heads, print the table."""
    options = parse_options()
    config = FitConfig.build(
        {
            "group_pattern": options.group_pattern, "backbone": options.backbone, "image_size": options.image_size,
            "budget": 0.9999,
        }
    )  # fmt: skip
    images = load_images(options.data, config, Watcher())
    everything = Splits(tuple(range(len(images))), (), ())
    _, model = open_classifier(config.backbone, images, everything, config, Watcher())
    example = images.batch([0, 1])[0]
    cuts = find_allowed(model, example, config, cost=trunk_cost(model, (), example))
    features, labels = features_behind(model, cuts, images, everything.train, Watcher(), batch_size=5)
    print("| behind | channels |", " | ".join(f"{n or 'all'} images" for n in options.sizes), "|")
    print("|---" * (2 + len(options.sizes)) + "|")
    for name, found in zip([*(cut.layer for cut in cuts), END], features, strict=True):
        means = [
            np.mean([judge_probe(found.numpy(), labels.numpy(), *rows) for rows in draw(images, n)])
            for n in options.sizes
        ]
        figures = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {name} | {found.shape[1]} | {figures} |", flush=True)


def draw(images: DecodedImages, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows to fit on, `size` of them or all for 0, and those to test on."""
    groups = np.array([record.group for record in images.images.records])
    for place, (train, test) in enumerate(draw_folds(images.images.labels, groups, FOLDS, seed=0)):
        order = order_images(images.images, train.tolist(), seed=place // FOLDS)
        yield np.array(order[: size or None]), test


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--group-pattern")
    parser.add_argument("--backbone", default="vgg16")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 200, 0], help="0: all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
