"""A model as a program of its own (torch.export), for networks that cannot be built again by name."""

import copy
import io
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from chanscale.errors import ArtifactError, ModelError, one_line
from chanscale.files import write_atomically
from chanscale.safe_loading import bare_tensors

PROGRAM = "program.pt2"
"""The name of the file in a run folder."""


class Program(nn.Module):
    """An exported classifier: (N, C, H, W) pixels in [0, 1], of the size that it was exported for, to logits."""

    def __init__(self, graph: nn.Module, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.graph, self.classes = graph, classes

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in fp32."""
        return cast(Tensor, self.graph(images))

    def train(self, mode: bool = True) -> "Program":
        """Stay in eval: a program has no other mode."""
        del mode
        self.training = False  # not passed on: an exported graph refuses to hear of it
        return self


@torch.no_grad()
def save_program(model: nn.Module, images: Tensor, path: Path) -> Path:
    """Export `model` for any number of images like `images` (N, C, H, W), and write it whole or not at all.

    Raises ModelError when the network cannot be exported.
    """
    plain = copy.deepcopy(model).cpu().eval()
    for module in plain.modules():  # what lies in memory in another order is written with a warning
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
    try:
        exported = torch.export.export(
            plain,
            (images.cpu(),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
        content = io.BytesIO()
        torch.export.save(exported, content)
    except Exception as error:  # whatever torch.export finds in the user's forward
        raise ModelError(f"the network cannot be exported: {one_line(error)[:200]}") from error
    write_atomically(path, content.getvalue())
    return path


def load_program(path: Path, classes: tuple[str, ...]) -> Program:
    """Return the program in a file, in eval. Reads tensors, and no pickled object. Raises ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"there is no program at {path}; pass the original network as `trunk`")
    try:
        with bare_tensors():
            graph = torch.export.load(path).module()
    except Exception as error:  # a damaged archive makes torch raise whatever it comes to first
        raise ArtifactError(
            f"{path} is no whole program ({one_line(error)[:150]}); fit the model again"
        ) from error
    return Program(graph, classes).train(False)
