"""The head that turns a feature map into logits."""

import torch
from torch import Tensor, nn


class PooledHead(nn.Module):
    """Global average pooling, standardisation, one linear layer.

    Input (N, C, *), or features (N, C) pooled already; output (N, outputs) logits in fp32.

    Features shrink with the scales by orders of
    magnitude, within an epoch. In training they are therefore standardised by the batch at hand, in eval by
    stored statistics, which `set_statistics` must renew after every change of the trunk. No epsilon is
    added to the variance: with the usual 1e-5 the features of a scaled network all but vanish.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a feature map."""
        features = self.pool(x)
        by_batch = self.training and len(features) > 1
        mean, variance = _statistics(features) if by_batch else (self.mean, self.variance)
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.linear(standardise(features, mean, variance))
        return logits

    def class_map(self, x: Tensor) -> Tensor:
        """Return where the evidence lies in a feature map (N, C, *): (N, outputs, *), whose mean is the logit.

        With stored statistics the head is linear in the features, and those are means over the map (Zhou et al. 2016,
        eq. 2): the same weights at each position, and the bias spread evenly.
        """
        varies, deviation = _spread(self.variance)
        factor = self.linear.weight * varies / deviation
        at_mean = self.linear.bias - factor @ self.mean
        maps = factor @ x.to(factor.dtype).flatten(2) + at_mean[:, None]
        return maps.reshape(x.shape[0], -1, *x.shape[2:])

    def contributions(self, x: Tensor) -> Tensor:
        """Return what each feature of `x` (N, C, *) adds to the logits: (N, outputs, C), whose sum lacks but the bias.

        With stored statistics: a feature that is as large as on average over the training images adds 0.
        """
        return self.linear.weight * standardise(self.pool(x), self.mean, self.variance)[:, None]

    def pool(self, x: Tensor) -> Tensor:
        """Return features (N, C): the mean of each map of (N, C, *), in fp32 or better."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return precise.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else precise

    @torch.no_grad()
    def set_statistics(self, features: Tensor) -> None:
        """Store the mean and variance of `features` (N, C)."""
        mean, variance = _statistics(features)
        self.mean.copy_(mean)
        self.variance.copy_(variance)


def standardise(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return features (N, C) at mean 0 and variance 1; a channel that never varies gives 0."""
    varies, deviation = _spread(variance)
    return (features - mean) * varies / deviation


def _spread(variance: Tensor) -> tuple[Tensor, Tensor]:
    varies = variance > 0
    # A root of 0 has no gradient; the constant channel is replaced before the root is taken.
    return varies, torch.where(varies, variance, 1.0).sqrt()


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), features.var(0, correction=0)
