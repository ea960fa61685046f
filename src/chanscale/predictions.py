"""What a model says about images whose classes are not known."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier
from chanscale.config import Frames
from chanscale.conformal import PredictionSets
from chanscale.data.images import IMAGE_SUFFIXES
from chanscale.data.listing import list_images
from chanscale.data.loading import decode_images
from chanscale.data.sources import ImageRecord, ImageSet, spread_frames
from chanscale.errors import DataError
from chanscale.evaluation import predict
from chanscale.files import exists
from chanscale.metrics import name_answer
from chanscale.novelty.detector import Detector, Verdict
from chanscale.operating_point import OperatingPoint
from chanscale.programs import Program

if TYPE_CHECKING:
    from chanscale.ensemble import Ensemble

Progress = Callable[[int, int], None]

SETS = {".csv": "a table of images and labels", ".npz": "a file of arrays, images and labels"}
"""What holds images, but is none, by suffix."""

UNCERTAIN = "uncertain"
"""What stands for the class where a model abstains."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities (N, K) of `classes` for the images `names`; `skipped` were unreadable.

    `operating_point`, `prediction_sets`: the model's rules to read them by, where it has any. `verdicts`: whether each
    image is like those of training; None where no detector was asked. With `abstain`, an image that is not, and a near
    tie, is of no class. `multilabel`: an image may be of several classes, or of none.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    skipped: tuple[str, ...] = ()
    operating_point: OperatingPoint | None = None
    prediction_sets: PredictionSets | None = None
    verdicts: tuple[Verdict, ...] | None = None
    abstain: bool = False
    multilabel: bool = False

    @property
    def predicted(self) -> tuple[str, ...]:
        """The most probable class of each image, or "uncertain" where the model abstains.

        Of several labels, those that are more probable than not, as in `effusion|mass`, or "none".
        """
        classes = tuple(
            name_answer(row, self.classes, multilabel=self.multilabel) for row in self.probabilities
        )
        if not self.abstain or self.verdicts is None:
            return classes
        told = zip(classes, self.verdicts, strict=True)
        return tuple(UNCERTAIN if verdict.uncertain else name for name, verdict in told)

    @property
    def called_positive(self) -> list[bool] | None:
        """Whether each image is positive at the operating point; None without one."""
        if self.operating_point is None:
            return None
        called: list[bool] = self.operating_point.call(self.probabilities).tolist()
        return called

    @property
    def sets(self) -> list[list[str]] | None:
        """The classes that cannot be ruled out for each image; None where that is not settled."""
        if self.prediction_sets is None:
            return None
        held = self.prediction_sets.contain(self.probabilities)
        return [[self.classes[k] for k in np.flatnonzero(row)] for row in held]

    def to_csv(self) -> str:
        """Return a table with the columns image, predicted and, for each class, `probability_<class>`.

        With an operating point there is `called_positive`, with prediction sets, for each class, `in_set_<class>`;
        with a detector `novelty`, the share of usual images that are as unusual, `flagged`, `reasons` and `near_tie`.
        """
        columns = self._columns()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return for each image its name, the predicted class, and the probability of each class.

        With an operating point also `called_positive`, with prediction sets `prediction_set`, with a detector
        `novelty`, `flagged`, `reasons` and `near_tie`.
        """
        shares = [dict(zip(self.classes, row, strict=True)) for row in self.probabilities.tolist()]
        told: dict[str, Sequence[Any] | None] = {
            "image": self.names, "predicted": self.predicted, "probabilities": shares,
            "called_positive": self.called_positive, "prediction_set": self.sets,
        }  # fmt: skip
        if self.verdicts is not None:
            told |= {
                "novelty": [verdict.score for verdict in self.verdicts],
                "flagged": [verdict.flagged for verdict in self.verdicts],
                "reasons": [list(verdict.reasons) for verdict in self.verdicts],
                "near_tie": [verdict.near_tie for verdict in self.verdicts],
            }
        known = {name: values for name, values in told.items() if values is not None}
        return [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]

    def _columns(self) -> dict[str, Sequence[str]]:
        """Return the cells of the table, by column."""
        columns: dict[str, Sequence[str]] = {"image": self.names, "predicted": self.predicted}
        for name, shares in zip(self.classes, self.probabilities.T, strict=True):
            columns[f"probability_{name}"] = [f"{share:.8g}" for share in shares]
        if self.called_positive is not None:
            columns["called_positive"] = [_yes_or_no(called) for called in self.called_positive]
        if self.sets is not None:
            for name in self.classes:
                columns[f"in_set_{name}"] = [_yes_or_no(name in held) for held in self.sets]
        if self.verdicts is not None:
            columns["novelty"] = [f"{verdict.score:.3g}" for verdict in self.verdicts]
            columns["flagged"] = [_yes_or_no(verdict.flagged) for verdict in self.verdicts]
            columns["reasons"] = ["; ".join(verdict.reasons) for verdict in self.verdicts]
            columns["near_tie"] = [_yes_or_no(verdict.near_tie) for verdict in self.verdicts]
        return columns


def predict_images(
    model: "Classifier | Program | Ensemble",
    info: ModelInfo,
    paths: Sequence[Path],
    *,
    skip_bad: bool = False,
    frames: Frames | None = None,
    detector: Detector | None = None,
    abstain: bool = False,
    decoding: Progress | None = None,
    predicting: Progress | None = None,
) -> Predictions:
    """Return what `model` says about image files, and about all images in folders.

    `info`: what the model's file says of it. `frames`: of a DICOM file; default: as in training. `detector`: that of
    the run, which tells images unlike those of training; with `abstain` these are of no class. `decoding` and
    `predicting` hear of images done, of all. Raises DataError, and UnreadableImageError unless `skip_bad` leaves such
    images out.
    """
    images = open_unlabelled(paths, info, frames=frames)
    data = decode_images(
        images, image_size=info.image_size, space=info.space, most_channels=info.most_channels, skip_bad=skip_bad,
        progress=decoding,
    )  # fmt: skip
    verdicts = None
    if detector is None:
        probabilities, _ = predict(model, data, range(len(data)), progress=predicting)
    else:
        # An ensemble has not the layers that are watched: that is an error, and says so.
        judged = detector.judge(cast(Classifier | Program, model), data, progress=predicting)
        probabilities, verdicts = judged.probabilities, judged.verdicts
    return Predictions(
        tuple(record.name for record in data.images.records), info.classes, probabilities, data.images.skipped,
        info.operating_point, info.prediction_sets, verdicts, abstain, info.multilabel,
    )  # fmt: skip


def open_unlabelled(paths: Sequence[Path], info: ModelInfo, *, frames: Frames | None = None) -> ImageSet:
    """Return image files, and all images in folders, each once, as a set. Raises DataError.

    Of DICOM files with several `frames`, the first is taken, or each, as one image; default: as in training.
    No class is known: the labels stand empty, and are not to be looked at.
    """
    files: dict[Path, Path] = {}
    for file in (file for path in paths for file in _find_images(path)):
        files.setdefault(file.absolute(), file)
    records = (ImageRecord(str(file), label=0, group=str(file), path=file) for file in files.values())
    frames = info.choose_frames(frames)
    if frames == "all":
        records = (frame for record in records for frame in spread_frames(record))
    return ImageSet(paths[0], info.classes, tuple(records), frames=frames)


def _yes_or_no(fact: bool) -> str:
    return "yes" if fact else "no"


def _find_images(path: Path) -> Iterable[Path]:
    if not exists(path):
        raise DataError(f"{path} does not exist; wanted an image, or a folder of images.")
    if path.suffix.lower() in SETS and not path.is_dir():
        raise DataError(
            f"{path} is {SETS[path.suffix.lower()]}, which evaluate takes; wanted an image, or a folder of images."
        )
    if not path.is_dir():
        return [path]
    found = list_images(path)
    if not found:
        raise DataError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); pass another folder.")
    return found
