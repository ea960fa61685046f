import pytest
import torch

from chanscale.heads import PooledHead, standardise

ROUNDING = 1e-4  # of logits near 1: fp32 features, from which a mean as large as their spread is taken


@pytest.fixture
def head():
    head = PooledHead(5, 2)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    return head


@pytest.fixture
def maps():
    return torch.rand(8, 5, 4, 3)


def test_a_new_head_says_nothing(maps):
    assert not PooledHead(5, 2)(maps).any()


def test_in_training_features_are_standardised_by_the_batch(head, maps):
    features = maps.mean((2, 3))
    wanted = (features - features.mean(0)) / features.std(0, correction=0)
    assert torch.allclose(head.train()(maps), head.linear(wanted), atol=ROUNDING)
    assert not head.mean.any()  # stored statistics do not follow


def test_in_eval_features_are_standardised_by_what_was_stored(head, maps):
    head.eval().set_statistics(head.pool(maps))
    assert torch.allclose(head(maps), head.train()(maps), atol=ROUNDING)
    one_by_one = torch.cat([head.eval()(image[None]) for image in maps])
    assert torch.allclose(one_by_one, head(maps), atol=ROUNDING)


def test_a_single_image_in_training_is_standardised_by_what_was_stored(head, maps):
    head.set_statistics(head.pool(maps))
    assert torch.equal(head.train()(maps[:1]), head.eval()(maps[:1]))


@pytest.mark.parametrize("shrunk", [1e-3, 1e-8, 1e-16])
def test_features_may_shrink_by_orders_of_magnitude(head, maps, shrunk):
    before = head.train()(maps)
    assert torch.allclose(head(shrunk * maps), before, atol=ROUNDING)
    head.eval().set_statistics(head.pool(shrunk * maps))
    assert torch.allclose(head(shrunk * maps), before, atol=ROUNDING)


def test_a_channel_that_never_varies_adds_nothing_and_its_gradient_is_finite(head, maps):
    maps[:, 2] = 0
    maps.requires_grad_()
    logits = head.train()(maps)
    logits.square().sum().backward()
    assert torch.isfinite(maps.grad).all()
    assert not maps.grad[:, 2].any()
    head.linear.weight.data[:, 2] = 1e6
    assert torch.equal(head(maps), logits)


def test_logits_are_fp32_under_autocast(head, maps):
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.train()(maps.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, head(maps.bfloat16()))


def test_statistics_are_saved_with_the_weights(head, maps):
    head.set_statistics(head.pool(maps))
    twin = PooledHead(5, 2)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.eval()(maps), head.eval()(maps))


def test_standardised_features_have_mean_0_and_variance_1():
    features = 3 + 5 * torch.randn(50, 4)
    got = standardise(features, features.mean(0), features.var(0, correction=0))
    assert torch.allclose(got.mean(0), torch.zeros(4), atol=ROUNDING)
    assert torch.allclose(got.var(0, correction=0), torch.ones(4), atol=ROUNDING)
