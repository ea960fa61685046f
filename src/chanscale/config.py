"""Every knob of a run, documented once, next to its default.

The Python API takes a `FitConfig`; the command line makes one option of each field; a run folder
holds the complete one as `config.yaml`.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chanscale.errors import ConfigError, brief, clip, one_line

CostKind = Literal["parameters", "macs"]
Penalty = Literal["proximal", "gradient"]
Weighting = Literal["uniform", "parameters", "macs"]
FixedPrecision = Literal["32-true", "bf16-mixed"]
Precision = Literal["auto", "32-true", "bf16-mixed"]
Frames = Literal["first", "all"]
Speed = Literal["auto", "off"]


LARGEST_SIDE = 2048
"""Pixels along a side of the largest image that a network may see."""
_MOST_TOLD = 5
"""Faults that are told of one configuration."""

WORKERS = 2
"""Threads that decode images, where nothing else is said or found."""

BEFORE_IT_EXISTED: dict[str, Any] = {"depth": "full", "calibrate": False, "speed": "off", "recompute": 0.0}
"""What an option came to before there was such an option, where that was not its default."""


def split_names(columns: str) -> tuple[str, ...]:
    """Return the names of columns that are separated by commas."""
    return tuple(name.strip() for name in columns.split(","))


class FitConfig(BaseModel):
    """What `scale_and_select` does, whole and validated; frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # --- images
    image_size: int = Field(
        112,
        ge=32,
        le=LARGEST_SIDE,
        description="Side of the square the network sees, in pixels; of volumes, of the cube, in voxels.",
    )
    spacing: float | None = Field(
        None,
        gt=0,
        description="Of volumes: mm between voxels; what does not fit in the cube is cut off, what lacks is black. "
        "Default: each volume is squashed to the cube.",
    )
    window: tuple[float, float] | None = Field(
        None,
        description="Of volumes: the values that become black and white, e.g. -160 240 of a CT. Default: the 0.5th and "
        "99.5th percentile of each volume.",
    )
    group_pattern: str | None = Field(
        None,
        description="Regular expression on the file name; its first group (or whole match) names the patient. "
        "Images of one patient stay on one side of the split. Default: of DICOM files, a hash of the PatientID.",
    )
    frames: Frames = Field(
        "first", description="Of DICOM files with several frames: take the first, or all, each as an image."
    )
    label_columns: str | None = Field(
        None,
        description="Of a CSV table: the columns that are labels, of which an image may have several, separated "
        "by commas; each holds 1, 0, or nothing where it is unknown. Default: where there is no column label, all but "
        "path, group and split.",
    )
    positive: str | None = Field(
        None, description="Class that counts as positive when there are two; default: the last in order."
    )
    validation: float = Field(
        0.15, gt=0, lt=1, description="Share of the images that chooses the best epoch."
    )
    test: float = Field(
        0.2, ge=0, lt=1, description="Share of the images kept for the final figures; 0: none."
    )
    skip_bad: bool = Field(
        False, description="Leave unreadable images out, and count them, instead of stopping."
    )
    augment: bool = Field(
        True, description="Rotate, shift, zoom, mirror and change the contrast of training images."
    )
    workers: int | None = Field(
        None, ge=0, description="Threads that decode images; default: 2, or as many as `speed` finds."
    )
    cache_gib: float | None = Field(
        None,
        ge=0,
        description="Memory for decoded images, in GiB, of each process; default: a quarter of what is free.",
    )

    # --- network
    backbone: str = Field(
        "vgg16",
        description="Pretrained network: vgg16, efficientnet_lite0, or LIBRARY:NETWORK of monai, timm, torchvision or "
        "transformers, e.g. monai:DenseNet121.",
    )
    weights: Path | None = Field(
        None, description="File with the pretrained weights; default: the cache, then the sources."
    )

    depth: str = Field(
        "auto",
        description="Where the network ends. auto: behind the layer that a linear head reads best, judged on the "
        "training images alone, or an earlier one where the budget leaves little; full: at its own end; or the name of "
        "a layer, e.g. features.18.",
    )
    fold_grey: bool = Field(
        False,
        description="For grey images: let the first convolution see each once instead of three times. Same outputs; "
        "but its weights are sums, and no longer a slice of the pretrained ones.",
    )

    # --- what is to be left
    budget: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="Share of the trunk's parameters (or MACs) to remove, or more: up to the next width that may be.",
    )
    budget_of: CostKind = Field("parameters", description="What the budget counts.")
    tolerance: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="Instead of stopping at the budget, go on halving what is left while the validation AUC "
        "stays within this of the best, and keep the smallest network that does.",
    )
    min_channels: int = Field(1, ge=1, description="Least number of channels that a layer keeps.")
    round_to: int = Field(
        16,
        ge=1,
        description="Round kept widths up to a multiple of this, which a CPU computes faster; 1: do not.",
    )
    round_last: bool = Field(False, description="Round the layer in front of the head as well.")

    # --- how scales are trained
    penalty: Penalty = Field(
        "proximal",
        description="How L1 acts: soft-thresholding after each step, or a gradient as in the paper.",
    )
    weigh_by: Weighting = Field(
        "parameters",
        description="Make every channel pay the same, or by the fourth root of the parameters or MACs that it holds.",
    )
    concavity: float = Field(
        4.0,
        ge=0,
        le=8,
        description="0: the penalty takes the same off every scale (plain L1); above, as the phase goes on: more off "
        "small scales and less off large ones, which keeps the signal of those that stay.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Channels whose scale is at most this are removed while the scales shrink, as far as the budget; "
        "when they have shrunk, the smallest go, whatever is left of them. Default: 0 with the proximal penalty, so "
        "that every removal is exact; 0.01 with the gradient, which never reaches 0.",
    )
    scale_epochs: int = Field(5, ge=1, description="Epochs in which the scales shrink to the budget.")
    refine_epochs: int = Field(5, ge=0, description="Epochs without the penalty, after the last removal.")
    early_removal: bool = Field(
        True,
        description="Remove channels at the end of the epoch in which they reach the threshold; else all at once, when "
        "the scaling phase ends.",
    )
    anchor: float = Field(
        0.25,
        ge=0,
        le=1,
        description="While scales shrink, stretch those of each group so that the largest share of this size keeps a "
        "mean of 1, as frozen norms behind them expect it; 0: do not. Networks without norms are never stretched.",
    )
    pressure: float = Field(
        0.4,
        gt=0,
        lt=2,
        description="Shrinkage per batch, as a share of the learning rate: a channel stays if its gradient "
        "agrees with itself more than this. Learning rate and penalty follow from it and from the budget.",
    )
    head_lr: float = Field(1e-3, gt=0, le=10, description="Learning rate of the head.")
    refine_lr: float = Field(
        1e-2, gt=0, le=10, description="Learning rate of the scales in refinement, at its start."
    )
    balance: bool = Field(
        False,
        description="Let each class count alike in the loss, however few its training images are. Probabilities stay "
        "those for images in which classes are as common as in these; --sensitivity calls a rare class more often.",
    )
    head_decay: float = Field(1e-2, ge=0, description="L2 penalty on the weights of the head.")
    batch_size: int = Field(20, ge=2, description="Images in a step.")
    micro_batch: int = Field(
        5, ge=1, description="Images of a step that the trunk computes at a time; fewer take less memory."
    )
    recompute: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of a step whose maps are computed again when its gradients are, instead of kept until then; "
        "the results are the same. 0: least time; 1: least memory. Layers that note something of each batch keep all.",
    )

    # --- how probabilities are read, settled on validation images
    calibrate: bool = Field(
        True, description="Divide the logits by the temperature that makes the validation images likeliest."
    )
    sensitivity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Find the threshold that calls this share of the positive images positive; of two classes.",
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Give each image the set of classes that cannot be ruled out, which is to hold the true one for "
        "this share of the images of each class.",
    )

    # --- machine
    seed: int = Field(
        0, ge=0, lt=2**32, description="Fixes the split, the order of images, the augmentation, all."
    )
    precision: Precision = Field("auto", description="bf16-mixed where the processor has it, else fp32.")
    device: str = Field("auto", description="auto, cpu, cuda or mps.")
    speed: Speed = Field(
        "auto",
        description="auto: where training takes minutes, find out in its first seconds what this machine computes "
        "fastest, and keep to that: precision, memory layout, threads, workers; what is given stays. off: the "
        "defaults, which cells of a comparison, folds and trials of a search always have.",
    )
    devices: int = Field(
        1,
        ge=1,
        description="Processes on this machine that share the work of each batch: one a GPU, or several on a CPU.",
    )
    nodes: int = Field(
        1,
        ge=1,
        description="Machines that share the work: start the same command on each, with MASTER_ADDR, MASTER_PORT and "
        "NODE_RANK set, or by torchrun. Images and run folder have one path on all.",
    )

    @property
    def cut(self) -> float:
        """The threshold, or its default for the penalty."""
        if self.threshold is not None:
            return self.threshold
        return 0.0 if self.penalty == "proximal" else 0.01

    @property
    def decoders(self) -> int:
        """The threads that decode images, or their default."""
        return WORKERS if self.workers is None else self.workers

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that are labels, if they are named."""
        return None if self.label_columns is None else split_names(self.label_columns)

    @model_validator(mode="after")
    def _shares_leave_training_images(self) -> Self:
        if self.validation + self.test >= 0.9:
            raise ValueError("validation + test must be below 0.9, or nothing is left to train on")
        return self

    @model_validator(mode="after")
    def _window_ascends(self) -> Self:
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("window must be a lower and a higher value")
        return self

    def require_one_process(self, what: str) -> None:
        """Raise ConfigError where the work of a batch is to be shared, which is for a single fit."""
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if self.devices * self.nodes > 1 or by_torchrun:
            raise ConfigError(f"{what} runs each fit in one process; leave devices, nodes and torchrun out")

    @classmethod
    def build(cls, options: dict[str, Any], *, places: Mapping[str, Path] | None = None) -> Self:
        """Validate `options`. Raises ConfigError, in one line that names the option.

        `places`: the files that options come from, by name.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            # Not `from error`: it would print its input whole, whatever that is.
            raise ConfigError(
                "; ".join(_describe(detail, places or {}) for detail in error.errors()[:_MOST_TOLD])
            ) from None

    def already_opened(self) -> Self:
        """Return the options for an `ImageSet`, whose class order and patients are settled: no option says them."""
        return self.model_copy(update={"positive": None, "group_pattern": None, "label_columns": None})

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None) -> Self:
        """Read a YAML file, then apply `overrides`. Raises ConfigError."""
        try:
            options = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        # What the loader cannot make a date or a number of raises nearly anything; what is deep, RecursionError.
        except Exception as error:
            raise ConfigError(f"cannot read the configuration {path}: {clip(one_line(error))}") from error
        if not isinstance(options, dict):
            raise ConfigError(f"{path} must hold `option: value` lines, got a {type(options).__name__}")
        given = overrides or {}
        return cls.build(options | given, places=dict.fromkeys(options.keys() - given.keys(), path))

    def to_yaml(self) -> str:
        """Return the complete configuration; `read` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Reads plain YAML without aliases: with them, a few lines could stand for billions, and no option needs them."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write each value out")
        return super().compose_node(parent, index)


DECODING = frozenset({"workers", "cache_gib"})
"""Options that change nothing but the time and the memory that decoding takes."""
TIMING = DECODING | {"speed", "recompute"}
"""Options that fits which are compared may differ in, and that a resumed run may change: what it computes stays."""
READING = frozenset({"calibrate", "sensitivity", "coverage"})
"""Options that say how probabilities are read, when training is over."""


def before_it_existed(option: str) -> Any:
    """Return what an option came to before it was added."""
    return BEFORE_IT_EXISTED.get(option, FitConfig.model_fields[option].default)


def _describe(detail: Any, places: Mapping[str, Path]) -> str:
    where = clip(".".join(str(part) for part in detail["loc"]))
    place = places.get(detail["loc"][0]) if detail["loc"] else None
    said = _tell_unknown(where) if detail["type"] == "extra_forbidden" else _tell_wrong(where, detail)
    return f"{place}: {said}" if place else said


def _tell_unknown(name: str) -> str:
    near = get_close_matches(name, FitConfig.model_fields, n=1)
    return f"there is no option `{name}`{f'; did you mean `{near[0]}`?' if near else ''}"


def _tell_wrong(where: str, detail: Any) -> str:
    got = f" Got {where}={brief(detail['input'])}." if where else ""
    return f"{where + ': ' if where else ''}{detail['msg']}.{got}"
