"""The commands of `chanscale weights`: what pretrained weights there are, and getting them; `cli` adds them."""

from typing import Annotated

import typer

from chanscale.cli_options import JsonOption
from chanscale.display import describe_rows, out, program, say, show_json, watching
from chanscale.wording import printable, size_on_disk

weights_app = typer.Typer(help="Pretrained weights: what there is, and getting them.")


@weights_app.command("list")
def list_weights(as_json: JsonOption = False) -> None:
    """Say which backbones there are, and which are in the cache."""
    from dataclasses import asdict

    from chanscale.weights import cache_folder, weights_status

    statuses = weights_status()
    if as_json:
        show_json([asdict(status) | {"path": status.path and str(status.path)} for status in statuses])
        return
    rows = [(s.name, str(s.path or "not fetched"), size_on_disk(s.bytes), s.licence) for s in statuses]
    out.print(describe_rows(("backbone", "cache", "size", "licence"), rows))
    say(f"Cache: {cache_folder()}")
    for status in statuses:
        if status.path is None:
            by_hand = " or ".join(f"{file} ({manual})" for file, manual in status.files.items())
            say(
                f"Get {status.name}: {program()} weights fetch {status.name}; or put into the cache {by_hand}."
            )


@weights_app.command("fetch")
def fetch_weights(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Backbone.")] = "vgg16",
    as_json: JsonOption = False,
) -> None:
    """Download pretrained weights into the cache, and verify each tensor."""
    from chanscale import weights

    with watching() as watcher:
        path = weights.fetch_weights(name, progress=watcher.on_step)
    if as_json:
        show_json({"name": name, "path": str(path)})
    else:
        typer.echo(printable(str(path)))
