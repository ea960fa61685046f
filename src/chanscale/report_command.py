"""The command that writes the report of a finished run again; `cli` adds it to the others."""

from pathlib import Path
from typing import Annotated

import typer

from chanscale.cli_options import RunArgument
from chanscale.display import say, watching
from chanscale.wording import printable, size_on_disk


def report(
    run: RunArgument,
    images: Annotated[Path, typer.Option(metavar="DATA", help="The images that the run was made of.")],
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="What to write; default: report.html in the run folder."),
    ] = None,
    names: Annotated[
        bool,
        typer.Option("--names", help="Call test images by their names, which may tell who the patient is."),
    ] = False,
) -> None:
    """Write the report of a finished run again.

    It has figures, curves, mistakes, what was kept, and a model card, on one page. The test images are judged again; a
    run that `fit` wrote has its report already.
    """
    from chanscale.artifact import model_path
    from chanscale.errors import ArtifactError, clip, one_line
    from chanscale.files import require_new
    from chanscale.report_page.material import open_material
    from chanscale.report_page.writing import REPORT, write_report

    own = model_path(run).with_name(REPORT)
    path = out_path or own
    require_new(path, ".html", renewed=own)
    with watching() as watcher:
        material = open_material(run, images, watcher=watcher)
    try:
        write_report(material, path, names=names)
    # What metrics.json and history.csv lack, or have of another kind, shows where it is drawn.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the metrics.json or history.csv of {run} is damaged ({clip(one_line(error))}); fit the model again"
        ) from error
    say(f"{printable(str(path))}: {size_on_disk(path.stat().st_size)}")
