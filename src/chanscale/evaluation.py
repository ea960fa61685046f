"""Run a model over images and judge what it says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chanscale.classifier import Classifier, probabilities
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.loading import BatchLoader, DecodedImages
from chanscale.errors import DataError
from chanscale.metrics import Estimate, Metric, estimate, label_metrics, metrics_for
from chanscale.programs import Program
from chanscale.team import Portion

if TYPE_CHECKING:
    from chanscale.ensemble import Ensemble


@dataclass(frozen=True)
class Evaluation:
    """What a model says about images whose classes are known, and how good that is.

    `logits` (N, 1 or K), `probabilities` (N, K), `labels` (N,), or (N, K) of several labels, `names` and
    `groups`, the patients, in the same order.
    `estimates`: auc, accuracy and, for two classes, sensitivity and specificity at probability 0.5, each with a 95 %
    interval. `by_label`: the AUC of each of several labels.
    """

    names: tuple[str, ...]
    groups: NDArray[np.str_]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    estimates: dict[str, Estimate]
    by_label: dict[str, Estimate] = field(default_factory=dict)

    def estimate(self, metrics: Mapping[str, Metric]) -> dict[str, Estimate]:
        """Return other figures of the same images, with their intervals over the same patients."""
        return estimate(metrics, self.probabilities, self.labels, self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers: `n`, each figure, its interval under `intervals`, and `labels`, if several."""
        values = {name: estimate.value for name, estimate in self.estimates.items()}
        intervals = {name: [estimate.low, estimate.high] for name, estimate in self.estimates.items()}
        labels = {"labels": self.describe_labels()} if self.by_label else {}
        return {**values, "n": len(self.labels), "intervals": intervals, **labels}

    def describe_labels(self) -> dict[str, dict[str, Any]]:
        """Return of each of several labels how many images have it, of how many where it is known, and its AUC."""
        columns = zip(self.by_label.items(), self.labels.T, strict=True)
        return {
            name: {
                "positives": int((own == 1).sum()),
                "known": int((own != UNKNOWN).sum()),
                "auc": auc.to_dict(),
            }
            for (name, auc), own in columns
        }


def evaluate(
    model: "Classifier | Program | Ensemble",
    data: DecodedImages,
    indices: Sequence[int] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judge `model` on the images of `data` at `indices` (default: all). Raises DataError when there are none,
    or when their classes are not those of the model.
    """
    if data.images.is_multilabel != model.multilabel:
        kinds = ("one label each", "several labels each")
        raise DataError(
            f"the images have {kinds[data.images.is_multilabel]}, the model was made for {kinds[model.multilabel]}"
        )
    if tuple(data.images.classes) != tuple(model.classes):
        raise DataError(
            f"the images have the classes {', '.join(data.images.classes)}, the model {', '.join(model.classes)}; "
            "open them with open_images(..., classes=model.classes)"
        )
    indices = range(len(data)) if indices is None else indices
    logits, labels = predict_logits(model, data, indices, progress=progress)
    scores = probabilities(torch.from_numpy(logits), multilabel=model.multilabel).numpy()
    names = tuple(data.images.records[i].name for i in indices)
    groups = data.images.group_keys[list(indices)]
    figures = metrics_for(len(model.classes), multilabel=model.multilabel)
    estimates = estimate(figures, scores, labels, groups)
    if not model.multilabel:
        return Evaluation(names, groups, labels, logits, scores, estimates)
    by_label = estimate(label_metrics(model.classes), scores, labels, groups)
    return Evaluation(names, groups, labels, logits, scores, estimates, by_label)


def predict(
    model: "Classifier | Program | Ensemble",
    data: DecodedImages,
    indices: Sequence[int],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the probabilities (N, K), computed in fp32, and the labels (N,) or (N, K) of some images."""
    if not len(indices):
        return np.zeros((0, len(model.classes)), np.float32), np.zeros(0, np.int64)
    logits, labels = predict_logits(model, data, indices, batch_size=batch_size, progress=progress)
    return probabilities(torch.from_numpy(logits), multilabel=model.multilabel).numpy(), labels


@torch.no_grad()
def predict_logits(
    model: "Classifier | Program | Ensemble",
    data: DecodedImages,
    indices: Sequence[int],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the logits (N, 1 or K), computed in fp32, and the labels (N,) or (N, K) of some images, one at least."""
    model.eval()
    device, portion = next(model.parameters()).device, Portion(indices)
    own = portion.own
    logits: list[Tensor] = []
    for batch in BatchLoader(data, own, batch_size=batch_size).epoch():
        logits.append(model(batch.images.to(device)).float())
        if progress:
            progress(sum(map(len, logits)), len(own))
    return portion.gather(torch.cat(logits)).cpu().numpy(), data.labels[list(indices)].numpy()
