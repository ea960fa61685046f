"""Which channels of the last layer the decisions on test images rest on, and what excites them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chanscale.classifier import Classifier
from chanscale.data.sources import describe_label
from chanscale.errors import UnreadableImageError
from chanscale.explain.chains import Chain, find_chain
from chanscale.explain.naming import ChannelNames
from chanscale.explain.patches import Patch, cut_patch
from chanscale.explain.receptive_fields import ReceptiveField, find_receptive_field
from chanscale.export.examples import spread
from chanscale.modes import device_of
from chanscale.report import label_layers
from chanscale.report_page.material import Material
from chanscale.report_page.mistakes import to_uri

MOST = 12
MOST_IMAGES = 500
"""Test images that contributions are averaged over, and training images that patches are sought in, at most."""
PATCHES = 4
PATCH_SIDE = 96
"""Pixels of the longer side of a patch on the page, at most."""


@dataclass(frozen=True)
class Excerpt:
    """A part of a training image that excites a channel, as a data URI, and that image's class."""

    picture: str
    label: str


@dataclass(frozen=True)
class Channel:
    """A channel of the last layer, by its place in the original: how much it moves the logits, on average.

    `size`: mean |contribution|. `towards`: the class whose images it scores higher, where there are two.
    """

    name: str
    size: float
    towards: str | None
    excerpts: tuple[Excerpt, ...]


def find_channels(material: Material) -> list[Channel]:
    """Return the channels of the largest mean |contribution| on test images; none where the model does not tell."""
    model, test = material.model, material.splits.test
    if not isinstance(model, Classifier) or not test:
        return []
    chosen = spread(test, MOST_IMAGES)
    with torch.no_grad():
        batches = [model.head.contributions(maps).cpu() for maps in material.feature_maps(model, chosen)]
    parts = torch.cat(batches)  # (N, outputs, channels)
    labels = torch.from_numpy(material.images.images.labels[np.asarray(chosen)])
    sizes = parts.abs().mean((0, 1))
    order = sizes.argsort(descending=True, stable=True)[:MOST].tolist()
    chain = find_chain(model.trunk, model.preprocessing(_batch(material, model, chosen[:1])), prefix="trunk.")
    names = _name(material, chain, order, parts.shape[2])
    excerpts = _find_excerpts(model, material, order, find_receptive_field(chain))
    return [
        Channel(name, float(sizes[place]), _towards(parts[:, 0, place], labels, material), found)
        for name, place, found in zip(names, order, excerpts, strict=True)
    ]


def _batch(material: Material, model: Classifier, indices: list[int]) -> Tensor:
    return material.images.batch(indices)[0].to(device_of(model))


def _name(material: Material, chain: Chain, places: list[int], count: int) -> list[str]:
    """Return names such as `conv4_1 #271 of 512`; of a network whose last layer is not found, the feature's number."""
    if not chain.convolutions:
        return [f"feature {place + 1} of {count}" for place in places]
    widths = material.widths
    labels = dict(zip(widths, label_layers(widths), strict=True))
    names = ChannelNames(labels, material.info.kept, widths)
    return [names.name(chain.convolutions[-1].name, place).text for place in places]


def _towards(parts: Tensor, labels: Tensor, material: Material) -> str | None:
    if not material.is_binary or 0 in torch.bincount(labels, minlength=2):
        return None
    higher = parts[labels == 1].mean() > parts[labels == 0].mean()
    return material.info.classes[int(higher)]


def _find_excerpts(
    model: Classifier, material: Material, channels: list[int], field: ReceptiveField | None
) -> Sequence[tuple[Excerpt, ...]]:
    """Return for each channel the parts of training images that excite it most; none where what it sees is unknown."""
    if field is None or not material.splits.train or material.images.space is not None:
        return [()] * len(channels)
    chosen = spread(material.splits.train, MOST_IMAGES)
    peaks, places, columns = _find_peaks(model, material, chosen, channels)
    found = []
    for peak, place in zip(peaks.T, places.T, strict=True):
        best = peak.argsort(descending=True, stable=True)[:PATCHES].tolist()
        spots = [(chosen[one], *divmod(int(place[one]), columns)) for one in best if peak[one] > 0]
        found.append(tuple(_cut(material, field, *spot) for spot in spots))
    return [tuple(excerpt for excerpt in one if excerpt) for one in found]


def _find_peaks(
    model: Classifier, material: Material, indices: list[int], channels: list[int]
) -> tuple[Tensor, Tensor, int]:
    """Return the largest value of each channel's map of each image, where it is, (N, channels), and a map's columns."""
    found, columns = [], 1
    for maps in material.feature_maps(model, indices):
        columns = maps.shape[-1]
        found.append(maps[:, channels].flatten(2).max(2))
    peaks, places = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return peaks, places, columns


def _cut(material: Material, field: ReceptiveField, index: int, row: int, column: int) -> Excerpt | None:
    record, side = material.images.images.records[index], material.images.image_size
    try:
        pixels = cut_patch(Patch(record, field.box(row, column, side=side), side, 0.0))
    except UnreadableImageError:  # it is gone since it was decoded
        return None
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((PATCH_SIDE, PATCH_SIDE), Image.Resampling.LANCZOS)
    return Excerpt(to_uri(np.asarray(image)), describe_label(record, material.info.classes))
