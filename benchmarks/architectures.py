"""Which architectures can lose channels exactly: every group of every network tried, beside Torch-Pruning alone.

    python benchmarks/architectures.py --out docs/architectures.md

Random weights, random norm statistics, 64 px (32 voxels in 3-D). Needs MONAI; those of transformers are left out
where it is not installed.
"""

import argparse
import copy
import importlib.util
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from chanscale.attaching import attach_scales, merge_scales
from chanscale.catalogue import build_network
from chanscale.channels import ChannelGroup, free_groups, removed_positions
from chanscale.errors import UnsupportedTopologyError
from chanscale.files import write_atomically
from chanscale.group_scales import scale_parameters
from chanscale.inspection import describe_network
from chanscale.proof import channel_groups, halve, run_masked
from chanscale.pruning import prune_channels, relative_change, silence_channels
from chanscale.rebuilding import install_tensors
from chanscale.selection import ChannelSelection

Architecture = tuple[Callable[[], nn.Module], tuple[int, ...]]
"""How a network is built, and the shape of an example."""

MOST_TRIED = 12
"""Groups of a network that Torch-Pruning is given alone: it traces anew for each."""

IMAGE, VOLUME, SIGNAL = (2, 3, 64, 64), (2, 1, 32, 32, 32), (2, 1, 256)


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def classify(channels: int) -> nn.Sequential:
    """Pool, flatten, linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))


class Function(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, forward: Callable[["Function", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(self, x)


def shuffle(x: Tensor) -> Tensor:
    """Mix two groups of channels, as ShuffleNet does."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def split_and_join(net: Function, x: Tensor) -> Tensor:
    """Send half of the channels through a branch, as ShuffleNet and GhostNet do."""
    left, right = net.stem(x).chunk(2, dim=1)
    return net.head(torch.cat([left, net.branch(right)], dim=1))


def shared(net: Function, x: Tensor) -> Tensor:
    """Apply one block twice."""
    x = net.stem(x)
    return net.head(net.block(net.block(x)))


def attend(net: Function, x: Tensor) -> Tensor:
    """Multiply a map with a sigmoid of itself."""
    x = net.stem(x)
    return net.head(net.body(x * torch.sigmoid(net.gate(x))))


def squash(net: Function, x: Tensor) -> Tensor:
    """Use a sigmoid where others use a ReLU."""
    return net.head(net.body(torch.sigmoid(net.stem(x))))


def hard_coded(net: Function, x: Tensor) -> Tensor:
    """Count on a width that is written in the code."""
    x = net.stem(x)
    return net.head(net.body(x.view(-1, 16, x.shape[2], x.shape[3])))


def pre_activate(net: Function, x: Tensor) -> Tensor:
    """Norm and ReLU in front of the convolutions, and a sum behind them."""
    x = net.stem(x)
    x = x + net.first(F.relu(net.norm1(x)))
    x = x + net.second(F.relu(net.norm2(x)))
    return net.head(F.relu(net.norm3(x)))


def add_grouped(net: Function, x: Tensor) -> Tensor:
    """Add what grouped convolutions make of a sum to it."""
    x = net.stem(x)
    x = x + net.wide(x)
    return net.head(x + net.narrow(x))


def functional(net: Function, x: Tensor) -> Tensor:
    """Layers and activations as functions."""
    x = F.max_pool2d(F.relu(net.first(x)), 2)
    return net.head(F.leaky_relu(net.second(F.dropout(x, 0.1, net.training)), 0.1))


