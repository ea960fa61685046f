import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from chanscale.attaching import attach_scales
from chanscale.channels import ChannelGroup, channel_groups, output_width
from chanscale.errors import UnsupportedTopologyError
from networks import build, build_classifier, nested_trunk, norm_trunk, plain_trunk


def convolution(inputs=4, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Network(nn.Module):
    """Two convolutions, `first` and `second`, called by a rule."""

    def __init__(self, rule):
        super().__init__()
        self.first, self.second = convolution(3), convolution()
        self.rule = rule

    def forward(self, x):
        return self.rule(self, x)


def depend_on_the_values(net, x):
    x = net.first(x)
    return net.second(x) if x.sum() > 0 else x


def loop_over_the_batch(net, x):
    return torch.stack([net.second(net.first(image)) for image in x])


class HalvedReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 0.5


class OwnConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flip(1)


def parametrised():
    return nn.Sequential(convolution(3), parametrizations.weight_norm(convolution()), convolution())


def shared_weight():
    shared = convolution()
    return nn.Sequential(convolution(3), shared, nn.ReLU(), shared)


# Each with the layer that the error must name.
UNSUPPORTED = {
    "residual add": ("'first'", lambda: Network(lambda net, x: (y := net.first(x)) + net.second(y))),
    "residual add in place": ("'first'", lambda: Network(lambda net, x: net.second(y := net.first(x)).add_(y))),
    "concat": ("'first'", lambda: Network(lambda net, x: torch.cat([y := net.first(x), net.second(y)], 1))),
    "add of the input": ("'second'", lambda: Network(lambda net, x: net.second(net.first(x)) + x)),
    "grouped": ("'1'", lambda: nn.Sequential(convolution(3), convolution(groups=2), convolution())),
    "depthwise": ("'1'", lambda: nn.Sequential(convolution(3), convolution(groups=4), convolution())),
    "sigmoid": ("'1'", lambda: nn.Sequential(convolution(3), nn.Sigmoid(), convolution())),
    "functional sigmoid": ("'first'", lambda: Network(lambda net, x: net.second(net.first(x).sigmoid()))),
    "softmax over channels": ("'1'", lambda: nn.Sequential(convolution(3), nn.Softmax(1), convolution())),
    "group norm": ("'1'", lambda: nn.Sequential(convolution(3), nn.GroupNorm(2, 4), convolution())),
    "bias after a conv": ("'first'", lambda: Network(lambda net, x: net.second(net.first(x) + 1))),
    "squeeze and excite": ("'first'", lambda: Network(lambda net, x: net.second((y := net.first(x)) * y.mean()))),
    "pixel shuffle": ("'1'", lambda: nn.Sequential(convolution(3), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3))),
    "transposed": ("'1'", lambda: nn.Sequential(convolution(3), nn.ConvTranspose2d(4, 4, 3), convolution())),
    "used twice": ("'second'", lambda: Network(lambda net, x: net.second(net.second(net.first(x))))),
    "the same layer at two places": ("'1'", shared_weight),
    "a ReLU of the user's own": ("'0'", lambda: nn.Sequential(convolution(3), HalvedReLU(), convolution())),
    "a convolution of the user's own": ("'0'", lambda: nn.Sequential(OwnConv2d(3, 4, 3), convolution())),
    "a tensor of its own": ("'first'", lambda: Network(lambda net, x: net.second(net.first(x) * net.first.bias.sum()))),
    "reparametrised": ("'1'", parametrised),
    "flatten over images": ("'1'", lambda: nn.Sequential(convolution(3), nn.Flatten(0), nn.Linear(4, 2))),
    "linear over columns": ("'1'", lambda: nn.Sequential(convolution(3), nn.Linear(16, 2))),
}  # fmt: skip


def test_groups_go_from_input_to_output_and_name_what_shares_their_channels():
    assert channel_groups(plain_trunk((8, 16, 12))) == (
        ChannelGroup("0", 8, relu="1", consumers=("3",)),
        ChannelGroup("3", 16, relu="4", consumers=("6",)),
    )
    assert channel_groups(norm_trunk())[0] == ChannelGroup("0", 8, norms=("1",), relu="2", consumers=("4",))


def test_the_scale_stands_behind_the_last_norm():
    group, *_ = channel_groups(norm_trunk())
    assert group.anchor == "1"
    assert channel_groups(attach_scales(norm_trunk()))[0].scale == "1.scale"
    assert channel_groups(attach_scales(plain_trunk()))[0].scale == "0.scale"


def test_a_bare_trunk_keeps_the_channels_that_it_returns():
    assert [group.name for group in channel_groups(plain_trunk())] == ["0", "3"]
    with_head = channel_groups(build_classifier(plain_trunk()))
    assert [group.name for group in with_head] == ["trunk.0", "trunk.3", "trunk.6"]
    assert with_head[-1].consumers == ("head",)


def test_a_relu_for_all_is_taken_over_by_none():
    assert {group.relu for group in channel_groups(nested_trunk())} == {None}


def test_groups_follow_the_calls_not_the_order_of_registration():
    assert [group.name for group in channel_groups(build("functional"))] == ["first", "second"]


def test_a_linear_layer_behind_a_flatten_takes_the_channels_in():
    groups = channel_groups(build("flatten"))
    assert groups[-1].consumers == ("hidden",)
    assert [group.name for group in groups] == ["trunk.0", "trunk.3"]


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("transform", [channel_groups, attach_scales])
def test_other_topologies_are_refused_by_the_name_of_the_layer(name, transform):
    layer, make = UNSUPPORTED[name]
    with pytest.raises(UnsupportedTopologyError) as caught:
        transform(make())
    message = str(caught.value)
    assert message.startswith(f"layer {layer} ")
    assert message.endswith("this version takes a plain sequence of conv, norm, ReLU and pool")
    assert "\n" not in message


@pytest.mark.parametrize("forward", [depend_on_the_values, loop_over_the_batch])
def test_control_flow_that_cannot_be_traced_is_refused(forward):
    with pytest.raises(
        UnsupportedTopologyError, match=r"^Network cannot be traced \(.*\); this version takes"
    ):
        channel_groups(Network(forward))


@pytest.mark.parametrize(
    "model", [nn.Sequential(convolution(3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(3, 2))]
)
def test_a_network_without_a_group_is_refused(model):
    with pytest.raises(UnsupportedTopologyError, match="no convolution whose channels could be removed"):
        channel_groups(model)


def test_the_output_width_of_a_trunk_is_that_of_its_last_convolution():
    assert output_width(plain_trunk((8, 16, 12))) == 12
    for model in (build("flatten"), nn.Sequential(convolution(3), nn.Flatten())):
        with pytest.raises(UnsupportedTopologyError, match="pass it without its head"):
            output_width(model)
