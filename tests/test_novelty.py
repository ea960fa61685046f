import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chanscale.artifact import METADATA, load_model, save_model
from chanscale.classifier import to_channels_last
from chanscale.data.loading import decode_images
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import ImageRecord, ImageSet
from chanscale.data.splits import Splits
from chanscale.errors import ArtifactError, ConfigError, DataError, ModelError
from chanscale.evaluation import predict
from chanscale.folding import fold_grey
from chanscale.novelty.facts import COLUMNS, SHAPE
from chanscale.novelty.fitting import fit_novelty, fit_traits
from chanscale.novelty.reasons import WORDS
from chanscale.novelty.storage import NOVELTY, load_novelty, save_novelty
from chanscale.novelty.tails import Tails
from chanscale.novelty.thumbnails import SIDE
from chanscale.novelty.traits import Traits, find_layers
from chanscale.programs import Program
from networks import attach, build_classifier, describe
from tiny_backbone import TinyTrunk, register

PIXELS = 64
PARTS = 20
"""Those of the spectrum of an image of 32 pixels, as `as_images` makes them."""

SPLITS = Splits(train=tuple(range(60)), validation=tuple(range(60, 80)), test=())


def as_images(arrays, classes=("normal", "opacity")):
    records = (ImageRecord(str(n), n % 2, str(n), pixels=array) for n, array in enumerate(arrays))
    return decode_images(ImageSet(Path("made"), classes, tuple(records)), image_size=32, workers=0)


def draw(count, first=0):
    return [draw_phantom(3, size=PIXELS, label=n % 2, patient=n).image for n in range(first, first + count)]


def tiny_model():
    torch.manual_seed(2)
    return to_channels_last(attach(build_classifier(TinyTrunk()))).eval()


@pytest.fixture(scope="module")
def phantoms():
    return draw(110)


@pytest.fixture(scope="module")
def fitted(phantoms):
    """A model, and a detector fitted on phantoms."""
    model = tiny_model()
    return model, fit_novelty(model, as_images(phantoms[:80]), SPLITS)


def draw_traits(count, rng, *, shift=0.0, features=20):
    """Traits of images that could be exchanged; of others, if `shift`ed."""
    mix = np.random.default_rng(1).normal(size=(6, SIDE * SIDE))
    thumbnails = (
        rng.normal(size=(count, 6)) @ mix + 2 * mix[0] + rng.normal(size=(count, SIDE * SIDE)) + shift
    )
    facts = rng.gamma(2, size=(count, len(COLUMNS) + len(SHAPE))) + shift
    # As of images: parts that go together, and heavy tails.
    spectra = rng.standard_t(5, size=(count, PARTS)).cumsum(1) + shift
    inside = rng.standard_t(5, size=(count, features)) + shift
    return Traits(facts, thumbnails, spectra, inside, np.full((count, 2), 0.5, np.float32))


@pytest.mark.parametrize(("count", "features", "repeats"), [(25, 0, 16), (50, 20, 16), (300, 20, 4)])
def test_false_alarms_are_as_rare_as_wanted(count, features, repeats):
    rng, alarms = np.random.default_rng(4), []
    for _ in range(repeats):
        traits = draw_traits(count, rng, features=features)
        detector = fit_traits(traits, np.ones(count, bool), np.arange(count).astype(str), rate=0.1)
        fresh = detector.judge_traits(draw_traits(100, rng, features=features))
        alarms.append(np.mean([verdict.flagged for verdict in fresh]))
    # Three standard errors: repeats share a detector, so they, not the images, are what is counted.
    error = 3 * np.std(alarms) / np.sqrt(repeats)
    assert 0.02 < np.mean(alarms) < 0.1 + error


def test_what_was_not_seen_is_flagged_with_few_images_too():
    rng = np.random.default_rng(5)
    detector = fit_traits(draw_traits(25, rng), np.ones(25, bool), np.arange(25).astype(str), rate=0.1)
    assert all(verdict.flagged for verdict in detector.judge_traits(draw_traits(20, rng, shift=30.0)))


