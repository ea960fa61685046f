"""Where trunks can end, and that a shorter one says what the whole one said there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chanscale.cutting_points import cut_trunk, find_cuts
from chanscale.efficientnet_lite import EfficientNetLite0Trunk
from chanscale.errors import ModelError
from chanscale.vgg import VGG16Trunk
from networks import grouped_trunk, norm_trunk, plain_trunk, randomise

IMAGES = torch.rand(2, 3, 32, 32)


class Wrapped(nn.Module):
    """A trunk within a module that may add something of its own at the end."""

    def __init__(self, trunk: nn.Module, *, activated: bool = False) -> None:
        super().__init__()
        self.trunk, self.activated = trunk, activated

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return F.relu(features) if self.activated else features


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Twice(nn.Module):
    """One convolution, called twice, in front of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.first(x)))


class AddsInPlace(nn.Module):
    """Writes into what a child returned before the next one sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).add_(1))


def outputs_behind(trunk: nn.Module, layer: str) -> Tensor:
    """Return what `layer` made of the images, as it was before anything wrote into it."""
    seen: list[Tensor] = []
    handle = trunk.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    with torch.no_grad():
        trunk.eval()(IMAGES)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "build",
    [plain_trunk, norm_trunk, grouped_trunk, VGG16Trunk, EfficientNetLite0Trunk, lambda: Wrapped(plain_trunk())],
)  # fmt: skip
def test_a_shorter_trunk_returns_what_its_last_layer_did(build):
    trunk = randomise(build()).eval()
    before = trunk(IMAGES)
    cuts = find_cuts(trunk, IMAGES)
    assert cuts
    for cut in cuts:
        shorter = cut_trunk(trunk, cut.without)
        with torch.no_grad():
            assert torch.equal(shorter(IMAGES), outputs_behind(trunk, cut.layer)), cut
    assert torch.equal(trunk(IMAGES), before), "the whole trunk was changed"


def test_vgg16_can_end_in_front_of_every_convolution_but_the_first():
    cuts = find_cuts(VGG16Trunk(), IMAGES)
    ends = [1, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27]
    assert [cut.layer for cut in cuts] == [f"features.{index}" for index in ends]
    assert cuts[7].without == tuple(f"features.{index}" for index in range(19, 31))


def test_what_is_left_out_holds_no_tensors_and_the_rest_are_the_same_ones():
    trunk = plain_trunk()
    shorter = cut_trunk(trunk, find_cuts(trunk, IMAGES)[0].without)
    kept = dict(shorter.named_parameters())
    assert set(kept) == {"0.weight", "0.bias"}
    assert all(tensor is dict(trunk.named_parameters())[name] for name, tensor in kept.items())


def test_no_cut_lies_between_a_convolution_and_its_norm_or_activation():
    assert [cut.layer for cut in find_cuts(norm_trunk().eval(), IMAGES)] == ["3", "7"]


def test_a_block_with_a_shortcut_is_left_out_whole():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(4), Residual(4))
    assert [(cut.layer, cut.without) for cut in find_cuts(trunk, IMAGES)] == [
        ("0", ("1", "2")),
        ("1", ("2",)),
    ]


def test_a_trunk_that_goes_on_behind_its_last_module_has_no_cut():
    assert find_cuts(Wrapped(plain_trunk(), activated=True), IMAGES) == []


def test_a_module_that_is_called_twice_is_no_place_to_end():
    assert find_cuts(Twice(), IMAGES) == []


def test_a_module_that_another_writes_behind_is_found_out():
    # It looks like a chain: the tensor is the same. What the shorter trunk returns is not what was seen there.
    assert find_cuts(AddsInPlace(), IMAGES) == []


def test_a_module_that_is_not_there_cannot_be_left_out():
    with pytest.raises(ModelError, match="no module '9'"):
        cut_trunk(plain_trunk(), ("9",))
