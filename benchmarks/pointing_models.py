"""The models of benchmarks/pointing.py: a small one, the frozen network with a head, and the network fine-tuned.

    python benchmarks/pointing_models.py ../shared/data/nih-opacity --out runs/pointing/nih --group-pattern '^(\\d+)_'

The set has a `boxes.csv` (image, x, y, width, height). All images of a patient of whom one has a box are test images,
so that none of them is trained on; the split is the same for every model. `--only small-0 full-0` trains these alone.
What is trained already is left; a small model that was stopped goes on.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_model, save_model

from chanscale.baselines import BASELINES
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import DecodedImages
from chanscale.data.sources import ImageSet, open_images
from chanscale.data.splits import Splits, split_images
from chanscale.pipeline import open_classifier, scale_and_select
from chanscale.progress import Watcher
from chanscale.run_images import load_images

SMALL = tuple(f"small-{seed}" for seed in range(5))
OTHERS = ("head", "full-0")
TEST, VALIDATION = 0.2, 0.15


class Lines(Watcher):
    """Prints a line for each epoch."""

    def on_epoch(self, _: object, row: dict[str, object]) -> None:  # type: ignore[override]
        """Print what an epoch came to."""
        print(
            {name: row.get(name) for name in ("epoch", "train_loss", "validation_auc", "seconds")}, flush=True
        )


def main() -> None:
    """Train what is asked for and is not there."""
    options = parse_options()
    images = split_set(options.data, options.group_pattern)
    for name in options.only:
        print(name, flush=True)
        train(name, images, options.out)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-pattern")
    parser.add_argument("--only", nargs="+", default=[*OTHERS, *SMALL], metavar="MODEL")
    return parser.parse_args()


def split_set(data: Path, group_pattern: str | None) -> ImageSet:
    """Return the set at `data`, each image on its side: patients with a box, and others up to the share, are test."""
    images = open_images(data, group_pattern=group_pattern)
    boxed = patients_with_boxes(images, data)
    rest = replace(images, records=tuple(r for r in images.records if r.group not in boxed))
    wanted = TEST * np.array([*images.counts.values()])
    drawn = draw_patients(rest, wanted - count_boxed(images, boxed))
    tested = boxed | drawn
    learning = replace(images, records=tuple(r for r in images.records if r.group not in tested))
    splits = split_images(learning, validation=VALIDATION / (1 - TEST), test=0, seed=0)
    validation = {learning.records[index].name for index in splits.validation}

    def side(name: str, group: str) -> str:
        return "test" if group in tested else "validation" if name in validation else "train"

    records = tuple(replace(r, split=side(r.name, r.group)) for r in images.records)  # type: ignore[arg-type]
    return replace(images, records=records)


def patients_with_boxes(images: ImageSet, data: Path) -> set[str]:
    """Return the patients of whom an image has a box; for phantoms, of whom all sick ones have, none: any will do."""
    with (data / "boxes.csv").open(newline="", encoding="utf-8") as file:
        boxed = {row["image"] for row in csv.DictReader(file)}
    records = [record for record in images.records if record.name.rpartition("/")[2] in boxed]
    sick = [record for record in images.records if record.label == 1]
    return set() if len(records) == len(sick) else {record.group for record in records}


def count_boxed(images: ImageSet, boxed: set[str]) -> np.ndarray:
    """Return how many images of each class the patients with boxes have."""
    labels = [record.label for record in images.records if record.group in boxed]
    return np.bincount(labels, minlength=len(images.classes))


def draw_patients(images: ImageSet, wanted: np.ndarray) -> set[str]:
    """Return patients, at random, who have about as many images of each class as `wanted`."""
    members: dict[str, list[int]] = {}
    for record in images.records:
        members.setdefault(record.group, []).append(record.label)
    drawn, filled = set(), np.zeros(len(wanted))
    for group in np.random.default_rng(0).permutation(sorted(members)).tolist():
        counts = np.bincount(members[group], minlength=len(wanted))
        if np.all(filled + counts <= np.maximum(np.round(wanted), 0)):
            drawn.add(group)
            filled += counts
    return drawn


def train(name: str, images: ImageSet, out: Path) -> None:
    """Train the model of this name into `out`, unless it is there."""
    kind, _, seed = name.partition("-")
    config = FitConfig(seed=int(seed or 0))
    if kind == "small":
        if not (out / name / "model.safetensors").exists():
            resume = bool(list(out.glob(f"*{name}*")))
            scale_and_select(
                config.backbone, images, config=config, out=out / name, resume=resume, watcher=Lines()
            )
        return
    path = out / f"{name}.safetensors"
    if path.exists():
        return
    decoded, splits, whole = open_whole(images, config)
    trained, history = BASELINES[kind](whole, decoded, splits, config, Lines())
    print(next(row for row in history if row["chosen"]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    save_model(trained, str(path.with_suffix(".partial")))
    path.with_suffix(".partial").rename(path)


def open_whole(images: ImageSet, config: FitConfig) -> tuple[DecodedImages, Splits, Classifier]:
    """Return the images, decoded; their split; and the pretrained network with an empty head."""
    decoded = load_images(images, config, Watcher())
    splits = split_images(decoded.images, validation=config.validation, test=0, seed=config.seed)
    _, whole = open_classifier(config.backbone, decoded, splits, config, Watcher())
    return decoded, splits, whole


def load_whole(path: Path, images: ImageSet) -> Classifier:
    """Return a model that `train` wrote, other than the small ones."""
    _, _, whole = open_whole(images, FitConfig())
    load_model(whole, str(path))
    return whole.eval()


if __name__ == "__main__":
    main()