def test_images_of_one_patient_are_in_one_fold():
    rng = np.random.default_rng(6)
    half = draw_traits(40, rng)
    twice = Traits(*(np.concatenate([column, column]) for column in vars(half).values()))
    groups = np.tile(np.arange(40), 2).astype(str)
    detector = fit_traits(twice, np.ones(80, bool), groups, rate=0.1)
    fresh = [verdict.flagged for verdict in detector.judge_traits(draw_traits(1000, rng))]
    assert np.mean(fresh) < 0.25  # were a twin fitted on, each image would seem usual, and all others novel


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: 255 - x, "looks inverted"),
        (lambda x: np.rot90(x), "looks rotated by 90 degrees to the left"),
        (lambda x: np.rot90(x, -1), "looks rotated by 90 degrees to the right"),
        (lambda x: np.full_like(x, 128), "less contrast than all training images"),
        (lambda x: np.stack([x, x // 2, x], -1), "in colour; the training images are grey"),
        (lambda x: x[:, :20], "narrower than all training images"),
    ],
)
def test_what_was_done_to_an_image_is_seen_and_told(fitted, phantoms, change, reason):
    model, detector = fitted
    changed = as_images([np.ascontiguousarray(change(array)) for array in phantoms[80:]])
    verdicts = detector.judge(model, changed).verdicts
    assert np.mean([verdict.flagged for verdict in verdicts]) >= 0.9
    told = [any(words.startswith(reason) for words in verdict.reasons) for verdict in verdicts]
    assert np.mean(told) > 0.5


def test_phantoms_are_as_usual_to_a_detector_fitted_on_phantoms(fitted, phantoms):
    model, detector = fitted
    verdicts = detector.judge(model, as_images(phantoms[80:])).verdicts
    assert np.mean([verdict.flagged for verdict in verdicts]) < 0.2
    assert all(verdict.reasons == () for verdict in verdicts if not verdict.flagged)


def shape_noise(seed, exponent):
    """A picture whose power falls as a power of the frequency, of a mean and a deviation that are always the same."""
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(PIXELS, PIXELS)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(PIXELS), np.fft.fftfreq(PIXELS)))
    grey = np.fft.ifft2(noise * np.maximum(frequency, 1 / PIXELS) ** -exponent).real
    return np.clip(128 + 30 * (grey - grey.mean()) / grey.std(), 0, 255).astype(np.uint8)


def test_detail_in_another_proportion_is_seen_and_told_in_words():
    model = tiny_model()
    detector = fit_novelty(model, as_images([shape_noise(n, 1.2) for n in range(80)]), SPLITS)
    judged = [
        detector.judge(model, as_images([shape_noise(n, exponent) for n in range(80, 120)])).verdicts
        for exponent in (1.2, 1.8)
    ]
    usual, other = (np.mean([verdict.flagged for verdict in verdicts]) for verdicts in judged)
    assert usual < 0.2
    assert other >= 0.9
    assert np.mean([WORDS["spectrum"] in verdict.reasons for verdict in judged[1]]) >= 0.9


def test_a_detector_of_colour_images_misses_the_colour(phantoms):
    rng = np.random.default_rng(7)
    arrays = [
        (array[..., None] * rng.uniform([0.8, 0.5, 0.6], [1, 0.6, 0.7])).astype(np.uint8)
        for array in phantoms[:60]
    ]
    model = tiny_model()
    detector = fit_novelty(model, as_images(arrays), Splits(tuple(range(60)), (), ()))
    [verdict] = detector.judge(model, as_images([arrays[0].mean(-1).astype(np.uint8)])).verdicts
    assert verdict.flagged
    assert "less colour than all training images" in verdict.reasons


def test_every_flag_has_a_reason_and_a_small_score(fitted, phantoms):
    model, detector = fitted
    noise = np.random.default_rng(8).integers(0, 256, (20, PIXELS, PIXELS)).astype(np.uint8)
    for verdict in detector.judge(model, as_images([*noise, *phantoms[80:]])).verdicts:
        assert verdict.flagged == (verdict.score <= detector.rate) == bool(verdict.reasons)
        assert 0 < verdict.score <= 1


def test_a_batch_is_judged_as_its_images_are_and_their_order_does_not_matter(fitted, phantoms):
    model, detector = fitted
    colour = np.stack([phantoms[81]] * 3, -1)  # makes the whole batch one of colour
    data = as_images([*phantoms[80:95], 255 - phantoms[80], colour])
    together = detector.judge(model, data).verdicts
    assert [verdict.flagged for verdict in together].count(True) >= 1
    alone = [detector.judge(model, data, [index]).verdicts[0] for index in range(len(data))]
    backwards = detector.judge(model, data, range(len(data))[::-1]).verdicts[::-1]
    assert list(together) == alone == list(backwards)
    assert replace(together[1]) == together[-1]


