"""A logit taken apart: behind global average pooling, a linear head is a sum over channels, and over places."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from chanscale.errors import ModelError
from chanscale.heads import PooledHead


@dataclass(frozen=True)
class Decomposition:
    """The logits (N, M) of N images, exactly, in fp64; M = 1 for two classes: that of the second, the positive one.

    `bias` (M,) + the sum of `contributions` (N, M, C) over the channels = the logits. A contribution is the weight
    of a channel times how far the mean of its map lies from its mean over the training images, in deviations of it:
    a channel that is as active as usual contributes 0. The mean of `class_maps` (N, M, h, w) over their positions
    is the logits, too. Neither is a cause: both say what the head made of its features, and not what a finding is.
    """

    logits: Tensor
    bias: Tensor
    contributions: Tensor
    class_maps: Tensor


@torch.no_grad()
def decompose(head: PooledHead, maps: Tensor) -> Decomposition:
    """Take the logits apart that `head` makes of feature maps (N, C, h, w). Raises ModelError for other features."""
    if maps.dim() != 4:
        raise ModelError(
            f"the network must end in feature maps (N, C, h, w). Got {tuple(maps.shape)}: "
            "where it lies, such features do not say; use --method integrated-gradients"
        )
    # In fp64: the division by small deviations would enlarge rounding.
    head, maps = copy.deepcopy(head).double().eval(), maps.double()
    return Decomposition(
        logits=head(maps),
        bias=head.linear.bias.detach(),
        contributions=head.contributions(maps),
        class_maps=head.class_map(maps),
    )
