"""DICOM files in folders and tables: which are listed, who the patients are, and that nothing tells of them."""

import csv
import io
import json
import re
import shutil
import stat
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

import tiny_backbone
from chanscale import cli, scale_and_select
from chanscale.artifact import load_model, model_path, read_model, write_tensors
from chanscale.comparison.cells import Cell, CellSpec, digest_images, run_cell
from chanscale.comparison.folds import assign_folds
from chanscale.comparison.methods import configure
from chanscale.config import FitConfig
from chanscale.data import decode_images, open_images, read_splits, split_images, write_splits
from chanscale.data.dicom_patients import KEY_VARIABLE, key_path, load_key, rename_patient
from chanscale.data.listing import list_images
from chanscale.data.sources import ImageRecord
from chanscale.depth import cross_validate
from chanscale.errors import ConfigError, DataError, SplitError
from chanscale.leaks.search import find_leaks
from chanscale.novelty import traits
from chanscale.novelty.traits import read_dimensions
from chanscale.own_images import open_own_images
from dicom_files import dicom, save, write
from tiny_reports import few_draws

KEY = "k" * 32
SECRETS = {
    "PatientName": "Zwiebelhauser^Ottokarine", "PatientBirthDate": "19470913", "StudyDate": "20190827",
    "AccessionNumber": "ACC7731904", "InstitutionName": "Klinikum Sonderwald", "OperatorsName": "Quastenberg",
    "ReferringPhysicianName": "Fliedermoos^Alwin", "PatientAddress": "Hollerweg 71", "StudyTime": "174403",
    "PatientComments": "limping since the war", "OtherPatientIDs": "OTHERID88213", "StudyID": "STUDY55120",
}  # fmt: skip
OPTIONS = [
    "--backbone=tiny", "--image-size=32", "--budget=0.5", "--round-to=1", "--scale-epochs=1", "--refine-epochs=1",
    "--precision=32-true", "--batch-size=8", "--micro-batch=8", "--workers=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Path:
    """A user's folder of the test's own, and no key from outside."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("CHANSCALE_HOME", str(folder))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return folder


def film(label: int = 0, *, seed: int = 0, size: int = 32):
    """Return 12-bit noise, with a bright spot for the second class."""
    pixels = np.random.default_rng(seed).integers(0, 2000, (size, size)).astype(np.uint16)
    pixels[8:24, 8:24] += np.uint16(1800 * label)
    return pixels


def patient_id(patient: int) -> str:
    return f"HOSP-{7204100 + patient}"


def draw(folder: Path, patients: int = 24, films: int = 2, **tags) -> Path:
    """Write DICOM files of each patient to a folder per class, under names that tell nothing."""
    for patient in range(patients):
        label = patient % 2
        for index in range(films):
            number = (patient * 37 % 100) * films + index
            write(folder / ("clear", "spot")[label] / f"{number:04}.dcm", film(label, seed=number), bits=12,
                  PatientID=patient_id(patient), **tags)  # fmt: skip
    return folder


def sets_of(groups) -> set[frozenset[int]]:
    """Return which images are together, whatever their groups are called."""
    members: dict[object, set[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, set()).add(index)
    return {frozenset(own) for own in members.values()}


# --- which files are images


def test_dicom_files_are_found_by_suffix_or_by_content(tmp_path):
    names = ["a.dcm", "b.DICOM", "c.ima", "IM0001", "1.2.840.10008.17", "sub/0001"]
    for name in names:
        write(tmp_path / name, film(), bits=12)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "d.png")
    for name in ("README", "notes.txt", "1.2.3"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "DICOMDIR").write_bytes((tmp_path / "a.dcm").read_bytes())
    directory = get_testdata_file("DICOMDIR-nopatient", download=False)
    (tmp_path / "DIRECTORY").write_bytes(Path(directory).read_bytes())
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == sorted([*names, "d.png"])


# --- patients


def test_the_patient_of_the_header_is_the_group_under_another_name(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    images = open_images(draw(tmp_path / "data", patients=4))
    assert images.has_groups
    named = {record.group for record in images.records}
    assert named == {rename_patient(patient_id(patient), key=KEY.encode()) for patient in range(4)}
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in named)
    assert "HOSP" not in repr(images)


def test_a_name_depends_on_all_of_the_patient_and_of_the_key():
    names = {
        rename_patient(patient, key=key) for patient in ("1", "2", "é") for key in (b"a" * 32, b"b" * 32)
    }
    assert len(names) == 6
    assert rename_patient("1", key=b"a" * 32) == rename_patient("1", key=b"a" * 32)


@pytest.mark.parametrize("value", [None, "", "   "])
def test_without_a_patient_each_file_stands_for_itself(tmp_path, value):
    tags = {} if value is None else {"PatientID": value}
    for name in ("a/1.dcm", "a/2.dcm", "b/1.dcm", "b/2.dcm"):
        write(tmp_path / name, film(), bits=12, **tags)
    images = open_images(tmp_path)
    assert [record.group for record in images.records] == [record.name for record in images.records]
    assert not images.has_groups


def test_a_pattern_or_a_column_goes_before_the_header(tmp_path):
    draw(tmp_path / "data", patients=4)
    images = open_images(tmp_path / "data", group_pattern=r"^(\d\d)")
    assert {record.group for record in images.records} == {
        record.name.split("/")[1][:2] for record in images.records
    }
    rows = [
        f"data/{r.name},{r.name[:5]},{'me' if index == 0 else ''}" for index, r in enumerate(images.records)
    ]
    (tmp_path / "table.csv").write_text("path,label,group\n" + "\n".join(rows))
    first, *others = (record.group for record in open_images(tmp_path / "table.csv").records)
    assert first == "me"
    assert all(re.fullmatch("[0-9a-f]{12}", group) for group in others)


def test_the_key_is_made_once_for_the_user_alone(home, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: load_key(), range(16)))
    assert keys == {key_path().read_bytes()}
    assert len(key_path().read_bytes()) == 32
    assert key_path().parent == home
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600
    assert [path.suffix for path in home.iterdir() if path != key_path()] in ([".lock"], [])


def test_no_key_is_made_where_no_patient_is_known(tmp_path):
    for name in ("a/1.dcm", "a/2.dcm", "b/1.dcm", "b/2.dcm"):
        write(tmp_path / name, film(), bits=12)
    open_images(tmp_path)
    assert not key_path().exists()


def test_the_key_lies_beside_the_users_data_not_in_a_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("CHANSCALE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert key_path() == tmp_path / "chanscale" / "pseudonym.key"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".local" / "share" / "chanscale" / "pseudonym.key"


def test_a_user_without_a_home_is_told_in_one_line_where_a_key_may_lie(homeless, monkeypatch):
    with pytest.raises(
        ConfigError, match=f"no home folder .* set CHANSCALE_HOME to a folder, or {KEY_VARIABLE}$"
    ):
        load_key()
    monkeypatch.setenv(KEY_VARIABLE, "0" * 32)
    assert load_key() == b"0" * 32
    monkeypatch.setenv("CHANSCALE_HOME", "~no such user/keys")
    assert key_path() == Path("~no such user/keys/pseudonym.key")


def test_a_key_that_cannot_be_used_is_one_line_without_the_key(home, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "too short to be one")
    with pytest.raises(ConfigError, match="must have 32 characters or more, got 19; make one with") as caught:
        load_key()
    assert "too short to be one" not in str(caught.value)
    monkeypatch.delenv(KEY_VARIABLE)
    key_path().write_bytes(b"half")
    with pytest.raises(ConfigError, match="must hold 32 bytes, got 4; remove it"):
        load_key()
    monkeypatch.setenv("CHANSCALE_HOME", str(key_path()))
    with pytest.raises(ConfigError, match="cannot read or make the key"):
        load_key()


def test_splits_and_folds_are_the_same_under_any_key(tmp_path, monkeypatch):
    draw(tmp_path / "data")
    seen = []
    for key in (KEY, "another key, of another hospital"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        images = open_images(tmp_path / "data")
        splits = split_images(images, validation=0.2, test=0.2, seed=3)
        folds = assign_folds(images, folds=4, seed=1).tolist()
        features = torch.randn(len(images), 8, generator=torch.Generator().manual_seed(0))
        labels = torch.from_numpy(images.labels)
        auc = cross_validate(features, labels, images.group_keys, classes=2, seed=0)
        seen.append((splits, folds, auc))
        groups = [record.group for record in images.records]
    assert seen[0] == seen[1]
    assert all(len({folds[index] for index in own}) == 1 for own in sets_of(groups))
    assert sets_of(images.group_keys.tolist()) == sets_of(groups)


def test_a_split_can_be_read_again_where_the_key_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    images = open_images(draw(tmp_path / "data"))
    splits = split_images(images, validation=0.2, test=0.2, seed=0)
    write_splits(tmp_path / "splits.csv", images, splits)
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_splits(tmp_path / "splits.csv", open_images(tmp_path / "data")) == splits


def test_groups_that_are_no_pseudonyms_are_sorted_by_their_names(tmp_path):
    draw(tmp_path / "data", patients=4)
    images = open_images(tmp_path / "data", group_pattern=r"^(\d\d)")
    assert images.group_keys.tolist() == [record.group for record in images.records]


# --- frames


def test_each_frame_can_be_an_image_of_the_same_patient(tmp_path):
    stack = np.stack([film(seed=seed) for seed in range(3)])
    for label in ("a", "b"):
        write(tmp_path / label / "1.dcm", stack, bits=12, PatientID=f"P{label}")
        write(tmp_path / label / "2.dcm", stack, bits=12)
        write(tmp_path / label / "3.dcm", stack[0], bits=12)
    first, every = (open_images(tmp_path, frames=frames) for frames in ("first", "all"))
    assert [record.name for record in first.records][:3] == ["a/1.dcm", "a/2.dcm", "a/3.dcm"]
    names = [record.name for record in every.records]
    assert names[:7] == [*(f"a/{film}.dcm#{number}" for film in (1, 2) for number in (1, 2, 3)), "a/3.dcm"]
    groups = [record.group for record in every.records]
    assert [len(set(groups[at : at + 3])) for at in (0, 3)] == [1, 1]
    assert groups[3] == "a/2.dcm"
    assert every.has_groups
    unknown = replace(every, records=every.records[3:7])
    assert not unknown.has_groups  # frames of a file, and no patient
    pixels = decode_images(every, image_size=32, workers=0).batch([0, 1, 2])[0]
    assert np.abs(pixels[:, 0].numpy() * 4095 - stack).max() < 0.1


def test_images_that_a_run_has_seen_are_pointed_out_whichever_frames_were_taken(
    tmp_path, monkeypatch, capsys
):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    for patient in range(24):
        stack = np.stack([film(patient % 2, seed=patient * 2 + frame) for frame in range(2)])
        write(tmp_path / "data" / "ab"[patient % 2] / f"{patient:02}.dcm", stack, bits=12)
    for fitted, judged in (("all", "first"), ("first", "all")):
        run = tmp_path / fitted
        assert cli.run(["fit", str(tmp_path / "data"), "--out", str(run), "--frames", fitted, *OPTIONS]) == 0
        rows = csv.DictReader((run / "splits.csv").read_text().splitlines())
        files = {row["name"].partition("#")[0] for row in rows if row["split"] != "test"}
        capsys.readouterr()
        assert cli.run(["evaluate", str(run), str(tmp_path / "data"), "--frames", judged]) == 0
        seen, of = (len(files), 24) if judged == "first" else (2 * len(files), 48)
        said = " ".join(capsys.readouterr().err.split())
        assert f"names {seen} of these {of} images as train or validation" in said


@pytest.fixture(scope="module")
def reels(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of files of two frames, and a run fitted on all of them."""
    folder = tmp_path_factory.mktemp("reels")
    data, run = folder / "data", folder / "run"
    for patient in range(24):
        stack = np.stack([film(patient % 2, seed=patient * 2 + frame) for frame in range(2)])
        write(data / "ab"[patient % 2] / f"{patient:02}.dcm", stack, bits=12)
    with pytest.MonkeyPatch.context() as patch:
        tiny_backbone.register(patch.setitem, patch.setattr)
        assert cli.run(["fit", str(data), "--out", str(run), "--frames", "all", *OPTIONS]) == 0
    return data, run


@pytest.fixture
def old(reels, tmp_path) -> Path:
    """The same run as a version wrote it whose model files did not tell of frames."""
    run = shutil.copytree(reels[1], tmp_path / "old")
    tensors, metadata = read_model(run / "model.safetensors")
    assert metadata["info"].pop("frames") == "all"
    write_tensors(run / "model.safetensors", tensors, metadata)
    (run / "novelty.safetensors").unlink()  # it goes by the digest of the model file
    return run


@pytest.fixture
def tiny(monkeypatch) -> None:
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)


