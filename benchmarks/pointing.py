"""Do maps point at the opacity, and what does a model see when the lungs are gone?

    python benchmarks/pointing_models.py ../shared/data/nih-opacity --out runs/pointing/nih --group-pattern '^(\\d+)_'
    python benchmarks/pointing.py ../shared/data/nih-opacity --out runs/pointing/nih --group-pattern '^(\\d+)_'

The first command trains (see there), this one measures and prints the tables of docs/benchmarks/explain.md; with
phantoms in place of the radiographs, the same. Intervals: 95 %, bootstrap over patients. Figures of the small model are
means over its seeds, image by image, before patients are drawn.
"""

import argparse
import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pointing_models import OTHERS, SMALL, load_whole, split_set
from torch import Tensor
from torch.nn import functional

from chanscale.artifact import load_model
from chanscale.baselines.head import STRENGTHS
from chanscale.classifier import Classifier, probabilities
from chanscale.config import FitConfig
from chanscale.data.images import FULL_RANGE
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits, split_images
from chanscale.explain.decomposition import decompose
from chanscale.explain.pointing import Box, centre_map, cover, energy_inside, enlarge, points_at
from chanscale.explain.saliency import grad_cam
from chanscale.explain.training_maps import decompose_mean, survey_training
from chanscale.metrics import mean_auc, resample
from chanscale.probe import pooled_features, regress
from chanscale.progress import Watcher
from chanscale.run_images import load_images

LUNGS = Box(0.12, 0.10, 0.76, 0.72)
"""Chosen by eye on the mean training radiograph; 27 of 27 boxes lie in it, but for a few pixels of three."""

SCALES = (1, 1.5, 2)
"""Sizes that maps are averaged over; chosen on phantoms."""

RESAMPLES = 2000

Table = dict[str, np.ndarray]


def main() -> None:
    """Print the tables for the models that are there."""
    options = parse_options()
    config = FitConfig()
    images = load_images(split_set(options.data, options.group_pattern), config, Watcher())
    splits = split_images(images.images, validation=config.validation, test=0, seed=0)
    models = load_models(options.out, images)
    print(f"models: {', '.join(models)}; test images: {len(splits.test)}\n", flush=True)
    print_pointing(models, images, splits, read_boxes(options.data, images))
    if options.blank:
        print_blanking(models, images, splits)


def load_models(out: Path, images: DecodedImages) -> dict[str, Classifier]:
    """Return the models in `out` by name."""
    models: dict[str, Classifier] = {}
    for name in (*OTHERS, "full-1", "full-2"):
        path = out / f"{name}.safetensors"
        if path.exists():
            models[name] = load_whole(path, images.images)
    for name in SMALL:
        if (out / name / "model.safetensors").exists():
            model, _ = load_model(out / name)
            assert isinstance(model, Classifier)
            models[name] = model.eval()
    return models


