"""The model file: self-contained, loads without the base weights and without pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale import __version__
from chanscale.backbones import Preprocessing
from chanscale.classifier import Classifier, to_channels_last
from chanscale.config import LARGEST_SIDE, Frames
from chanscale.conformal import PredictionSets
from chanscale.cutting_points import cut_trunk
from chanscale.data.loading import shape_of
from chanscale.data.volumes import MAX_VOXELS, VolumeSpace
from chanscale.errors import ArtifactError, ChanscaleError, ConfigError, ModelError, brief, clip, one_line
from chanscale.files import parse_json, write_atomically
from chanscale.modes import in_eval
from chanscale.operating_point import OperatingPoint
from chanscale.originals import rebuild_trunk, trunk_of
from chanscale.programs import PROGRAM, Program, load_program
from chanscale.rebuilding import install_tensors
from chanscale.slicing import output_width
from chanscale.wording import counted, without_folder

T = TypeVar("T")

FORMAT = "chanscale-model/2"
METADATA = "chanscale"
"""The one entry of a file's metadata."""
EXPORTS = {".onnx": "an ONNX export", ".pt2": "a program"}
"""What else may lie in a run folder and be taken for its model, by suffix."""
FEATURES = "head.linear.weight"
"""The tensor that is as wide as the features."""
RULES = ("operating_point", "prediction_sets")
"""What a `ModelInfo` calls the rules to read probabilities by."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about its model, beside the tensors.

    `kept`: for each group, named by a convolution, the ascending indices of its channels in the original backbone;
    groups that are protected are not named. Where grouped convolutions hold channels together, those count as one.
    `image_size` in pixels, `channels` 1 or 3: what the model was trained on. `head`: the layer of the original that
    ours replaced, if one was. `without`: the modules of its trunk that are left out. `rebuilt_by`: its name; or a
    program that lies beside the file; or only the original network. `operating_point`, `prediction_sets`: how to read
    its probabilities, where that was settled. `multilabel`: whether an image may have several of the classes, or none.
    `space`: how volumes are read; None for a model of pictures. `frames`: which of a DICOM file's it was trained on;
    None in a file of before it was noted.
    """

    backbone: str
    classes: tuple[str, ...]
    kept: Mapping[str, list[int]]
    preprocessing: Mapping[str, Any]
    image_size: Annotated[int, Field(gt=0, le=LARGEST_SIDE)]
    channels: Annotated[int, Field(gt=0, le=3)]
    head: str | None = None
    without: tuple[str, ...] = ()
    rebuilt_by: Literal["name", "program", "network"] = "name"
    program: str | None = None
    operating_point: OperatingPoint | None = None
    prediction_sets: PredictionSets | None = None
    multilabel: bool = False
    space: VolumeSpace | None = None
    frames: Frames | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a rule of decision is for other classes than these, or a cube too large to decode."""
        if self.space is not None and self.image_size**3 > MAX_VOXELS:
            raise ValueError(f"a cube of {self.image_size} voxels a side is too large")
        if self.operating_point is not None and not self.is_binary:
            raise ValueError("an operating point is for two classes")
        sets = self.prediction_sets
        if sets is not None and not len(sets.least) == len(sets.images) == len(self.classes):
            raise ValueError("the prediction sets are of other classes")

    @property
    def is_binary(self) -> bool:
        """Whether there are two classes, of which an image has one; the second is the positive one."""
        return len(self.classes) == 2 and not self.multilabel

    @property
    def label_columns(self) -> tuple[str, ...] | None:
        """The columns of a table that hold the labels; None where an image has one class."""
        return self.classes if self.multilabel else None

    @property
    def most_channels(self) -> int | None:
        """The channels that an image may have; None where it may be in colour as well as grey."""
        grey_alone = self.preprocessing.get("folded") or len(self.preprocessing.get("mean", ())) == 1
        return 1 if grey_alone else None

    def choose_frames(self, wanted: Frames | None) -> Frames:
        """Return which frames of a DICOM file to take: those `wanted`, or else those that it was trained on."""
        return wanted or self.frames or "first"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image as the model takes it: (C, S, S), or (C, S, S, S) for volumes."""
        return shape_of(self.channels, self.image_size, self.space)

    def require_pictures(self, what: str) -> None:
        """Raise ConfigError for a model of volumes, which `what` is not for."""
        if self.space is not None:
            raise ConfigError(f"{what} is for models of pictures, and this one takes volumes")

    @property
    def network(self) -> str:
        """The backbone's name to show: of one that was read from a folder, not where that lay."""
        return without_folder(self.backbone)

    @property
    def rules(self) -> dict[str, dict[str, Any]]:
        """The operating point and the prediction sets as plain values, those that are settled."""
        return {name: asdict(rule) for name in RULES if (rule := getattr(self, name)) is not None}

    @property
    def widths(self) -> dict[str, int]:
        """How many channels each group has left."""
        return {name: len(indices) for name, indices in self.kept.items()}


