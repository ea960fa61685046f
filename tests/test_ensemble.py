"""Several models as one."""

import json

import pytest
import torch

import tiny_backbone
from chanscale import cli
from chanscale.artifact import save_model
from chanscale.classifier import probabilities, to_channels_last
from chanscale.ensemble import RESULT, Ensemble, load_ensemble, load_predictor
from chanscale.errors import ArtifactError, ConfigError
from chanscale.evaluation import predict
from chanscale.pruning import prune_channels
from chanscale.selection import ChannelSelection
from networks import attach, build_classifier, describe, images, renew_statistics, set_scales
from test_cli import draw
from tiny_backbone import TinyTrunk
from tiny_fits import tiny_images


class Fixed(torch.nn.Module):
    """A model that says the same of all images."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def make_member(folder, seed=0, classes=("no", "yes")):
    """Write a small model of the tiny backbone, whose head depends on `seed`, and return it."""
    torch.manual_seed(seed)
    model = attach(build_classifier(TinyTrunk(), classes=classes))
    kept = dict(set_scales(model).kept)
    model = to_channels_last(renew_statistics(prune_channels(model, ChannelSelection(kept))))
    torch.nn.init.normal_(model.head.linear.weight)
    folder.mkdir(parents=True)
    save_model(model, describe(model, kept, backbone="tiny"), folder / "model.safetensors")
    return model.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a cross-validation, as far as an ensemble reads it, of three models."""
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    for fold in range(3):
        make_member(tmp_path / "runs" / f"r0-f{fold}", fold)
    note(tmp_path, [f"runs/r0-f{fold}" for fold in range(3)])
    return tmp_path


def note(folder, runs):
    (folder / RESULT).write_text(json.dumps({"members": [{"run": run} for run in runs]}))


@torch.no_grad()
@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_an_ensemble_of_copies_is_the_single_model(classes):
    model, x = build_classifier(TinyTrunk(), classes=classes).eval(), images(side=32)
    torch.nn.init.normal_(model.head.linear.weight)
    single = model(x)
    for count in (1, 2, 3, 7):
        together = Ensemble([model] * count, classes=classes)(x)
        assert together.shape == single.shape
        assert together.dtype == torch.float32
        # The same but for one rounding to fp32.
        torch.testing.assert_close(probabilities(together), probabilities(single), rtol=2e-7, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize(
    "logits", [[(2.0,), (-1.0,), (0.5,)], [(1.0, 2.0, 3.0), (0.0, 0.0, 9.0), (4.0, 1.0, 1.0)]]
)
def test_it_says_the_mean_of_the_probabilities(logits):
    members, x = [Fixed(*one) for one in logits], torch.zeros(2, 3, 8, 8)
    classes = ("no", "yes") if len(logits[0]) == 1 else ("a", "b", "c")
    said = probabilities(Ensemble(members, classes=classes)(x))
    wanted = torch.stack([probabilities(member(x)) for member in members]).mean(0)
    torch.testing.assert_close(said, wanted)


@torch.no_grad()
def test_the_order_of_members_does_not_matter():
    members, x = [Fixed(value) for value in (1e-3, 3.7, -12.4, 0.33, 8.25)], torch.zeros(1, 3, 8, 8)
    forward, turned, mixed = (
        Ensemble([members[i] for i in order], classes=("no", "yes"))(x)
        for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3))
    )
    assert torch.equal(forward, turned)
    assert torch.equal(forward, mixed)


@torch.no_grad()
@pytest.mark.parametrize("logit", [-100.0, -40.0, 40.0, 100.0])
def test_members_that_are_very_sure_leave_a_finite_logit(logit):
    said = Ensemble([Fixed(logit), Fixed(logit)], classes=("no", "yes"))(torch.zeros(1, 3, 8, 8))
    assert said.item() == pytest.approx(logit, rel=1e-6)


def test_an_ensemble_without_members_is_refused():
    with pytest.raises(ConfigError, match="one model at least"):
        Ensemble([], classes=("no", "yes"))


def test_the_models_of_a_folder_are_averaged_as_a_classifier_is_used(folder):
    model, info = load_ensemble(folder)
    singles = [load_predictor(folder / "runs" / f"r0-f{fold}")[0] for fold in range(3)]
    data = tiny_images(10)
    said, labels = predict(model, data, range(10))
    wanted = sum(predict(single, data, range(10))[0] for single in singles) / 3
    assert said == pytest.approx(wanted, abs=1e-6)
    assert abs(predict(singles[0], data, range(10))[0] - said).max() > 1e-3, "members must differ"
    assert labels.tolist() == [i % 2 for i in range(10)]
    assert model.classes == info.classes == ("no", "yes")
    assert info.kept == {}
    assert info.operating_point is info.prediction_sets is None
    assert not model.training
    assert isinstance(load_predictor(folder)[0], Ensemble)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "pass the folder of a finished cross-validation"),
        ("", "is damaged"), ("[]", "is damaged"), ('{"members": 3}', "is damaged"), ('{"members": [{}]}', "is damaged"),
        ('{"members": []}', "must name the runs"),
        ('{"members": [{"run": "../elsewhere"}]}', "must name the runs"),
        ('{"members": [{"run": "runs/r0-f9"}]}', "there is no model at"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none_is_one_line(folder, text, message):
    (folder / RESULT).unlink()
    if text is not None:
        (folder / RESULT).write_text(text)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_ensemble(folder)
    assert "\n" not in str(caught.value)


def test_models_of_other_classes_have_no_average(folder):
    make_member(folder / "runs" / "r1-f0", classes=("a", "b", "c"))
    note(folder, ["runs/r0-f0", "runs/r1-f0"])
    with pytest.raises(ArtifactError, match="are of different kinds"):
        load_ensemble(folder)


def test_predict_and_evaluate_take_the_folder_for_a_run(folder, tmp_path_factory, capsys):
    data = draw(tmp_path_factory.mktemp("images"), patients=4, classes=("no", "yes"))
    assert cli.run(["predict", str(folder), str(data), "--json"]) == 0
    together = json.loads(capsys.readouterr().out)
    singles = []
    for fold in range(3):
        assert cli.run(["predict", str(folder / "runs" / f"r0-f{fold}"), str(data), "--json"]) == 0
        singles.append(json.loads(capsys.readouterr().out))
    for row, *parts in zip(together, *singles, strict=True):
        mean = sum(part["probabilities"]["yes"] for part in parts) / 3
        assert row["probabilities"]["yes"] == pytest.approx(mean, abs=1e-6)
    assert cli.run(["evaluate", str(folder), str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 8
    assert cli.run(["predict", str(folder), str(data), "--abstain"]) == 2
    assert "novelty.safetensors" in capsys.readouterr().err
