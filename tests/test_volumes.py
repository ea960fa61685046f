"""NIfTI volumes: what is read of a file, and the whole way with a network for volumes; the network is tiny."""

import gzip
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch import nn

import tiny_volumes
from chanscale import cli, scale_and_select, weights
from chanscale.artifact import load_model
from chanscale.catalogue import build_network, require_kind, takes_volumes
from chanscale.config import FitConfig
from chanscale.data import Strength, VolumeSpace, augment, decode_images, open_images, read_volume
from chanscale.data.images import read_image
from chanscale.data.volumes import middle_slice
from chanscale.errors import ConfigError, DataError, ModelError, UnreadableImageError, WeightsError
from chanscale.export.agreement import raw_pixels
from chanscale.export.runtime import open_session, run_session
from chanscale.predictions import predict_images
from chanscale.run_images import load_images
from networks import same_tensors
from test_cli import error_of, words
from tiny_fits import tiny_config, tiny_images
from tiny_volumes import AFFINE, NAME, SECRETS, SHAPE, TinyVolumeTrunk, save_volume, write_volumes

RNG = np.random.default_rng(1)
VALUES = RNG.integers(-1000, 2000, SHAPE).astype(np.int16)
SPACES = [VolumeSpace(), VolumeSpace(spacing=1.3), VolumeSpace(window=(-160, 240))]
OPTIONS = {
    "budget": 0.4, "scale_epochs": 1, "refine_epochs": 1, "round_to": 1, "window": (-200, 600),
}  # fmt: skip
WHOLE = VolumeSpace(window=(0, 65535))


def read(path, size=16, space=WHOLE):
    return read_volume(path, size=size, space=space)


# --- one file


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("codes", ["LPS", "SAR", "AIL"])
def test_a_volume_in_another_axis_order_with_its_affine_reads_the_same(space, codes, tmp_path):
    image = nibabel.Nifti1Image(VALUES, AFFINE)
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(codes))
    nibabel.save(image, tmp_path / "as_it_was.nii.gz")
    nibabel.save(image.as_reoriented(turn), tmp_path / "turned.nii")
    wanted = read(tmp_path / "as_it_was.nii.gz", space=space)
    assert wanted.max() > wanted.min()
    np.testing.assert_array_equal(read(tmp_path / "turned.nii", space=space), wanted)


def test_the_axes_run_right_anterior_and_superior(tmp_path):
    values = np.zeros((8, 8, 8), np.uint16)
    values[1, 6, 2] = 65535  # of LPS: near the right, near the back, near the feet
    cube = read(save_volume(tmp_path / "a.nii", values, np.diag([-1.0, -1.0, 1.0, 1.0])), size=8)
    assert [int(place) for place in np.argwhere(cube[0])[0]] == [6, 1, 2]


def test_grey_levels_are_kept_where_nothing_is_resampled(tmp_path):
    values = np.arange(16**3, dtype=np.uint16).reshape(16, 16, 16)
    path = save_volume(tmp_path / "a.nii.gz", values, np.eye(4))
    np.testing.assert_array_equal(read(path)[0], values)
    np.testing.assert_array_equal(read(path, space=VolumeSpace(spacing=1, window=(0, 65535)))[0], values)
    bytewise = save_volume(tmp_path / "b.nii.gz", (values % 256).astype(np.uint8), np.eye(4))
    np.testing.assert_array_equal(
        read(bytewise, space=VolumeSpace(window=(0, 255)))[0], (values % 256) * np.uint16(257)
    )


