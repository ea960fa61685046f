"""Small networks with random weights, and what the tests of the method do with them."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from architectures import own_networks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chanscale.artifact import ModelInfo
from chanscale.attaching import attach_scales
from chanscale.backbones import Preprocessing
from chanscale.channels import carry_groups, free_groups, removed_positions
from chanscale.classifier import Classifier, assemble
from chanscale.proof import channel_groups
from chanscale.selection import ChannelSelection

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


def grouped_trunk() -> nn.Module:
    """Grouped convolutions of both ways: few wide groups, which keep their number, and many narrow ones."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(),
        nn.Conv2d(24, 36, 3, groups=2), nn.BatchNorm2d(36), nn.ReLU(),
        nn.Conv2d(36, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 36, 3, padding=1, groups=12), nn.ReLU(),
        nn.Conv2d(36, 10, 1), nn.ReLU(),
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
    "grouped": grouped_trunk,
    "nested, shared ReLU": nested_trunk,
    "functional": FunctionalTrunk,
    "two names": AliasTrunk,
}
"""Networks from pixels to a feature map."""

SHAPES = dict.fromkeys(TRUNKS | {"flatten": FlattenNet, "pool and flatten": pooled_net}, (4, 3, 16, 16))
NASTY = {name: made for name, made in own_networks().items() if name not in ("VGG16", "EfficientNet-Lite0")}
ALL_PROTECTED = ("split and concatenate", "grouped convolution, one output each")

NETWORKS = (
    TRUNKS
    | {"flatten": FlattenNet, "pool and flatten": pooled_net}
    | {name: make for name, (make, _) in NASTY.items() if name not in ALL_PROTECTED}
)
"""All that have something to remove; in eval with `build`, for the images that `inputs` draws."""


def build(name: str) -> nn.Module:
    """Return a network of the table in eval mode, with random weights, biases and norm statistics.

    It carries its groups.
    """
    return know_groups(randomise(copy.deepcopy(NETWORKS[name]())).eval(), inputs(name))


def inputs(name: str) -> Tensor:
    """Return random images in [0, 1] for the network called `name`."""
    return torch.rand(SHAPES.get(name) or NASTY[name][1])


def know_groups(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Let `model` carry its groups; return it."""
    return carry_groups(model, channel_groups(model, images() if example is None else example))


def attach(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Return a scaled copy of `model`."""
    return attach_scales(model, channel_groups(model, images() if example is None else example))


def widths_of(model: nn.Module) -> dict[str, int]:
    """Return the width of each group of `model` that can lose channels."""
    return {group.name: group.width for group in free_groups(model)}


def randomise(model: nn.Module) -> nn.Module:
    """Draw, in place, what starts at 0 or 1: a law must not hold by chance."""
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, _BatchNorm):
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
    """Give `model` scales of both signs, those of a share of the channels exactly 0; return the other channels."""
    kept = {}
    for group in free_groups(model):
        gone = torch.randperm(group.width)[: max(1, int(zeros * group.width))].tolist()
        kept[group.name] = torch.tensor([c for c in range(group.width) if c not in gone])
        for site in group.sites:
            scale = model.get_submodule(site.layer).channel_scale.weight
            places = torch.tensor(site.positions)
            scale[places] = (torch.rand(len(places)) + 0.5) * torch.rand(len(places)).sub(0.3).sign()
            scale[list(site.holding(gone))] = 0
    return ChannelSelection(kept)


def build_classifier(
    trunk: nn.Module | None = None, classes=("no", "yes"), *, multilabel=False
) -> Classifier:
    """Return a classifier on `trunk` whose head has weights and statistics that are not trivial."""
    trunk = randomise(plain_trunk()) if trunk is None else trunk
    model = assemble(PREPROCESSING, trunk, images(2, 32), classes=classes, multilabel=multilabel)
    nn.init.normal_(model.head.linear.weight)
    nn.init.normal_(model.head.linear.bias)
    return know_groups(renew_statistics(model), images(2, 32))


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
        image_size=32,
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


def require_slices(pruned: nn.Module, original: nn.Module, kept: dict[str, Tensor]) -> None:
    """Check that every weight, and every statistic of a norm, is a bit-exact slice of the original's."""
    gone = removed_positions(free_groups(original), kept)
    for name, module in original.named_modules():
        if isinstance(module, _ConvNd | _BatchNorm):
            slim = pruned.get_submodule(name)
            tensors = dict(slim.named_parameters(recurse=False)) | dict(slim.named_buffers(recurse=False))
            for key, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                turned = isinstance(module, _ConvTransposeNd) and tensor.dim() > 1
                wanted = without(tensor, int(turned), gone.get(("outputs", name), ()))
                if tensor.dim() > 1:
                    wanted = without(wanted, int(not turned), gone.get(("inputs", name), ()))
                assert torch.equal(tensors[key], wanted), f"{name}.{key}"


def without(tensor: Tensor, dim: int, gone: tuple[int, ...]) -> Tensor:
    """Return `tensor` without the slices at `gone` along `dim`."""
    if tensor.dim() == 0:
        return tensor
    return tensor.index_select(dim, torch.tensor([i for i in range(tensor.shape[dim]) if i not in gone]))
