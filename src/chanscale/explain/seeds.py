"""Finished runs on the same images that differ in their seed, read and compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.classifier import Classifier, probabilities
from chanscale.config import READING, TIMING, FitConfig
from chanscale.data.dicom import name_file
from chanscale.data.loading import BatchLoader, DecodedImages, decode_images
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, read_training_names
from chanscale.errors import ConfigError, DataError
from chanscale.explain.decomposition import decompose
from chanscale.explain.pointing import enlarge
from chanscale.explain.stability import STABILITY, Agreement, agree_on_channels, agree_on_maps
from chanscale.explain.training_maps import decompose_mean, survey_training
from chanscale.files import to_json, write_atomically
from chanscale.own_images import open_own_images
from chanscale.report_page.material import find_widths, read_metrics

IDLE = READING | TIMING | {"seed", "weights", "device", "devices", "nodes"}
"""Options in which runs may differ that differ in their seed."""

SIDE = 28
"""Pixels of the square that maps of different sizes are brought to."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stability:
    """How far runs agree: on the channels they keep, on the maps of the same images, on the answers.

    `layers`: the agreement on channels in each layer that any run keeps channels of. `images`: test images of the
    first run, of which `seen` are such that another was trained on them. `answers`: the share of images that all runs
    give one class; `spread`: the standard deviation over the runs of the probability of the class that the first names,
    on average.
    """

    runs: tuple[str, ...]
    channels: Agreement
    layers: Mapping[str, Agreement]
    maps: Agreement
    images: int
    seen: int
    answers: float
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, as stability.json has them."""
        return {
            "runs": len(self.runs),
            "channels": self.channels.to_dict(),
            "layers": {name: found.to_dict() for name, found in self.layers.items()},
            "maps": self.maps.to_dict(),
            "images": self.images, "seen": self.seen, "answers": self.answers, "spread": self.spread,
        }  # fmt: skip


@dataclass(frozen=True)
class _Answers:
    """What one run says of the images: maps (N, SIDE, SIDE), less their mean over training images, and (N, K)."""

    info: ModelInfo
    maps: np.ndarray[Any, Any]
    shares: np.ndarray[Any, Any]


def measure_stability(
    runs: Sequence[str | Path], data: str | Path, *, progress: Progress | None = None
) -> Stability:
    """Compare two or more finished runs on the images at `data`, which they were made of.

    Raises ConfigError, ArtifactError, DataError, ModelError.
    """
    files = [model_path(Path(run)) for run in runs]
    if (count := len({file.resolve() for file in files})) < max(2, len(files)):
        raise ConfigError(
            f"wanted two runs or more that differ in their seed, got {count}: {len(files)} are named"
        )
    loaded = [_load(file) for file in files]
    _require_alike(files, [info for _, info in loaded])
    if loaded[0][1].multilabel:
        raise ConfigError(
            "runs are compared where an image has one class each, and these tell several labels"
        )
    metrics = read_metrics(files[0].with_name("metrics.json"))
    widths = find_widths(metrics, *loaded[0])
    own = [open_own_images(Path(data), file, info) for file, (_, info) in zip(files, loaded, strict=True)]
    shown = _take_test(files[0], *own[0], image_size=loaded[0][1].image_size)
    answers = []
    for number, ((model, info), (images, splits)) in enumerate(zip(loaded, own, strict=True), 1):
        answers.append(_ask(model, info, images, splits, shown, _step(progress, number, len(files))))
    return _compare(files, answers, shown.images, widths)


def write_stability(runs: Sequence[str | Path], stability: Stability) -> None:
    """Write stability.json into the folder of each run, from where its report tells it."""
    for run in runs:
        write_atomically(model_path(Path(run)).with_name(STABILITY), to_json(stability.to_dict()) + "\n")


def _load(file: Path) -> tuple[Classifier, ModelInfo]:
    model, info = load_model(file)
    info.require_pictures("stability")
    if not isinstance(model, Classifier):
        raise ConfigError(f"{file.parent} holds its network as a program, which hides the channels")
    return model, info


def _require_alike(files: Sequence[Path], infos: Sequence[ModelInfo]) -> None:
    """Raise ConfigError unless the runs have one network, one task, and options that differ in the seed alone."""
    configs = [FitConfig.read(file.with_name("config.yaml")) for file in files]
    first, options = infos[0], [_leave_idle(config) for config in configs]
    for file, own in zip(files, options, strict=True):
        if other := sorted(name for name in own if own[name] != options[0][name]):
            name = other[0]
            raise ConfigError(
                f"wanted runs that differ in their seed alone, got {name}={options[0][name]!r} in {files[0].parent} "
                f"and {own[name]!r} in {file.parent}"
            )
    for file, info in zip(files, infos, strict=True):
        if (info.backbone, info.classes) != (first.backbone, first.classes):
            raise ConfigError(
                f"wanted runs that differ in their seed alone, got {first.network} for {', '.join(first.classes)} in "
                f"{files[0].parent} and {info.network} for {', '.join(info.classes)} in {file.parent}"
            )
    _require_other_seeds(files, [config.seed for config in configs])


def _require_other_seeds(files: Sequence[Path], seeds: Sequence[int]) -> None:
    """Raise ConfigError where two runs have one seed, as two folds of a cross-validation have."""
    found: dict[int, Path] = {}
    for file, seed in zip(files, seeds, strict=True):
        if (other := found.setdefault(seed, file)) is not file:
            raise ConfigError(
                f"wanted runs that differ in their seed, got seed={seed} in {other.parent} and {file.parent}, whose "
                "images would differ instead, as those of two folds do; fit again with another --seed"
            )


def _take_test(file: Path, images: ImageSet, splits: Splits, *, image_size: int) -> DecodedImages:
    if not splits.test:
        raise DataError(f"{file.parent} set no test images aside, and on others its maps are no measure")
    records = tuple(images.records[index] for index in splits.test)
    return decode_images(ImageSet(images.source, images.classes, records), image_size=image_size)


def _leave_idle(config: FitConfig) -> dict[str, Any]:
    """Return the options that are alike in runs to compare."""
    return {name: value for name, value in config.model_dump().items() if name not in IDLE}


@torch.no_grad()
def _ask(
    model: Classifier, info: ModelInfo, images: ImageSet, splits: Splits, shown: DecodedImages,
    progress: Callable[[int, int], None] | None,
) -> _Answers:  # fmt: skip
    usual = decompose_mean(
        model, survey_training(model, images, splits, image_size=info.image_size, progress=progress)
    )
    maps, logits = [], []
    for batch in BatchLoader(shown, range(len(shown)), batch_size=16).epoch():
        parts = decompose(model.head, model.feature_map(batch.images))
        target = torch.zeros_like(batch.labels) if info.is_binary else batch.labels
        rows = torch.arange(len(target))
        maps += list(parts.class_maps[rows, target] - usual.class_maps[0, target])
        logits.append(parts.logits)
    shares = probabilities(torch.cat(logits)).numpy()
    return _Answers(info, np.stack([enlarge(one, side=SIDE) for one in maps]), shares)


def _compare(
    files: Sequence[Path], answers: Sequence[_Answers], shown: ImageSet, widths: Mapping[str, int]
) -> Stability:
    kept = [answer.info.kept for answer in answers]
    named = [name for name in widths if any(run.get(name) for run in kept)]
    shares = np.stack([answer.shares for answer in answers])
    classes = shares.argmax(2)
    return Stability(
        runs=tuple(str(file.parent) for file in files),
        channels=agree_on_channels(kept, widths),
        layers={name: agree_on_channels(kept, {name: widths[name]}) for name in named},
        maps=agree_on_maps([answer.maps for answer in answers]),
        images=len(shown),
        seen=_count_seen(files, shown),
        answers=float(np.mean((classes == classes[0]).all(0))),
        spread=float(np.take_along_axis(shares, classes[:1, :, None], 2).std(0, ddof=1).mean()),
    )


def _count_seen(files: Sequence[Path], shown: ImageSet) -> int:
    seen = frozenset().union(*(read_training_names(file.with_name("splits.csv")) for file in files))
    return sum(name_file(record.name) in seen for record in shown.records)


def _step(progress: Progress | None, number: int, count: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(f"run {number} of {count}", done, total)