def test_what_a_value_is_stored_as_changes_nothing(tmp_path):
    values = RNG.integers(0, 120, SHAPE) * 2 - 100
    kinds = {"int16": values, "float32": values, "float64": values, ">i4": values}
    paths = [save_volume(tmp_path / f"{i}.nii", values.astype(kind)) for i, kind in enumerate(kinds)]
    scaled = nibabel.Nifti1Image(((values + 100) // 2).astype(np.uint8), AFFINE)
    scaled.header.set_slope_inter(2, -100)
    nibabel.save(scaled, tmp_path / "scaled.nii")
    wanted = read(paths[0], space=VolumeSpace())
    for path in (*paths[1:], tmp_path / "scaled.nii"):
        np.testing.assert_array_equal(read(path, space=VolumeSpace()), wanted)


def test_a_volume_keeps_its_size_in_mm_and_lies_in_the_middle(tmp_path):
    values = np.full((10, 10, 5), 65535, np.uint16)
    path = save_volume(tmp_path / "a.nii", values, np.diag([1.0, 1.0, 2.0, 1.0]))
    cube = read(path, size=20, space=VolumeSpace(spacing=1, window=(0, 65535)))[0]
    inside = np.zeros_like(cube)
    inside[5:15, 5:15, 5:14] = 1  # along the last axis 4 steps of 2 mm, which 9 places of 1 mm span
    assert set(np.unique(cube[inside == 0])) == {0}
    assert cube[6:14, 6:14, 6:13].min() == 65535


def test_means_are_kept_where_voxels_get_larger(tmp_path):
    values = RNG.integers(0, 65535, (32, 32, 32)).astype(np.uint16)
    cube = read(save_volume(tmp_path / "a.nii", values, np.eye(4)), size=8)[0]
    np.testing.assert_allclose(cube, values.reshape(8, 4, 8, 4, 8, 4).mean((1, 3, 5)), atol=1)


def test_a_volume_of_one_value_is_black_and_one_of_few_voxels_is_seen(tmp_path):
    assert not read(save_volume(tmp_path / "a.nii", np.full(SHAPE, 7.0)), space=VolumeSpace()).any()
    lone = np.zeros((16, 16, 16), np.uint8)
    lone[3, 3, 3] = 1
    assert read(save_volume(tmp_path / "b.nii", lone, np.eye(4)), space=VolumeSpace()).max() == 65535


def bad_files(folder):
    whole = save_volume(folder / "whole.nii", VALUES).read_bytes()
    lost = VALUES.astype(np.float32)
    lost[0, 0, 0] = np.nan
    save_volume(folder / "nan.nii", lost)
    save_volume(folder / "times.nii", np.stack([VALUES] * 3, axis=-1))
    save_volume(folder / "slice.nii", VALUES[:, :, :1])
    save_volume(folder / "complex.nii", VALUES.astype(np.complex64))
    (folder / "truncated.nii").write_bytes(whole[:-100])
    (folder / "truncated.nii.gz").write_bytes(gzip.compress(whole)[:-100])
    (folder / "header.nii").write_bytes(whole[:200])
    (folder / "empty.nii").write_bytes(b"")
    (folder / "text.nii").write_bytes(b"no volume at all" * 50)
    (folder / "text.nii.gz").write_bytes(b"no volume at all" * 50)
    flat = nibabel.Nifti1Image(VALUES, AFFINE)
    flat.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
    nibabel.save(flat, folder / "flat.nii")
    huge = bytearray(whole)
    huge[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (folder / "huge.nii").write_bytes(huge)
    offset = bytearray(whole)
    offset[108:112] = np.array(2e9, "<f4").tobytes()
    (folder / "offset.nii.gz").write_bytes(gzip.compress(bytes(offset)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan.nii", "1 voxels that are NaN"),
        ("times.nii", r"4 axes \(12, 14, 10, 3\)"),
        ("slice.nii", "which is no volume"),
        ("complex.nii", "voxels of complex64"),
        ("truncated.nii", "cannot be decoded"),
        ("truncated.nii.gz", "cannot be decoded"),
        ("header.nii", "something else|cannot be decoded"),
        ("empty.nii", "empty file"),
        ("text.nii", "something else"),
        ("text.nii.gz", "cannot be decoded"),
        ("flat.nii", "affine"),
        ("huge.nii", "wanted at most"),
        ("offset.nii.gz", "a header of at most"),
        ("absent.nii", "cannot be decoded"),
    ],
)
def test_what_is_no_volume_is_one_line_that_names_the_file_and_no_patient(name, said, tmp_path):
    bad_files(tmp_path)
    with pytest.raises(UnreadableImageError, match=said) as caught:
        read(tmp_path / name)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / name))
    assert "\n" not in text
    assert not any(secret.decode() in text for secret in SECRETS)


def test_the_sform_counts_whatever_the_voxel_sizes_of_the_header_say(tmp_path):
    image = nibabel.Nifti1Image(VALUES, AFFINE)
    nibabel.save(image, tmp_path / "right.nii")
    image.header.set_zooms((7, 7, 7))
    image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "wrong.nii")
    np.testing.assert_array_equal(read(tmp_path / "wrong.nii"), read(tmp_path / "right.nii"))