def own_networks() -> dict[str, Architecture]:
    """Return small networks with the constructs that go wrong."""
    from chanscale.backbones import VGG16Trunk
    from chanscale.efficientnet_lite import EfficientNetLite0Trunk

    def make(
        forward: Callable[[Function, Tensor], Tensor], channels: int, **layers: nn.Module
    ) -> Architecture:
        return (lambda: Function(forward, head=classify(channels), **layers)), IMAGE

    return {
        "VGG16": (lambda: nn.Sequential(VGG16Trunk(), classify(512)), IMAGE),
        "EfficientNet-Lite0": (lambda: nn.Sequential(EfficientNetLite0Trunk(), classify(1280)), IMAGE),
        "pre-activation": make(
            pre_activate, 16, stem=nn.Conv2d(3, 16, 3, padding=1), norm1=nn.BatchNorm2d(16), norm2=nn.BatchNorm2d(16),
            first=nn.Conv2d(16, 16, 3, padding=1), second=nn.Conv2d(16, 16, 3, padding=1), norm3=nn.BatchNorm2d(16),
        ),
        "functions": make(functional, 12, first=nn.Conv2d(3, 16, 3), second=nn.Conv2d(16, 12, 3)),
        "PReLU, dilated, strided": make(
            lambda net, x: net.head(net.body(net.stem(x))), 12, stem=nn.Sequential(conv(3, 16, stride=2), nn.PReLU(16)),
            body=nn.Sequential(nn.Conv2d(16, 12, 3, dilation=2), nn.BatchNorm2d(12), nn.PReLU()),
        ),
        "concatenate": make(
            lambda net, x: net.head(torch.cat([net.left(x), net.right(x)], dim=1)), 24,
            left=conv(3, 16), right=conv(3, 8),
        ),
        "split and concatenate": make(split_and_join, 16, stem=conv(3, 16), branch=conv(8, 8)),
        "channel shuffle": make(
            lambda net, x: net.head(net.body(shuffle(net.stem(x)))), 12, stem=conv(3, 16), body=conv(16, 12)
        ),
        "shared block": make(shared, 16, stem=conv(3, 16), block=conv(16, 16)),
        "attention gate": make(attend, 12, stem=conv(3, 16), gate=nn.Conv2d(16, 16, 1), body=conv(16, 12)),
        "sigmoid activation": make(squash, 12, stem=conv(3, 16), body=conv(16, 12)),
        "hard-coded view": make(hard_coded, 12, stem=conv(3, 16), body=conv(16, 12)),
        "grouped convolution": make(
            lambda net, x: net.head(net.body(net.stem(x))), 24, stem=conv(3, 16), body=conv(16, 24, groups=8)
        ),
        "grouped convolution, wide groups": make(
            lambda net, x: net.head(net.body(net.stem(x))), 12, stem=conv(3, 24),
            body=nn.Sequential(conv(24, 32, groups=2), conv(32, 12, groups=2), conv(12, 12, 1)),
        ),
        "grouped convolutions on a sum": make(
            add_grouped, 24, stem=conv(3, 24), narrow=conv(24, 24, groups=12), wide=conv(24, 24, groups=2),
        ),
        "grouped convolutions that differ": make(
            lambda net, x: net.head(torch.cat([net.left(x := net.stem(x)), net.right(x)], dim=1)), 42,
            stem=conv(3, 24), left=conv(24, 24, groups=2), right=conv(24, 18, groups=3),
        ),
        "grouped convolution on halves": make(
            lambda net, x: net.head(net.body(torch.cat([net.left(x), net.right(x)], dim=1))), 24,
            left=conv(3, 12), right=conv(3, 12), body=nn.Sequential(conv(24, 24, groups=2), conv(24, 24, 1)),
        ),
        "grouped convolution on parts": make(
            lambda net, x: net.head(net.body(torch.cat([net.left(x), net.right(x)], dim=1))), 24,
            left=conv(3, 16), right=conv(3, 8), body=nn.Sequential(conv(24, 24, groups=2), conv(24, 24, 1)),
        ),
        "grouped convolution of the input": make(
            lambda net, x: net.head(net.body(net.stem(x))), 12, stem=conv(3, 24, groups=3), body=conv(24, 12)
        ),
        "grouped convolution, one output each": make(
            lambda net, x: net.head(net.body(net.stem(x))), 12, stem=conv(3, 24), body=conv(24, 12, groups=12)
        ),
        "grouped convolution 1-D": (
            lambda: nn.Sequential(
                nn.Conv1d(1, 24, 5), nn.ReLU(), nn.Conv1d(24, 24, 5, groups=2), nn.BatchNorm1d(24), nn.ReLU(),
                nn.Conv1d(24, 36, 5, groups=12), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(36, 2),
            ), SIGNAL,
        ),
        "grouped convolution 3-D": (
            lambda: nn.Sequential(
                nn.Conv3d(1, 24, 3, stride=2), nn.ReLU(), nn.Conv3d(24, 24, 3, groups=2), nn.BatchNorm3d(24),
                nn.ReLU(), nn.Conv3d(24, 36, 3, groups=12), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                nn.Linear(36, 2),
            ), VOLUME,
        ),
        "depthwise, multiplier 2": make(
            lambda net, x: net.head(net.body(net.stem(x))), 12, stem=conv(3, 16),
            body=nn.Sequential(conv(16, 32, groups=16), conv(32, 12, 1)),
        ),
        "U-Net": make(
            lambda net, x: net.head(torch.cat([x := net.stem(x), net.up(net.down(x))], dim=1)), 24,
            stem=nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True), nn.PReLU()),
            down=nn.Sequential(
                nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.InstanceNorm2d(16), nn.LeakyReLU(0.1, inplace=True),
            ),
            up=nn.Sequential(nn.ConvTranspose2d(16, 12, 2, stride=2), nn.BatchNorm2d(12), nn.PReLU()),
        ),
        "flatten with positions": (
            lambda: nn.Sequential(conv(3, 16), nn.MaxPool2d(16), nn.Flatten(), nn.Linear(16 * 16, 2)), IMAGE,
        ),
        "group norm": (
            lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 12), classify(12)),
            IMAGE,
        ),
    }  # fmt: skip


