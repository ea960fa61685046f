"""The commands that rebuild a model from its delta, and prove where it comes from; `cli` adds them to the others."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chanscale.cli_options import JsonOption, RunArgument
from chanscale.display import describe_rows, out, say, show_json, watching
from chanscale.errors import ArtifactError
from chanscale.wording import size_on_disk

if TYPE_CHECKING:
    from torch import nn

    from chanscale.onnx_proof import GraphProof
    from chanscale.provenance import Origins, Provenance

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="The public weights; default: the cache, then their sources."
    ),
]
SHORT = 12
"""Digits of a digest that a table shows."""


def restore(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A delta, or the run folder it lies in.")],
    out_path: Annotated[
        Path,
        typer.Option(
            "--out", metavar="RUN", help="Run folder to make or to fill, or a .safetensors file to write."
        ),
    ],
    weights: WeightsOption = None,
) -> None:
    """Rebuild a model file from its delta, byte for byte.

    The rest of it comes from the public weights.
    """
    from chanscale.delta import Restorer
    from chanscale.files import require_absent, write_atomically
    from chanscale.provenance import Origins

    target = out_path if out_path.suffix == ".safetensors" else out_path / "model.safetensors"
    require_absent(target)
    with watching() as watcher:
        content = Restorer(Origins(weights=weights, progress=watcher.on_step)).rebuild(delta)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    digest = hashlib.sha256(content).hexdigest()
    say(f"{target}: {size_on_disk(len(content))}, SHA-256 {digest}, as its delta says")


def verify(
    run: RunArgument,
    weights: WeightsOption = None,
    delta: Annotated[
        Path | None,
        typer.Option(
            "--delta", metavar="FILE", help="A delta that must give this model; default: the run's."
        ),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            "--onnx",
            metavar="FILE",
            help="An export whose convolutions must be these slices times their scales.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that filters are slices of the public checkpoint.

    Each is compared bit by bit, and what else the run holds is listed. One bit that differs ends it with an error,
    which names the filter.
    """
    from chanscale.artifact import load_model, model_path
    from chanscale.provenance import Origins, verify_model

    file = model_path(run)
    with watching() as watcher:
        origins = Origins(weights=weights, progress=watcher.on_step)
        proof = verify_model(file, origins=origins)
    checked = _check_delta(file, delta, origins)
    graph = _check_graph(onnx, load_model(file)[0]) if onnx else None
    if as_json:
        show_json(
            {
                "model": str(file),
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                **_tell(proof),
                "delta": str(checked) if checked else None,
                "onnx": {"file": str(onnx), **vars(graph)} if graph else None,
            }
        )
        return
    _show(proof)
    if checked:
        say(f"{checked} gives this very file.")
    if graph:
        say(f"{onnx}: {_describe_graph(graph)}")
    say(_sum_up(proof))


def _check_delta(file: Path, delta: Path | None, origins: "Origins") -> Path | None:
    """Return the delta that was named, or lies beside the model file, if it gives that file. Raises ArtifactError."""
    from chanscale.delta import DELTA, Restorer

    beside = file.with_name(DELTA)
    chosen = delta or (beside if beside.is_file() else None)
    if chosen and Restorer(origins).rebuild(chosen) != file.read_bytes():
        raise ArtifactError(f"{chosen} is the delta of another model than {file}; export it again")
    return chosen


def _check_graph(path: Path, model: "nn.Module") -> "GraphProof":
    """Return the proof that the convolutions of the graph are those of `model`. Raises ArtifactError."""
    from chanscale.classifier import Classifier
    from chanscale.onnx_proof import prove_graph

    assert isinstance(model, Classifier)  # as every backbone of the table is
    return prove_graph(path, model)


def _tell(proof: "Provenance") -> dict[str, Any]:
    """Return the proof as plain values: every digest whole."""
    backbone = proof.origin.backbone
    return {
        "backbone": backbone.name,
        "origin": backbone.origin,
        "digest": proof.origin.digest,
        "filters": proof.count("filters")[0],
        "layers": [
            {
                "layer": layer.layer,
                "kind": layer.kind,
                "kept": list(layer.kept),
                "of": layer.width,
                "equal": True,
                "tensors": {
                    item.name: {"sha256": item.kept, "original": item.original} for item in layer.tensors
                },
            }
            for layer in proof.layers
        ],
        "own": {
            "scales": _span(proof),
            "head": {name: list(tensor.shape) for name, tensor in proof.head.items()},
            "folded": proof.folded,
            "others": {name: list(tensor.shape) for name, tensor in proof.others.items()},
        },
    }


def _span(proof: "Provenance") -> dict[str, Any]:
    import torch

    if not proof.scales:
        return {"count": 0, "lowest": None, "highest": None}
    values = torch.cat([scale.flatten() for scale in proof.scales.values()])
    return {"count": len(values), "lowest": float(values.min()), "highest": float(values.max())}


def _show(proof: "Provenance") -> None:
    rows = [
        (
            layer.layer, "yes", f"{len(layer.kept):,} of {layer.width:,}",
            layer.tensors[0].kept[:SHORT], layer.tensors[0].original[:SHORT],
        )
        for layer in proof.layers
    ]  # fmt: skip
    out.print(describe_rows(("layer", "equal", "kept", "SHA-256", "published"), rows))
    say("Not from the checkpoint:")
    for line in _list_own(proof):
        say(f"    {line}")


def _list_own(proof: "Provenance") -> Iterator[str]:
    """Yield a line for each kind of number that the model adds."""
    scales = _span(proof)
    if scales["count"]:
        span = f"{scales['lowest']:.3g} to {scales['highest']:.3g}"
        yield f"{scales['count']:,} scales, {span}: the network computes the filters times these"
    yield f"the head, {sum(tensor.numel() for tensor in proof.head.values()):,} numbers"
    for name, tensor in proof.others.items():
        folded = name.rpartition(".")[0] == proof.folded
        why = (
            ": its filters are those of the checkpoint, summed over the colours for grey images"
            if folded
            else ""
        )
        yield f"{name}, {tensor.numel():,} numbers{why}"


def _describe_graph(graph: "GraphProof") -> str:
    folded = f" ({graph.with_norm} of them and the norm behind)" if graph.with_norm else ""
    return f"its {graph.convolutions} convolutions are these filters times their scales{folded}, bit for bit."


def _sum_up(proof: "Provenance") -> str:
    backbone, digest = proof.origin.backbone, proof.origin.digest[:SHORT]
    (filters, layers), (channels, norms) = proof.count("filters"), proof.count("channels")
    also = f", and {channels:,} channels of {norms} norms," if norms else ""
    return (
        f"{filters:,} filters in {layers} layers{also} are bit-exact slices of {backbone.name} "
        f"({backbone.origin}; digest {digest})"
    )
