"""Several models as one: the mean of their probabilities."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanscale.artifact import ModelInfo, load_model
from chanscale.classifier import Classifier
from chanscale.errors import ArtifactError, ConfigError, one_line
from chanscale.files import read_json
from chanscale.programs import Program

RESULT = "cross_validation.json"
"""The figures of a cross-validation, written when all its runs are there; they say which these are."""
_RUN = re.compile(r"runs/r\d+-f\d+")


class Ensemble(nn.Module):
    """The mean of the probabilities of models for the same classes, whatever their order.

    Input: that of its members. Output: logits of the mean, (N, 1) for two classes and (N, K) for K > 2, as those of a
    `Classifier`.
    """

    def __init__(self, members: Sequence[nn.Module], *, classes: Sequence[str]) -> None:
        super().__init__()
        if not members:
            raise ConfigError("an ensemble needs one model at least. Got none.")
        self.members, self.classes = nn.ModuleList(members), tuple(classes)
        self.multilabel = False  # no cross-validation is of several labels

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the mean probabilities, in fp32."""
        logits = torch.stack([member(images).double() for member in self.members])
        if logits.shape[2] > 1:
            return _log_mean(logits.log_softmax(2)).float()
        # Both logarithms: near 1, a probability has no digits left for its distance from 1.
        return (_log_mean(F.logsigmoid(logits)) - _log_mean(F.logsigmoid(-logits))).float()


def load_ensemble(folder: Path | str) -> tuple[Ensemble, ModelInfo]:
    """Return the average of the models of a finished cross-validation, in eval mode, and what holds of all of them.

    Which channels are kept, and how to read probabilities, differs between them, and is left out. Raises ArtifactError.
    """
    folder = Path(folder)
    loaded = [load_model(folder / run) for run in _read_runs(folder / RESULT)]
    infos = [info for _, info in loaded]
    _require_alike(folder, infos)
    ensemble = Ensemble([model for model, _ in loaded], classes=infos[0].classes)
    info = replace(infos[0], kept={}, without=(), operating_point=None, prediction_sets=None)
    return ensemble.eval(), info


def load_predictor(path: Path | str) -> tuple[Classifier | Program | Ensemble, ModelInfo]:
    """Return the model of a run, or the average of those of a cross-validation, and what is known of it.

    Raises ArtifactError.
    """
    return load_ensemble(path) if (Path(path) / RESULT).is_file() else load_model(path)


def _log_mean(logs: Tensor) -> Tensor:
    """Return the logarithm of the mean over the first axis of what `logs` are the logarithms of."""
    # Sorted: sums in another order would round in another way.
    return logs.sort(0).values.logsumexp(0) - math.log(len(logs))


def _read_runs(path: Path) -> list[str]:
    try:
        facts: Any = read_json(path)
        runs = [str(member["run"]) for member in facts["members"]]
    except FileNotFoundError as error:
        raise ArtifactError(
            f"there is no {RESULT} in {path.parent}; pass the folder of a finished cross-validation"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({one_line(error)}); cross-validate again") from error
    if not runs or not all(_RUN.fullmatch(run) for run in runs):  # it may come from anywhere
        raise ArtifactError(f"{path} must name the runs in runs/. Got {runs[:3]}; cross-validate again.")
    return runs


def _require_alike(folder: Path, infos: Sequence[ModelInfo]) -> None:
    found = {(info.classes, info.image_size, info.channels, info.space) for info in infos}
    if len(found) > 1:
        one, other = cast(tuple[Any, Any], sorted(found, key=str)[:2])
        raise ArtifactError(
            f"the models in {folder} are of different kinds, {one} and {other} (classes, image size, channels, "
            "how volumes are read), and have no average"
        )
