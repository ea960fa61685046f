"""The model file: self-contained, loads without the base weights and without pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from chanscale import __version__
from chanscale.attaching import attach_scales
from chanscale.backbones import Preprocessing, build_backbone
from chanscale.channels import output_width
from chanscale.classifier import Classifier
from chanscale.errors import ArtifactError, ChanscaleError, EmptySelectionError
from chanscale.files import write_atomically
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection

FORMAT = "chanscale-model/1"


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
    image_size: int
    channels: int

    @property
    def widths(self) -> dict[str, int]:
        """How many channels each convolution has left."""
        return {name: len(indices) for name, indices in self.kept.items()}


def save_model(model: Classifier, info: ModelInfo, path: Path) -> Path:
    """Write the tensors of a scaled `model`, and `info` in the metadata, to one safetensors file."""
    # Clones: safetensors takes no tensor that bears two names.
    tensors = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    metadata = {"format": FORMAT, "chanscale": __version__, "info": json.dumps(asdict(info), sort_keys=True)}
    write_atomically(path, save(tensors, metadata))
    return path


def load_model(path: Path, *, trunk: nn.Module | None = None) -> tuple[Classifier, ModelInfo]:
    """Return the model of a file, or of a run folder, in eval mode, and what the file says about it.

    `trunk`: the original network, needed only where it was one of the user's own. Raises ArtifactError.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, info = _read(path)
    try:
        model = rebuild(info, trunk=trunk)
        model.load_state_dict(tensors, assign=True)
    except (ChanscaleError, RuntimeError, IndexError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} does not fit {info.backbone!r}: {reason}") from error
    return model.requires_grad_(False).eval(), info


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


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _read(path: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    if not path.is_file():
        raise ArtifactError(f"there is no model at {path}; pass a run folder, or the model.safetensors in it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file ({error}); fit the model again") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; "
            f"it is no chanscale model, or one of another version"
        )
    return tensors, _parse(path, metadata)


def _parse(path: Path, metadata: Mapping[str, str]) -> ModelInfo:
    try:
        fields = json.loads(metadata["info"])
        return ModelInfo(**{**fields, "classes": tuple(fields["classes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the metadata of {path} is damaged ({error}); fit the model again") from error
