"""One call that explains what a run says of images, and writes a folder of pictures and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from chanscale.config import Frames
from chanscale.data.sources import describe_label
from chanscale.errors import ConfigError
from chanscale.explain.answers import Answer, answer_image, picture_of
from chanscale.explain.evidence import Method
from chanscale.explain.overlays import draw_overlay, draw_patches
from chanscale.explain.patches import Patch, cut_patch, find_patches
from chanscale.explain.places import file_names, plain_name, require_new_folder
from chanscale.explain.receptive_fields import ReceptiveField, find_receptive_field
from chanscale.explain.saliency import require_captum
from chanscale.explain.survey import Survey, survey_images
from chanscale.explain.training_maps import TrainingMaps
from chanscale.files import to_json, whole_folder, write_atomically
from chanscale.wording import NOTICE

Progress = Callable[[str, int, int], None]
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Explained:
    """The folder that was written, what is told of each image, and what stands in index.json."""

    folder: Path
    answers: tuple[Answer, ...]
    index: dict[str, Any]


def explain_run(
    run: str | Path,
    images: Paths,
    *,
    out: str | Path,
    data: str | Path | None = None,
    top: int = 5,
    method: Method = "class-map",
    frames: Frames | None = None,
    progress: Progress | None = None,
) -> Explained:
    """Write to the new folder `out` why a run answers as it does on image files, or on all images in folders.

    Of each image a picture, NAME.png, and the figures in it, NAME.json: the `top` channels by what they add to the
    logit, what feeds them, and the rest. `data`: the set that the run was made of; the class map then shows what
    differs from its mean over the training images, and `patches` what excites the channels there. `method`: the map
    that is shown; `grad-cam` and `integrated-gradients` need captum. `frames`: of a DICOM file; default: as in
    training. Raises ConfigError, ArtifactError, DataError, ModelError; nothing is written then.
    """
    paths = [Path(path) for path in ([images] if isinstance(images, str | Path) else images)]
    folder, own = Path(out), None if data is None else Path(data)
    _require_options(paths, top, method)
    require_new_folder(folder, beside=[*paths, *([own] if own else [])])
    needs_maps = method != "integrated-gradients"
    survey = survey_images(Path(run), paths, own, needs_maps=needs_maps, frames=frames, progress=progress)
    with whole_folder(folder) as partial:
        answers, entries = _write_answers(survey, partial, top, method, progress)
        index = _index(survey, method, entries) | _write_patches(survey, partial)
        write_atomically(partial / "index.json", to_json(index) + "\n")
    return Explained(folder, answers, index)


def _require_options(paths: Sequence[Path], top: int, method: str) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"`method` must be one of {', '.join(get_args(Method))}. Got {method!r} instead.")
    if top < 1:
        raise ConfigError(f"`top` must be 1 or more. Got {top} instead.")
    if not paths:
        raise ConfigError("there is no image to explain; name one, or a folder of them")
    if method != "class-map":
        require_captum()


def _write_answers(
    survey: Survey, folder: Path, top: int, method: Method, progress: Progress | None
) -> tuple[tuple[Answer, ...], list[dict[str, Any]]]:
    """Write the picture and the figures of each image; return the answers, and the entries of the index."""
    names = file_names([record.name for record in survey.images.images.records])
    answers, entries = [], []
    for index, name in enumerate(names):
        answer = answer_image(survey, index, top=top, method=method)
        write_atomically(folder / f"{name}.png", draw_overlay(picture_of(answer, survey)))
        write_atomically(folder / f"{name}.json", to_json(answer.to_dict()) + "\n")
        answers.append(answer)
        entries.append({"picture": f"{name}.png", "figures": f"{name}.json", **answer.to_brief()})
        if progress:
            progress("explaining", index + 1, len(names))
    return tuple(answers), entries


def _index(survey: Survey, method: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "method": method,
        "relative": method == "class-map" and survey.usual is not None,
        "backbone": survey.info.network,
        "classes": list(survey.info.classes),
        "training_images": None if survey.training is None else len(survey.training.peaks),
        "chain_stops": survey.chain.stop,
        "images": entries,
        "notice": NOTICE,
    }


def _write_patches(survey: Survey, folder: Path) -> dict[str, Any]:
    """Write what excites the channels that were named on the training images; return what the index says of it."""
    training, field = survey.training, find_receptive_field(survey.chain)
    if training is None:
        return {
            "patches": [],
            "no_patches": "they are cut from the training images: give the run's set (--images)",
        }
    if field is None:
        return {"patches": [], "no_patches": f"the receptive field is not known: {survey.chain.stop}"}
    (folder / "patches").mkdir()
    told = [_write_sheet(survey, training, field, channel, folder) for channel in sorted(survey.circuits)]
    return {"patches": told, "receptive_field": list(field.size), "no_patches": None}


def _write_sheet(
    survey: Survey, training: TrainingMaps, field: ReceptiveField, channel: int, folder: Path
) -> dict[str, Any]:
    """Write the patches of a channel as one picture, if it has any; return what the index says of them."""
    name, active = survey.circuit(channel).channel.text, training.count_active(channel)
    patches = find_patches(training, field, channel, image_size=survey.info.image_size)
    file = f"patches/{plain_name(name.partition(' of ')[0])}.png" if patches else None
    if file is not None:
        title = (
            f"{name}, where it is most active; above 0 on {active} of {len(training.peaks)} training images"
        )
        shown = [(cut_patch(patch), _label(patch, survey)) for patch in patches]
        write_atomically(folder / file, draw_patches(title, shown))
    numbers = {record.name: number for number, record in enumerate(training.images.records, 1)}
    told = [_describe(patch, numbers[patch.record.name], survey) for patch in patches]
    return {"name": name, "position": channel, "file": file, "active_images": active, "patches": told}


def _label(patch: Patch, survey: Survey) -> str:
    # By class and not by name: names of training images may be those of patients.
    return f"{_class_of(patch, survey)}, {patch.activation:.3g}"


def _describe(patch: Patch, number: int, survey: Survey) -> dict[str, Any]:
    return {
        "training_image": number,
        "class": _class_of(patch, survey),
        "box": list(patch.box),
        "of_side": patch.side,
        "activation": patch.activation,
    }


def _class_of(patch: Patch, survey: Survey) -> str:
    return describe_label(patch.record, survey.info.classes)
