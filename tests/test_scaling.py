"""The scale, and the two functions that save memory: the same gradients as autograd's own, from less."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chanscale.scaling import ChannelScale, add_scale, freeze, soft_threshold, thaw
from networks import relative_difference

ROUNDING = 1e-12  # in fp64
SCALES = torch.tensor([1.0, -0.7, 1e-4, 2.5, -3.0])

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "strided": {"kernel_size": 5, "stride": (2, 3), "padding": 2},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "oblong": {"kernel_size": (3, 1), "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def frozen(conv, *, relu=True):
    """Return a frozen copy of `conv`, with scales of both signs."""
    twin = copy.deepcopy(conv).requires_grad_(False)
    freeze(twin)
    add_scale(twin, relu=relu).weight.data = SCALES.to(next(conv.parameters(), SCALES.double()).dtype)
    return twin


def saved_shapes(compute):
    """Return the shapes of the tensors with more than 2 dimensions that autograd keeps for the backward."""
    shapes = {}

    def pack(tensor):
        if tensor.dim() > 2:
            shapes[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    return sorted(shapes.values()), output  # the output lives: its memory cannot be used twice


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_equal_those_of_plain_operations(name, relu):
    conv = nn.Conv2d(3, 5, **CONVOLUTIONS[name]).double()
    require_gradients(conv, frozen(conv, relu=relu), torch.randn(2, 3, 9, 8), relu=relu)


def spread(norm):
    """Give `norm` statistics and weights that are not trivial."""
    for name, tensor in norm.state_dict().items():
        if name != "num_batches_tracked":
            tensor.uniform_(0.5, 2)
    return norm


LAYERS = {
    "1-D": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 9)),
    "3-D": (lambda: nn.Conv3d(3, 5, 3, padding=1), (2, 3, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), (2, 5, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, stride=2), (2, 3, 6, 7)),
    "batch norm": (lambda: spread(nn.BatchNorm2d(5)), (2, 5, 6, 7)),
    "batch norm 1-D": (lambda: spread(nn.BatchNorm1d(5)), (2, 5, 6)),
    "batch norm without weights": (lambda: spread(nn.BatchNorm3d(5, affine=False)), (2, 5, 3, 3, 3)),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (2, 5, 6, 7)),
    "instance norm": (lambda: nn.InstanceNorm2d(5, affine=True), (2, 5, 6, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_any_kind_have_the_gradients_of_plain_operations(name):
    make, shape = LAYERS[name]
    layer = make().double().eval()
    require_gradients(layer, frozen(layer, relu=False), torch.randn(shape), relu=False)


class Standardised(nn.Conv2d):
    """A convolution of the user's own, whose weights are standardised and whose input is padded as it is called."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.bias)


def double_behind(conv):
    conv.register_forward_hook(lambda _layer, _inputs, output: 2 * output.tanh())
    return conv


@pytest.mark.parametrize(
    "make", [lambda: Standardised(1, 5, 2), lambda: double_behind(nn.Conv2d(1, 5, 2))], ids=["class", "hook"]
)
def test_a_first_layer_that_computes_more_than_a_convolution_has_the_gradients_of_plain_operations(make):
    conv = make().double()
    twin, x = (
        frozen(conv),
        torch.randn(2, 1, 6, 7).double(),
    )  # without a gradient: the first layer of a network
    scale = SCALES.double().requires_grad_()
    plain = (conv(x) * scale.view(1, -1, 1, 1)).relu()
    toward = torch.randn_like(plain)
    (ours,) = torch.autograd.grad((twin(x) * toward).sum(), [twin.channel_scale.weight])
    (wanted,) = torch.autograd.grad((plain * toward).sum(), [scale])
    assert relative_difference(ours, wanted) < ROUNDING


def test_one_image_without_a_batch_is_taken_too():
    conv = nn.Conv2d(3, 5, 3)
    twin, x = copy.deepcopy(conv), torch.randn(3, 6, 7, requires_grad=True)
    freeze(twin)
    assert torch.equal(twin(x), conv(x))


def require_gradients(plain_layer, layer, x, *, relu):
    """Compare the output, and the gradients for input and scale, with those of plain operations."""
    x = x.double().requires_grad_()
    scale = SCALES.double().requires_grad_()
    plain = plain_layer(x) * scale.view(1, -1, *[1] * (x.dim() - 2))
    plain = plain.relu() if relu else plain
    assert relative_difference(layer(x), plain) < ROUNDING
    toward = torch.randn_like(plain)
    ours = torch.autograd.grad((layer(x) * toward).sum(), [x, layer.channel_scale.weight])
    autograds = torch.autograd.grad((plain * toward).sum(), [x, scale])
    for got, wanted in zip(ours, autograds, strict=True):
        assert relative_difference(got, wanted) < ROUNDING


def test_a_frozen_norm_keeps_nothing_of_its_input():
    norm = spread(nn.BatchNorm2d(5)).requires_grad_(False)
    freeze(norm)
    shapes, _ = saved_shapes(lambda: norm(torch.randn(2, 5, 3, 3, requires_grad=True)))
    assert shapes == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_agree_with_finite_differences(memory_format):
    layer = ChannelScale(5, relu=True).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format)

    def scaled(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    scale = SCALES.double().clamp(-2, 2).requires_grad_()
    assert torch.autograd.gradcheck(scaled, (x.requires_grad_(), scale), eps=1e-7)


def test_a_scale_of_0_has_the_derivative_from_the_right_and_can_come_back():
    layer = ChannelScale(2, relu=True).double()
    layer.weight.data.zero_()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.relu().sum((0, 2, 3)))
    assert (layer.weight.grad != 0).all()