def test_the_probabilities_are_those_of_predict(fitted, phantoms):
    model, detector = fitted
    data = as_images(phantoms[80:100])
    assert np.array_equal(detector.judge(model, data).probabilities, predict(model, data, range(20))[0])


def test_a_near_tie_is_one_within_the_margin(fitted):
    detector = replace(fitted[1], margin=0.1)
    traits = draw_traits(4, np.random.default_rng(9), features=detector.views.features.mean.size)
    shares = np.array([[0.45, 0.55], [0.39, 0.61], [0.61, 0.39], [0.5, 0.5]], np.float32)
    verdicts = detector.judge_traits(replace(traits, probabilities=shares))
    assert [verdict.near_tie for verdict in verdicts] == [True, False, False, True]
    assert all(verdict.uncertain for verdict in verdicts if verdict.flagged or verdict.near_tie)


def test_a_program_is_judged_by_its_pixels_alone(phantoms):
    model = tiny_model()
    program = Program(model, model.classes, shape=(1, 32, 32))
    assert find_layers(program, torch.zeros(1, 1, 32, 32)) == ()
    detector = fit_novelty(program, as_images(phantoms[:80]), SPLITS)
    verdicts = detector.judge(program, as_images([255 - array for array in phantoms[80:]])).verdicts
    assert np.mean([verdict.flagged for verdict in verdicts]) >= 0.9


def test_a_layer_that_is_never_called_is_not_watched(phantoms):
    trunk = TinyTrunk()
    trunk.spare = torch.nn.Conv2d(3, 4, 1)
    model = attach(build_classifier(trunk)).eval()
    layers = find_layers(model, torch.zeros(1, 1, 32, 32))
    assert layers == find_layers(tiny_model(), torch.zeros(1, 1, 32, 32)) != ()
    assert fit_novelty(model, as_images(phantoms[:80]), SPLITS).layers == layers


def test_no_hook_stays_on_the_model(fitted, phantoms):
    model, detector = fitted
    before = [len(module._forward_hooks) for module in model.modules()]
    detector.judge(model, as_images(phantoms[:2]))
    with pytest.raises(ModelError, match=r"no layer 'trunk\.nowhere'"):
        replace(detector, layers=(*detector.layers, "trunk.nowhere")).judge(model, as_images(phantoms[:2]))
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_colour_images_of_a_network_folded_for_grey_are_refused_as_predict_refuses_them(fitted, phantoms):
    model, detector = fitted
    grey, colour = as_images(phantoms[:4]), as_images([np.stack([image] * 3, -1) for image in phantoms[:4]])
    folded = fold_grey(model, grey.batch(range(4))[0])
    assert len(detector.judge(folded, grey).verdicts) == 4
    for call in (lambda: detector.judge(folded, colour), lambda: predict(folded, colour, range(4))):
        with pytest.raises(ModelError, match="folded for grey images"):
            call()


def test_no_images_give_no_verdicts(fitted, phantoms):
    model, detector = fitted
    assert detector.judge(model, as_images(phantoms[:2]), []).verdicts == ()


def test_a_tail_goes_on_beyond_all_that_was_seen():
    scores = np.random.default_rng(0).exponential(size=(4000, 1))
    tails = Tails.fit(scores, np.array([0.01]))
    assert tails.surprise(np.array([[10.0]])) == pytest.approx(10, abs=1)
    assert tails.surprise(np.array([[-1.0]])) == 0
    constant = Tails.fit(np.zeros((50, 1)), np.array([0.5]))
    assert constant.surprise(np.array([[1.0]])) == pytest.approx(2 + np.log(10))


