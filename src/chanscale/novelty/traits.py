"""What is read of images to tell whether they are unusual, in the same pass that predicts them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from chanscale.classifier import Classifier, probabilities
from chanscale.data.dicom import Frame, read_header
from chanscale.data.images import FORMATS, read_image
from chanscale.data.loading import BatchLoader, DecodedImages, Progress, source_of
from chanscale.data.sources import ImageRecord
from chanscale.errors import ModelError
from chanscale.modes import device_of, hooked, in_eval
from chanscale.novelty.facts import measure_facts, measure_shape
from chanscale.novelty.gaussian import Floats
from chanscale.novelty.spectrum import measure_spectra
from chanscale.novelty.thumbnails import draw_thumbnails
from chanscale.programs import Program

LAYERS = 8
"""Convolutions that are watched at most; of more, as many at even distances."""

UPRIGHT = 274
SIDEWAYS = frozenset({5, 6, 7, 8})
"""The EXIF tag of the orientation, and its values that exchange width and height."""


@dataclass(frozen=True)
class Traits:
    """Of N images: `facts` (N, F), `thumbnails` (N, T), `spectra` (N, P), `features` (N, C), `probabilities` (N, K).

    `features`: the mean of each channel of the layers watched; (N, 0) for a program, which has no layers inside.
    `probabilities`: those that the model gives.
    """

    facts: Floats
    thumbnails: Floats
    spectra: Floats
    features: Floats
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.facts)

    def of(self, rows: NDArray[np.bool_]) -> "Traits":
        """Return the traits of some of the images."""
        return Traits(*(column[rows] for column in vars(self).values()))


@torch.no_grad()
def find_layers(model: Classifier | Program, images: Tensor) -> tuple[str, ...]:
    """Return the names of the layers of `model` to watch: convolutions, or the trunk where there is none.

    Only those that `images` (N, C, H, W) pass: a network may have layers that it never calls.
    """
    if isinstance(model, Program):
        return ()
    names = [
        name for name, module in model.trunk.named_modules(prefix="trunk") if isinstance(module, _ConvNd)
    ]
    passed: dict[str, Tensor] = {}
    with in_eval(model), hooked(_watch(model, names, passed)):
        model(images.to(device_of(model)))
    found = [name for name in names if name in passed]
    if not found:
        return ("trunk",)
    places = np.unique(np.linspace(0, len(found) - 1, LAYERS).round().astype(int))
    return tuple(found[place] for place in places)


@torch.no_grad()
def read_traits(
    model: Classifier | Program, layers: Sequence[str], data: DecodedImages, indices: Sequence[int],
    *, batch_size: int = 16, progress: Progress | None = None,
) -> Traits:  # fmt: skip
    """Run `model` over the images of `data` at `indices` once, watching `layers`. Raises ModelError where one lacks."""
    model.eval()
    device, rows = device_of(model), []
    for batch in BatchLoader(data, indices, batch_size=batch_size).epoch():
        features: dict[str, Tensor] = {}
        with hooked(_watch(model, layers, features)):
            logits = model(batch.images.to(device)).float().cpu()
        records = [data.images.records[index] for index in batch.indices.tolist()]
        shapes = torch.tensor([_shape_of(record, data.image_size) for record in records]).double()
        facts = torch.cat([measure_facts(batch.images), shapes], 1)
        inside = torch.cat([features[name] for name in layers], 1) if layers else facts[:, :0]
        pictures = draw_thumbnails(batch.images), measure_spectra(batch.images)
        rows.append((facts, *pictures, inside, logits))
        if progress:
            progress(sum(len(row[0]) for row in rows), len(indices))
    if not rows:
        return Traits(*(np.zeros((0, 0)),) * 4, np.zeros((0, len(model.classes)), np.float32))
    facts, thumbnails, spectra, inside, logits = (torch.cat(column) for column in zip(*rows, strict=True))
    # Of all at once, as `predict` does it: a sigmoid rounds otherwise where a processor's vectors are not filled.
    shares = probabilities(logits, multilabel=model.multilabel)
    return Traits(facts.numpy(), thumbnails.numpy(), spectra.numpy(), inside.numpy(), shares.numpy())


def _watch(model: nn.Module, layers: Sequence[str], found: dict[str, Tensor]) -> Iterator[RemovableHandle]:
    """Put hooks on `layers`, which note in `found` the mean of each channel, (N, C), in fp64."""

    def note(name: str) -> Callable[..., None]:
        # At once: what follows may write into the map.
        return lambda *call: found.update({name: _pool(call[-1])})

    watched = {name: _find(model, name) for name in layers}
    return (layer.register_forward_hook(note(name)) for name, layer in watched.items())


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"the model has no layer {name!r}, which this detector watches; use the model that it was fitted on"
        ) from error


def _pool(maps: Tensor) -> Tensor:
    values = maps.float().flatten(2) if maps.dim() > 2 else maps.float()[:, :, None]
    return values.mean(2).double().cpu()


def _shape_of(record: ImageRecord, image_size: int) -> tuple[float, float]:
    return measure_shape(*read_dimensions(record), image_size)


def read_dimensions(record: ImageRecord) -> tuple[int, int]:
    """Return the width and height of an image as it stands upright; by the header alone where that tells them."""
    source = source_of(record)
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    try:
        return _read_header(source)
    except Exception:  # DICOM, of another kind that only read_image knows, or damaged: it says how
        path = source.path if isinstance(source, Frame) else Path(source)
        if (header := read_header(path)) and header.width and header.height:
            return header.width, header.height
        _, height, width = read_image(source, size=None).shape
        return width, height


def _read_header(source: Any) -> tuple[int, int]:
    with Image.open(source, formats=FORMATS) as image:
        sideways = image.getexif().get(UPRIGHT) in SIDEWAYS
        return (image.height, image.width) if sideways else (image.width, image.height)
