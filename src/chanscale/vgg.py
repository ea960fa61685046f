"""The convolutions of VGG16, and the names that published files give them."""

from typing import cast

from torch import Tensor, nn

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16Trunk(nn.Module):
    """The 13 convolutions of VGG16, with torchvision's names; random weights until some are loaded.

    Input: (N, 3, H, W), preprocessed, H and W at least 32. Output: (N, 512, H // 32, W // 32).
    Simonyan & Zisserman 2014, configuration D, without batch norm.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in _BLOCKS:
            for _ in range(depth):
                layers += [_convolution(channels, width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last feature map."""
        return cast(Tensor, self.features(x))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    # He et al. 2015: the variance survives 13 layers, which torch's own default lets fade.
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def vgg16_names(*, weight: str, bias: str) -> dict[str, str]:
    """Our tensor names -> those of a file that calls the convolutions block1_conv1, block1_conv2, ..."""
    names, index = {}, 0
    for block, (_, depth) in enumerate(_BLOCKS, start=1):
        for conv in range(1, depth + 1):
            layer = f"block{block}_conv{conv}"
            names[f"features.{index}.weight"] = weight.format(layer)
            names[f"features.{index}.bias"] = bias.format(layer)
            index += 2
        index += 1
    return names
