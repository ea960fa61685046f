"""Copies are found whatever was done to them, other films are not, and what they spoil is named."""

import csv
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import tiny_backbone
from chanscale import cli, find_leaks
from chanscale.data.loading import decode_images
from chanscale.data.phantoms import draw_phantom
from chanscale.data.sources import ImageRecord, ImageSet, open_images
from chanscale.data.splits import Splits
from chanscale.errors import ConfigError, DataError
from chanscale.leaks.findings import write_groups
from chanscale.leaks.search import leaks_of_fit
from chanscale.leaks.thumbnails import SIDE
from chanscale.leaks.twins import SURE, find_twins
from chanscale.pipeline import note_leaks
from chanscale.progress import Watcher
from dicom_files import write
from test_cli import OPTIONS, draw

SIZE = 128


@cache
def film(patient: int) -> Image.Image:
    return Image.fromarray(draw_phantom(0, size=SIZE, label=patient % 2, patient=patient).image)


def shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def twins_of(*images: Image.Image):
    return find_twins(np.stack([shrink(image) for image in images]))


def as_jpeg(image: Image.Image, quality: int = 30) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("L")


def save(folder: Path, films: dict[str, Image.Image]) -> Path:
    for name, image in films.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


def base(**more: Image.Image) -> dict[str, Image.Image]:
    """Six films of six patients in two classes, and more."""
    films = {f"{'ab'[patient % 2]}/{patient}_0.png": film(patient) for patient in range(6)}
    return films | {name.replace("__", "/") + ".png": image for name, image in more.items()}


def names(found) -> list[tuple[str, str]]:
    return [(pair.first.name, pair.second.name) for pair in found.pairs]


def run(*arguments) -> int:
    return cli.run(["leaks", *map(str, arguments)])


# --- what is a copy


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i,
        as_jpeg,
        lambda i: i.resize((SIZE // 2, SIZE // 2), Image.Resampling.BILINEAR),
        lambda i: i.crop((6, 6, SIZE - 6, SIZE - 6)),
        lambda i: i.crop((0, 0, SIZE - 12, SIZE - 12)),
        lambda i: i.rotate(2, Image.Resampling.BICUBIC),
        lambda i: i.point(lambda value: 0.6 * value + 40),
    ],
    ids=["exact", "jpeg", "half", "crop", "corner", "rotation", "contrast"],
)
def test_a_copy_is_found(change):
    [pair] = twins_of(film(0), film(1), change(film(0)))
    assert (pair.first, pair.second, pair.mirrored, pair.inverted) == (0, 2, False, False)


def test_a_mirrored_and_an_inverted_copy_are_found_and_called_so():
    found = twins_of(film(0), ImageOps.mirror(film(0)), ImageOps.invert(film(0)))
    assert [(pair.first, pair.second, pair.mirrored, pair.inverted) for pair in found] == [
        (0, 1, True, False),
        (0, 2, False, True),
        (1, 2, True, True),
    ]


def test_films_of_different_patients_are_never_beyond_doubt():
    # Phantoms are drawn from few numbers: a pair in a hundred looks alike, as docs/benchmarks/leaks.md says.
    small = np.stack([shrink(film(patient)) for patient in range(9)])
    assert find_twins(small, least=SURE) == []
    assert len(find_twins(small)) <= 1
    copies = np.stack([shrink(film(0)), shrink(as_jpeg(film(0)))])
    assert len(find_twins(copies, least=SURE)) == 1


def test_images_that_show_nothing_are_no_twins():
    assert twins_of(*(Image.new("L", (SIDE, SIDE), level) for level in (0, 0, 90, 255))) == []


def test_what_is_found_does_not_depend_on_the_order():
    films = [film(0), film(1), as_jpeg(film(0)), ImageOps.mirror(film(1)), film(0).rotate(1), film(2)]
    pairs = {(pair.first, pair.second, pair.agreement) for pair in twins_of(*films)}
    backwards = {(5 - pair.second, 5 - pair.first, pair.agreement) for pair in twins_of(*films[::-1])}
    assert len(pairs) == 4
    assert pairs == backwards


# --- what it spoils


def test_a_copy_under_another_name_is_a_duplicate(tmp_path):
    found = find_leaks(save(tmp_path, base(a__copy=film(0))))
    assert names(found) == [("a/0_0.png", "a/copy.png")]
    assert found.pairs[0].kinds == ("duplicate",)


def test_two_labels_of_one_film_are_a_conflict(tmp_path):
    found = find_leaks(save(tmp_path, base(b__copy=as_jpeg(film(0)))))
    assert found.pairs[0].kinds == ("duplicate", "label conflict")


def test_two_patients_of_one_film_are_told_only_where_patients_are_known(tmp_path):
    folder = save(tmp_path, base(a__9_0=film(0), a__0_1=film(7)))
    assert find_leaks(folder).count("two patients") == 0
    found = find_leaks(folder, group_pattern=r"^(\d+)_")
    assert found.pairs[0].kinds == ("duplicate", "two patients")


