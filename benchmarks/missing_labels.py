"""What unknown labels cost: phantoms with several labels, of which ever more are unknown to training.

    chanscale phantom phantoms --count 600 --size 128
    python benchmarks/missing_labels.py phantoms --out runs/missing_labels

Three labels come from the boxes: an opacity on the left of the film, on the right, and more than one. Of the training
and validation images a share of the labels is taken away at random; test images keep all of theirs. The last rows count
what is unknown as absent, as tables that list findings alone invite one to do. Finished runs are not run again.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from chanscale.config import FitConfig
from chanscale.data.readers import Side
from chanscale.data.sources import open_images
from chanscale.data.splits import SIDES, split_images
from chanscale.pipeline import scale_and_select

LABELS = ("left", "right", "several")
CASES = (("unknown", 0.0), ("unknown", 0.3), ("unknown", 0.6), ("absent", 0.3), ("absent", 0.6))
PATIENT = r"^(\d+)_"

Labels = dict[str, tuple[int, ...]]


def main() -> None:
    """Write a table for each case, fit on it, and print what the test images say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phantoms", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    labels = read_boxes(options.phantoms)
    sides = draw_sides(options.phantoms, labels)
    print(f"| unknown labels | counted as | mean AUC | {' | '.join(LABELS)} |")
    print("|---|---|---|" + "---|" * len(LABELS))
    for treatment, share in CASES:
        table = options.phantoms / f"labels-{treatment}-{share}.csv"
        write_table(table, take_away(labels, sides, share, treatment), sides)
        print(describe(treatment, share, fit(table, options.out / f"{treatment}-{share}")), flush=True)


def read_boxes(phantoms: Path) -> Labels:
    """Return the labels of each image, by its path below the folder."""
    boxes = defaultdict(list)
    with (phantoms / "boxes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            boxes[row["image"]].append(float(row["x"]) + float(row["width"]) / 2)
    middle = open_middle(phantoms)
    found = {}
    for path in sorted(phantoms.rglob("*.png")):
        centres = boxes[path.name]
        on_sides = any(x < middle for x in centres), any(x >= middle for x in centres)
        found[path.relative_to(phantoms).as_posix()] = (*map(int, on_sides), int(len(centres) > 1))
    return found


def open_middle(phantoms: Path) -> float:
    """Return half the width of the images, in pixels."""
    with Image.open(next(phantoms.rglob("*.png"))) as image:
        return image.width / 2


def draw_sides(phantoms: Path, labels: Labels) -> dict[str, Side]:
    """Return the side of each image: the same in every case."""
    table = phantoms / "labels.csv"
    write_table(table, labels, {})
    images = open_images(table, group_pattern=PATIENT)
    side_of = split_images(images, validation=0.15, test=0.2, seed=0).side_of
    return {record.name: side_of[index] for index, record in enumerate(images.records)}


def take_away(labels: Labels, sides: dict[str, Side], share: float, treatment: str) -> Labels:
    """Return the labels with a share of those that are not of test images taken away, at random."""
    rng = np.random.default_rng(0)
    gone = -1 if treatment == "unknown" else 0
    return {
        name: tuple(gone if rng.random() < share and sides[name] != SIDES[2] else label for label in own)
        for name, own in labels.items()
    }


def write_table(table: Path, labels: Labels, sides: dict[str, Side]) -> None:
    """Write path, labels and side of each image."""
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *LABELS, "split"])
        for name, own in labels.items():
            writer.writerow([name, *("" if label < 0 else label for label in own), sides.get(name, "")])


def fit(table: Path, run: Path) -> dict:
    """Return the metrics of a run on a table, which is made if it is not there."""
    if not run.exists():
        config = FitConfig(backbone="efficientnet_lite0", budget=0.7, group_pattern=PATIENT)
        begun = run.with_name(f"{run.name}.partial").exists()
        scale_and_select("efficientnet_lite0", table, config=config, out=run, resume=begun)
    return json.loads((run / "metrics.json").read_text())


def describe(treatment: str, share: float, metrics: dict) -> str:
    """Return a row of the table."""
    mean = metrics["auc"]
    each = [f"{metrics['labels'][name]['auc']['value']:.3f}" for name in LABELS]
    interval = f"{mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
    return f"| {share:.0%} | {treatment} | {interval} | {' | '.join(each)} |"


if __name__ == "__main__":
    main()