INFO = TypeAdapter(ModelInfo)
"""Reads a `ModelInfo` from JSON, and checks it: a file may come from anywhere."""


def save_model(model: Classifier, info: ModelInfo, path: Path | str) -> Path:
    """Write the tensors of a scaled `model`, and `info` in the metadata, to one safetensors file."""
    metadata = {"format": FORMAT, "chanscale": __version__, "info": asdict(info)}
    return write_tensors(Path(path), model.state_dict(), metadata)


def load_model(path: Path | str, *, trunk: nn.Module | None = None) -> tuple[Classifier | Program, ModelInfo]:
    """Return the model of a file, or of a run folder, in eval mode, and what the file says about it.

    `trunk`: the original network, which makes a `Classifier` of one that was the user's own; without it, that is a
    `Program`. Raises ArtifactError.
    """
    path = model_path(Path(path))
    tensors, metadata = read_model(path)
    info = parse_info(metadata, path)
    if trunk is None and info.rebuilt_by == "program":
        program = load_program(
            path.with_name(PROGRAM), info.classes, digest=info.program, multilabel=info.multilabel
        )
        return program, info
    if not isinstance(trunk, nn.Module | None):
        raise ArtifactError(f"`trunk` must be the original network. Got {trunk!r:.60} instead.")
    if trunk is None and info.rebuilt_by == "network":
        raise ArtifactError(
            f"{path} was made from a network of your own, {info.backbone}: in Python, pass that network as `trunk`"
        )
    try:
        model = rebuild(info, tensors, trunk=trunk)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (ChanscaleError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ArtifactError(f"{path} does not fit {info.backbone!r}: {reason}") from error
    return to_channels_last(model).requires_grad_(False).eval(), info


def rebuild(info: ModelInfo, tensors: Mapping[str, Tensor], *, trunk: nn.Module | None = None) -> Classifier:
    """Return the classifier that `info` describes, with `tensors` for its state; `trunk` is not changed."""
    preprocessing = Preprocessing.from_dict(info.preprocessing)
    trunk = rebuild_trunk(info.backbone, info.head) if trunk is None else trunk_of(trunk, info.head)
    trunk = cut_trunk(trunk, info.without)
    with torch.device("meta"):
        model = Classifier(
            preprocessing, trunk, channels=tensors[FEATURES].shape[1], classes=info.classes,
            multilabel=info.multilabel,
        )  # fmt: skip
    outputs = len(model.head.linear.bias)
    if len(tensors["head.linear.bias"]) != outputs:
        raise ModelError(f"{len(info.classes)} classes need {outputs} outputs, and there are others")
    whole = {name: output_width(model.get_submodule(name)) for name in info.kept}
    install_tensors(model, tensors)
    grouped = any(isinstance(module, _ConvNd) and module.groups > 1 for module in trunk.modules())
    for name, indices in info.kept.items():
        width = output_width(model.get_submodule(name))
        # Where convolutions are grouped, a channel may be several of the layer's.
        each = max(1, width // max(1, len(indices))) if grouped else 1
        _require_indices(name, indices, whole[name], width, each=each)
    _require_run(model, info)
    return model


def _require_indices(name: str, indices: list[int], whole: int, width: int, *, each: int) -> None:
    ascending = all(low < high for low, high in pairwise((-1, *indices, whole // each)))
    if len(indices) * each != width or whole % each or not ascending:
        raise ModelError(f"{name!r} has {width} of {whole} channels, which {indices[:8]}... cannot be")


@torch.no_grad()
def _require_run(model: Classifier, info: ModelInfo) -> None:
    """Run `model` on an empty image: widths that do not fit each other are found now, and not in use."""
    with in_eval(model):
        model(torch.zeros(1, *info.shape))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write one safetensors file, whole or not at all; equal content gives equal bytes."""
    write_atomically(path, pack_tensors(tensors, metadata))
    return path


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of one safetensors file; equal content gives equal bytes."""
    # Clones: safetensors takes no memory that bears two names.
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    content: bytes = save(plain, {METADATA: json.dumps(metadata)})
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(parse_json((file.metadata() or {}).get(METADATA, "{}")))
            # Clones: in memory that is not aligned, some kernels add in another order, and round differently.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({clip(one_line(error))}); fit the model again"
        ) from error


def parse_header(
    adapter: TypeAdapter[T], metadata: Mapping[str, Any], path: Path, *, wanted: str, kind: str, advice: str
) -> T:
    """Return the metadata of a file that lies beside a model as `adapter` has them. Raises ArtifactError.

    `wanted`: the format it must have; `kind`: what a file of that format is called; `advice`: what to do about damage.
    """
    if metadata.get("format") != wanted:
        raise ArtifactError(
            f"{path} has the format {brief(metadata.get('format'))}, not {wanted!r}; "
            f"it is no {kind}, or one of another version"
        )
    try:
        return adapter.validate_json(json.dumps(metadata), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = clip(".".join(map(str, first["loc"])))
        raise ArtifactError(
            f"the metadata of {path} are damaged ({where}: {first['msg']}); {advice}"
        ) from error


def model_path(path: Path) -> Path:
    """Return the model file of a run folder; a path that is no folder as it is."""
    return path / "model.safetensors" if path.is_dir() else path


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a model file. Raises ArtifactError for any other."""
    if not path.is_file():
        raise ArtifactError(_describe_absence(path))
    if path.suffix.lower() in EXPORTS:
        raise ArtifactError(
            f"{path} is no model file but {EXPORTS[path.suffix.lower()]}; pass a run folder, or the "
            "model.safetensors in it"
        )
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has the format {brief(metadata.get('format'))}, not {FORMAT!r}; "
            f"it is no chanscale model, or one of another version"
        )
    return tensors, metadata


def _describe_absence(path: Path) -> str:
    """Return why there is no model file at `path`, and what to do; of a cross-validation, which are its runs."""
    runs = sorted(path.parent.glob("runs/r*-f*/model.safetensors"))
    if not runs:
        return f"there is no model at {path}; pass a run folder, or the model.safetensors in it"
    return (
        f"{path.parent} is a cross-validation of {counted(len(runs), 'run')}, and this takes one; pass one of them, "
        f"such as {runs[0].parent}"
    )


def parse_info(metadata: Mapping[str, Any], path: Path) -> ModelInfo:
    """Return what the metadata of the file at `path` say of its model. Raises ArtifactError."""
    try:
        return INFO.validate_json(json.dumps(metadata["info"]), strict=True)
    except KeyError as error:
        reason = f"no {error}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = clip(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    raise ArtifactError(f"the metadata of {path} is damaged ({reason}); fit the model again")