def count_images(command: str, run: Path, data: Path, capsys, *options: str) -> int:
    """Return how many images a command took from a folder of 12 files of two frames, or from two such folders."""
    capsys.readouterr()
    path = data if command == "evaluate" else data / "a"
    assert cli.run([command, str(run), str(path), "--json", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    return {
        "predict": len,
        "evaluate": lambda told: told["n"] // 2,
        "explain": lambda told: len(told["images"]),
    }[command](told)


@pytest.mark.parametrize("command", ["predict", "evaluate", "explain"])
def test_a_run_takes_the_frames_that_it_was_fitted_on_unless_told_otherwise(
    command, reels, tiny, tmp_path, capsys
):
    data, run = reels
    for number, (options, count) in enumerate(
        [([], 24), (["--frames", "all"], 24), (["--frames", "first"], 12)]
    ):
        out = ["--out", str(tmp_path / str(number))] if command == "explain" else []
        assert count_images(command, run, data, capsys, *options, *out) == count


def test_a_run_of_before_frames_were_noted_takes_the_first(old, reels, tiny, capsys):
    assert load_model(old)[1].frames is None
    assert count_images("predict", old, reels[0], capsys) == 12
    assert count_images("predict", old, reels[0], capsys, "--frames", "all") == 24


def test_the_images_of_a_run_are_opened_with_its_frames(reels, old, tiny, tmp_path):
    data, run = reels
    for each in (run, old):
        images, splits = open_own_images(data, model_path(each), load_model(each)[1])
        assert len(images) == sum(map(len, (splits.train, splits.validation, splits.test))) == 48
    # Of a set that was open already, the options of the run say nothing.
    config = FitConfig.read(run / "config.yaml").model_copy(update={"frames": "first"})
    kept = scale_and_select("tiny", open_images(data, frames="all"), config=config, out=tmp_path / "open")
    assert kept.info.frames == "all"
    assert len(open_own_images(data, model_path(kept.folder), kept.info)[0]) == 48


def test_leaks_of_a_run_go_by_its_frames(reels, tiny):
    data, run = reels
    assert len(find_leaks(data, run=run).images) == 48
    assert len(find_leaks(data).images) == 24


# --- sources side by side


def test_a_header_is_read_once_for_the_patient_and_the_channels(tmp_path, monkeypatch):
    data, opened, read = draw(tmp_path / "data"), [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, **how: opened.append(path) or read(path, *mode, **how)
    )
    images = open_images(data)
    assert decode_images(images, image_size=32, workers=0, cache_bytes=0).channels == 1
    assert sorted(path for path in opened if path.suffix == ".dcm") == sorted(data.rglob("*.dcm"))


def test_the_header_tells_how_large_an_image_is_without_its_pixels(tmp_path, monkeypatch):
    write(tmp_path / "a" / "1.dcm", np.zeros((24, 40), np.uint16))
    monkeypatch.setattr(traits, "read_image", None)
    record = ImageRecord("1.dcm", 0, "1.dcm", path=tmp_path / "a" / "1.dcm")
    assert read_dimensions(record) == (40, 24)
    assert read_dimensions(replace(record, frame=1)) == (40, 24)


def test_png_and_dicom_stand_side_by_side_in_a_class(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for label in ("a", "b"):
        write(tmp_path / label / "1.dcm", pixels, bits=8, PatientID="P1")
        Image.fromarray(pixels).save(tmp_path / label / "2.png")
    images = open_images(tmp_path)
    assert [record.name for record in images.records] == ["a/1.dcm", "a/2.png", "b/1.dcm", "b/2.png"]
    batch = decode_images(images, image_size=8, workers=2).batch([0, 1])[0]
    assert np.array_equal(batch[0], batch[1])


def write_sources(folder: Path) -> Path:
    """Write a table that names a DICOM file, a folder and an `.npz`, and return it."""
    draw(folder / "hospital", patients=4, films=1)
    write(folder / "own.dcm", film(), bits=12, PatientID=patient_id(0))
    arrays = {f"{side}_{what}": value for side in ("train", "test") for what, value in
              (("images", np.zeros((2, 8, 8), np.uint8)), ("labels", np.array([[0], [1]])))}  # fmt: skip
    np.savez(folder / "set.npz", **arrays)
    table = folder / "all.csv"
    table.write_text("path,label,group,split\nown.dcm,clear,,test\nhospital,,,train\nset.npz,,,\n")
    return table


def test_a_table_may_name_other_sources_below_it(tmp_path):
    images = open_images(write_sources(tmp_path))
    assert images.classes == ("0", "1", "clear", "spot")
    assert [(record.name, images.classes[record.label], record.split) for record in images.records] == [
        ("own.dcm", "clear", "test"),
        *((f"hospital/{path.parent.name}/{path.name}", path.parent.name, "train")
          for path in sorted((tmp_path / "hospital").rglob("*.dcm"))),
        ("set.npz/train/0", "0", "train"), ("set.npz/train/1", "1", "train"),
        ("set.npz/test/0", "0", "test"), ("set.npz/test/1", "1", "test"),
    ]  # fmt: skip
    assert len(decode_images(images, image_size=8, workers=0)) == 9


def test_a_patient_is_the_same_in_all_sources(tmp_path):
    images = open_images(write_sources(tmp_path))
    own, *others = images.records
    assert own.group in {record.group for record in others if record.name.startswith("hospital/")}
    with pytest.raises(SplitError, match=r"group '[0-9a-f]{12}' of .* stands on two sides"):
        split_images(images, validation=0.2, test=0.2, seed=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [("own.dcm,,,", "line 2: the label is missing"), ("hospital,,me,", "hospital has groups of its own"),
     ("../hospital,,,", "wanted a path below"), ("other.npz,,,", "does not exist"),
     ("hospital/clear,,,", "got no folder"), ("hospital,,,\nhospital/clear/0000.dcm,clear,,", "more than once")],
)  # fmt: skip
def test_a_line_that_names_no_source_is_one_line(tmp_path, line, said):
    table = write_sources(tmp_path)
    table.write_text("path,label,group,split\n" + line)
    with pytest.raises(DataError, match=said):
        open_images(table)


# --- nothing tells of a patient


def texts_of(path: Path) -> list[bytes]:
    """Return the content of a file, and of what it packs."""
    content = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += [archive.read(name) for name in archive.namelist()]
    return content


def assert_untold(texts: list[bytes], key: bytes) -> None:
    """Fail if a value of a patient's tags, or the key, stands in any of these."""
    words = [part for value in SECRETS.values() for part in value.split("^")]
    for word in [*words, *map(patient_id, range(24)), "HOSP-"]:
        for form in (word.encode(), word.encode("utf-16-le"), word.lower().encode()):
            assert not any(form in text for text in texts), word
    assert not any(form in text for text in texts for form in (key, key.hex().encode()))


def test_nothing_of_a_patient_is_in_a_run_its_exports_its_report_or_on_the_screen(
    tmp_path, monkeypatch, capfd
):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    data, run = draw(tmp_path / "data", **SECRETS), tmp_path / "out" / "run"
    run.parent.mkdir()
    image = str(next(data.rglob("*.dcm")))
    with few_draws():
        for command in (
            ["fit", str(data), "--out", str(run), *OPTIONS],
            ["evaluate", str(run), str(data), "--json"],
            ["predict", str(run), image, "--json"],
            ["predict", str(run), str(data), "--out", str(run / "predictions.csv")],
            ["report", str(run), "--images", str(data)],
            ["explain", str(run), image, "--images", str(data), "--out", str(tmp_path / "out" / "why")],
            ["export", str(run), "--format", "torch", "--images", str(data)],
        ):  # fmt: skip
            assert cli.run(command) == 0, command
    said = capfd.readouterr()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"report.html", "splits.csv", "model.safetensors", "predictions.csv"} <= {
        path.name for path in files
    }
    rows = list(csv.DictReader(io.StringIO((run / "splits.csv").read_text())))
    assert len({row["group"] for row in rows}) == 24
    assert json.loads((run / "metrics.json").read_text())["patients"] < 24
    texts = [text for path in files for text in texts_of(path)]
    assert_untold([*texts, said.out.encode(), said.err.encode()], key_path().read_bytes())


def test_a_cell_of_a_comparison_knows_patients_by_their_other_names(tmp_path, monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    data = draw(tmp_path / "data", **SECRETS)
    options = {"backbone": "tiny", "image_size": 32, "scale_epochs": 1, "refine_epochs": 0, "batch_size": 8}
    config = configure("head", FitConfig(**options, precision="32-true", workers=0), seed=0)
    listed = digest_images(open_images(data))
    result = run_cell(CellSpec(Cell("head", None, 0, 0), data, listed, 4, 0, config))
    assert all(re.fullmatch("[0-9a-f]{12}", group) for group in result["test"]["groups"])
    assert_untold([json.dumps(result).encode()], key_path().read_bytes())


def test_the_search_would_find_a_patient(tmp_path):
    path = write(tmp_path / "a.dcm", film(), bits=12, PatientID=patient_id(3), **SECRETS)
    for value in (SECRETS["StudyDate"], patient_id(3)):
        with pytest.raises(AssertionError):
            assert_untold([b"..." + value.encode()], b"key")
    with pytest.raises(AssertionError):
        assert_untold(texts_of(path), b"key")


@pytest.mark.parametrize(
    "tags",
    [{"Rows": None}, {"WindowCenter": [1, 2], "WindowWidth": "", "BitsStored": 99}, {"PixelData": None},
     {"NumberOfFrames": 77}, {"SpecificCharacterSet": "NONSENSE"}, {"PhotometricInterpretation": "XYZ"}],
)  # fmt: skip
def test_no_error_tells_of_a_patient(tmp_path, monkeypatch, capfd, caplog, tags):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    draw(tmp_path / "data", patients=6, films=1)
    dataset = dicom(film(), bits=12, PatientID=patient_id(1), **SECRETS, **tags)
    with warnings.catch_warnings():  # pydicom warns of what it writes here
        warnings.simplefilter("ignore")
        path = save(tmp_path / "data" / "clear" / "bad.dcm", dataset)
    raw = path.read_bytes()
    code = cli.run(["fit", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *OPTIONS])
    # A date that is none, and a number that is a name: pydicom's own words would hold them.
    path.write_bytes(raw.replace(b"19470913", b"Ottokari").replace(b"US\x02\x00\x0c\x00", b"DS\x02\x00Ot"))
    cli.run(["fit", str(tmp_path / "data"), "--out", str(tmp_path / "run2"), *OPTIONS])
    said = capfd.readouterr()
    assert code == 0 if "SpecificCharacterSet" in tags else code == 2
    assert_untold([said.out.encode(), said.err.encode(), caplog.text.encode()], key_path().read_bytes())
    assert "Ottokari" not in said.err