def test_a_spacing_that_would_fill_the_memory_is_refused(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"spacing of 0\.001 mm"):
        read(save_volume(tmp_path / "a.nii", VALUES), space=VolumeSpace(spacing=0.001))


def test_a_single_time_point_is_a_volume(tmp_path):
    four = save_volume(tmp_path / "four.nii", VALUES[..., None])
    np.testing.assert_array_equal(read(four), read(save_volume(tmp_path / "three.nii", VALUES)))


def test_the_middle_slice_has_anterior_on_top_and_right_on_the_left():
    cube = np.zeros((1, 4, 4, 4), np.uint16)
    cube[0, 3, 3, 2] = 1
    assert np.argwhere(middle_slice(cube)).tolist() == [[0, 0, 0]]


# --- sets and batches


def test_a_folder_of_volumes_is_decoded_cached_or_not_alike(tmp_path):
    images = open_images(write_volumes(tmp_path / "data", 4))
    assert images.dimensions == 3
    kept = decode_images(images, image_size=8, space=WHOLE)
    read_again = decode_images(images, image_size=8, space=WHOLE, cache_bytes=0)
    assert (kept.cached, read_again.cached) == (True, False)
    batch, labels = kept.batch([0, 3])
    assert batch.shape == (2, 1, 8, 8, 8)
    assert labels.tolist() == [0, 1]
    assert torch.equal(batch, read_again.batch([0, 3])[0])


def test_pictures_and_volumes_are_not_mixed_and_not_mistaken(tmp_path):
    images = open_images(write_volumes(tmp_path / "data", 4))
    with pytest.raises(DataError, match="is a volume, and this takes pictures"):
        decode_images(images, image_size=8)
    with pytest.raises(DataError, match="is a picture, and the model takes volumes"):
        decode_images(tiny_images().images, image_size=8, space=WHOLE)
    with pytest.raises(UnreadableImageError, match="got a volume"):
        read_image(images.records[0].path, size=8)
    mixed = replace(images, records=(*images.records, *tiny_images(2).images.records))
    with pytest.raises(DataError, match=r"4 volumes.* and 2 pictures"):
        decode_images(mixed, image_size=8, space=WHOLE)


STILL = Strength(rotation=0, shift=0, zoom=(1, 1), mirror=0, brightness=0, contrast=0, gamma=1)


def changed(volumes, seed=0, **strength):
    return augment(
        volumes, generator=torch.Generator().manual_seed(seed), strength=replace(STILL, **strength)
    )


