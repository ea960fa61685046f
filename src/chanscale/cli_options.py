"""The options that several commands share, and one for each field of `FitConfig`, made from it."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from chanscale.config import FitConfig, Frames

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts, on stdout.")]
ConfigFileOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file of options; the command line goes before it."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
GroupOption = Annotated[
    str | None,
    typer.Option(
        help="Regular expression on the file name; its first group (or whole match) names the patient. "
        "The intervals come from drawing patients, not single images, again and again."
    ),
]
FramesOption = Annotated[
    Frames | None,
    typer.Option(
        help="Of DICOM files with several frames: take the first, or all, each as an image. Default: as the run did."
    ),
]
SkipOption = Annotated[bool, typer.Option(help="Leave unreadable images out, and count them.")]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run them on Ray: local (here), auto, host:port or ray://host:port. "
        "The images must lie at the same path on each node.",
    ),
]
RayCpusOption = Annotated[
    int | None, typer.Option(min=1, help="CPUs, and so threads, of each on Ray; 1 on a cluster.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the model file in it.")]
DataArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="A folder with a folder of images per class, a CSV table, or an .npz."
    ),
]


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of FitConfig, in place of its parameter `given`.

    `given` then holds, by field, the values of those that stood on the command line. A default is not among
    them, so that a file can stand between the two.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "given"]
    options = [_to_option(name, field) for name, field in FitConfig.model_fields.items()]

    def with_given(context: typer.Context, **values: Any) -> None:
        fields = {name: values.pop(name) for name in FitConfig.model_fields}
        given = {name: value for name, value in fields.items() if _is_given(context, name)}
        command(**values, given=given)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [_keyword_only(parameter) for parameter in [context, *own, *options]]
    with_given.__name__, with_given.__doc__ = command.__name__, command.__doc__
    # Typer reads these two to learn what a command takes.
    with_given.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_given.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_given


def merge_config(given: dict[str, Any], file: Path | None) -> FitConfig:
    """Return the configuration: the command line over the file over the defaults. Raises ConfigError."""
    return FitConfig.build(given) if file is None else FitConfig.read(file, given)


def _to_option(name: str, field: FieldInfo) -> inspect.Parameter:
    annotation = Annotated[field.annotation, typer.Option(help=field.description)]  # type: ignore[name-defined]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )


def _keyword_only(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
