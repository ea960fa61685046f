"""What `--balance` gains where a class is rare: phantoms of which one in ten has an opacity.

    python benchmarks/imbalance.py --out runs/imbalance

The phantoms are drawn by the script, one film a patient, and read at 64 px, where a faint opacity spans a few pixels:
that makes the task harder. Training, validation and test images each have one opacity in ten. For each seed there is
a fit with `--balance` and one without, alike in all else, of three epochs of scaling and three of refinement; finished
ones are not run again. A threshold of 0.5 is what `predict` goes by, one of 0.1 the share of opacities.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from chanscale.calibration import brier_score
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.loading import decode_images
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import open_images
from chanscale.evaluation import predict
from chanscale.metrics import area_under_roc
from chanscale.pipeline import scale_and_select

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_backbone

SIZE = 64
COUNTS = {"train": 300, "validation": 100, "test": 600}
ONE_IN = 10
Figures = dict[str, float]


def main() -> None:
    """Draw the phantoms, fit, and print a row for each run, and their means and ranges."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--backbone",
        default="efficientnet_lite0",
        help="or tiny: three layers of random filters, for a quick look",
    )
    options = parser.parse_args()
    if options.backbone == tiny_backbone.NAME:
        tiny_backbone.register()
    table = draw(options.out / "phantoms")
    rows: dict[bool, list[Figures]] = {False: [], True: []}
    for seed in range(options.seeds):
        for balance in rows:
            found = judge(table, options.out, options.backbone, seed=seed, balance=balance)
            if not any(rows.values()):
                print(f"| fit | {' | '.join(found)} |\n|---|{'---|' * len(found)}", flush=True)
            rows[balance].append(found)
            print(describe(f"{name(balance)}, seed {seed}", found), flush=True)
    for balance, found in rows.items():
        print(summarise(f"**{name(balance)}**: mean (range)", found))
    gains = [
        {key: one[key] - two[key] for key in one} for one, two in zip(rows[True], rows[False], strict=True)
    ]
    print(summarise("`--balance` less without", gains, sign="+"))


def draw(folder: Path) -> Path:
    """Return a table of phantoms and their sides, drawn if it is not there."""
    table = folder / "table.csv"
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label,split"]
    sides = [side for side, count in COUNTS.items() for _ in range(count)]
    for patient, side in enumerate(sides):
        label = int(patient % ONE_IN == 0)
        film = draw_phantom(0, size=SIZE, label=label, patient=patient).image
        Image.fromarray(film).save(folder / f"{patient:05}.png")
        lines.append(f"{patient:05}.png,{('normal', 'opacity')[label]},{side}")
    table.write_text("\n".join([*lines, ""]))
    return table


def judge(table: Path, out: Path, backbone: str, *, seed: int, balance: bool) -> Figures:
    """Return what a fit comes to on the test images; finished ones are read."""
    file = out / f"{backbone}-{'balance' if balance else 'plain'}-{seed}.json"
    if not file.exists():
        config = FitConfig(
            backbone=backbone, image_size=SIZE, budget=0.7, round_to=4, scale_epochs=3, refine_epochs=3,
            micro_batch=20, precision="32-true", seed=seed, balance=balance,
        )  # fmt: skip
        # Without a folder: nobody looks for twins, strangers or a report.
        model = scale_and_select(backbone, table, config=config).model
        file.write_text(json.dumps(measure(model, table)))
    return json.loads(file.read_text())


def measure(model: Classifier, table: Path) -> Figures:
    """Return the figures of a model on the test images."""
    images = open_images(table, classes=model.classes).on_side("test")
    assert images is not None
    shares, labels = predict(model, decode_images(images, image_size=SIZE), range(len(images)))
    found = {"AUC": area_under_roc(shares[:, 1], labels == 1), "Brier": brier_score(shares, labels)}
    for threshold in (0.5, 1 / ONE_IN):
        right = (shares[:, 1] > threshold) == (labels == 1)
        sensitivity, specificity = (float(right[labels == label].mean()) for label in (1, 0))
        found |= {
            f"balanced accuracy at {threshold:g}": (sensitivity + specificity) / 2,
            f"sensitivity at {threshold:g}": sensitivity,
            f"specificity at {threshold:g}": specificity,
        }
    return found


def name(balance: bool) -> str:
    """Return what to call the fits."""
    return "`--balance`" if balance else "without"


def describe(what: str, found: Figures) -> str:
    """Return a row of the table."""
    return f"| {what} | {' | '.join(f'{value:.3f}' for value in found.values())} |"


def summarise(what: str, found: list[Figures], *, sign: str = "") -> str:
    """Return a row of means, with the least and the most."""
    columns = np.array([list(one.values()) for one in found]).T
    cells = [f"{own.mean():{sign}.3f} ({own.min():{sign}.3f} to {own.max():{sign}.3f})" for own in columns]
    return f"| {what} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