def monai_networks() -> dict[str, Architecture]:
    """Return MONAI's classifiers and segmenters, in one, two and three dimensions."""
    from monai.networks import nets

    two, three, one = {"spatial_dims": 2}, {"spatial_dims": 3}, {"spatial_dims": 1}
    image, volume = {"in_channels": 3, "out_channels": 2}, {"in_channels": 1, "out_channels": 2}
    unet = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2, "norm": "batch"}
    return {
        "MONAI ResNet-18": (lambda: nets.resnet18(**two, n_input_channels=3, num_classes=2), IMAGE),
        "MONAI ResNet-50": (lambda: nets.resnet50(**two, n_input_channels=3, num_classes=2), IMAGE),
        "MONAI ResNet-18 3-D": (lambda: nets.resnet18(**three, n_input_channels=1, num_classes=2), VOLUME),
        "MONAI ResNet-10 1-D": (lambda: nets.resnet10(**one, n_input_channels=1, num_classes=2), SIGNAL),
        "MONAI DenseNet-121": (lambda: nets.DenseNet121(**two, **image), IMAGE),
        "MONAI DenseNet-121 3-D": (lambda: nets.DenseNet121(**three, **volume), VOLUME),
        "MONAI DenseNet-169": (lambda: nets.DenseNet169(**two, **image), IMAGE),
        "MONAI EfficientNet-B0": (lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False), IMAGE),
        "MONAI EfficientNet-B0 3-D": (
            lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1), VOLUME,
        ),
        "MONAI SE-ResNet-50": (lambda: nets.SEResNet50(**two, in_channels=3, num_classes=2), IMAGE),
        "MONAI SE-ResNeXt-50": (lambda: nets.SEResNext50(**two, in_channels=3, num_classes=2), IMAGE),
        "MONAI UNet": (lambda: nets.UNet(**two, **image, **unet), IMAGE),
        "MONAI UNet 3-D": (lambda: nets.UNet(**three, **volume, **unet), VOLUME),
        "MONAI BasicUNet, instance norm": (
            lambda: nets.BasicUNet(**two, **image, features=(8, 8, 16, 16, 32, 8)), IMAGE,
        ),
        "MONAI SegResNet, group norm": (lambda: nets.SegResNet(**two, **image, init_filters=8), IMAGE),
    }  # fmt: skip