def test_the_sides_are_those_of_the_source(tmp_path):
    save(tmp_path, base(a__copy=film(0)))
    rows = [("path", "label", "split")]
    rows += [(name, name[0], "test" if "copy" in name else "train") for name in base(a__copy=film(0))]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = find_leaks(tmp_path / "table.csv")
    assert found.pairs[0].kinds == ("leak",)
    assert found.pairs[0].sides == ("train", "test")
    assert (found.spoiled("test"), found.spoiled("validation")) == (1, 0)


def test_a_fit_hears_of_the_twins_across_its_split():
    pixels = [np.asarray(film(patient)) for patient in (0, 1, 2, 0)]
    records = [ImageRecord(f"{i}.png", i % 2, f"{i}.png", pixels=array) for i, array in enumerate(pixels)]
    images = decode_images(ImageSet(Path("set"), ("a", "b"), tuple(records)), image_size=96, workers=0)
    figures, warning = leaks_of_fit(images, Splits((0, 1), (2,), (3,)))
    assert figures["kinds"] == {"leak": 1, "label conflict": 1, "two patients": 0, "duplicate": 0}
    assert figures["test_images_with_twins"] == 1
    assert warning == (
        "1 pair of images look like one exposure (1 beyond doubt): 1 on two sides of the split, 1 with two labels; "
        "1 of the test images has a twin on another side"
    )
    assert leaks_of_fit(images, Splits((0, 3), (1,), (2,)))[0]["kinds"]["leak"] == 0


def test_the_table_joins_twins_and_their_patients_and_fit_takes_it(tmp_path):
    folder = save(tmp_path / "set", base(a__9_0=film(0), a__9_1=film(8)))
    found = find_leaks(folder, group_pattern=r"^(\d+)_")
    write_groups(found, folder / "groups.csv")
    groups = {record.name: record.group for record in open_images(folder / "groups.csv").records}
    assert groups["a/0_0.png"] == groups["a/9_0.png"] == groups["a/9_1.png"]
    assert len(set(groups.values())) == 6


def read_table(path: Path) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    named = {row["path"]: row for row in rows}
    assert len(named) == len(rows)
    return named


def test_the_table_names_a_group_only_where_there_is_one(tmp_path):
    save(tmp_path / "set", base(a__copy=film(0)))
    write_groups(find_leaks(tmp_path / "set"), tmp_path / "groups.csv")
    groups = {path: row["group"] for path, row in read_table(tmp_path / "groups.csv").items()}
    assert {path for path, group in groups.items() if group} == {"set/a/0_0.png", "set/a/copy.png"}
    assert groups["set/a/0_0.png"] == groups["set/a/copy.png"]


def test_the_table_of_images_without_patients_or_twins_knows_none_either(tmp_path):
    save(tmp_path / "set", base())
    write_groups(find_leaks(tmp_path / "set"), tmp_path / "groups.csv")
    assert not open_images(tmp_path / "groups.csv").has_groups


@pytest.mark.parametrize("table", ["all.csv", "set/../all.csv"])
def test_the_table_of_the_images_is_not_written_over(tmp_path, table):
    save(tmp_path / "set", base())
    text = "path,label\n" + "\n".join(f"set/{name},{name[0]}" for name in base())
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ConfigError, match="is the table of the images itself"):
        find_leaks(tmp_path / "all.csv", table=tmp_path / table)
    with pytest.raises(ConfigError, match="is the table of the images itself"):
        write_groups(find_leaks(tmp_path / "all.csv"), tmp_path / table)
    assert (tmp_path / "all.csv").read_text() == text


def test_single_images_are_no_two_patients(tmp_path):
    rows = [f"{name},{name[0]},{'me' if name == 'a/0_0.png' else ''}" for name in base(a__copy=film(0))]
    save(tmp_path, base(a__copy=film(0)))
    (tmp_path / "all.csv").write_text("path,label,group\n" + "\n".join(rows))
    assert find_leaks(tmp_path / "all.csv").pairs[0].kinds == ("duplicate",)


# --- frames of one file


@pytest.fixture
def reels(tmp_path) -> Path:
    """Four files of two frames, which are alike; the second frame of one is that of another, of the other class."""
    for file in range(4):
        first = np.asarray(film(file))
        second = np.asarray(film(0)) if file == 3 else np.asarray(as_jpeg(film(file), 90))
        write(tmp_path / "reels" / "ab"[file % 2] / f"{file}.dcm", np.stack([first, second]), bits=8)
    return tmp_path / "reels"


def test_frames_of_one_file_are_no_pair(reels):
    assert names(find_leaks(reels)) == []
    assert names(find_leaks(reels, frames="all")) == [
        ("a/0.dcm#1", "b/3.dcm#2"), ("a/0.dcm#2", "b/3.dcm#2"),
    ]  # fmt: skip
    assert find_leaks(reels, frames="all").count("two patients") == 0


