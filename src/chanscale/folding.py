"""Fold the first convolution for grey images: three equal inputs become one, and a constant."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.backbones import Preprocessing
from chanscale.classifier import Classifier, to_channels_last
from chanscale.errors import InexactRemovalError, ModelError
from chanscale.modes import device_of, hooked
from chanscale.pruning import output_change

FOLDED = 1e-5
"""Largest change of an output, relative to the largest: the sums are rounded to fp32, as all weights are."""


@torch.no_grad()
def fold_grey(model: Classifier, images: Tensor) -> Classifier:
    """Return a copy of `model` for grey images alone, whose first convolution sees each of them once.

    `images`: (N, 1, H, W), to check it on. The network was given the same grey three times, shifted and scaled by the
    preprocessing; its filters are summed over the three, once with the scales and once with the shifts, which belong
    to a second input of ones (a bias would not do: zero padding adds nothing of the shift at the border). Outputs
    stay but for rounding; these weights are no longer a slice of the checkpoint. Raises ModelError.
    """
    old = model.preprocessing
    if not isinstance(old, Preprocessing) or old.folded:
        raise ModelError("the network does not take grey images three times: there is nothing to fold")
    device, folded = device_of(model), copy.deepcopy(model).cpu()
    first = folded.get_submodule(_find_first(folded, images.cpu()))
    assert isinstance(first, _ConvNd)
    if (
        first.in_channels != 3
        or first.groups != 1
        or first.weight.dim() != 4
        or isinstance(first, _ConvTransposeNd)
    ):
        raise ModelError("the first convolution does not take three channels: nothing can be folded")
    first.weight = nn.Parameter(fold_weight(first.weight, old), requires_grad=False)
    first.in_channels = 2
    folded.preprocessing = Preprocessing.from_dict({**old.to_dict(), "folded": True})
    try:
        change = output_change(model, folded, images)
    except InexactRemovalError:
        change = math.inf
    if not change <= FOLDED:
        raise ModelError(
            f"folding changes the output by {change:.1e} of its size: the image is used beside the first convolution; "
            "leave fold_grey out"
        )
    # Laid out as a model that is loaded is, so that kernels round alike.
    return to_channels_last(folded).to(device)


def fold_weight(weight: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return filters (N, 2, h, w) for a grey image and ones, from those (N, 3, h, w) for the image in colour."""
    mean, std = preprocessing.mean.cpu().double(), preprocessing.std.cpu().double()
    scale, shift = 1 / std, -mean / std  # (1, 3, 1, 1)
    # `mean` and `std` follow the order of the weights, and a grey image is the same in any order.
    parts = [(weight.double() * part).sum(1, keepdim=True) for part in (scale, shift)]
    return torch.cat(parts, 1).to(weight.dtype)


def _find_first(model: Classifier, images: Tensor) -> str:
    """Return the name of the first convolution that is called."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd)
    ]
    with hooked(handles):
        model.eval()(images)
    if not called:
        raise ModelError("the network has no convolution to fold")
    return called[0]
