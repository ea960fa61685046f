"""The test images on which the model was most confident and wrong, with what it looked at."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from chanscale.classifier import Classifier
from chanscale.data.images import read_image
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.loading import source_of
from chanscale.data.sources import describe_label
from chanscale.data.volumes import middle_slice, read_volume
from chanscale.errors import UnreadableImageError
from chanscale.evaluation import Evaluation
from chanscale.export.examples import spread
from chanscale.modes import device_of
from chanscale.operating_point import OperatingPoint
from chanscale.report_page.material import Material
from chanscale.wording import printable

MOST, MEAN_OF = 8, 100
SIDE = 320
"""Pixels of the longer side of an image on the page, at most."""
FOR, AGAINST = (224, 82, 6), (20, 110, 220)
STRONGEST = 0.6
"""How much of a pixel the map covers where the evidence is strongest."""
FAINTER = 0.95
"""Share of a map that is fainter than full colour: its padded corners can outdo all the rest."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Wrong:
    """A wrong answer: the test image, the class called, its probability, and whether it was said to hold."""

    place: int
    called: int
    probability: float
    holds: bool = True

    @property
    def confidence(self) -> float:
        """How probable the answer seemed."""
        return self.probability if self.holds else 1 - self.probability


@dataclass(frozen=True)
class Mistake:
    """A test image that was called wrongly, and how probable that seemed; both pictures are data URIs, or None."""

    title: str
    label: str
    called: str
    probability: float
    picture: str | None
    overlay: str | None


def find_mistakes(material: Material, *, names: bool) -> list[Mistake]:
    """Return the wrong test images, the most confident first, eight at most; named only if `names`."""
    judged = material.judged
    worst = _worst(judged, material.info.operating_point) if judged else []
    usual = find_usual_map(material) if worst else None
    return [_describe(material, judged, place, usual, names=names) for place in worst] if judged else []


def count_mistakes(judged: Evaluation, point: OperatingPoint | None) -> int:
    """Return how many images are called wrongly: at the operating point, or else by their most probable class.

    Of several labels, how many answers are wrong.
    """
    return len(_find_wrong(judged, point))


def _find_wrong(judged: Evaluation, point: OperatingPoint | None) -> list[_Wrong]:
    """Return what was answered wrongly, in the order of the images."""
    shares, labels = judged.probabilities, judged.labels
    if labels.ndim == 1:
        called = point.call(shares).astype(int) if point else shares.argmax(1)
        return [
            _Wrong(place, int(called[place]), float(shares[place, called[place]]))
            for place in np.flatnonzero(called != labels).tolist()
        ]
    said = shares > 0.5
    wrong = np.argwhere((labels != UNKNOWN) & (said != (labels == 1)))
    return [
        _Wrong(place, label, float(shares[place, label]), holds=bool(said[place, label]))
        for place, label in wrong.tolist()
    ]


def _worst(judged: Evaluation, point: OperatingPoint | None) -> list[_Wrong]:
    return sorted(_find_wrong(judged, point), key=lambda one: -one.confidence)[:MOST]


def _describe(
    material: Material, judged: Evaluation, wrong: _Wrong, usual: Tensor | None, *, names: bool
) -> Mistake:
    place, classes = wrong.place, material.info.classes
    index = material.splits.test[place]
    pixels = _read(material, index)
    evidence = find_evidence(material, index, wrong.called, usual)
    if evidence is not None and not wrong.holds:
        evidence = -evidence
    return Mistake(
        title=title_of(judged, place, names=names),
        label=describe_label(material.images.images.records[index], classes),
        called=classes[wrong.called] if wrong.holds else f"not {classes[wrong.called]}",
        probability=wrong.confidence,
        picture=None if pixels is None else to_uri(pixels),
        overlay=None if pixels is None or evidence is None else to_uri(paint(pixels, evidence)),
    )


def title_of(judged: Evaluation, place: int, *, names: bool) -> str:
    """Return what a test image is called: its number, since a name may be that of a patient, unless `names`."""
    return printable(judged.names[place]) if names else f"Test image {place + 1}"


def _read(material: Material, index: int) -> Bytes | None:
    """Return the image as it is, (H, W, 3), its longer side 320 pixels at most; of a volume, a slice."""
    record, space = material.images.images.records[index], material.images.space
    try:
        if space is not None and record.path is not None:
            planes = middle_slice(read_volume(record.path, size=material.images.image_size, space=space))
        else:
            planes = read_image(source_of(record), size=None)
    except UnreadableImageError:  # it is gone since it was decoded
        return None
    grey_or_rgb = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
    image = Image.fromarray((grey_or_rgb >> 8).astype(np.uint8)).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


@torch.no_grad()
def find_usual_map(material: Material) -> Tensor | None:
    """Return the mean feature map (1, C, h, w) of training images, or None for a model that has none.

    What is alike in each of them, such as the frame that padding makes, explains no answer.
    """
    model = material.model
    if not isinstance(model, Classifier):
        return None
    chosen = spread(material.splits.train, MEAN_OF)
    total: Tensor | None = None
    for features in material.feature_maps(model, chosen):
        if features.dim() != 4:
            return None
        part = features.double().sum(0, keepdim=True)
        total = part if total is None else total + part
    return None if total is None else (total / len(chosen)).float()


@torch.no_grad()
def find_evidence(
    material: Material, index: int, called: int, usual: Tensor | None
) -> NDArray[np.float32] | None:
    """Return the class map (h, w) of the class that was called, less that of the `usual` map; None without one."""
    model = material.model
    if not isinstance(model, Classifier) or usual is None:
        return None
    pixels, _ = material.images.batch([index])
    features = model.feature_map(pixels.to(device_of(model)))
    maps = (model.head.class_map(features) - model.head.class_map(usual))[0].float().cpu().numpy()
    evidence: NDArray[np.float32] = maps[called] if len(maps) > 1 else maps[0] * (1 if called else -1)
    return evidence


def paint(pixels: Bytes, evidence: NDArray[np.float32]) -> Bytes:
    """Return the image with evidence for what was called in orange, against it in blue."""
    height, width = pixels.shape[:2]
    full = float(np.quantile(np.abs(evidence), FAINTER)) or 1.0
    smooth = Image.fromarray(evidence / full).resize((width, height), Image.Resampling.BILINEAR)
    strength = np.asarray(smooth).clip(-1, 1)[..., None]
    colour = np.where(strength > 0, FOR, AGAINST)
    share = STRONGEST * np.abs(strength)
    painted: Bytes = ((1 - share) * pixels + share * colour).round().astype(np.uint8)
    return painted


def to_uri(pixels: Bytes) -> str:
    """Return an image (H, W, 3) as a data URI, a JPEG without any metadata."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
