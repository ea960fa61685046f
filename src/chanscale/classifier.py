"""The network as a whole: pixels in, logits out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from chanscale.errors import ConfigError, ModelError, one_line
from chanscale.heads import PooledHead
from chanscale.modes import in_eval


@dataclass(frozen=True)
class LeftOut:
    """What is gone from the end of the pretrained trunk: parameters, and MACs for one image."""

    parameters: int = 0
    macs: int = 0


NOTHING = LeftOut()


class Classifier(nn.Module):
    """Preprocessing, a convolutional trunk, and a head, for a list of classes.

    Input: (N, 1 or 3, *), pixels in [0, 1]. Output: logits, (N, 1) for two classes (that of the second,
    the positive one) and (N, K) for K > 2. `left_out`: what the trunk lacks, if it ends early.
    """

    def __init__(
        self, preprocessing: nn.Module, trunk: nn.Module, *, channels: int, classes: Sequence[str]
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"a classifier needs at least two classes. Got {list(classes)} instead.")
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.trunk = trunk
        self.left_out = NOTHING
        self.head = PooledHead(channels, 1 if len(classes) == 2 else len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in fp32."""
        return cast(Tensor, self.head(self.feature_map(images)))

    def feature_map(self, images: Tensor) -> Tensor:
        """Return the trunk's last feature map, (N, C, h, w)."""
        return cast(Tensor, self.trunk(self.preprocessing(images)))


def to_channels_last(model: Classifier) -> Classifier:
    """Lay the weights of `model` out, in place, as convolution kernels want them; return it."""
    if any(
        parameter.dim() == 5 for parameter in model.parameters()
    ):  # of volumes: torch has another format for each
        return model
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def assemble(
    preprocessing: nn.Module, trunk: nn.Module, images: Tensor, *, classes: Sequence[str]
) -> Classifier:
    """Put a head behind `trunk`, as wide as what it makes of `images` (N, 1 or 3, *), pixels in [0, 1].

    Raises ModelError unless that is a feature map (N, C, *), or features (N, C).
    """
    try:
        with in_eval(trunk), torch.no_grad():
            features: object = trunk(preprocessing(images))
    except Exception as error:  # whatever the user's trunk raises
        reason = one_line(error)[:200]
        raise ModelError(
            f"the network does not run on images of {tuple(images.shape[1:])}: {reason}"
        ) from error
    if not isinstance(features, Tensor) or features.dim() < 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(
            f"the trunk must return a feature map (N, C, *). Got {got}; pass it without its head"
        )
    return Classifier(preprocessing, trunk, channels=features.shape[1], classes=classes)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (N,), from the logits of a `Classifier` and class indices (N,)."""
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")


def class_weights(labels: Sequence[int] | NDArray[np.integer], classes: int) -> Tensor:
    """Return the weight of each class, (classes,), with which all count alike in a loss over `labels`, each present.

    The mean over the images is 1.
    """
    counts = torch.bincount(torch.as_tensor(np.asarray(labels), dtype=torch.int64), minlength=classes)
    return len(labels) / (classes * counts)


def probabilities(logits: Tensor) -> Tensor:
    """Return (N, K) class probabilities from the logits of a `Classifier`, in fp32."""
    logits = logits.float()
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], 1)
