"""A model as a program of its own (torch.export), for networks that cannot be built again by name."""

import copy
import hashlib
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from chanscale.backbones import Preprocessing
from chanscale.classifier import Classifier
from chanscale.errors import ArtifactError, ModelError, one_line
from chanscale.files import write_atomically
from chanscale.safe_loading import bare_tensors

PROGRAM = "program.pt2"
"""The name of the file in a run folder."""

PLAIN = re.compile(r"(weight|tensor)_\d+")
"""What an archive calls tensors that are stored as they are; all else would be unpickled."""


class Program(nn.Module):
    """An exported classifier: (N, *shape) pixels in [0, 1], of the shape that it was exported for, to logits.

    Made for colour, it takes grey images too, and replicates them.
    """

    def __init__(
        self, graph: nn.Module, classes: tuple[str, ...], *, shape: tuple[int, ...], multilabel: bool = False
    ) -> None:
        super().__init__()
        self.graph, self.classes, self.multilabel = graph, classes, multilabel
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in fp32. Raises ModelError for images of another shape."""
        if images.dim() > 1 and images.shape[1] == 1 < self.shape[0]:
            images = images.expand(-1, self.shape[0], *images.shape[2:]).contiguous()
        if len(images) == 0 or tuple(images.shape[1:]) != self.shape:
            raise ModelError(
                f"this program takes images (N, {', '.join(map(str, self.shape))}). Got {tuple(images.shape)}"
            )
        return cast(Tensor, self.graph(images))

    def train(self, mode: bool = True) -> "Program":
        """Stay in eval: a program has no other mode."""
        del mode
        self.training = False  # not passed on: an exported graph refuses to hear of it
        return self


def takes_grey_alone(model: Classifier | Program) -> bool:
    """Whether `model` takes images of one channel only."""
    if isinstance(model, Program):
        return model.shape[0] == 1
    return isinstance(model.preprocessing, Preprocessing) and model.preprocessing.takes_grey_alone


@torch.no_grad()
def save_program(model: nn.Module, shape: tuple[int, ...], path: Path) -> str:
    """Export `model` for any number of images of `shape` (C, *), write it whole or not at all; return its SHA-256.

    Raises ModelError when the network cannot be exported.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    content = pack_program(trace_program(model, shape, batch))
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def trace_program(model: nn.Module, shape: tuple[int, ...], dynamic: Mapping[int, Any]) -> ExportedProgram:
    """Return `model` in eval as a program for images of `shape` (C, *), and of others where it is `dynamic`.

    `dynamic`: torch.export.Dim by axis of (N, C, *). Raises ModelError when the network cannot be exported.
    """
    with quiet():
        plain = copy.deepcopy(model).cpu().eval()
    for module in plain.modules():  # what lies in memory in another order is written with a warning
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
    # An archive keeps the example that it was exported with: no image of a patient.
    example = torch.zeros(2, *shape)
    try:
        with quiet():
            program = torch.export.export(plain, (example,), dynamic_shapes=(dict(dynamic),))
    except Exception as error:  # whatever torch.export finds in the user's forward
        raise ModelError(f"the network cannot be exported: {one_line(error)[:200]}") from error
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def pack_program(program: ExportedProgram) -> bytes:
    """Return the archive of a program."""
    content = io.BytesIO()
    with quiet():
        torch.export.save(program, content)
    return content.getvalue()


def load_program(
    path: Path,
    classes: tuple[str, ...],
    *,
    digest: str | None,
    multilabel: bool = False,
) -> Program:
    """Return the program in a file, in eval, if its SHA-256 is `digest`. Nothing of it is unpickled but tensors.

    torch evaluates the shapes that its graph tells: like any program, run one only if you trust where it came from.
    Raises ArtifactError.
    """
    advice = "in Python, load_model(run, trunk=network) does with the original network"
    if not path.is_file():
        raise ArtifactError(f"there is no program at {path}; {advice}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ArtifactError(f"{path} is not the program that was saved with this model; {advice}")
    try:
        _require_plain(content)
        with bare_tensors(), quiet():
            program = torch.export.load(io.BytesIO(content))
            graph, shape = program.module(), _shape_of(program)
    except Exception as error:  # a damaged archive makes torch raise whatever it comes to first
        raise ArtifactError(f"{path} is no program ({one_line(error)[:150]}); {advice}") from error
    return Program(graph, classes, shape=shape, multilabel=multilabel).train(False)


def _shape_of(program: ExportedProgram) -> tuple[int, ...]:
    """Return (C, *) of the images that a program takes, as its graph tells it."""
    [name] = program.graph_signature.user_inputs
    [images] = [node for node in program.graph.nodes if node.name == name]
    return tuple(int(length) for length in images.meta["val"].shape[1:])


def _require_plain(content: bytes) -> None:
    """Raise ArtifactError if anything in the archive would be unpickled."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        configs = [name for name in archive.namelist() if name.endswith("_config.json")]
        if not configs:
            raise ArtifactError("it is of another format")
        for name in configs:
            for payload in json.loads(archive.read(name))["config"].values():
                if payload["use_pickle"] or not PLAIN.fullmatch(payload["path_name"]):
                    raise ArtifactError(f"{payload['path_name']!r} is a pickled object")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from writing graphs and tracebacks beside our one line, and from warning of what it uses itself."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