def test_a_scale_of_0_passes_nothing_on():
    layer = ChannelScale(2, relu=True)
    layer.weight.data[0] = 0
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert not out[:, 0].any()
    assert not x.grad[:, 0].any()
    assert x.grad[:, 1].any()


def test_frozen_weights_get_no_gradient():
    layer = frozen(nn.Conv2d(3, 5, 3))
    layer(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert not layer.weight.requires_grad


def test_a_frozen_block_keeps_one_feature_map_where_plain_operations_keep_three():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer, scale = frozen(conv), SCALES.clone().requires_grad_()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight, before_scale, input, output = (5, 3, 3, 3), (2, 5, 8, 8), (2, 3, 8, 8), (2, 5, 8, 8)
    ours, _ = saved_shapes(lambda: layer(x))
    plain, _ = saved_shapes(lambda: (conv(x) * scale.view(1, -1, 1, 1)).relu())
    assert ours == sorted([weight, before_scale])
    assert set(plain) >= {weight, input, before_scale}
    assert plain.count(output) == 2  # what is scaled, and what comes out of the ReLU


@pytest.mark.parametrize(("outputs", "kept"), [(5, (2, 3, 8, 8)), (2, (2, 2, 8, 8))])
def test_the_first_convolution_keeps_the_image_or_its_map_whichever_is_smaller(outputs, kept):
    layer = nn.Conv2d(3, outputs, 3, padding=1).requires_grad_(False)
    freeze(layer)
    add_scale(layer, relu=True)
    assert saved_shapes(lambda: layer(torch.randn(2, 3, 8, 8)))[0] == [kept]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"bias": False}]
)
def test_what_is_convolved_again_has_the_gradients_of_what_is_kept_to_the_last_bit(options, dtype):
    layer = frozen(nn.Conv2d(3, 5, 3, **options))
    x, gradients = torch.randn(2, 3, 8, 8), []
    for needs_gradient in (False, True):  # with one for the image, the map is kept
        layer.channel_scale.weight.grad = None
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            layer(x.clone().requires_grad_(needs_gradient)).square().sum().backward()
        gradients.append(layer.channel_scale.weight.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_without_gradients_nothing_is_kept():
    layer = frozen(nn.Conv2d(3, 5, 3))
    with torch.no_grad():
        assert saved_shapes(lambda: layer(torch.randn(2, 3, 8, 8)))[0] == []


def test_autocast_computes_in_bf16_and_keeps_the_scales_in_fp32():
    first, second = frozen(nn.Conv2d(3, 5, 3)), frozen(nn.Conv2d(5, 5, 3))
    x = torch.randn(2, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = second(first(x))
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(
        out.float().sum(), [first.channel_scale.weight, second.channel_scale.weight]
    )
    wanted = torch.autograd.grad(
        second(first(x)).sum(), [first.channel_scale.weight, second.channel_scale.weight]
    )
    for got, exact in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float32
        assert relative_difference(got, exact) < 0.05  # bf16 has 8 bits; sums of 128 products


def test_a_frozen_norm_stays_in_eval():
    norm = nn.BatchNorm2d(5)
    norm.running_mean.normal_()
    layer, x = copy.deepcopy(norm), torch.randn(4, 5, 3, 3)
    freeze(layer)
    before = layer.running_mean.clone()
    assert torch.equal(layer.train()(x), norm.eval()(x))
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    "plain",
    [
        nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(3, 5, (1, 3), dilation=2, padding="same"),
        nn.BatchNorm2d(3, eps=0.1, affine=False),
        nn.BatchNorm2d(3, eps=0.1),
        nn.MaxPool2d(2),
        nn.ReLU(),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_layer_thaws_to_what_it_was(plain):
    layer, x = copy.deepcopy(plain.eval()), torch.randn(2, 3, 7, 7)
    freeze(layer)
    assert torch.equal(layer(x), plain(x))
    thaw(layer)
    assert type(layer) is type(plain)
    assert repr(layer) == repr(plain)
    assert torch.equal(layer(x), plain(x))


class ShiftedConv(nn.Conv2d):
    """A convolution of the user's own."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def test_a_layer_that_computes_something_else_goes_on_doing_so():
    layer, x = ShiftedConv(3, 5, 3), torch.randn(2, 3, 7, 7, requires_grad=True)
    wanted = layer(x)
    freeze(layer)
    assert torch.equal(layer(x), wanted)
    assert type(layer) is ShiftedConv


def test_soft_threshold_is_the_proximal_operator():
    got = soft_threshold(torch.tensor([-1.0, -0.25, 0.0, 0.25, 0.5, 3.0]), 0.25)
    assert got.tolist() == [-0.75, 0, 0, 0, 0.25, 2.75]
    # It minimises step |y| + (y - s)^2 / 2, tried on a grid.
    grid = torch.linspace(-4, 4, 801)
    for scale in (-2.0, -0.3, 0.1, 1.7):
        loss = 0.5 * grid.abs() + F.mse_loss(grid, torch.full_like(grid, scale), reduction="none") / 2
        assert abs(float(grid[loss.argmin()] - soft_threshold(torch.tensor(scale), 0.5))) < 0.01
