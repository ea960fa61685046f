"""One call that writes a run in a form to deploy, after it was compared with the run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.data.images import Pixels
from chanscale.data.sources import ImageSet, open_images
from chanscale.data.splits import Splits, read_splits
from chanscale.delta import save_delta
from chanscale.errors import ArtifactError, ConfigError
from chanscale.export.agreement import Agreement
from chanscale.export.deployed import takes_grey_alone
from chanscale.export.examples import draw_examples, read_whole, spread
from chanscale.export.int8_trial import Int8Trial, try_int8
from chanscale.export.onnx_file import export_onnx
from chanscale.export.program_file import export_program
from chanscale.export.quantising import CALIBRATION, quantise_onnx
from chanscale.export.web import build_page
from chanscale.files import require_writable, write_atomically
from chanscale.programs import Program
from chanscale.wording import NOTICE

Form = Literal["onnx", "torch", "web", "delta"]
Progress = Callable[[str, int, int], None]

FILES: dict[str, str] = {
    "onnx": "model.onnx", "torch": "model.pt2", "web": "web", "delta": "delta.safetensors",
}  # fmt: skip
INT8_FILE = "model.int8.onnx"
"""What each form is called in a run folder, unless another path is given."""

CHECKED = 50
"""On how many images an export is compared with the run, if so many are given."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how large it is; how well it agrees with the run; what int8 cost and gained."""

    path: Path
    size: int
    agreement: Agreement | None = None
    int8: Int8Trial | None = None


def export_run(
    run: str | Path,
    form: Form = "onnx",
    *,
    out: str | Path | None = None,
    images: str | Path | None = None,
    int8: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the model of a run folder as `onnx`, a `torch.export` program, a `web` page, or its `delta`.

    `out`: where to; default: in the run folder. `images`: the set that the run was made of; the export is compared
    with the run on its test images, without it on phantoms. `int8`: as ONNX alone; calibrated on the training images
    of that set, and judged on its test images. Raises ConfigError, ArtifactError, DataError, ModelError, among them
    InexactExportError when a probability differs by more than 1e-4; nothing is written then.
    """
    file = model_path(Path(run))
    target = _find_target(file, form, out, int8=int8)
    if int8 and images is None:
        raise ConfigError("int8 is calibrated on the training images of the run: give its set with --images")
    if form == "delta":
        return _describe(save_delta(file, target))
    model, info = load_model(file)
    own = None if images is None else open_own_images(Path(images), file, info)
    grey_only = takes_grey_alone(model, info)
    examples = (
        read_whole(own[0], spread(judged(own[1]), CHECKED)) if own else draw_examples(grey_only=grey_only)
    )
    if progress:
        examples = _counted(examples, progress)
    if form == "torch":
        content, agreement = export_program(model, info, examples)
        return _write(target, content, agreement)
    graph, agreement = export_onnx(model, info, examples)
    if form == "web":
        return _describe(_build_page(graph, target, model, info), agreement)
    if own and int8:
        return _quantise(graph, target, info, own, agreement, progress)
    return _write(target, graph, agreement)


def open_own_images(path: Path, file: Path, info: ModelInfo) -> tuple[ImageSet, Splits]:
    """Return the images at `path`, and which of them the run of the model at `file` was trained on.

    Raises DataError, and ArtifactError where the run does not say.
    """
    config, splits = file.with_name("config.yaml"), file.with_name("splits.csv")
    if not (config.is_file() and splits.is_file()):
        raise ArtifactError(f"beside {file} lie no config.yaml and splits.csv, which tell its test images")
    pattern = FitConfig.read(config).group_pattern
    images = open_images(path, group_pattern=pattern, classes=info.classes)
    return images, read_splits(splits, images)


def judged(splits: Splits) -> tuple[int, ...]:
    """Return the images to judge an export on: the test images, or those of validation where there are none."""
    return splits.test or splits.validation


def _find_target(file: Path, form: str, out: str | Path | None, *, int8: bool) -> Path:
    if form not in get_args(Form):
        raise ConfigError(f"`form` must be one of {', '.join(get_args(Form))}. Got {form!r} instead.")
    if int8 and form != "onnx":
        raise ConfigError(f"int8 is for ONNX alone, not for {form}; leave it out")
    target = Path(out) if out is not None else file.with_name(INT8_FILE if int8 else FILES[form])
    if form == "web":
        if target.exists():
            raise ArtifactError(f"{target} exists already; remove it, or choose another --out")
    else:
        require_writable(target)
    return target


def _build_page(graph: bytes, folder: Path, model: Classifier | Program, info: ModelInfo) -> Path:
    return build_page(
        graph, folder, classes=info.classes, name=folder.absolute().parent.name, channels=info.channels,
        grey_only=takes_grey_alone(model, info), notice=NOTICE,
    )  # fmt: skip


def _quantise(
    graph: bytes, target: Path, info: ModelInfo, own: tuple[ImageSet, Splits],
    agreement: Agreement, progress: Progress | None,
) -> Exported:  # fmt: skip
    images, splits = own
    chosen = spread(splits.train, CALIBRATION)
    calibration = read_whole(images, chosen)
    if progress:
        calibration = _counted(calibration, progress, "calibrating", len(chosen))
    small = quantise_onnx(graph, calibration)
    trial = try_int8(graph, small, images, judged(splits), info, progress=progress)
    return _write(target, small, agreement, trial)


def _counted(
    images: Iterator[Pixels], progress: Progress, what: str = "checking images", total: int = CHECKED
) -> Iterator[Pixels]:
    for done, image in enumerate(images):
        progress(what, done, total)
        yield image
    progress(what, total, total)


def _write(target: Path, content: bytes, agreement: Agreement, int8: Int8Trial | None = None) -> Exported:
    write_atomically(target, content)
    return _describe(target, agreement, int8)


def _describe(path: Path, agreement: Agreement | None = None, int8: Int8Trial | None = None) -> Exported:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return Exported(path, sum(file.stat().st_size for file in files), agreement, int8)
