"""Measure calibration, an operating point and prediction sets on finished runs, made with `--no-calibrate`.

    python benchmarks/calibration.py runs/a runs/b --images DATA

Temperature, threshold and bounds come from the validation images of each run, all figures from its test images, on
which nothing is chosen. Prints Markdown tables: a row for each run, with 95 % bootstrap intervals over patients, and
one of the means and standard deviations over runs.
"""

import argparse
from pathlib import Path

import numpy as np

from chanscale.artifact import load_model, model_path
from chanscale.conformal import find_prediction_sets
from chanscale.data.loading import decode_images
from chanscale.decision_rules import judge_rules, judge_temperature, temper
from chanscale.evaluation import evaluate, predict_logits
from chanscale.operating_point import find_operating_point
from chanscale.own_images import open_own_images
from chanscale.temperature import find_temperature, fold_temperature

FIGURES = {"nll": "NLL", "ece": "ECE", "brier": "Brier"}


def main() -> None:
    """Judge every run, and print the tables."""
    options = parse_options()
    found = [judge_run(run, options) for run in options.runs]
    names = [run.name for run in options.runs]
    print_table("calibration", names, [describe_calibration(one) for one in found])
    print_table(
        f"operating point for a sensitivity of {options.sensitivity:g}",
        names,
        [describe_point(one) for one in found],
    )
    print_table(
        f"prediction sets for a coverage of {options.coverage:g}",
        names,
        [describe_sets(one) for one in found],
    )


def judge_run(run: Path, options: argparse.Namespace) -> dict:
    """Return what the validation images of a run settle, and what that comes to on its test images."""
    file = model_path(run)
    model, info = load_model(file)
    images, splits = open_own_images(options.images, file, info)
    decoded = decode_images(images, image_size=info.image_size)
    logits, labels = predict_logits(model, decoded, splits.validation)
    temperature = find_temperature(logits, labels)
    shares = temper(logits, temperature.value)
    judged = evaluate(fold_temperature(model, temperature.value), decoded, splits.test)
    point = find_operating_point(shares, labels, options.sensitivity)
    sets = find_prediction_sets(shares, labels, options.coverage)
    calibration = temperature.to_dict() | judge_temperature(judged, temperature.value)
    return {"calibration": calibration, "test": len(judged.labels), **judge_rules(judged, point, sets)}


def describe_calibration(found: dict) -> dict:
    """Return the cells of a run in the first table: numbers, or figures with intervals."""
    told = found["calibration"]
    sides = {
        f"{title} {side}": told[side][name] for name, title in FIGURES.items() for side in ("before", "after")
    }
    return {"validation": told["images"], "test": found["test"], "T": told["temperature"], **sides}


def describe_point(found: dict) -> dict:
    """Return the cells of a run in the second table."""
    told = found["operating_point"]
    figures = {name: told[name] for name in ("sensitivity", "specificity", "ppv", "npv")}
    support = {"positives": told["positives"], "rests on": told["rests_on"]}
    return {**support, "threshold": told["threshold"], **figures}


def describe_sets(found: dict) -> dict:
    """Return the cells of a run in the third table."""
    told = found["prediction_sets"]
    return {"of each class": min(told["images"])} | {
        name: told[name] for name in told if isinstance(told[name], dict)
    }


def print_table(title: str, names: list[str], rows: list[dict]) -> None:
    """Print a Markdown table: a row for each run, and the means over runs."""
    columns = list(rows[0])
    print(f"| {title} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in zip(names, rows, strict=True):
        print(f"| {name} | {' | '.join(write(row[column]) for column in columns)} |")
    if len(rows) > 1:
        print(
            f"| mean (s.d.) | {' | '.join(summarise([row[column] for row in rows]) for column in columns)} |"
        )
    print()


def write(cell: dict | float) -> str:
    """Return a figure with its interval, or a number."""
    if isinstance(cell, dict):
        return f"{cell['value']:.3f} [{cell['low']:.2f}, {cell['high']:.2f}]"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def summarise(cells: list[dict | float]) -> str:
    """Return the mean over runs and the standard deviation; of a count, nothing."""
    if isinstance(cells[0], int):
        return ""
    values = [cell["value"] if isinstance(cell, dict) else cell for cell in cells]
    return f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--sensitivity", type=float, default=0.9)
    parser.add_argument("--coverage", type=float, default=0.9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
