"""The network as a whole: pixels in, logits out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from chanscale.data.label_columns import UNKNOWN
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
    the positive one) and (N, K) for K > 2, or where the model is `multilabel`: where an image may have several of its
    classes, or none. `left_out`: what the trunk lacks, if it ends early.
    """

    def __init__(
        self,
        preprocessing: nn.Module,
        trunk: nn.Module,
        *,
        channels: int,
        classes: Sequence[str],
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"a classifier needs at least two classes. Got {list(classes)} instead.")
        self.classes, self.multilabel = tuple(classes), multilabel
        self.preprocessing = preprocessing
        self.trunk = trunk
        self.left_out = NOTHING
        self.head = PooledHead(channels, 1 if len(classes) == 2 and not multilabel else len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits in fp32."""
        return cast(Tensor, self.head(self.feature_map(images)))

    def feature_map(self, images: Tensor) -> Tensor:
        """Return the trunk's last feature map, (N, C, h, w)."""
        return cast(Tensor, self.trunk(self.preprocessing(images)))


def to_channels_last(model: Classifier) -> Classifier:
    """Lay the weights of `model` out, in place, as convolution kernels want them; return it."""
    # Of volumes: torch has another format for each.
    if any(parameter.dim() == 5 for parameter in model.parameters()):
        return model
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def lay_out(model: Classifier, *, channels_last: bool) -> Classifier:
    """Lay the weights of `model` out, in place, in either format; return it."""
    if channels_last:
        return to_channels_last(model)
    for parameter in model.parameters():
        # Copied into a tensor made for it: `contiguous` leaves the strides of a 1 x 1 kernel, by which kernels choose.
        plain = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
        parameter.data = plain.copy_(parameter.data)
    return model


def assemble(
    preprocessing: nn.Module,
    trunk: nn.Module,
    images: Tensor,
    *,
    classes: Sequence[str],
    multilabel: bool = False,
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
    return Classifier(
        preprocessing, trunk, channels=features.shape[1], classes=classes, multilabel=multilabel
    )


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each image, (N,), from the logits of a `Classifier` and class indices (N,).

    Of several labels (N, K), 1, 0, or -1 where unknown, it is the mean over the K, to which an unknown one adds 0.
    `weights`: those of `class_weights`; default, all 1.
    """
    if labels.dim() == 2:
        known = labels != UNKNOWN
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        if weights is not None:
            losses = losses * weights.to(losses).T.gather(0, labels.clamp_min(0))
        return torch.where(known, losses, 0.0).mean(1)
    if logits.shape[1] > 1:
        losses = F.cross_entropy(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return losses if weights is None else losses * weights.to(losses)[labels]


def class_weights(labels: NDArray[np.integer], classes: int) -> Tensor:
    """Return the weight of each class, (classes,), with which all count alike in a loss over `labels`, each present.

    The mean over the images is 1. Of several labels (N, K): (K, 2), so that its absence counts as much as its presence.
    """
    if labels.ndim == 2:
        return torch.stack([class_weights(own[own != UNKNOWN], 2) for own in labels.T])
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=classes)
    return len(labels) / (classes * counts)


def probabilities(logits: Tensor, *, multilabel: bool = False) -> Tensor:
    """Return (N, K) class probabilities from the logits of a `Classifier`, in fp32; `multilabel`: each by itself."""
    logits = logits.float()
    if multilabel:
        return logits.sigmoid()
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], 1)