def test_augmentation_of_volumes_depends_on_the_generator_alone_and_still_ones_stay():
    volumes = torch.rand(3, 1, 8, 8, 8)
    first, again, other = (
        augment(volumes, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == (volumes.shape, torch.float32)
    torch.testing.assert_close(changed(volumes), volumes, atol=1e-5, rtol=0)


def test_a_sure_mirror_swaps_right_and_left_of_a_volume():
    volumes = torch.rand(2, 1, 8, 8, 8)
    torch.testing.assert_close(changed(volumes, mirror=1), volumes.flip(2), atol=1e-5, rtol=0)


def test_rotations_of_a_volume_are_about_its_centre_and_as_small_as_told():
    places = torch.arange(33.0) - 16
    ball = torch.exp(-((places[:, None, None] - 8) ** 2 + places[:, None] ** 2 + places**2) / 8)
    turned = changed(ball.expand(20, 1, -1, -1, -1), rotation=10)
    mass = turned[:, 0] / turned[:, 0].sum((1, 2, 3), keepdim=True)
    centres = torch.stack([(mass.movedim(axis, 1).sum((2, 3)) * places).sum(1) for axis in (1, 2, 3)], 1)
    torch.testing.assert_close(centres.norm(dim=1), torch.full((20,), 8.0), atol=0.1, rtol=0)
    angles = torch.rad2deg(torch.acos(centres[:, 0] / centres.norm(dim=1)))
    assert 5 < angles.max() < 10 * 3**0.5  # three turns, each of 10 degrees at most


# --- networks


def test_a_network_for_volumes_is_named_and_needs_a_file_of_weights(tmp_path):
    with torch.device("meta"):
        network = build_network("monai:resnet10@3d")
    assert network.conv1.weight.shape[1:] == (1, 7, 7, 7)
    assert takes_volumes("monai:resnet10@3d")
    with pytest.raises(WeightsError, match="--weights FILE"):
        scale_and_select("monai:resnet10@3d", tmp_path)
    with pytest.raises(ConfigError, match="timm has no networks for volumes; have monai"):
        build_network("timm:resnet10@3d")
    with pytest.raises(ConfigError, match="and vgg16 is for pictures"):
        require_kind("vgg16", 3)
    with pytest.raises(ConfigError, match=r"the images are pictures, and monai:resnet10@3d is for volumes"):
        require_kind("monai:resnet10@3d", 2)


def test_a_network_of_ones_own_must_have_the_dimensions_of_the_images(tmp_path):
    config = tiny_config(**{**OPTIONS, "window": None})
    with pytest.raises(ModelError, match="convolves in 3 dimensions, and the images have 2"):
        scale_and_select(TinyVolumeTrunk(), tiny_images().images, config=config)
    flat = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(ModelError, match="convolves in 2 dimensions, and the images have 3"):
        scale_and_select(flat, write_volumes(tmp_path / "data", 12), config=config)


def test_options_of_volumes_are_refused_for_pictures_and_checked():
    with pytest.raises(ConfigError, match="spacing and window are for volumes"):
        load_images(tiny_images().images, tiny_config(window=(0, 1)), None)
    with pytest.raises(ConfigError, match="a lower and a higher value"):
        FitConfig.build({"window": (1, 0)})
    with pytest.raises(ConfigError, match="a lower and a higher value"):
        VolumeSpace(window=(1, 0))


# --- the whole way


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on volumes by the command line, their folder, and the arguments; the network stays registered."""
    folder = tmp_path_factory.mktemp("volumes")
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(2)
        state = TinyVolumeTrunk().state_dict()
        tiny_volumes.register(patch.setitem)
        patch.setattr(weights, "resolve_weights", lambda *_, **__: state)
        data = write_volumes(folder / "data")
        arguments = [
            "fit", str(data), "--backbone", NAME, "--image-size=32", "--window", "-200", "600", "--budget=0.4",
            "--round-to=1", "--scale-epochs=1", "--refine-epochs=1", "--precision=32-true", "--batch-size=8",
            "--micro-batch=4", "--workers=0", "--depth=full",
        ]  # fmt: skip
        assert cli.run([*arguments, "--out", str(folder / "run")]) == 0
        yield folder / "run", data, arguments


def test_the_model_holds_how_volumes_are_read_and_predict_reads_them_so(made):
    run, data, _ = made
    model, info = load_model(run)
    assert info.space == VolumeSpace(window=(-200, 600))
    assert info.shape == (1, 32, 32, 32)
    paths = sorted(data.rglob("*.nii.gz"))[:3]
    with torch.no_grad():
        cubes = np.stack([read_volume(path, size=32, space=info.space) for path in paths])
        logits = model(torch.from_numpy(cubes.astype(np.float32) / 65535))
    wanted = torch.cat([1 - logits.sigmoid(), logits.sigmoid()], 1)
    found = predict_images(model, info, paths).probabilities
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_a_fit_in_memory_is_the_same_run_again_and_the_same_as_its_file(made):
    run, data, _ = made
    loaded, info = load_model(run)
    config = FitConfig.read(run / "config.yaml")
    again = scale_and_select(NAME, data, config=config)
    assert again.info == info
    assert same_tensors(again.model, loaded)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["auc"] == again.metrics["auc"]
    assert metrics["parameters"]["kept"] < metrics["parameters"]["trunk"] * 0.6
    assert metrics["leaks"] is None
    assert "for pictures" in metrics["novelty"]["reason"]


def test_nothing_of_a_header_is_written_anywhere(made):
    run, _, _ = made
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"model.safetensors", "report.html", "splits.csv"} <= {path.name for path in files}
    assert not [path for path in files if any(secret in path.read_bytes() for secret in SECRETS)]


def test_evaluate_and_predict_take_volumes_and_no_pictures(made, capsys, tmp_path):
    run, data, _ = made
    assert cli.run(["evaluate", str(run), str(data), "--json"]) == 0
    assert json.loads(words(capsys)[0])["n"] > 0
    assert cli.run(["predict", str(run), str(data / "yes"), "--json"]) == 0
    assert len(json.loads(words(capsys)[0])) == 12
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    assert "is a picture, and the model takes volumes" in error_of(capsys, ["predict", run, picture])


def test_the_report_shows_slices_and_names_the_space(made, capsys):
    run, data, _ = made
    assert cli.run(["report", str(run), "--images", str(data)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "volumes, made 32 × 32 × 32 voxels, squashed, axes to RAS, values -200 to 600" in page
    assert "--window -200.0 600.0" in page
    words(capsys)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_an_export_takes_cubes_and_agrees_with_the_run(made, form, tmp_path, capsys):
    run, data, _ = made
    target = tmp_path / "model"
    assert cli.run(["export", str(run), "--format", form, "--images", str(data), "--out", str(target)]) == 0
    assert "Largest difference" in "".join(words(capsys))
    if form == "onnx":
        model, info = load_model(run)
        path = next(data.rglob("*.nii.gz"))
        cube = read_volume(path, size=32, space=info.space)
        found = run_session(open_session(target))(raw_pixels(cube))
        np.testing.assert_allclose(found, predict_images(model, info, [path]).probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "RUN", "--format", "web"], "web is for models of pictures"),
        (["export", "RUN", "--int8", "--images", "DATA"], "int8 is for models of pictures"),
        (["explain", "RUN", "DATA", "--out", "why"], "explain is for models of pictures"),
        (["latency", "RUN"], "latency is for models of pictures"),
        (["stability", "RUN", "COPY", "--images", "DATA"], "stability is for models of pictures"),
        (["leaks", "DATA"], "is a volume, and this takes pictures"),
        (["predict", "RUN", "DATA", "--abstain"], "nor one of volumes"),
        (["fit", "DATA", "--out", "other"], "vgg16 is for pictures; name a network for volumes"),
    ],
)
def test_what_does_not_work_on_volumes_says_so_in_one_line(made, arguments, said, tmp_path, capsys):
    run, data, _ = made
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    places = {"RUN": run, "DATA": data, "COPY": copy, "why": tmp_path / "why", "other": tmp_path / "other"}
    assert said in error_of(capsys, [places.get(argument, argument) for argument in arguments])


class Own(TinyVolumeTrunk):
    """A network that no name rebuilds."""


def test_a_network_of_ones_own_reloads_as_a_program(tmp_path):
    data = write_volumes(tmp_path / "data", 16)
    config = tiny_config(**OPTIONS)
    run = scale_and_select(Own(), data, config=config, out=tmp_path / "run")
    program, info = load_model(tmp_path / "run")
    assert info.rebuilt_by == "program"
    x = torch.rand(3, *info.shape)
    with torch.no_grad():
        torch.testing.assert_close(program(x), run.model(x), atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="this program takes images"):
        program(x[:, :, 0])
