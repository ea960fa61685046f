"""The scales of a network, told by group: a channel has as many as its group has sites, and they act as one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chanscale.channels import free_groups
from chanscale.errors import ModelError
from chanscale.last_layer import find_last
from chanscale.scaling import SCALE, ChannelScale, soft_threshold


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scale weights, shape (width,), behind every layer that has some, by the layer's name."""
    return {
        name.removesuffix(SCALE).removesuffix("."): module.weight
        for name, module in model.named_modules()
        if isinstance(module, ChannelScale)
    }


class GroupScales:
    """All scales of a network in a row, and which channel of which group each belongs to.

    The norm of a channel is the root mean square of its scales: |scale| where it has one. Tied channels, as on a
    residual stream, so share one threshold, and leave together (group lasso, Yuan & Lin 2006).
    Raises ModelError when the network has no scales.
    """

    def __init__(self, model: nn.Module) -> None:
        groups = free_groups(model)
        self.parameters = scale_parameters(model)
        if not self.parameters:
            raise ModelError("the network has no channel scales; call attach_scales first")
        self.widths = {group.name: group.width for group in groups}
        starts = _starts({layer: len(scale) for layer, scale in self.parameters.items()})
        firsts = _starts(self.widths)
        placed = [
            (starts[site.layer] + position, firsts[group.name] + channel)
            for group in groups
            for site in group.sites
            for position, channel in zip(site.positions, site.channels, strict=True)
        ]
        self.last = find_last(model, groups)
        device = next(iter(self.parameters.values())).device
        self._places, self._channels = torch.tensor(placed, device=device).T
        self._counts = torch.bincount(self._channels, minlength=sum(self.widths.values()))

    def norms(self) -> dict[str, Tensor]:
        """Return the norm of each channel, shape (width,), by the group's name."""
        return self._by_group(self._norms())

    @torch.no_grad()
    def shrink(self, steps: Mapping[str, Tensor]) -> None:
        """Take `steps`, shape (width,), off the norms of each group, in place: the group soft-threshold.

        s / |s| * max(|s| - step, 0): the proximal operator of step * |s| (Parikh & Boyd 2014, 6.5.1).
        """
        norms = self._norms()
        left = soft_threshold(norms, torch.cat([steps[name] for name in self.widths]))
        row = self._row(self.parameters)
        row[self._places] = self._directions(norms) * left[self._channels]
        self._write(row, self.parameters)

    @torch.no_grad()
    def anchor(self, share: float) -> None:
        """Stretch the scales of each group, in place, until the largest `share` of its norms has a mean of 1.

        A group whose scales are all 0 stays as it is.
        """
        factors = {}
        for name, norms in self.norms().items():
            largest = norms.topk(max(1, round(share * len(norms)))).values.mean()
            factors[name] = torch.where(largest > 0, 1 / largest, 1.0).expand(len(norms))
        row = self._row(self.parameters)
        row[self._places] *= torch.cat([factors[name] for name in self.widths])[self._channels]
        self._write(row, self.parameters)

    @torch.no_grad()
    def add_to_gradients(self, slopes: Mapping[str, Tensor]) -> None:
        """Add to the gradients that of a penalty whose slope along each norm is `slopes`, shape (width,)."""
        gradients = self._gradients()
        row = self._row(gradients)
        along = torch.cat([slopes[name] for name in self.widths])[self._channels]
        row[self._places] += self._directions(self._norms()) * along
        self._write(row, gradients)

    def gradient_rms(self) -> Tensor:
        """Return the root mean square of all gradients of the scales."""
        return self._row(self._gradients())[self._places].square().mean().sqrt()

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each scale; one that has none gets zeros."""
        for scale in self.parameters.values():
            if scale.grad is None:
                scale.grad = torch.zeros_like(scale)
        return {layer: scale.grad for layer, scale in self.parameters.items() if scale.grad is not None}

    def _norms(self) -> Tensor:
        # In fp64, where the root of a square is the number it was: one scale alone has its |s|, to the last bit.
        scales = self._row(self.parameters)[self._places]
        there = torch.device("cpu") if scales.device.type == "mps" else scales.device  # which has no fp64
        sums = torch.zeros(len(self._counts), dtype=torch.float64, device=there)
        sums.index_add_(0, self._channels.to(there), scales.to(there).double().square())
        return (sums / self._counts.to(there)).sqrt().float().to(scales.device)

    def _directions(self, norms: Tensor) -> Tensor:
        """Return each scale divided by the norm of its channel; 0 where that is 0."""
        norms = norms[self._channels]
        return torch.where(norms > 0, self._row(self.parameters)[self._places] / norms.clamp_min(1e-30), 0.0)

    def _by_group(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.widths, torch.split(values, list(self.widths.values())), strict=True))

    @staticmethod
    def _row(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensor.detach() for tensor in tensors.values()])

    @staticmethod
    def _write(row: Tensor, tensors: Mapping[str, Tensor]) -> None:
        for tensor, values in zip(
            tensors.values(), torch.split(row, [len(tensor) for tensor in tensors.values()]), strict=True
        ):
            tensor.copy_(values)


def _starts(lengths: Mapping[str, int]) -> dict[str, int]:
    """Return where each part begins when parts of these lengths lie in a row."""
    starts, total = {}, 0
    for name, length in lengths.items():
        starts[name] = total
        total += length
    return starts
