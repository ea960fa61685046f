"""Weights that a network uses otherwise than by calling a convolution or linear layer: they count, and cannot go."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from chanscale.modes import calls_noted, device_of, in_eval


def loose_weights(model: nn.Module, counted: Iterable[nn.Module], example: Tensor) -> dict[str, int]:
    """Return the size of each weight, by name, that a pass of `example` (N, C, *) uses beside the layers `counted`.

    Such are those of attention and of recurrent layers, or of a layer whose weight another one reads. Vectors (biases,
    weights of norms) are left out, and so is what is not used: what a layer that is called holds itself counts, and of
    others what the output depends on.
    """
    known = {id(parameter) for layer in counted for parameter in layer.parameters()}
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if sum(side > 1 for side in parameter.shape) > 1 and id(parameter) not in known
    }
    if not weights:
        return {}
    with calls_noted(model) as called, in_eval(model), torch.no_grad():
        model(example.to(device_of(model)))
    unsure = {name: weight for name, weight in weights.items() if name.rpartition(".")[0] not in called}
    unused = unsure.keys() - _find_used(model, unsure, example)
    return {name: weight.numel() for name, weight in weights.items() if name not in unused}


def _find_used(model: nn.Module, weights: Mapping[str, Tensor], example: Tensor) -> set[str]:
    """Return the names of those of the `weights` that the output of `model` depends on."""
    if not weights:
        return set()
    own = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with in_eval(model), torch.enable_grad():
        output = torch.func.functional_call(model, own, (example.to(device_of(model)),))
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(output.sum(), [*own.values()], allow_unused=True)
    return {name for name, gradient in zip(own, found, strict=True) if gradient is not None}
