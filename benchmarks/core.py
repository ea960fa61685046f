"""Scale-and-select against a linear head and full fine-tuning: accuracy, time and memory, side by side.

    python benchmarks/core.py ../shared/data/nih-opacity --group-pattern '^(\\d+)_' --seeds 0 1 2 --out runs/core

Each cell (method, seed) runs in a process of its own, so that its peak memory is its own, and leaves one JSON
file; cells that are there are not run again. The last lines are the table of docs/benchmarks/core.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

METHODS = ("head", "full", "chanscale")


def main() -> None:
    """Run the cells that are missing, then print the table."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cell:
        method, seed = options.cell
        run_cell(method, int(seed), options)
        return
    cells = [(method, seed) for seed in options.seeds for method in options.methods]
    for done, (method, seed) in enumerate(cells, start=1):
        path = cell_path(options.out, method, seed)
        if not path.exists():
            command = [sys.executable, __file__, *sys.argv[1:], "--cell", method, str(seed)]
            subprocess.run(command, check=True)
        print(f"{done}/{len(cells)} {path.name}: {summarise(read(path))}", flush=True)
    print(
        make_table(
            {
                method: [read(cell_path(options.out, method, s)) for s in options.seeds]
                for method in options.methods
            }
        )
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--group-pattern")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budget", type=float, default=0.95)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="further options of FitConfig"
    )
    parser.add_argument("--full-micro-batch", type=int, help="for full fine-tuning; default: the whole batch")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_cell(method: str, seed: int, options: argparse.Namespace) -> None:
    """Train one method with one seed, judge it on the test images, and write its figures."""
    from chanscale.baselines import BASELINES
    from chanscale.config import FitConfig
    from chanscale.data.splits import split_images
    from chanscale.files import write_atomically
    from chanscale.pipeline import open_classifier, scale_and_select
    from chanscale.run_figures import describe_machine, judge
    from chanscale.run_images import load_images

    given = {"seed": seed, "budget": options.budget, "group_pattern": options.group_pattern}
    config = FitConfig.build(given | dict(item.split("=", 1) for item in options.set))
    watcher = EpochLines(f"{method} {seed}")
    began = perf_counter()
    if method == "chanscale":
        metrics = scale_and_select(config.backbone, options.data, config=config, watcher=watcher).metrics
    else:
        if method == "full":
            config = config.model_copy(update={"micro_batch": options.full_micro_batch or config.batch_size})
        images = load_images(options.data, config, watcher)
        splits = split_images(images.images, validation=config.validation, test=config.test, seed=seed)
        _, classifier = open_classifier(config.backbone, images, splits, config, watcher)
        model, history = BASELINES[method](classifier, images, splits, config, watcher)
        metrics = {
            **judge(model, images, splits, watcher),
            "validation_auc": next(row["validation_auc"] for row in history if row["chosen"]),
            "parameters": {
                "removed": next(row for row in history if row["chosen"]).get("parameters_removed", 0.0)
            },
            **describe_machine(),
        }
    metrics["seconds"] = round(perf_counter() - began, 1)
    write_atomically(cell_path(options.out, method, seed), json.dumps(metrics, indent=2) + "\n")


class EpochLines:
    """Prints one line for each epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step(self, what: str, done: int, total: int) -> None:
        """Say nothing of the short work."""

    def on_batch(self, moment: Any, done: int, total: int, loss: float) -> None:
        """Say nothing of a batch."""

    def on_epoch(self, moment: Any, row: dict[str, Any]) -> None:
        """Print the epoch."""
        left = f" parameters {row['parameters']:,}" if "parameters" in row else ""
        print(
            f"  {self.name} epoch {row['epoch']} {moment.phase} loss {row['train_loss']:.3f} "
            f"validation AUC {row['validation_auc']:.3f}{left} {row['seconds']:.1f} s",
            flush=True,
        )


def cell_path(out: Path, method: str, seed: int) -> Path:
    """Return where the figures of a cell lie."""
    return out / f"{method}-{seed}.json"


def read(path: Path) -> dict[str, Any]:
    """Return the figures of a cell."""
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def summarise(cell: dict[str, Any]) -> str:
    """Return the figures of a cell in one line."""
    auc, gib = cell["auc"], cell["peak_memory_bytes"] / 2**30
    return (
        f"AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}] "
        f"removed {cell['parameters']['removed']:.2%} {cell['seconds']:.0f} s {gib:.2f} GiB"
    )


def make_table(cells: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table: a row for each method, a column for the test AUC of each seed."""
    seeds = len(next(iter(cells.values())))
    head = [
        "method",
        "removed",
        *(f"AUC, split {i}" for i in range(seeds)),
        "mean AUC",
        "seconds",
        "peak GiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, runs in cells.items():
        aucs = [run["auc"]["value"] for run in runs]
        row = [
            method,
            f"{mean(run['parameters']['removed'] for run in runs):.2%}",
            *(f"{auc:.3f}" for auc in aucs),
            f"{mean(aucs):.3f}",
            f"{mean(run['seconds'] for run in runs):.0f}",
            f"{mean(run['peak_memory_bytes'] for run in runs) / 2**30:.2f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(
        [*lines, "", f"Machine: {os.cpu_count()} cores, {platform.processor() or platform.machine()}"]
    )


if __name__ == "__main__":
    main()