def test_many_frames_of_one_file_do_not_hide_a_copy_in_another(tmp_path):
    # Each of 12 has 11 that are nearer to it than the copy, which is cut: more than are looked at for an image.
    noise = np.random.default_rng(0)
    for name, shown in {"a/0": film(0), "b/1": film(1), "b/copy": film(0).crop((0, 4, SIZE, SIZE))}.items():
        reel = [np.asarray(shown) + noise.normal(0, 1, shown.size[::-1]) for _ in range(12)]
        write(tmp_path / f"{name}.dcm", np.stack(reel).clip(0, 255).astype(np.uint8), bits=8)
    found = find_leaks(tmp_path, frames="all")
    assert {tuple(name.partition("#")[0] for name in pair) for pair in names(found)} == {
        ("a/0.dcm", "b/copy.dcm")
    }
    assert found.count("label conflict") == len(found.pairs) >= 12


def test_a_fit_warns_of_frames_as_the_command_shows_them(reels, caplog):
    images = decode_images(open_images(reels, frames="all"), image_size=96, workers=0)
    assert note_leaks(images, Splits((0, 1, 2, 3), (), (4, 5, 6, 7)), Watcher())["pairs"] == 2
    assert "`chanscale leaks --frames all` names them" in caplog.text


def test_the_command_takes_frames(reels, capsys):
    assert run(reels) == 0
    capsys.readouterr()
    assert run(reels, "--frames", "all", "--json") == 1
    assert json.loads(capsys.readouterr().out)["pairs"] == 2


def test_the_table_has_a_row_for_a_file_of_several_frames(reels):
    write_groups(find_leaks(reels, frames="all"), reels / "groups.csv")
    groups = {path: row["group"] for path, row in read_table(reels / "groups.csv").items()}
    assert groups == {"a/0.dcm": "a/0.dcm", "a/2.dcm": "", "b/1.dcm": "", "b/3.dcm": "a/0.dcm"}
    assert len(open_images(reels / "groups.csv", frames="all")) == 8


# --- the command


def test_nothing_found_is_0_and_something_is_1(tmp_path, capsys):
    save(tmp_path, base())
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == "No two of 6 images look like one exposure.\n"
    save(tmp_path, {"b/copy.png": film(0)})
    assert run(tmp_path) == 1
    assert "1 with two labels" in capsys.readouterr().out


def test_json_has_every_pair(tmp_path, capsys):
    save(tmp_path, base(b__copy=ImageOps.mirror(film(0))))
    assert run(tmp_path, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["kinds"]["label conflict"] == told["pairs"] == 1
    [pair] = told["findings"]
    assert pair["images"] == ["a/0_0.png", "b/copy.png"]
    assert pair["labels"] == ["a", "b"]
    assert pair["mirrored"]


def test_the_help_promises_no_more_turning_than_is_found(capsys):
    assert run("--help") == 0
    assert "turned by a degree or two" in " ".join(capsys.readouterr().out.split())


def test_hostile_names_are_escaped(tmp_path, capsys):
    save(tmp_path, base())
    film(0).save(tmp_path / "a" / "[red]\x1b[31m\ncopy\udcff.png")
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]" in "".join(out.split())


def test_a_run_gives_the_sides(tmp_path, monkeypatch, capsys):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    folder = draw(tmp_path / "set")
    assert cli.run(["fit", str(folder), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    with (tmp_path / "run" / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    train, test = (next(row["name"] for row in rows if row["split"] == side) for side in ("train", "test"))
    (folder / test).write_bytes((folder / train).read_bytes())
    capsys.readouterr()
    run(folder, "--run", tmp_path / "run", "--json")
    told = json.loads(capsys.readouterr().out)
    pair = next(pair for pair in told["findings"] if set(pair["images"]) == {train, test})
    assert pair["kinds"][0] == "leak"
    assert set(pair["sides"]) == {"train", "test"}


# --- errors


def test_a_table_elsewhere_is_refused_before_the_work(tmp_path, capsys):
    folder, other = save(tmp_path / "set", base()), tmp_path / "other"
    other.mkdir()
    assert run(folder, "--out", other / "groups.csv") == 2
    assert "does not lie above the images" in capsys.readouterr().err
    assert list(other.iterdir()) == []


def test_a_table_that_is_there_is_left_alone(tmp_path, capsys):
    folder, table = save(tmp_path / "set", base()), tmp_path / "all.csv"
    table.write_text("path,label\n")
    assert run(folder, "--out", table) == 2
    assert "exists already" in capsys.readouterr().err
    assert table.read_text() == "path,label\n"


def test_an_npz_has_no_files_for_a_table(tmp_path):
    pixels = np.stack([shrink(film(patient)) for patient in range(4)])
    np.savez(tmp_path / "set.npz", train_images=pixels, train_labels=np.array([0, 1, 0, 1]))
    assert find_leaks(tmp_path / "set.npz").pairs == ()
    with pytest.raises(ConfigError, match="holds no files"):
        find_leaks(tmp_path / "set.npz", table=tmp_path / "groups.csv")


def test_a_run_and_a_pattern_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match="knows its patients"):
        find_leaks(tmp_path, run=tmp_path, group_pattern="x")


def test_a_run_and_frames_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match="knows its frames"):
        find_leaks(tmp_path, run=tmp_path, frames="all")


def test_a_missing_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_leaks(tmp_path / "nowhere")
