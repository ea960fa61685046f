"""The model card: what the model is, what it was made of and with, and how to make it again."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chanscale.artifact import ModelInfo
from chanscale.backbones import BACKBONES
from chanscale.config import FitConfig
from chanscale.crossval.plan import CrossPlan
from chanscale.data.splits import SIDES
from chanscale.report_page.material import Material
from chanscale.speed.choice import Calibration
from chanscale.wording import shorten, size_on_disk, without_folder

Rows = list[tuple[str, str]]

TITLES = {"torch": "PyTorch", "python": "Python"}


@dataclass(frozen=True)
class Side:
    """The images of one side of the split: how many of each class, of all, and of how many patients, where known."""

    name: str
    counts: tuple[int, ...]
    total: int
    patients: int | None


@dataclass(frozen=True)
class Option:
    """An option that is not at its default, and what it does."""

    name: str
    value: str
    default: str
    description: str


def count_sides(material: Material) -> list[Side]:
    """Return the images of each side, by class."""
    images = material.images.images
    sides = []
    for name in SIDES:
        side = getattr(material.splits, name)
        own = replace(images, records=tuple(images.records[index] for index in side))
        sides.append(Side(name, tuple(own.counts.values()), len(own), images.count_patients(side)))
    return sides


def describe_model(material: Material) -> Rows:
    """Return what the model is and where it comes from."""
    info, metrics = material.info, material.metrics
    known = BACKBONES.get(info.backbone)
    parameters = metrics["parameters"]
    rows = [
        ("Made from", known.origin if known else info.network),
        ("Licence of its weights", known.licence if known else "not known here: ask where it came from"),
        ("Ends", f"behind {metrics['depth']['layer']}" if metrics["depth"]["layer"] else "where it ended"),
        ("Takes", _describe_input(info)),
        ("Says", f"a probability for each of {len(info.classes)} {'labels' if info.multilabel else 'classes'}"),
        ("Parameters", f"{parameters['kept']:,} of {parameters['trunk']:,}, and {parameters['head']:,} in the head"),
        ("MACs", f"{shorten(metrics['macs']['kept'])} for an image, of {shorten(metrics['macs']['trunk'])}"),
    ]  # fmt: skip
    if size := metrics["bytes"].get("model"):
        rows.append(("File", f"model.safetensors, {size_on_disk(size)}"))
    if protected := metrics["groups"]["protected"]:
        rows.append(("Left whole", f"{len(protected)} groups of channels, whose removal would not be exact"))
    return rows


def _describe_input(info: ModelInfo) -> str:
    side, space = info.image_size, info.space
    if space is None:
        return f"{'grey' if info.channels == 1 else 'colour'} images, made {side} × {side} pixels"
    apart = "squashed" if space.spacing is None else f"{space.spacing:g} mm apart"
    values = "{:g} to {:g}".format(*space.window) if space.window else "the 0.5th to 99.5th percentile"
    return f"volumes, made {side} × {side} × {side} voxels, {apart}, axes to {space.orientation}, values {values}"


def describe_training(material: Material) -> Rows:
    """Return how the model was trained, and what that took."""
    metrics = material.metrics
    validation, calibration = metrics["validation_auc"], metrics.get("calibration")
    return [
        # Files count epochs from 0; people, here as on the console, from 1.
        ("Epochs", f"{metrics['epochs']}, of which epoch {metrics['best_epoch'] + 1} was best on validation images"),
        ("Validation AUC", "not defined" if validation is None else f"{validation:.3f}"),
        *([("Temperature", _describe_temperature(calibration))] if calibration else []),
        ("Precision", str(metrics["precision"])),
        ("Time", f"{metrics['seconds']:,.0f} s"),
        ("Threads of the processor", str(metrics["threads"])),
        *_describe_speed(metrics.get("speed")),
        ("Memory", f"{size_on_disk(metrics['peak_memory_bytes'])} at most"),
        *((TITLES.get(name, name), version) for name, version in metrics["versions"].items()),
    ]  # fmt: skip


def _describe_speed(told: Any) -> Rows:
    """Return how the machine was found to train fastest; nothing of a run that did not try."""
    try:
        speed = Calibration.from_dict(told)
    except ValueError:
        return []
    return [("Speed", speed.describe().removeprefix("speed: "))] if speed.measured else []


def _describe_temperature(calibration: Mapping[str, Any]) -> str:
    if calibration["temperature"] == 1 and calibration["reason"]:
        return f"none: {calibration['reason']}"
    told = f"{calibration['temperature']:.3f}, from {calibration['images']:,} validation images"
    return f"{told}; {calibration['reason']}" if calibration["reason"] else told


def list_options(config: FitConfig) -> list[Option]:
    """Return the options that are not at their defaults."""
    return [
        Option(name, str(value), str(FitConfig.model_fields[name].default), field.description or "")
        for name, field in FitConfig.model_fields.items()
        if (value := getattr(config, name)) != field.default
    ]


def without_folders(config: FitConfig) -> FitConfig:
    """Return `config` with files by name alone: where they lay is nobody's business."""
    weights = config.weights and Path(config.weights.name)
    return config.model_copy(update={"weights": weights, "backbone": without_folder(config.backbone)})


def write_command(config: FitConfig, backbone: str, *, plan: CrossPlan | None = None) -> str:
    """Return the command line that makes the run again, an option a line; that of a fold makes all of its `plan`."""
    begin = "chanscale fit IMAGES --out RUN"
    if plan:
        begin = f"chanscale cross-validate IMAGES --out FOLDER --folds={plan.folds} --repeats={plan.repeats}"
    given = {option.name: getattr(config, option.name) for option in list_options(config)}
    options = [shlex.join(_flag(name, value)) for name, value in (given | {"backbone": backbone}).items()]
    return " \\\n    ".join([begin, *options])


def name_objects(material: Material) -> list[str]:
    """Return what no command line names, as it was given as an object: the network, the images."""
    # What a hub describes is kept as a program, but has a name; a folder's is not told.
    backbone = material.config.backbone
    named = material.info.rebuilt_by == "name" or (":" in backbone and without_folder(backbone) == backbone)
    # The images of a fold are an object to it, but not to its cross-validation.
    objects = {
        "network": not named,
        "images": material.plan is None and material.metrics.get("images_from") == "object",
    }
    return [name for name, given in objects.items() if given]


def _flag(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [f"--{option}", *map(str, value)]
    return [f"--{option}={value}"]


def figure_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures that both networks have, in order: name, title, before, after."""
    titles = {
        "auc": "AUC",
        "accuracy": "Accuracy",
        "sensitivity": "Sensitivity",
        "specificity": "Specificity",
    }
    return [
        {"name": name, "title": title, "before": metrics["before"].get(name), "after": metrics[name]}
        for name, title in titles.items()
        if name in metrics
    ]