def read_boxes(data: Path, images: DecodedImages) -> dict[int, list[Box]]:
    """Return the boxes of each image that has some, by its index."""
    found: dict[str, list[Box]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    indices = {record.name.rpartition("/")[2]: i for i, record in enumerate(images.images.records)}
    with (data / "boxes.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["image"]
            if name not in sizes:
                with Image.open(images.images.records[indices[name]].path) as picture:  # type: ignore[arg-type]
                    sizes[name] = picture.size
            width, height = sizes[name]
            x, y, w, h = (float(row[key]) for key in ("x", "y", "width", "height"))
            found.setdefault(name, []).append(Box(x / width, y / height, w / width, h / height))
    return {indices[name]: boxes for name, boxes in found.items()}


# --- pointing


def print_pointing(
    models: Mapping[str, Classifier], images: DecodedImages, splits: Splits, boxes: Mapping[int, list[Box]]
) -> None:
    """Print hits and energy of each model and map, and the differences that the bar is about."""
    chosen = [index for index in splits.test if index in boxes]
    masks = [cover(boxes[index], side=images.image_size) for index in chosen]
    groups = np.array([images.images.records[index].group for index in chosen])
    share = np.array([mask.mean() for mask in masks])
    print(
        f"{len(chosen)} images of {len(set(groups))} patients; boxes cover {share.mean():.3f} of an image\n"
    )
    hits, energy = judge_all(models, images, splits, chosen, masks)
    print("| model | map | hit rate | energy in box | over its share |\n|---|---|---|---|---|")
    for key, values in hits.items():
        model, _, kind = key.partition(": ")
        ratio = interval(lambda rows, e=energy[key]: e[rows].mean() / share[rows].mean(), groups)
        cells = [interval(lambda rows, v=v: v[rows].mean(), groups) for v in (values, energy[key])]
        print(f"| {model} | {kind} |", " | ".join((*cells, ratio)), "|")
    print("\n| small model, class map | hit rate | energy in box |\n|---|---|---|")
    first = "small: class map"
    for key in hits:
        if key != first:
            cells = [
                interval(lambda rows, t=t, k=key: (t[first] - t[k])[rows].mean(), groups, sign="+")
                for t in (hits, energy)
            ]
            print(f"| less {key} |", " | ".join(cells), "|")
    print(flush=True)


def judge_all(
    models: Mapping[str, Classifier], images: DecodedImages, splits: Splits, chosen: list[int],
    masks: list[np.ndarray],
) -> tuple[Table, Table]:  # fmt: skip
    """Return of each model and map, for each image, whether it hits, and the energy; seeds averaged."""
    hits: dict[str, list[np.ndarray]] = {}
    energy: dict[str, list[np.ndarray]] = {}
    for name, model in models.items():
        for kind, maps in draw_maps(model, images, splits, chosen).items():
            key = f"{name.partition('-')[0]}: {kind}"
            large = [enlarge(one, side=images.image_size) for one in maps]
            note(hits, key, [points_at(one, mask) for one, mask in zip(large, masks, strict=True)])
            note(energy, key, [energy_inside(one, mask) for one, mask in zip(large, masks, strict=True)])
    centre = centre_map(images.image_size)
    note(hits, "no model: centre of the image", [points_at(centre, mask) for mask in masks])
    note(energy, "no model: centre of the image", [energy_inside(centre, mask) for mask in masks])
    return average(hits), average(energy)


def note(table: dict[str, list[np.ndarray]], key: str, values: list[float]) -> None:
    """Add what one model came to."""
    table.setdefault(key, []).append(np.array(values))


def average(table: dict[str, list[np.ndarray]]) -> Table:
    """Return the mean over seeds of each figure of each image."""
    return {key: np.mean(rows, axis=0) for key, rows in table.items()}


def draw_maps(
    model: Classifier, images: DecodedImages, splits: Splits, chosen: list[int]
) -> dict[str, Tensor]:
    """Return the maps (N, h, w) of some images by their kind."""
    training = survey_training(model, images.images, splits, image_size=images.image_size)
    mean = decompose_mean(model, training).class_maps[0, 0]
    maps = torch.cat([class_map(model, images.batch(part)[0]) for part in chunks(chosen)])
    cams = torch.cat([grad_cam(model, images.batch(part)[0], 0) for part in chunks(chosen)])
    views = torch.cat([average_views(model, images.batch(part)[0]) for part in chunks(chosen)])
    return {
        "class map": maps, "class map less mean": maps - mean, "the mean alone": mean.expand_as(maps),
        "class map, views averaged": views, "Grad-CAM": cams.clamp_min(0),
    }  # fmt: skip


def average_views(model: Classifier, pixels: Tensor) -> Tensor:
    """Return the mean class map of images at three sizes, each as it is and mirrored, (N, H, W)."""
    side, found = pixels.shape[-1], []
    for size in (round(scale * side) for scale in SCALES):
        view = functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
        both = [class_map(model, view), class_map(model, view.flip(-1)).flip(-1)]
        found += [
            functional.interpolate(one[:, None], size=(side, side), mode="bilinear")[:, 0] for one in both
        ]
    return torch.stack(found).mean(0)


@torch.no_grad()
def class_map(model: Classifier, pixels: Tensor) -> Tensor:
    """Return the class maps (N, h, w), in fp64."""
    return decompose(model.head, model.feature_map(pixels)).class_maps[:, 0]


def chunks(indices: list[int], size: int = 8) -> list[list[int]]:
    """Return the indices in batches."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


# --- blanking


def print_blanking(models: Mapping[str, Classifier], images: DecodedImages, splits: Splits) -> None:
    """Print the AUC of each model when parts of test images are blank, and of a head that is fitted to such images."""
    train, test = images.batch(splits.train)[0], images.batch(splits.test)[0]
    labels = images.images.labels[np.array(splits.test)]
    groups = np.array([images.images.records[index].group for index in splits.test])
    lungs = torch.from_numpy(cover([LUNGS], side=images.image_size))
    mean = train.mean(0)
    grey = torch.full_like(mean, float(mean.mean()))
    treatments: dict[str, Callable[[Tensor], Tensor]] = {
        "whole image": lambda x: x,
        "lungs blank (mean film)": lambda x: torch.where(lungs, mean, x),
        "lungs blank (flat grey)": lambda x: torch.where(lungs, grey, x),
        "only the lungs (mean film)": lambda x: torch.where(lungs, x, mean),
        "only the lungs (flat grey)": lambda x: torch.where(lungs, x, grey),
    }
    print("| test images | " + " | ".join(kinds(models)) + " | linear head fitted to such images |")
    print("|---" * (2 + len(kinds(models))) + "|")
    for treatment, change in treatments.items():
        scores = score_all(models, change(test))
        cells = [
            interval(lambda rows, s=s: mean_of(s, labels, rows), groups)
            for s in (*scores.values(), [refit(models["head"], images, splits, change)])
        ]
        print(f"| {treatment} |", " | ".join(cells), "|", flush=True)


def kinds(models: Mapping[str, Classifier]) -> list[str]:
    """Return the kinds of models, each once."""
    return list(dict.fromkeys(name.partition("-")[0] for name in models))


@torch.no_grad()
def score_all(models: Mapping[str, Classifier], pixels: Tensor) -> dict[str, list[np.ndarray]]:
    """Return the probabilities (N, 2) of each model, those of one kind together."""
    found: dict[str, list[np.ndarray]] = {}
    for name, model in models.items():
        shares = [probabilities(model(part)) for part in pixels.split(16)]
        found.setdefault(name.partition("-")[0], []).append(torch.cat(shares).numpy())
    return found


def mean_of(scores: list[np.ndarray], labels: np.ndarray, rows: np.ndarray) -> float:
    """Return the mean AUC over seeds of some rows."""
    return float(np.mean([mean_auc(one[rows], labels[rows]) for one in scores]))


def refit(
    model: Classifier, images: DecodedImages, splits: Splits, change: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """Return what a linear head on the frozen network says of changed images, fitted to training images changed alike.

    Its penalty is chosen on validation images, changed as well.
    """
    changed = ChangedImages(images, change)
    tables = {
        side: pooled_features(model, changed, indices, batch_size=8)
        for side, indices in (
            ("train", splits.train),
            ("validation", splits.validation),
            ("test", splits.test),
        )
    }
    x, y = (part.numpy() for part in tables["train"])
    centre, spread = x.mean(0), np.maximum(x.std(0), 1e-6)
    heads = [regress((x - centre) / spread, y, c=c) for c in STRENGTHS]

    def shares(head: object, side: str) -> np.ndarray:
        return head.predict_proba((tables[side][0].numpy() - centre) / spread)  # type: ignore[attr-defined,no-any-return]

    best = max(heads, key=lambda head: mean_auc(shares(head, "validation"), tables["validation"][1].numpy()))
    return shares(best, "test")


class ChangedImages(DecodedImages):
    """Decoded images of which each batch is changed."""

    def __init__(self, images: DecodedImages, change: Callable[[Tensor], Tensor]) -> None:
        everything = range(len(images))
        pixels = change(images.batch(everything)[0]) * FULL_RANGE
        super().__init__(
            images.images, image_size=images.image_size, channels=images.channels,
            cache=pixels.round().numpy().astype(np.uint16),
        )  # fmt: skip


def interval(figure: Callable[[np.ndarray], float], groups: np.ndarray, *, sign: str = "") -> str:
    """Return a figure of some rows and its interval over patients, as a cell."""
    everything = np.arange(len(groups))
    drawn = [figure(rows) for rows in resample(groups, RESAMPLES, np.random.default_rng(0))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{figure(everything):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where the models are")
    parser.add_argument("--group-pattern")
    parser.add_argument("--blank", action="store_true", help="also blank the lungs, and all but the lungs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
