"""What the validation images settle once training is over: temperature, operating point, prediction sets."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chanscale.calibration import judge_calibration
from chanscale.classifier import Classifier, probabilities
from chanscale.config import FitConfig
from chanscale.conformal import PredictionSets, find_prediction_sets, require_enough
from chanscale.data.loading import DecodedImages
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError
from chanscale.evaluation import Evaluation, predict_logits
from chanscale.metrics import Estimate, Floats, Metric
from chanscale.operating_point import OperatingPoint, find_operating_point, require_positives
from chanscale.temperature import NOT_ASKED, Temperature, find_temperature, fold_temperature

Figures = dict[str, Any]


@dataclass(frozen=True)
class DecisionRules:
    """How to read what a model says; None: not asked for. `temperature` is folded into the model already."""

    temperature: Temperature = NOT_ASKED
    operating_point: OperatingPoint | None = None
    prediction_sets: PredictionSets | None = None

    def judge(self, judged: Evaluation | None) -> Figures:
        """Return what metrics.json says of the rules, with their figures where there are test images."""
        temperature = self.temperature
        calibration = temperature.to_dict()
        if judged is not None:
            calibration |= judge_temperature(judged, temperature.value)
        found = judge_rules(judged, self.operating_point, self.prediction_sets)
        return {"calibration": calibration, **found}


def require_support(config: FitConfig, images: ImageSet, validation: Iterable[int]) -> None:
    """Raise ConfigError where the validation images are too few for what `config` asks: before training, not after."""
    classes = len(images.classes)
    if images.is_multilabel:
        _refuse_for_labels(config)
        return
    labels = [images.records[index].label for index in validation]
    counts = np.bincount(labels, minlength=classes).tolist()
    if config.sensitivity is not None:
        require_positives(classes, counts[1])
    if config.coverage is not None:
        require_enough(counts, config.coverage)


def _refuse_for_labels(config: FitConfig) -> None:
    for name in ("sensitivity", "coverage"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"`{name}` is for images of one class each, and these have several labels; leave it out"
            )


def settle_rules(
    model: Classifier,
    images: DecodedImages,
    splits: Splits,
    config: FitConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, DecisionRules]:
    """Return `model` with its temperature folded in, and the rules that `config` asks for, from validation images.

    They have chosen the epoch, too, so that what is promised of other images holds but roughly.
    """
    if not config.calibrate and config.sensitivity is None and config.coverage is None:
        return model, DecisionRules()
    logits, labels = predict_logits(model, images, splits.validation, progress=progress)
    temperature = find_temperature(logits, labels) if config.calibrate else NOT_ASKED
    shares = temper(logits, temperature.value, multilabel=model.multilabel)
    point = None if config.sensitivity is None else find_operating_point(shares, labels, config.sensitivity)
    sets = None if config.coverage is None else find_prediction_sets(shares, labels, config.coverage)
    folded = model if temperature.value == 1 else fold_temperature(model, temperature.value)
    return folded, DecisionRules(temperature, point, sets)


def temper(logits: Floats, temperature: float, *, multilabel: bool = False) -> Floats:
    """Return the probabilities (N, K) of logits that are divided by `temperature`, in fp32."""
    divided = torch.from_numpy(logits / np.float32(temperature))
    shares: Floats = probabilities(divided, multilabel=multilabel).numpy()
    return shares


def judge_temperature(judged: Evaluation, temperature: float) -> Figures:
    """Return the calibration `before` and `after` a temperature that is folded into the model that was judged."""
    before = temper(judged.logits, 1 / temperature, multilabel=judged.labels.ndim == 2)
    return {
        "before": _to_dicts(judge_calibration(before, judged.labels, judged.groups)),
        "after": _to_dicts(judge_calibration(judged.probabilities, judged.labels, judged.groups)),
    }


def judge_rules(
    judged: Evaluation | None, point: OperatingPoint | None, sets: PredictionSets | None
) -> Figures:
    """Return `operating_point` and `prediction_sets`, those that there are, with their figures and intervals."""
    found: Figures = {}
    if point:
        told = {
            "wanted": point.sensitivity, "threshold": point.threshold, "positives": point.positives,
            "rests_on": point.rests_on, "doubt": point.doubt,
        }  # fmt: skip
        found["operating_point"] = told | _estimate(judged, point.metrics())
    if sets:
        said = {"wanted": sets.coverage, "least": list(sets.least), "images": list(sets.images)}
        found["prediction_sets"] = said | _estimate(judged, sets.metrics())
    return found


def _estimate(judged: Evaluation | None, metrics: Mapping[str, Metric]) -> Figures:
    return {} if judged is None else _to_dicts(judged.estimate(metrics))


def _to_dicts(estimates: Mapping[str, Estimate]) -> Figures:
    return {name: one.to_dict() for name, one in estimates.items()}
