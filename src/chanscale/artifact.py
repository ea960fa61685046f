"""The model file: self-contained, loads without the base weights and without pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from chanscale import __version__
from chanscale.attaching import attach_scales
from chanscale.backbones import BACKBONES, Preprocessing, build_backbone
from chanscale.channels import output_width
from chanscale.classifier import Classifier, to_channels_last
from chanscale.errors import ArtifactError, ChanscaleError, EmptySelectionError, one_line
from chanscale.files import write_atomically
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection

FORMAT = "chanscale-model/1"
METADATA = "chanscale"
"""The one entry of a file's metadata."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about its model, beside the tensors.

    `kept`: for each convolution, the ascending indices of its channels in the original backbone. `image_size`
    in pixels, `channels` 1 or 3: what the model was trained on.
    """

    backbone: str
    classes: tuple[str, ...]
    kept: Mapping[str, list[int]]
    preprocessing: Mapping[str, Any]
    image_size: Annotated[int, Field(gt=0)]
    channels: Annotated[int, Field(gt=0)]

    @property
    def widths(self) -> dict[str, int]:
        """How many channels each convolution has left."""
        return {name: len(indices) for name, indices in self.kept.items()}


INFO = TypeAdapter(ModelInfo)
"""Reads a `ModelInfo` from JSON, and checks it: a file may come from anywhere."""


def save_model(model: Classifier, info: ModelInfo, path: Path | str) -> Path:
    """Write the tensors of a scaled `model`, and `info` in the metadata, to one safetensors file."""
    metadata = {"format": FORMAT, "chanscale": __version__, "info": asdict(info)}
    return write_tensors(Path(path), model.state_dict(), metadata)


def load_model(path: Path | str, *, trunk: nn.Module | None = None) -> tuple[Classifier, ModelInfo]:
    """Return the model of a file, or of a run folder, in eval mode, and what the file says about it.

    `trunk`: the original network, needed only where it was one of the user's own. Raises ArtifactError.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, info = _read(path)
    if trunk is None and info.backbone not in BACKBONES:
        raise ArtifactError(
            f"{path} was made from a network of your own, {info.backbone}; pass that network as `trunk`"
        )
    try:
        model = rebuild(info, trunk=trunk)
        model.load_state_dict(tensors, assign=True)
    except (ChanscaleError, RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ArtifactError(f"{path} does not fit {info.backbone!r}: {reason}") from error
    return to_channels_last(model).requires_grad_(False).eval(), info


def rebuild(info: ModelInfo, *, trunk: nn.Module | None = None) -> Classifier:
    """Return a classifier of the shape that `info` describes; its tensors hold nothing yet."""
    preprocessing = Preprocessing.from_dict(info.preprocessing)
    with torch.device("meta"):  # shapes alone: no time or memory for weights that are replaced at once
        trunk = build_backbone(info.backbone) if trunk is None else trunk
        model = assemble(preprocessing, trunk, classes=info.classes)
        scaled = attach_scales(model)
    selection = ChannelSelection({name: torch.tensor(indices) for name, indices in info.kept.items()})
    try:
        return prune_channels(scaled, selection)
    except EmptySelectionError:  # a model that was saved whole
        return scaled


def assemble(preprocessing: nn.Module, trunk: nn.Module, *, classes: tuple[str, ...]) -> Classifier:
    """Put a head behind `trunk` that is as wide as its last convolution."""
    return Classifier(preprocessing, trunk, channels=output_width(trunk), classes=classes)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write one safetensors file, whole or not at all; equal content gives equal bytes."""
    # Clones: safetensors takes no memory that bears two names.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    write_atomically(path, save(plain, {METADATA: json.dumps(metadata)}))
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: in memory that is not aligned, some kernels add in another order, and round differently.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({error}); fit the model again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    if not path.is_file():
        raise ArtifactError(f"there is no model at {path}; pass a run folder, or the model.safetensors in it")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; "
            f"it is no chanscale model, or one of another version"
        )
    return tensors, _parse(path, metadata)


def _parse(path: Path, metadata: Mapping[str, Any]) -> ModelInfo:
    try:
        return INFO.validate_json(json.dumps(metadata["info"]), strict=True)
    except KeyError as error:
        reason = f"no {error}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise ArtifactError(f"the metadata of {path} is damaged ({reason}); fit the model again")
