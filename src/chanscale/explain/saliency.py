"""Grad-CAM and integrated gradients, by captum: to compare with, and for networks with another head than ours."""

from types import ModuleType

import torch
from torch import Tensor, nn

from chanscale.classifier import Classifier
from chanscale.errors import ConfigError, ModelError, one_line

STEPS = 32
"""Of the integral; Gauss-Legendre, which captum takes by default, is close with that many."""

AT_ONCE = 8
"""Images, times steps, of one backward pass."""


def require_captum() -> ModuleType:
    """Return captum's attribution methods. Raises ConfigError without the extra."""
    try:
        import captum.attr
    except ImportError as error:
        raise ConfigError("this method needs captum: pip install 'chanscale[explain]'") from error
    found: ModuleType = captum.attr
    return found


def grad_cam(model: nn.Module, images: Tensor, target: int) -> Tensor:
    """Return Grad-CAM of one logit before its ReLU, (N, h, w), on the last map (Selvaraju et al. 2017, eq. 1 and 2).

    `images`: (N, C, H, W), pixels in [0, 1]. Behind global average pooling and a linear head this is the class map,
    less a constant, over the number of positions. Raises ConfigError without captum, ModelError.
    """
    captum = require_captum()
    if not isinstance(model, Classifier):
        raise ModelError(
            "Grad-CAM needs the last map, which a program hides; use --method integrated-gradients"
        )
    # The gradient reaches the last map only where something in front of it asks for one.
    inputs = images.detach().clone().requires_grad_()
    maps: Tensor = captum.LayerGradCam(model, model.trunk).attribute(inputs, target=target)
    if maps.dim() != 4:
        raise ModelError("the network ends in features, not in maps; use --method integrated-gradients")
    return maps.detach()[:, 0]


def integrated_gradients(
    model: nn.Module, images: Tensor, target: int, *, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Return integrated gradients of one logit, (N, H, W), summed over colours (Sundararajan et al. 2017, eq. 1).

    From a black image to `images` (N, C, H, W), pixels in [0, 1]; black pixels therefore get nothing. The second
    tensor, (N,), is by how much the sum over the pixels misses the difference of the two logits. Raises ConfigError
    without captum, ModelError where no gradient reaches the pixels.
    """
    captum = require_captum()
    inputs = images.detach().clone().requires_grad_()
    try:
        found, missed = captum.IntegratedGradients(model).attribute(
            inputs, torch.zeros_like(inputs), target=target, n_steps=steps,
            internal_batch_size=max(AT_ONCE, len(inputs)), return_convergence_delta=True,
        )  # fmt: skip
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"integrated gradients cannot be had: no gradient reaches the pixels ({one_line(error)[:120]})"
        ) from error
    return found.detach().sum(1), missed.detach()
