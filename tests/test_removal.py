import copy

import pytest
import torch

from chanscale.classifier import classification_loss
from chanscale.errors import InexactRemovalError
from chanscale.group_scales import scale_parameters
from chanscale.pruning import ROUNDING
from chanscale.removal import remove_channels
from chanscale.selection import ChannelSelection
from chanscale.state import make_optimizer
from networks import attach, build_classifier, images, renew_statistics, set_scales, widths_of
from tiny_fits import tiny_config


def step(model, optimizer, seed):
    """Take one step of the optimizer, from images that the seed alone decides."""
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    classification_loss(model.eval()(x), torch.arange(6) % 2).mean().backward()
    optimizer.step()


@pytest.fixture
def trained():
    """A scaled classifier, its optimizer after some steps, the index book, and a selection of channels."""
    model = attach(build_classifier())
    optimizer = make_optimizer(model, tiny_config())
    for seed in range(3):
        step(model, optimizer, seed)
    selection = set_scales(model)
    renew_statistics(model)
    return (
        model,
        optimizer,
        {name: torch.arange(width) for name, width in widths_of(model).items()},
        selection,
    )


def remove(trained):
    model, optimizer, kept, selection = trained
    removal = remove_channels(model, optimizer, kept, selection, example=images(2, side=32))
    renewed = make_optimizer(removal.model, tiny_config())
    removal.restore(renewed)
    return removal, renewed


def test_the_moments_of_adam_follow_their_parameters(trained):
    model, optimizer, _, selection = trained
    removal, renewed = remove(trained)
    before = {name: optimizer.state[scale] for name, scale in scale_parameters(model).items()}
    after = {name: renewed.state[scale] for name, scale in scale_parameters(removal.model).items()}
    for name, kept in selection.kept.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[name][key], before[name][key][kept])
            assert after[name][key].any()
        assert after[name]["step"] == 3
    last = selection.kept["trunk.6"]
    old, new = optimizer.state[model.head.linear.weight], renewed.state[removal.model.head.linear.weight]
    assert torch.equal(new["exp_avg"], old["exp_avg"][:, last])
    old, new = optimizer.state[model.head.linear.bias], renewed.state[removal.model.head.linear.bias]
    assert torch.equal(new["exp_avg"], old["exp_avg"])


def test_training_goes_on_as_if_the_channels_were_still_there(trained):
    model, optimizer, _, selection = trained
    removal, renewed = remove(trained)
    step(removal.model, renewed, 7)
    # A scale of 0 has a gradient, but its channel has no weight in what follows: the others do not feel it.
    step(model, optimizer, 7)
    for name, scale in scale_parameters(removal.model).items():
        torch.testing.assert_close(
            scale, scale_parameters(model)[name][selection.kept[name]], rtol=1e-4, atol=1e-5
        )


def test_removing_zeros_changes_nothing_and_the_book_keeps_the_original_indices(trained):
    *_, selection = trained
    removal, optimizer = remove(trained)
    assert removal.change < ROUNDING
    assert {name: kept.tolist() for name, kept in removal.kept.items()} == {
        name: kept.tolist() for name, kept in selection.kept.items()
    }
    again = ChannelSelection({"trunk.0": torch.tensor([0, 2])})
    twice = remove_channels(removal.model, optimizer, removal.kept, again, example=images(2, side=32))
    assert torch.equal(twice.kept["trunk.0"], selection.kept["trunk.0"][[0, 2]])
    assert torch.equal(twice.kept["trunk.3"], selection.kept["trunk.3"])


def test_removing_what_is_not_0_tells_how_much_that_changed(trained):
    model, optimizer, kept, _ = trained
    selection = ChannelSelection({"trunk.0": torch.arange(2)})
    assert remove_channels(model, optimizer, kept, selection, example=images(2, side=32)).change > 1e-3


def test_model_and_optimizer_are_left_as_they_were(trained):
    model, optimizer, kept, _ = trained
    tensors, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    remove(trained)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state["state"][index][key]) for key, tensor in moments.items())
    assert all(
        len(indices) == width for indices, width in zip(kept.values(), widths_of(model).values(), strict=True)
    )


def test_a_removal_that_is_not_exact_is_refused(trained, monkeypatch):
    model, optimizer, kept, selection = trained
    monkeypatch.setattr("chanscale.removal.silence_channels", lambda _model, _selection: None)
    selection = ChannelSelection({"trunk.0": torch.arange(2)})
    with pytest.raises(InexactRemovalError, match="Please report it"):
        remove_channels(model, optimizer, kept, selection, example=images(2, side=32))
