"""EfficientNet-Lite0 without its classifier, and the names that its published file gives the tensors."""

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

# (repeats, kernel, stride of the first, expansion, width): Tan & Le 2019, table 1, that is B0.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


class EfficientNetLite0Trunk(nn.Module):
    """EfficientNet-Lite0 up to its last feature map; random weights until some are loaded.

    Input: (N, 3, H, W), preprocessed, H and W at least 32. Output: (N, 1280, H // 32, W // 32).
    At multiples of 32 the padding is TensorFlow's. Tan & Le 2019; the Lite variant has no squeeze-excite, and
    ReLU6 for swish.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _layer(3, _STEM, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        channels = _STEM
        for repeats, kernel, stride, expansion, width in _STAGES:
            for index in range(repeats):
                first = stride if index == 0 else 1
                blocks.append(_Block(channels, width, kernel=kernel, stride=first, expansion=expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _layer(channels, _HEAD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last feature map."""
        return cast(Tensor, self.head(self.blocks(self.stem(x))))


class _Block(nn.Sequential):
    """Widen, filter each channel by itself, narrow; and add the input where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        inner = inputs * expansion
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion > 1:
            layers["expand"] = _layer(inputs, inner)
        layers["depthwise"] = _layer(inner, inner, kernel=kernel, stride=stride, groups=inner)
        layers["project"] = _layer(inner, outputs, activation=False)
        super().__init__(layers)
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, outputs, H // stride, W // stride)."""
        y = x
        for layer in self:
            y = layer(y)
        return x + y if self.has_skip else y


def _layer(
    inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    margin = (kernel - 1) // 2
    if stride == 2:
        # TensorFlow pads an even size by one pixel less on the left and at the top. For an odd one it would be
        # the same on all sides; that depends on the image, and is left out, as in the published PyTorch network.
        layers["pad"] = nn.ZeroPad2d((margin - 1, margin, margin - 1, margin))
        margin = 0
    layers["conv"] = nn.Conv2d(inputs, outputs, kernel, stride, margin, groups=groups, bias=False)
    layers["norm"] = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    if activation:
        layers["relu"] = nn.ReLU6(inplace=True)
    return nn.Sequential(layers)


def efficientnet_lite0_names() -> dict[str, str]:
    """Our tensor names -> those of the published .pth, which follow lukemelas' EfficientNet-PyTorch."""
    names = {}
    for layer, (conv, norm) in _published_layers().items():
        names[f"{layer}.conv.weight"] = f"{conv}.weight"
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{layer}.norm.{part}"] = f"{norm}.{part}"
    return names


def _published_layers() -> dict[str, tuple[str, str]]:
    layers = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index in range(sum(repeats for repeats, *_ in _STAGES)):
        theirs = f"_blocks.{index}."
        for norm, layer in enumerate(("expand", "depthwise", "project")):
            layers[f"blocks.{index}.{layer}"] = (f"{theirs}_{layer}_conv", f"{theirs}_bn{norm}")
    del layers["blocks.0.expand"]  # the first block does not widen
    return layers
