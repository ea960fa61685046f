"""The file of a detector, beside its model."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from chanscale import __version__
from chanscale.artifact import model_path, parse_header, read_tensors, write_tensors
from chanscale.errors import ArtifactError, clip, one_line
from chanscale.novelty.detector import Detector
from chanscale.novelty.facts import COLUMNS, FACTS
from chanscale.novelty.gaussian import Gaussian
from chanscale.novelty.tails import Tails
from chanscale.novelty.thumbnails import SIDE
from chanscale.novelty.views import Views

FORMAT: Final = "chanscale-novelty/2"
BEFORE: Final = "chanscale-novelty/1"
"""The format without a spectrum, which is read as it is."""
NOVELTY = "novelty.safetensors"
"""What a detector is called in a run folder."""

PARTS = ("mean", "scale", "axes", "variances", "rest")
"""The fields of a `Gaussian`."""


@dataclass(frozen=True)
class _Header:
    """The metadata: `sha256` of the model file; `facts`, the names of what is measured."""

    format: Literal["chanscale-novelty/1", "chanscale-novelty/2"]
    chanscale: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    layers: tuple[str, ...]
    facts: tuple[str, ...]
    rate: Annotated[float, Field(gt=0, lt=1)]
    margin: Annotated[float, Field(ge=0, lt=0.5)]


_HEADER = TypeAdapter(_Header)
_MEASURED = (*COLUMNS, *(fact.name for fact in FACTS))


def save_novelty(detector: Detector, run: Path | str) -> Path:
    """Write `novelty.safetensors` beside the model of a run folder, to which it is tied; return its path.

    Raises ArtifactError where there is no model.
    """
    file = model_path(Path(run))
    header = _Header(
        BEFORE if detector.views.spectrum is None else FORMAT, __version__, _digest(file), detector.layers, _MEASURED,
        detector.rate, detector.margin,
    )  # fmt: skip
    return write_tensors(file.with_name(NOVELTY), _to_tensors(detector), asdict(header))


def load_novelty(run: Path | str) -> Detector:
    """Return the detector of a run folder, or of a model file. Raises ArtifactError, also if it is another model's."""
    file = model_path(Path(run))
    path = file.with_name(NOVELTY)
    if not path.is_file():
        raise ArtifactError(f"there is no {NOVELTY} beside {file}; fit_novelty and save_novelty make one")
    tensors, metadata = read_tensors(path)
    header = _parse(metadata, path)
    if header.sha256 != _digest(file):
        raise ArtifactError(f"{path} was fitted on another model than {file}; fit a detector on this one")
    try:
        return _from_tensors(header, tensors)
    except (LookupError, ValueError) as error:
        raise ArtifactError(
            f"the tensors of {path} are damaged ({clip(one_line(error))}); fit a detector again"
        ) from error


def find_novelty(run: Path | str) -> Detector | None:
    """Return the detector of a run folder or model file, if it has one. Raises ArtifactError as `load_novelty`."""
    return load_novelty(run) if model_path(Path(run)).with_name(NOVELTY).is_file() else None


def _digest(file: Path) -> str:
    if not file.is_file():
        raise ArtifactError(f"there is no model at {file}; pass a run folder, or the model.safetensors in it")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parse(metadata: dict[str, Any], path: Path) -> _Header:
    wanted = BEFORE if metadata.get("format") == BEFORE else FORMAT
    header = parse_header(
        _HEADER, metadata, path, wanted=wanted, kind="novelty detector", advice="fit a detector again"
    )
    if header.facts != _MEASURED:
        raise ArtifactError(f"{path} measures other facts than this version does; fit a detector again")
    return header


def _to_tensors(detector: Detector) -> dict[str, Tensor]:
    views, tails = detector.views, detector.tails
    gaussians = {name: getattr(views, name) for name in ("pixels", "appearance", "spectrum", "features")}
    arrays: dict[str, Any] = {
        f"{name}.{part}": getattr(gaussian, part)
        for name, gaussian in gaussians.items()
        if gaussian is not None
        for part in PARTS
    }
    arrays |= {"low": views.low, "high": views.high, "usual": detector.usual}
    arrays |= {"tails.start": tails.start, "tails.step": tails.step}
    # In fp64: the surprise of an image must not depend on whether the detector was saved.
    return {name: torch.from_numpy(np.array(array, dtype=np.float64)) for name, array in arrays.items()}


def _from_tensors(header: _Header, tensors: dict[str, Tensor]) -> Detector:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def gaussian(name: str, width: int | None = None) -> Gaussian:
        mean, scale, axes, variances, rest = (arrays[f"{name}.{part}"] for part in PARTS)
        fits = mean.shape == scale.shape == axes.shape[1:] and variances.shape == axes.shape[:1]
        if not fits or rest.shape or width not in (None, len(mean)):
            raise ValueError(f"those of {name!r} do not fit each other")
        return Gaussian(mean, scale, axes, variances, float(rest))

    spectrum = gaussian("spectrum") if header.format == FORMAT else None
    features = gaussian("features") if header.layers else None
    views = Views(
        gaussian("pixels", len(COLUMNS)), gaussian("appearance", SIDE * SIDE), spectrum, features,
        arrays["low"], arrays["high"],
    )  # fmt: skip
    tails, usual = Tails(arrays["tails.start"], arrays["tails.step"]), arrays["usual"]
    if not tails.start.shape == tails.step.shape == views.least.shape or usual.ndim != 1 or not len(usual):
        raise ValueError("those of the tails do not fit the views")
    if not views.low.shape == views.high.shape == (len(FACTS),):
        raise ValueError("those of the facts do not fit each other")
    return Detector(header.layers, views, tails, usual, header.rate, header.margin)
