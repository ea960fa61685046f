"""Run a model over images and judge what it says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chanscale.classifier import Classifier, probabilities
from chanscale.data.loading import BatchLoader, DecodedImages
from chanscale.errors import DataError
from chanscale.metrics import Estimate, estimate, metrics_for
from chanscale.programs import Program


@dataclass(frozen=True)
class Evaluation:
    """What a model says about images whose classes are known, and how good that is.

    `probabilities` (N, K), `labels` (N,), `names` in the same order. `estimates`: auc, accuracy and, for two
    classes, sensitivity and specificity at probability 0.5, each with a 95 % interval.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    estimates: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers: `n`, each figure, and its interval under `intervals`."""
        values = {name: estimate.value for name, estimate in self.estimates.items()}
        intervals = {name: [estimate.low, estimate.high] for name, estimate in self.estimates.items()}
        return {**values, "n": len(self.labels), "intervals": intervals}


def evaluate(
    model: Classifier | Program,
    data: DecodedImages,
    indices: Sequence[int] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judge `model` on the images of `data` at `indices` (default: all). Raises DataError when there are none,
    or when their classes are not those of the model.
    """
    if tuple(data.images.classes) != tuple(model.classes):
        raise DataError(
            f"the images have the classes {', '.join(data.images.classes)}, the model {', '.join(model.classes)}; "
            "open them with open_images(..., classes=model.classes)"
        )
    indices = range(len(data)) if indices is None else indices
    scores, labels = predict(model, data, indices, progress=progress)
    records = [data.images.records[i] for i in indices]
    groups = np.array([record.group for record in records])
    estimates = estimate(metrics_for(len(model.classes)), scores, labels, groups)
    return Evaluation(tuple(record.name for record in records), labels, scores, estimates)


@torch.no_grad()
def predict(
    model: Classifier | Program,
    data: DecodedImages,
    indices: Sequence[int],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the probabilities (N, K), computed in fp32, and the labels (N,) of some images."""
    model.eval()
    device = next(model.parameters()).device
    scores, labels = [], []
    for batch in BatchLoader(data, indices, batch_size=batch_size).epoch():
        scores.append(probabilities(model(batch.images.to(device))).cpu())
        labels.append(batch.labels)
        if progress:
            progress(sum(map(len, labels)), len(indices))
    if not scores:
        return np.zeros((0, len(model.classes)), np.float32), np.zeros(0, np.int64)
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()
