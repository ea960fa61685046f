"""A model as it is deployed: raw pixels of any size in, probabilities and a map of the evidence out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from chanscale.artifact import ModelInfo
from chanscale.attaching import merge_scales
from chanscale.classifier import Classifier, probabilities
from chanscale.data.images import FULL_RANGE
from chanscale.export.lanczos import LanczosResize
from chanscale.programs import Program, quiet, takes_grey_alone
from chanscale.scaling import ChannelScale

WHITE = 255.0
"""The largest value of a raw pixel."""
AXES = ("batch", "channels", "height", "width")


class DeployedClassifier(nn.Module):
    """Everything between the pixels of an image file and a probability, in one network.

    Input: (N, 1 or 3, H, W), values 0 to 255, any height and width; of a 16-bit image, value / 257. A network that is
    `grey_only` takes (N, 1, H, W). Two channels are no image, which a graph cannot say. Output: probabilities (N, K),
    and, where the trunk ends in maps, the class map (N, M, h, w), whose mean over h and w is the logit: M = 1 for two
    classes (for the second of them) of which an image has one, else K.

    A network for `volumes` takes (N, 1, S, S, S), values 0 to 255, of cubes that `read_volume` made: how a file is
    turned and resampled stands in its header, which is no part of a graph.
    """

    def __init__(
        self, network: Classifier | Program, *, image_size: int, grey_only: bool, volumes: bool = False
    ) -> None:
        super().__init__()
        self.resize = nn.Identity() if volumes else LanczosResize(image_size)
        self.network = network
        self.grey_only = grey_only or volumes
        self.cube = (1, image_size, image_size, image_size) if volumes else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return probabilities, and the class map if there is one."""
        # As `read_image` does: 16-bit levels, filtered, rounded, cut where the filter overshoots.
        levels = self.resize(pixels * (FULL_RANGE / WHITE)).round().clamp(0, FULL_RANGE)
        images = levels / FULL_RANGE
        if not self.grey_only:  # one channel becomes three, three stay
            images = torch.cat([images] * 3, 1)[:, :3]
        if isinstance(self.network, Program):
            return (probabilities(self.network.graph(images), multilabel=self.network.multilabel),)
        features = self.network.feature_map(images)
        found = probabilities(self.network.head(features), multilabel=self.network.multilabel)
        return (found, self.network.head.class_map(features)) if features.dim() > 2 else (found,)


def deploy(
    model: Classifier | Program, info: ModelInfo, *, image_size: int | None = None
) -> DeployedClassifier:
    """Return a copy of `model` to deploy: scales merged, denormal weights 0, in eval; `model` stays as it is.

    `image_size`: default, what it was trained on.
    """
    scaled = any(isinstance(module, ChannelScale) for module in model.modules())
    with quiet():  # torch warns when a program is copied
        network = merge_scales(model) if scaled and isinstance(model, Classifier) else copy.deepcopy(model)
    flush_denormals(network)
    size = image_size or info.image_size
    return DeployedClassifier(
        network, image_size=size, grey_only=takes_grey_alone(model), volumes=info.space is not None
    ).eval()


def dynamic_axes(deployed: DeployedClassifier) -> dict[int, Any]:
    """Return which axes of the input of `deployed` may have any size, as torch.export takes them."""
    dim = torch.export.Dim
    if deployed.cube is not None:
        return {0: dim("batch", min=1)}
    axes = {0: dim("batch", min=1), 2: dim("height", min=1), 3: dim("width", min=1)}
    return axes if deployed.grey_only else axes | {1: dim("channels", min=1, max=3)}


def example_shape(deployed: DeployedClassifier) -> tuple[int, ...]:
    """Return (C, *) of an image to trace `deployed` with: of no size that its shapes could be mistaken for."""
    return deployed.cube or (1 if deployed.grey_only else 3, 90, 70)


@torch.no_grad()
def flush_denormals(model: nn.Module) -> None:
    """Set to 0, in place, what is too small for a normal fp32: processors take a hundred times as long for it."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0
