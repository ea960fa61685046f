"""One call that writes a run in a form to deploy, after it was compared with the run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.data.images import Pixels
from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits
from chanscale.delta import save_delta
from chanscale.errors import ConfigError
from chanscale.export.agreement import Agreement
from chanscale.export.examples import draw_cubes, draw_examples, read_cubes, read_whole, spread
from chanscale.export.int8_trial import Int8Trial, try_int8
from chanscale.export.onnx_file import export_onnx
from chanscale.export.program_file import export_program
from chanscale.export.quantising import CALIBRATION, quantise_onnx
from chanscale.export.web import build_page
from chanscale.files import require_absent, require_writable, write_atomically
from chanscale.novelty.storage import NOVELTY
from chanscale.own_images import judged_images, open_own_images
from chanscale.programs import PROGRAM, takes_grey_alone
from chanscale.wording import NOTICE

Form = Literal["onnx", "torch", "web", "delta"]
Progress = Callable[[str, int, int], None]

FILES: dict[str, str] = {
    "onnx": "model.onnx", "torch": "model.pt2", "web": "web", "delta": "delta.safetensors",
}  # fmt: skip
INT8_FILE = "model.int8.onnx"
"""What each form is called in a run folder, unless another path is given."""

CHECKED, PHANTOMS = 50, 8
"""On how many images an export is compared with the run: of those given, at most; and without any."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how large it is; how well it agrees with the run; what int8 cost and gained.

    With int8, `agreement` is that of the graph in fp32 that it was made of.
    """

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
    with the run on its test images, without it on phantoms (of volumes, on noise). `int8`: as ONNX alone; calibrated on
    the training images of that set, and judged on its test images. Raises ConfigError, ArtifactError, DataError,
    ModelError, among them InexactExportError when a probability differs by more than 1e-4 (for int8, one of the graph
    in fp32 that it is made of); nothing is written then.
    """
    file = model_path(Path(run))
    target = _find_target(file, form, out, int8=int8)
    if int8 and images is None:
        raise ConfigError("int8 is calibrated on the training images of the run: give its set with --images")
    if form == "delta":
        return _describe(save_delta(file, target))
    model, info = load_model(file)
    if int8 or form == "web":
        info.require_pictures("int8" if int8 else "web")
    own = open_own_images(Path(images), file, info) if images is not None else None
    examples = _examples(own, info, grey_only=takes_grey_alone(model), progress=progress)
    if form == "torch":
        content, agreement = export_program(model, info, examples)
        return _write(target, content, agreement)
    graph, agreement = export_onnx(model, info, examples)
    if form == "web":
        page = build_page(
            graph, target, classes=info.classes, name=file.absolute().parent.name, channels=info.channels,
            grey_only=takes_grey_alone(model), multilabel=info.multilabel, rules=info.rules, notice=NOTICE,
            progress=progress,
        )  # fmt: skip
        return _describe(page, agreement)
    if own and int8:
        graph, trial = _quantise(graph, *own, info, progress)
        return _write(target, graph, agreement, trial)
    return _write(target, graph, agreement)


def _examples(
    own: tuple[ImageSet, Splits] | None, info: ModelInfo, *, grey_only: bool, progress: Progress | None
) -> Iterator[Pixels]:
    """Yield the images to compare an export with the run on."""
    size, space = info.image_size, info.space
    if own is None:
        drawn = draw_cubes(PHANTOMS, size=size) if space else draw_examples(PHANTOMS, grey_only=grey_only)
        return _counted(drawn, "checking images", PHANTOMS, progress)
    chosen = spread(judged_images(own[1]), CHECKED)
    whole = read_cubes(own[0], chosen, size=size, space=space) if space else read_whole(own[0], chosen)
    return _counted(whole, "checking images", len(chosen), progress)


def _find_target(file: Path, form: str, out: str | Path | None, *, int8: bool) -> Path:
    if form not in get_args(Form):
        raise ConfigError(f"`form` must be one of {', '.join(get_args(Form))}. Got {form!r} instead.")
    if int8 and form != "onnx":
        raise ConfigError(f"int8 is for ONNX alone, not for {form}; leave it out")
    target = Path(out) if out is not None else file.with_name(INT8_FILE if int8 else FILES[form])
    if form == "web":
        require_absent(target)
    require_writable(target)
    _require_other(target, file)
    return target


def _require_other(target: Path, file: Path) -> None:
    """Raise ConfigError where an export would take the place of what the run cannot do without."""
    for own in (file, file.with_name(PROGRAM), file.with_name(NOVELTY)):
        if own.exists() and target.exists() and target.samefile(own):
            raise ConfigError(f"{target} is the run's own {own.name}, and would be lost; name another --out")


def _quantise(
    graph: bytes, images: ImageSet, splits: Splits, info: ModelInfo, progress: Progress | None
) -> tuple[bytes, Int8Trial]:
    chosen = spread(splits.train, CALIBRATION)
    whole = _counted(read_whole(images, chosen), "calibrating", len(chosen), progress)
    small = quantise_onnx(graph, whole)
    return small, try_int8(graph, small, images, judged_images(splits), info, progress=progress)


def _counted(images: Iterator[Pixels], what: str, total: int, progress: Progress | None) -> Iterator[Pixels]:
    for done, image in enumerate(images):
        if progress:
            progress(what, done, total)
        yield image
    if progress:
        progress(what, total, total)


def _write(target: Path, content: bytes, agreement: Agreement, int8: Int8Trial | None = None) -> Exported:
    write_atomically(target, content)
    return _describe(target, agreement, int8)


def _describe(path: Path, agreement: Agreement | None = None, int8: Int8Trial | None = None) -> Exported:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return Exported(path, sum(file.stat().st_size for file in files), agreement, int8)
