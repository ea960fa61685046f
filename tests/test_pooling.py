"""The frugal max pooling against PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from chanscale.pooling import FrugalMaxPool2d
from chanscale.scaling import freeze

POOLS = {
    "vgg": nn.MaxPool2d(2),
    "resnet": nn.MaxPool2d(3, stride=2, padding=1),
    "overlapping": nn.MaxPool2d(3, stride=1),
    "ceil": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "dilated": nn.MaxPool2d(2, stride=2, dilation=2),
    "oblong": nn.MaxPool2d((2, 3), stride=(3, 2), padding=(1, 0)),
}


def frugal_twin(pool):
    twin = copy.deepcopy(pool)
    freeze(twin)
    assert isinstance(twin, FrugalMaxPool2d)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", POOLS)
def test_outputs_and_gradients_are_those_of_the_plain_pooling(name, layout, dtype):
    plain, frugal = POOLS[name], frugal_twin(POOLS[name])
    x = torch.randn(2, 5, 13, 11).relu().to(dtype=dtype, memory_format=layout)  # ties at 0, as behind a ReLU
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = frugal(ours), plain(theirs)
    assert torch.equal(got, wanted)
    weights = torch.randn_like(wanted)
    got.backward(weights)
    wanted.backward(weights)
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0


def test_a_window_as_large_as_the_map_finds_its_pixel():
    pool = nn.MaxPool2d(224)
    x = torch.zeros(1, 1, 224, 224)
    x[..., 200, 100] = 1
    x.requires_grad_()
    frugal_twin(pool)(x).sum().backward()
    assert x.grad[0, 0].nonzero().tolist() == [[200, 100]]


def test_it_keeps_two_bytes_for_each_output():
    kept = []
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = FrugalMaxPool2d(2)(x)
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * output.numel()
