"""The deployed classifier as a `torch.export` program, which needs PyTorch and none of our code."""

import io
from collections.abc import Iterable

import torch

from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier
from chanscale.data.images import Pixels
from chanscale.export.agreement import Agreement, compare, require_agreement
from chanscale.export.deployed import deploy, dynamic_axes, example_shape
from chanscale.export.runtime import Floats
from chanscale.programs import Program, pack_program, quiet, trace_program


def export_program(
    model: Classifier | Program, info: ModelInfo, images: Iterable[Pixels]
) -> tuple[bytes, Agreement]:
    """Return `model` as the archive of a program with its preprocessing inside, and how well it agrees on `images`.

    It takes and gives what `DeployedClassifier` does. `images`: (C, H, W), 16 bits, of any size. Raises ModelError
    when the network cannot be exported, InexactExportError when a probability differs by more than 1e-4.
    """
    deployed = deploy(model, info)
    content = pack_program(trace_program(deployed, example_shape(deployed), dynamic_axes(deployed)))
    with quiet():
        graph = torch.export.load(io.BytesIO(content)).module()

    @torch.no_grad()
    def run(pixels: Floats) -> Floats:
        found: Floats = graph(torch.from_numpy(pixels))[0].numpy()
        return found

    agreement = compare(run, model, info, images)
    require_agreement(agreement, "torch.export")
    return content, agreement
