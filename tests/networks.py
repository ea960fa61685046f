"""Small VGG-shaped networks with random weights, and what the tests of the method do with them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanscale.artifact import ModelInfo, assemble
from chanscale.backbones import Preprocessing
from chanscale.channels import channel_groups
from chanscale.classifier import Classifier
from chanscale.selection import ChannelSelection, scale_parameters

PREPROCESSING = Preprocessing(scale=2.0, mean=(0.9, 1.0, 1.1), std=(0.5, 0.6, 0.7))


def plain_trunk(widths=(8, 16, 12), *, bias=True) -> nn.Module:
    """Conv, ReLU, pool, as VGG16: (N, 3, H, W) -> (N, widths[-1], H / 2^k, W / 2^k)."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers)


def norm_trunk(*, affine=True) -> nn.Module:
    norm = partial(nn.BatchNorm2d, affine=affine)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), norm(12), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(12, 10, 3, bias=False), norm(10), nn.ReLU(),
    )  # fmt: skip


def late_norm_trunk() -> nn.Module:
    """Norms behind the ReLU, and on both sides of it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.BatchNorm2d(12),
        nn.Conv2d(12, 10, 3), nn.ReLU(), nn.BatchNorm2d(10), nn.ReLU(),
    )  # fmt: skip


def bare_trunk() -> nn.Module:
    """No activation at all behind one convolution, and others than ReLU behind the rest."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.LeakyReLU(0.1), nn.Conv2d(10, 9, 3), nn.GELU(),
        nn.Dropout(0.5), nn.Conv2d(9, 6, 3),
    )  # fmt: skip


def strided_trunk() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 10, 3, padding=2, dilation=2), nn.ReLU(),
        nn.Conv2d(10, 12, (3, 1), padding=(1, 0)), nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding="same"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(8, 6, 1, padding="valid"), nn.ReLU(),
    )  # fmt: skip


def nested_trunk() -> nn.Module:
    """Blocks within blocks, and one ReLU for all of them."""
    relu = nn.ReLU(inplace=True)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), relu, nn.Conv2d(8, 8, 3, padding=1), relu)
    second = nn.Sequential(nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), relu), nn.MaxPool2d(2))
    return nn.Sequential(first, nn.AvgPool2d(2), second)


class FunctionalTrunk(nn.Module):
    """Activations and pools as functions, layers registered in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(10, 8, 3)
        self.second = nn.Conv2d(12, 10, 3)
        self.first = nn.Conv2d(3, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return torch.relu(self.third(self.second(x).relu()))


class AliasTrunk(nn.Module):
    """Each layer has two names, and is called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = plain_trunk((8, 6))
        self.first, self.relu, self.pool, self.second = self.layers[:4]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pool(self.relu(self.first(x))))


class FlattenNet(nn.Module):
    """A classic classifier: several inputs of the linear layer for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = plain_trunk((8, 6))
        self.hidden, self.output = nn.Linear(6 * 4 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.trunk(x), 1)
        return self.output(F.relu(self.hidden(x)))


def pooled_net() -> nn.Module:
    layers = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 10, 5), nn.ReLU(), nn.Linear(5, 2)]
    return nn.Sequential(*norm_trunk(), *layers)


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_trunk,
    "without bias": partial(plain_trunk, bias=False),
    "batch norm": norm_trunk,
    "batch norm without weights": partial(norm_trunk, affine=False),
    "norm behind the ReLU": late_norm_trunk,
    "without ReLU": bare_trunk,
    "strides and paddings": strided_trunk,
    "nested, shared ReLU": nested_trunk,
    "functional": FunctionalTrunk,
    "two names": AliasTrunk,
}
"""Networks from pixels to a feature map."""

NETWORKS = TRUNKS | {"flatten": FlattenNet, "pool and flatten": pooled_net}
"""All, in eval with `build`; for images (N, 3, 16, 16)."""


def build(name: str) -> nn.Module:
    """Return a network of the table in eval mode, with random weights, biases and norm statistics."""
    return randomise(NETWORKS[name]()).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Draw, in place, what starts at 0 or 1: a law must not hold by chance."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def images(count: int = 4, side: int = 16) -> Tensor:
    """Return random images (count, 3, side, side) in [0, 1]."""
    return torch.rand(count, 3, side, side)


@torch.no_grad()
def set_scales(model: nn.Module, *, zeros: float = 0.4) -> ChannelSelection:
    """Give `model` scales of both signs, a share of them exactly 0; return the channels that are not."""
    kept = {}
    for name, scale in scale_parameters(model, channel_groups(model)).items():
        scale.copy_(torch.rand(len(scale)) + 0.5).mul_(torch.rand(len(scale)).sub(0.3).sign())
        scale[torch.randperm(len(scale))[: max(1, int(zeros * len(scale)))]] = 0
        kept[name] = scale.nonzero().flatten()
    return ChannelSelection(kept)


def build_classifier(trunk: nn.Module | None = None, classes=("no", "yes")) -> Classifier:
    """Return a classifier on `trunk` whose head has weights and statistics that are not trivial."""
    model = assemble(PREPROCESSING, randomise(plain_trunk()) if trunk is None else trunk, classes=classes)
    nn.init.normal_(model.head.linear.weight)
    nn.init.normal_(model.head.linear.bias)
    return renew_statistics(model)


@torch.no_grad()
def renew_statistics(model: Classifier, side: int = 32) -> Classifier:
    """Set the statistics of the head, in place, as training does after every change of the trunk."""
    model.eval().head.set_statistics(model.head.pool(model.feature_map(images(16, side))))
    return model


def describe(model: Classifier, kept: dict[str, Tensor], *, backbone: str = "custom") -> ModelInfo:
    """Return what a model file would say of `model`."""
    return ModelInfo(
        backbone=backbone,
        classes=model.classes,
        kept={name: indices.tolist() for name, indices in kept.items()},
        preprocessing=model.preprocessing.to_dict(),
        image_size=16,
        channels=3,
    )


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value wanted."""
    assert got.shape == wanted.shape
    assert wanted.abs().max() > 0
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max())


def same_tensors(got: nn.Module, wanted: nn.Module) -> bool:
    """Tell whether two modules hold the same tensors under the same names, bit for bit."""
    ours, theirs = got.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def require_slices(pruned, original, kept):
    """Check that every weight of a convolution or norm, and every statistic, is a bit-exact slice."""
    inputs = {consumer: g.name for g in channel_groups(original) for consumer in g.consumers}
    outputs = {layer: g.name for g in channel_groups(original) for layer in (g.name, *g.norms)}
    for name, module in original.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            slim = dict(pruned.get_submodule(name).named_parameters(recurse=False))
            slim |= dict(pruned.get_submodule(name).named_buffers(recurse=False))
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
                wanted = tensor
                if name in outputs and tensor.dim() > 0:
                    wanted = wanted[kept[outputs[name]]]
                if name in inputs and tensor.dim() == 4:
                    wanted = wanted[:, kept[inputs[name]]]
                assert torch.equal(slim[key], wanted), f"{name}.{key}"