def transformers_networks() -> dict[str, Architecture]:
    """Return transformers' convolutional classifiers, from their default configurations."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    names = ("ResNet", "RegNet", "MobileNetV1", "MobileNetV2", "EfficientNet", "ConvNext", "ConvNextV2")
    return {f"transformers {name}": (partial(build_network, f"transformers:{name}"), IMAGE) for name in names}


def randomise(model: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that are not trivial, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for name, low, high in (
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 1.5),
                ("bias", -0.3, 0.3),
            ):
                nn.init.uniform_(getattr(module, name), low, high)
    return model.eval()


def main() -> None:
    """Try every architecture, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="names that contain this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    networks = own_networks() | monai_networks() | transformers_networks()
    columns = (
        "network",
        "groups",
        "protected",
        "conv parameters prunable",
        "attached",
        "removed",
        "merged",
        "reloaded",
        "s",
        "wrong alone",
    )
    head = f"| {' | '.join(columns)} |"
    lines = [head, f"|{'---|' * len(columns)}"]
    reasons = []
    for name, (build, shape) in networks.items():
        if options.only and options.only not in name:
            continue
        torch.manual_seed(0)
        try:
            row, why = measure(name, randomise(build()), torch.randn(shape))
        except UnsupportedTopologyError as error:
            row, why = f"| {name} {'| ' * len(columns)}", [f"- {name}: {error}"]
        lines.append(row)
        reasons += why
        print(row, *why, sep="\n", flush=True)
    if options.out:
        write_atomically(
            options.out,
            "\n".join([INTRODUCTION, *lines, "", "## What is protected, and why", "", *reasons, ""]),
        )


INTRODUCTION = """# Architectures

Every group of channels of every network is tried: half of its channels are set to 0 where their scales would sit,
and removed. A group whose removal changes the output by more than rounding is protected. Random weights, random
norm statistics. Real weights and images: [benchmarks/efficientnet_lite0.md](benchmarks/efficientnet_lite0.md). Made by

    python benchmarks/architectures.py --out docs/architectures.md

*Attached*: with scales of 1, is the output the original's, bit for bit (law 1)? *Removed*: half of the channels of all
groups that are not protected have scales of 0, the others random ones of both signs; the largest change of an output in
fp32 when those channels are removed at once, relative to the largest output (law 2). *Merged*: the same when scales are
folded into the layers (law 3). *Reloaded*: is the pruned network the same bit for bit when its tensors are put into a
fresh copy of the whole one (law 4), and is every weight left a bit-exact slice (law 5)? *s*: seconds to trace and try.
*Wrong alone*: groups of which Torch-Pruning, without the proof, removes half, and the output is not that of the masked
network, or the network no longer runs; at most twelve groups of a network, evenly spread, were tried.
"""


@torch.no_grad()
def measure(name: str, model: nn.Module, example: Tensor) -> tuple[str, list[str]]:
    """Return the row of a network, and a line for each reason to protect groups of it."""
    began = perf_counter()
    groups = channel_groups(model, example)
    seconds = perf_counter() - began
    report = describe_network(model, groups, example)
    free = [group for group in groups if group.protected is None]
    laws = try_laws(model, groups, example) if free else ("", "", "", "")
    figures = (
        name, len(groups), len(groups) - len(free), f"{report.prunable:.1%}", *laws, f"{seconds:.1f}",
        count_wrong(model, groups, example),
    )  # fmt: skip
    row = f"| {' | '.join(map(str, figures))} |"
    return row, [
        f"- {name}: {reason}" + (f" ({count} groups)" if count > 1 else "")
        for reason, count in count_reasons(groups).items()
    ]


