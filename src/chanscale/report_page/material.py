"""What a report is made of, and the same read again from a run folder."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.classifier import Classifier
from chanscale.config import FitConfig, before_it_existed
from chanscale.crossval.plan import CrossPlan, plan_above
from chanscale.data.loading import BatchLoader, DecodedImages, decode_images
from chanscale.data.splits import Splits
from chanscale.errors import ArtifactError, ChanscaleError, DataError, one_line
from chanscale.evaluation import Evaluation, evaluate
from chanscale.explain.stability import STABILITY
from chanscale.files import read_json
from chanscale.modes import device_of
from chanscale.originals import rebuild_trunk
from chanscale.own_images import open_own_images
from chanscale.programs import Program
from chanscale.progress import Watcher
from chanscale.slicing import output_width

WIDTH = "width:"
"""How the columns of `history.csv` begin that hold the width of a group."""
SAME = 0.02
"""How far a figure may be from the run's own when its images are judged again, on another machine."""
WANTED = frozenset({
    "before", "best_epoch", "bytes", "depth", "epochs", "groups", "images", "macs", "n", "parameters",
    "peak_memory_bytes", "precision", "seconds", "threads", "validation_auc", "versions",
})  # fmt: skip
"""What metrics.json must tell for a report."""


@dataclass(frozen=True)
class Material:
    """A run and its images. `metrics` as in metrics.json, `history` a row for each epoch.

    `widths`: the channels of each group of the whole original, also behind the end of the trunk; empty where that is
    not known. `judged`: what the model said of the test images, in the order of `splits.test`; None without any.
    `stability`: how far other seeds agree, as in stability.json; None where that was not measured. `plan`: of the
    cross-validation that the run is a fold of, if it is one.
    """

    model: Classifier | Program
    info: ModelInfo
    metrics: dict[str, Any]
    history: Sequence[Mapping[str, Any]]
    config: FitConfig
    widths: Mapping[str, int]
    images: DecodedImages
    splits: Splits
    judged: Evaluation | None
    stability: Mapping[str, Any] | None = None
    plan: CrossPlan | None = None

    @cached_property
    def groups(self) -> NDArray[Any]:
        """The patient of each test image, or its name where none is known, shape (N,)."""
        return self.images.images.group_keys[list(self.splits.test)]

    @torch.no_grad()
    def feature_maps(self, model: Classifier, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield what the trunk of `model` makes of these images, batch by batch: (N, C, *)."""
        for batch in BatchLoader(self.images, indices, batch_size=16).epoch():
            yield model.feature_map(batch.images.to(device_of(model)))

    @property
    def is_binary(self) -> bool:
        """Whether there are two classes, of which an image has one; the second is the positive one."""
        return self.info.is_binary


def open_material(run: Path, data: Path, *, watcher: Watcher) -> Material:
    """Read a finished run and its own images, and judge the model on the test images again.

    Raises ArtifactError, DataError, among them when the images are not those of the run.
    """
    file = model_path(run)
    model, info = load_model(file)
    images, splits = open_own_images(data, file, info)
    decoded = decode_images(
        images,
        image_size=info.image_size,
        space=info.space,
        progress=partial(watcher.on_step, "decoding images"),
    )
    metrics = read_metrics(file.with_name("metrics.json"))
    judged = _judge(model, decoded, splits, metrics, watcher)
    history = read_history(file.with_name("history.csv"))
    config = FitConfig.read(file.with_name("config.yaml"))
    if "calibration" not in metrics:  # a run of a version that calibrated none
        config = config.model_copy(update={"calibrate": before_it_existed("calibrate")})
    widths = find_widths(metrics, model, info)
    stability = read_stability(file.with_name(STABILITY))
    plan = plan_above(file.parent)
    return Material(model, info, metrics, history, config, widths, decoded, splits, judged, stability, plan)


def _judge(
    model: Classifier | Program, images: DecodedImages, splits: Splits, metrics: Mapping[str, Any],
    watcher: Watcher,
) -> Evaluation | None:  # fmt: skip
    if not splits.test:
        return None
    wanted = _accuracy(metrics)
    judged = evaluate(model, images, splits.test, progress=partial(watcher.on_step, "evaluating"))
    got = judged.estimates["accuracy"].value
    if abs(wanted - got) > max(
        SAME, 1.5 / len(splits.test)
    ):  # one image near a probability of 0.5 may change sides
        raise DataError(
            f"on the test images in {images.images.source}, the accuracy is {got:.3f}, and not {wanted:.3f} as in "
            "metrics.json; give the images that the run was made of"
        )
    return judged


def _accuracy(metrics: Mapping[str, Any]) -> float:
    try:
        return float(metrics["accuracy"]["value"])
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            "metrics.json has no accuracy, and there are test images; fit the model again"
        ) from error


def read_metrics(path: Path) -> dict[str, Any]:
    """Return what a metrics.json holds, if a report can be made of it. Raises ArtifactError."""
    try:
        metrics = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"cannot read {path} ({one_line(error)}); fit the model again") from error
    missing = sorted(WANTED - metrics.keys())
    if missing:
        raise ArtifactError(
            f"{path} has no {missing[0]!r}: it is of an older version of chanscale; fit the model again for a report"
        )
    return metrics


def read_stability(path: Path) -> dict[str, Any] | None:
    """Return what a stability.json holds, or None where there is none. Raises ArtifactError."""
    if not path.exists():
        return None
    try:
        found = dict(read_json(path))
        for name in ("channels", "maps"):
            found[name] = {key: float(found[name][key]) for key in ("mean", "least", "most", "chance")}
        for name in ("runs", "images", "seen", "answers", "spread"):
            found[name] = float(found[name])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"cannot read {path} ({one_line(error)}); remove it, or run chanscale stability"
        ) from error
    return found


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a history.csv, numbers as such. Raises ArtifactError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: _parse(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (
        OSError,
        csv.Error,
        ValueError,
        TypeError,
    ) as error:  # ValueError: no UTF-8; TypeError: a short row
        raise ArtifactError(f"cannot read {path} ({one_line(error)}); fit the model again") from error


def _parse(text: str) -> Any:
    """Return a cell of `history.csv` as the number that it is, if it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def find_widths(metrics: Mapping[str, Any], model: Classifier | Program, info: ModelInfo) -> dict[str, int]:
    """Return the widths of the original, of metrics.json, or by building it again; empty where no name builds it."""
    return metrics.get("widths") or _rebuild_widths(model, info)


def _rebuild_widths(model: Classifier | Program, info: ModelInfo) -> dict[str, int]:
    if info.rebuilt_by != "name" or isinstance(model, Program):
        return {}
    try:
        trunk = rebuild_trunk(info.backbone, info.head)
    except ChanscaleError:  # its library is not installed here
        return {}
    layers = {f"trunk.{name}": module for name, module in trunk.named_modules()}
    behind = {f"trunk.{name}" for name in info.without}
    widths = {}
    for name, layer in layers.items():
        if name in info.kept:
            # Where grouped convolutions hold channels together, several of the layer's are one of the group's.
            each = max(1, output_width(model.get_submodule(name)) // len(info.kept[name]))
            widths[name] = output_width(layer) // each
        elif name in behind and hasattr(layer, "out_channels"):
            widths[name] = output_width(layer)
    return widths
