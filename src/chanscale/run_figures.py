"""The figures of a run, as metrics.json has them: of its test images, its size, its training and its machine."""

import platform
import sys
from functools import partial
from typing import Any

import psutil
import torch

from chanscale import __version__
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.costs import trunk_cost
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import on_device
from chanscale.evaluation import Evaluation, evaluate
from chanscale.probe import fit_probe
from chanscale.progress import Watcher
from chanscale.proof import channel_groups
from chanscale.state import Best, TrainingState
from chanscale.wording import NOTICE


def judge(model: Classifier, images: DecodedImages, splits: Splits, watcher: Watcher) -> dict[str, Any]:
    """Return the figures on the test images, with intervals; only `n` = 0 where none were set aside."""
    return describe_test(evaluate_test(model, images, splits, watcher), images, splits)


def evaluate_test(
    model: Classifier, images: DecodedImages, splits: Splits, watcher: Watcher
) -> Evaluation | None:
    """Return what `model` says of the test images, and how good that is; None where none were set aside."""
    if not splits.test:
        return None
    return evaluate(model, images, splits.test, progress=partial(watcher.on_step, "evaluating"))


def describe_test(judged: Evaluation | None, images: DecodedImages, splits: Splits) -> dict[str, Any]:
    """Return the figures of an evaluation of the test images, as metrics.json has them."""
    if judged is None:
        return {"n": 0}
    figures = {name: estimate.to_dict() for name, estimate in judged.estimates.items()}
    patients = images.images.count_patients(splits.test)
    known = {} if patients is None else {"patients": patients}
    labels = {"labels": judged.describe_labels()} if judged.by_label else {}
    return {**figures, "n": len(judged.labels), **known, **labels}


def judge_head(
    model: Classifier, images: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> dict[str, Any]:
    """Return the figures of a linear head on the frozen `model`, as `judge` does; its head is set."""
    if not splits.test:
        return {"n": 0}
    reader = on_device(model, config)
    fit_probe(reader, images, splits.train, batch_size=config.micro_batch)
    return judge(reader, images, splits, watcher)


def measure(classifier: Classifier, best: Best, images: DecodedImages, *, full: int | None) -> dict[str, Any]:
    """Return what the trunk held before and holds now: parameters, MACs for one image, bytes.

    `full`: parameters of the published network, with the classifier that was cut off.
    """
    example, _ = images.batch([0])
    cost = trunk_cost(classifier, channel_groups(classifier, example), example)
    # Of a folded network, the first convolution has fewer inputs than that whose channels were counted.
    folded = best.model.preprocessing.folded
    left = trunk_cost(best.model, (), example) if folded else cost.keep(best.kept)
    trunk, kept = cost.original("parameters"), left.parameters()
    macs = cost.original("macs")
    return {
        "parameters": {
            "trunk": trunk,
            "kept": kept,
            "removed": 1 - kept / trunk,
            "full": full,
            "removed_of_full": 1 - kept / full if full else None,
            "head": sum(parameter.numel() for parameter in best.model.head.parameters()),
        },
        "macs": {"trunk": macs, "kept": left.macs(), "removed": 1 - left.macs() / macs},
        "bytes": {"trunk": 4 * trunk},
        "groups": {
            "prunable": len(cost.widths),
            "protected": {group.name: group.protected for group in cost.groups if group.protected},
        },
    }


def describe_training(
    best: Best, state: TrainingState, images: DecodedImages, splits: Splits
) -> dict[str, Any]:
    """Return how the model came about: epochs, validation, and the images it saw."""
    sides = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {
        "classes": list(images.images.classes),
        "images": {name: len(side) for name, side in sides.items()} | {"skipped": len(images.images.skipped)},
        "epochs": state.epoch,
        "best_epoch": best.row["epoch"],
        "validation_auc": best.row["validation_auc"],
    }


def describe_machine() -> dict[str, Any]:
    """Return what the figures were measured with, and the notice that goes with all figures."""
    return {**describe_resources(), "notice": NOTICE}


def describe_resources() -> dict[str, Any]:
    """Return the memory and threads that this process has had, and the versions of what it runs."""
    return {
        "peak_memory_bytes": _peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": {
            "chanscale": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _peak_memory() -> int:
    """Return the most memory, in bytes, that this process has held."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