def try_laws(
    model: nn.Module, groups: tuple[ChannelGroup, ...], example: Tensor
) -> tuple[str, str, str, str]:
    """Return what laws 1 to 5 come to, as the columns of the table say."""
    scaled = attach_scales(model, groups)
    attached = torch.equal(scaled(example), model(example))
    kept = halve(free_groups(scaled))
    for scale in scale_parameters(scaled).values():
        scale.copy_((torch.rand(len(scale)) + 0.5) * torch.rand(len(scale)).sub(0.2).sign())
    silence_channels(scaled, ChannelSelection(kept))
    pruned = prune_channels(scaled, ChannelSelection(kept))
    removed = relative_change(scaled(example), pruned(example))
    merged = relative_change(pruned(example), merge_scales(pruned)(example))
    rebuilt = copy.deepcopy(model)
    install_tensors(rebuilt, pruned.state_dict())
    same = torch.equal(rebuilt.eval()(example), pruned(example)) and are_slices(pruned, model, groups, kept)
    return "yes" if attached else "NO", f"{removed:.0e}", f"{merged:.0e}", "yes" if same else "NO"


def are_slices(
    pruned: nn.Module, model: nn.Module, groups: tuple[ChannelGroup, ...], kept: dict[str, Tensor]
) -> bool:
    """Tell whether every weight and statistic of `pruned` is that of `model` without what was removed."""
    gone = removed_positions(groups, kept)
    for name, layer in model.named_modules():
        slim = pruned.get_submodule(name).state_dict()
        cut = [
            (axis, gone[axis, name])
            for axis in ("outputs", "inputs")
            if (axis, name) in gone  # type: ignore[operator]
        ]
        for key, whole in layer.state_dict().items():
            if "." not in key and not torch.equal(cut_out(layer, whole, cut), slim[key]):
                return False
    return True


def cut_out(layer: nn.Module, tensor: Tensor, cut: list[tuple[str, list[int]]]) -> Tensor:
    """Return `tensor` of `layer` without the positions of each axis."""
    turned = isinstance(layer, _ConvTransposeNd) and layer.groups == 1
    for axis, gone in cut:
        dim = int((axis == "inputs") != (turned and tensor.dim() > 1))
        if tensor.dim() > dim:
            stay = [i for i in range(tensor.shape[dim]) if i not in set(gone)]
            tensor = tensor.index_select(dim, torch.tensor(stay))
    return tensor


def count_reasons(groups: tuple[ChannelGroup, ...]) -> dict[str, int]:
    """Return how many groups are protected for each reason."""
    reasons: dict[str, int] = {}
    for group in groups:
        if group.protected is not None:
            # Not the name of the layer, where there are many of its kind.
            kind = re.sub(r"^\S+ (?:is )?(?=a grouped|\(\w+\) computes)", "", group.protected)
            reasons[kind] = reasons.get(kind, 0) + 1
    return reasons


def count_wrong(model: nn.Module, groups: tuple[ChannelGroup, ...], example: Tensor) -> str:
    """Return how many groups Torch-Pruning, left alone, does not remove exactly, of how many that were tried."""
    import torch_pruning as tp

    possible = [g for g in groups if g.width > 1 and g.protected != "the network returns these channels"]
    tried = possible[:: -(-len(possible) // MOST_TRIED)]
    wrong = 0
    for group in tried:
        removal = halve([group])
        twin = copy.deepcopy(model)
        layer = twin.get_submodule(group.name)
        try:
            with torch.enable_grad():
                graph = tp.DependencyGraph().build_dependency(twin, example, verbose=False)
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            gone = sorted(set(range(group.width)) - set(removal[group.name].tolist()))
            graph.get_pruning_group(layer, prune, gone).prune()
            got = twin(example)
        except Exception:
            wrong += 1
            continue
        wrong += relative_change(run_masked(model, [group], removal, example), got) > 1e-4
    return f"{wrong} of {len(tried)}"


if __name__ == "__main__":
    main()