@pytest.mark.parametrize("option", [{"rate": 0}, {"rate": 1}, {"margin": -0.1}, {"margin": 0.5}])
def test_options_that_cannot_be_are_an_error(fitted, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        replace(fitted[1], **option)


def test_too_few_images_for_the_rate_are_an_error():
    rng = np.random.default_rng(3)
    for count, patients, words in ((18, 18, "needs 19 images"), (6, 6, "Got 6 of 6"), (40, 2, "Got 40 of 2")):
        groups = (np.arange(count) % patients).astype(str)
        with pytest.raises(DataError, match=words):
            fit_traits(draw_traits(count, rng), np.ones(count, bool), groups)


def test_traits_of_another_size_are_refused():
    rng = np.random.default_rng(11)
    detector = fit_traits(draw_traits(40, rng), np.ones(40, bool), np.arange(40).astype(str))
    other = draw_traits(3, rng)
    with pytest.raises(ModelError, match="20 parts of a spectrum, these images have 18"):
        detector.judge_traits(replace(other, spectra=other.spectra[:, :18]))


# --- the file


@pytest.fixture
def saved(fitted, monkeypatch, tmp_path):
    register(monkeypatch.setitem, monkeypatch.setattr)
    model, detector = fitted
    kept = {"trunk.features.0": torch.arange(8), "trunk.features.3": torch.arange(16)}
    save_model(model, describe(model, kept, backbone="tiny"), tmp_path / "model.safetensors")
    return detector, save_novelty(detector, tmp_path)


def test_loaded_judges_as_saved(saved, phantoms):
    detector, path = saved
    model, _ = load_model(path.parent)
    data = as_images([*phantoms[80:90], *(255 - array for array in phantoms[:5])])
    loaded = load_novelty(path.parent)
    assert loaded.judge(model, data).verdicts == detector.judge(model, data).verdicts
    assert (loaded.layers, loaded.rate, loaded.margin) == (detector.layers, detector.rate, detector.margin)


def test_a_file_without_a_spectrum_is_read_and_judges_without_it(saved, fitted, phantoms):
    detector, path = saved
    model, _ = load_model(path.parent)
    data = as_images([*phantoms[80:90], *(255 - array for array in phantoms[:5])])
    tails, place = detector.tails, detector.views.names.index("spectrum") - len(detector.views.names)
    before = replace(
        detector,
        views=replace(detector.views, spectrum=None),
        tails=Tails(np.delete(tails.start, place), np.delete(tails.step, place)),
    )
    save_novelty(before, path.parent)
    assert b"chanscale-novelty/1" in path.read_bytes()
    assert not any(name.startswith("spectrum") for name in load_file(path))
    loaded = load_novelty(path.parent)
    assert loaded.views.spectrum is None
    verdicts = loaded.judge(model, data).verdicts
    assert verdicts == before.judge(model, data).verdicts
    assert all(verdict.flagged for verdict in verdicts[10:])
    assert not any(WORDS["spectrum"] in verdict.reasons for verdict in verdicts)


def test_equal_detectors_give_equal_bytes_and_few(saved):
    detector, path = saved
    before = path.read_bytes()
    assert save_novelty(detector, path.parent).read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.safetensors", NOVELTY]
    assert len(before) < 200_000


def test_the_detector_of_another_model_is_refused(saved, fitted):
    _, path = saved
    model = tiny_model()
    with torch.no_grad():
        model.head.linear.bias.add_(1)
    kept = {"trunk.features.0": torch.arange(8), "trunk.features.3": torch.arange(16)}
    save_model(model, describe(model, kept, backbone="tiny"), path.with_name("model.safetensors"))
    with pytest.raises(ArtifactError, match="fitted on another model"):
        load_novelty(path.parent)


def test_a_missing_file_is_an_error(saved):
    _, path = saved
    path.unlink()
    with pytest.raises(ArtifactError, match=r"there is no novelty\.safetensors beside"):
        load_novelty(path.parent)
    with pytest.raises(ArtifactError, match="there is no model at"):
        save_novelty(saved[0], path.with_name("none.safetensors"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told, _: told.update(format="chanscale-novelty/99"), "has the format"),
        (lambda told, _: told.update(rate=7.0), "rate"),
        (lambda told, _: told.update(facts=["beauty"]), "measures other facts"),
        (lambda _, tensors: tensors.pop("usual"), "damaged"),
        (lambda _, tensors: tensors.pop("spectrum.axes"), "damaged"),
        (lambda told, _: told.update(format="chanscale-novelty/1"), "damaged"),
        (lambda _, tensors: tensors.update({"low": torch.zeros(2)}), "damaged"),
        (lambda _, tensors: tensors.update({"pixels.axes": torch.zeros(2, 2)}), "damaged"),
        (lambda _, tensors: tensors.update({"tails.step": torch.ones(2)}), "damaged"),
    ],
)
def test_a_file_that_was_tampered_with_is_an_error(saved, change, words):
    _, path = saved
    content, tensors = path.read_bytes(), load_file(path)
    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    change(told, tensors)
    save_file(tensors, path, {METADATA: json.dumps(told)})
    with pytest.raises(ArtifactError, match=words) as caught:
        load_novelty(path.parent)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_an_error(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        load_novelty(path.parent)
