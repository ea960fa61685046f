import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chanscale.data import ImageSet, open_images, read_image
from chanscale.errors import DataError


def write_images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / name)
    return root


def write_table(root: Path, text: str) -> Path:
    write_images(root, "a.png", "b.png", "sub/c.png", "sub/d.png")
    path = root / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def names(images: ImageSet) -> list[str]:
    return [record.name for record in images.records]


def message(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_images(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_for_each_class_in_alphabetical_order(tmp_path: Path) -> None:
    write_images(tmp_path, "well/1.png", "ill/2.PNG", "ill/deep/er/3.jpg", "well/0.tif")
    images = open_images(tmp_path)
    assert images.classes == ("ill", "well")
    assert names(images) == ["ill/2.PNG", "ill/deep/er/3.jpg", "well/0.tif", "well/1.png"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.counts == {"ill": 2, "well": 2}
    assert not images.has_groups
    assert all(record.path == tmp_path / record.name for record in images.records)


def test_hidden_files_and_other_suffixes_are_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", "loose.png")
    write_images(tmp_path, "a/.hidden.png", ".cache/1.png", "a/.thumbs/1.png", "__MACOSX/1.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "folder.png").mkdir()
    assert names(open_images(tmp_path)) == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]


def test_a_link_that_leads_nowhere_is_missed(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "gone.png")
    assert "1 of 5 images named in" in message(tmp_path)
    assert "such as a/3.png. Mend the links" in message(tmp_path)
    assert open_images(tmp_path, skip_bad=True).skipped == ("a/3.png",)


def test_a_class_that_is_a_lost_link_is_missed(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (tmp_path / "c").symlink_to(tmp_path / "gone")
    assert "leads nowhere" in message(tmp_path)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / os.fsdecode(b"\xf6.png"))
    assert names(open_images(tmp_path))[1] == os.fsdecode(b"a/\xf6.png")
    (tmp_path / "b").rename(tmp_path / os.fsdecode(b"\xfc"))
    # The model's file could not be read again.
    assert "the class '\\udcfc' of" in message(tmp_path)


def test_class_names_that_are_numbers_are_in_order_of_value(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{label}/{i}.png" for label in (10, 2, 1) for i in range(2)))
    assert open_images(tmp_path).classes == ("1", "2", "10")
    write_images(tmp_path, *(f"{label}/{i}.png" for label in ("01", "+1", "001") for i in range(2)))
    assert open_images(tmp_path).classes == ("+1", "001", "01", "1", "2", "10")  # in no order but this


def test_the_pattern_names_the_patient_across_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "a/07_1.png", "a/08_1.png", "b/07_2.png", "b/09_1.png")
    by_group = open_images(tmp_path, group_pattern=r"^(\d+)_")
    whole_match = open_images(tmp_path, group_pattern=r"^\d+")
    assert [record.group for record in by_group.records] == ["07", "08", "07", "09"]
    assert [record.group for record in whole_match.records] == ["07", "08", "07", "09"]
    assert by_group.has_groups


def test_a_pattern_with_a_slash_sees_the_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "a/p1/x.png", "a/p1/y.png", "b/p2/x.png", "b/p2/y.png")
    images = open_images(tmp_path, group_pattern=r"/(p\d)/")
    assert [record.group for record in images.records] == ["p1", "p1", "p2", "p2"]


def test_given_classes_fix_names_and_order(tmp_path: Path) -> None:
    write_images(tmp_path, "b/1.png")
    assert open_images(tmp_path, classes=("c", "b", "a")).labels.tolist() == [1]
    assert "'b'" in message(tmp_path, classes=("a", "c"))


def test_folder_errors_say_what_to_do(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "absent")
    assert "got no folder" in message(tmp_path)
    (tmp_path / "a").mkdir()
    assert "no image" in message(tmp_path)
    write_images(tmp_path, "a/1.png", "a/2.png")
    assert "only the class 'a'" in message(tmp_path)
    write_images(tmp_path, "b/1.png")
    assert "'b' of" in message(tmp_path)
    assert "has 1 image;" in message(tmp_path)
    write_images(tmp_path, "b/2.png")
    assert "finds no patient in '1.png'" in message(tmp_path, group_pattern="(x)")
    assert "finds no patient" in message(tmp_path, group_pattern="(x?)")
    assert "not a regular expression" in message(tmp_path, group_pattern="(")
    (tmp_path / "c").mkdir()
    assert "no image (.dcm, .dicom, .ima, .jpeg, .jpg, .nii, .nii.gz, .png, .tif, .tiff) in 'c'" in message(
        tmp_path
    )


def test_folders_of_sides_are_no_classes_and_a_table_names_them(tmp_path: Path) -> None:
    files = (f"{side}/{name}/{i}.png" for side in ("Train", "val", "test") for name in "ab" for i in range(2))
    write_images(tmp_path, *files)
    said = message(tmp_path)
    assert "Train, test, val, are sides, not classes" in said
    lines = said.partition("such as ")[2].removesuffix(".").split(" and ")
    images = open_images(write_table(tmp_path, "\n".join(["path,label,split", *lines, "val,,validation"])))
    assert images.classes == ("a", "b")
    sides = {record.name.partition("/")[0]: record.split for record in images.records}
    assert sides == {"Train": "train", "val": "validation", "test": "test"}


@pytest.mark.parametrize("columns", ["path,label,label", "path,Label,label,split", "Path,path,label"])
def test_a_table_with_one_of_our_columns_twice_is_refused(tmp_path: Path, columns: str) -> None:
    write_images(tmp_path, "a.png")
    assert "twice" in message(write_table(tmp_path, f"{columns}\na.png,b,c,d\n"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"")
    assert "images.zip" in message(tmp_path / "images.zip")


def test_a_table_gives_labels_groups_and_splits(tmp_path: Path) -> None:
    table = write_table(
        tmp_path,
        "\ufeffPath, Label, group, split, note\na.png,x,p1,train,\n./b.png,y,p2,val,\n"
        "sub/c.png,x,,test,\n\nsub/d.png,y,p3,validation,left\n",
    )
    images = open_images(table)
    assert names(images) == ["a.png", "b.png", "sub/c.png", "sub/d.png"]
    assert images.labels.tolist() == [0, 1, 0, 1]
    assert [record.group for record in images.records] == ["p1", "p2", "sub/c.png", "p3"]
    assert [record.split for record in images.records] == ["train", "validation", "test", "validation"]
    assert read_image(images.records[2].path or "", size=4).shape == (1, 4, 4)


def test_a_table_needs_no_group_and_no_split(tmp_path: Path) -> None:
    table = write_table(tmp_path, "label,path\nx,a.png\ny,b.png\nx,sub/c.png\ny,sub/d.png\n")
    images = open_images(table)
    assert {record.split for record in images.records} == {None}
    assert not images.has_groups
    assert open_images(table, group_pattern="^(.)").has_groups


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got none"),
        ("path,class\na.png,x\n", "for the label 'class', got 'x'"),
        ("file,class\na.png,x\n", "got class, file"),
        ("path,label\n", "no row"),
        ("path,label\na.png,\n", "line 2: the label is missing"),
        ("path,label\na.png\n", "line 2: the label is missing"),
        ("path,label\n,x\n", "line 2: the path is missing"),
        ("path,label,split\na.png,x,training\n", "got 'training'"),
        ("path,label\n../a.png,x\n", "got ../a.png"),
        ("path,label\n/etc/a.png,x\n", "got /etc/a.png"),
        ("path,label\na.png,x\n./a.png,y\n", "more than once, such as a.png"),
        ("path,label\na.png,x\ngone.png,y\n", "1 of 2 images named"),
        ("path,label\na.png,x\nb.png,x\n", "only the class 'x'"),
        ("path,label\na.png,x\nb.png,x\nsub/c.png,y\n", "has 1 image;"),
        ('path,label\n"a.png,x\n' + "x" * 200000, "cannot read the table"),
    ],
)
def test_table_errors_say_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    assert said in message(write_table(tmp_path, text))


def test_a_binary_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    assert "cannot read the table" in message(tmp_path / "a.csv")


def test_groups_from_two_places_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,group\na.png,x,p\nb.png,y,q\n")
    assert "use one of them" in message(table, group_pattern="(.)")


def test_a_table_from_windows_has_backslashes(tmp_path: Path) -> None:
    images = open_images(
        write_table(tmp_path, "path,label\na.png,x\nb.png,y\nsub\\c.png,x\n.\\sub\\d.png,y\n")
    )
    assert names(images) == ["a.png", "b.png", "sub/c.png", "sub/d.png"]
    assert all(record.path and record.path.is_file() for record in images.records)
    for elsewhere in ("..\\a.png", "C:\\a.png", "C:/a.png", "\\a.png"):
        assert f"got {elsewhere}" in message(write_table(tmp_path, f"path,label\n{elsewhere},x\n"))


@pytest.mark.skipif(os.sep != "/", reason="no file name holds a backslash here")
def test_a_backslash_in_a_file_name_is_kept(tmp_path: Path) -> None:
    write_images(tmp_path, "sub\\c.png")
    table = write_table(tmp_path, "path,label\na.png,x\nb.png,y\nsub\\c.png,x\nsub/d.png,y\n")
    assert names(open_images(table))[2] == "sub\\c.png"


def test_missing_files_of_a_table_are_skipped_and_named(tmp_path: Path) -> None:
    rows = "a.png,x\nb.png,y\nsub/c.png,x\nsub/d.png,y\ngone.png,y\n"
    images = open_images(write_table(tmp_path, "path,label\n" + rows), skip_bad=True)
    assert (len(images), images.skipped) == (4, ("gone.png",))


def test_a_table_of_missing_files_is_refused_even_when_skipping(tmp_path: Path) -> None:
    assert "none of the 2" in message(write_table(tmp_path, "path,label\ny.png,x\nz.png,y\n"), skip_bad=True)


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_npz_has_official_splits_and_numbers_for_classes(tmp_path: Path) -> None:
    grey, rgb = np.zeros((4, 5, 5), np.uint8), np.zeros((2, 5, 5, 3), np.uint8)
    labels = np.array([[10], [2], [10], [2]])
    path = write_npz(
        tmp_path / "a.npz", train_images=grey, train_labels=labels, test_images=rgb, test_labels=labels[:2, 0]
    )
    images = open_images(path)
    assert images.classes == ("2", "10")
    assert names(images) == ["train/0", "train/1", "train/2", "train/3", "test/0", "test/1"]
    assert images.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert [record.split for record in images.records] == ["train"] * 4 + ["test"] * 2
    assert images.records[4].pixels is not None
    assert images.records[4].pixels.shape == (5, 5, 3)
    assert images.records[4].path is None


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros(3)}, "MedMNIST's keys"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8)}, "train_labels"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.full((2, 14), 2)}, "(2, 14)"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.zeros(2)}, "float64"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.zeros(3, int)}, "(3,)"),
        ({"train_images": np.array(5), "train_labels": np.zeros(3, int)}, "shape ()"),
        ({"train_images": np.array([None, 1]), "train_labels": np.zeros(2, int)}, "cannot read"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.zeros(2, int)}, "only the class"),
    ],
)
def test_npz_errors_say_what_came(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    assert said in message(write_npz(tmp_path / "a.npz", **arrays))


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = {"empty": b"", "text": b"hello", "zip": b"PK\x03\x04rubbish"}
    contents["array"] = (tmp_path / "array.npy").read_bytes()
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        assert "cannot read the arrays" in message(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("classes", [None, ("0", "1")])
def test_an_npz_without_an_image_is_refused(tmp_path: Path, classes: tuple[str, ...] | None) -> None:
    path = write_npz(
        tmp_path / "a.npz", train_images=np.zeros((0, 4, 4), np.uint8), train_labels=np.zeros(0, int)
    )
    assert "holds no image" in message(path, classes=classes)


def test_one_side_of_a_source(tmp_path: Path) -> None:
    table = write_table(
        tmp_path, "path,label,split\na.png,x,train\nb.png,y,test\nsub/c.png,x,test\nsub/d.png,y,train\n"
    )
    images = open_images(table)
    test = images.on_side("test")
    assert test is not None
    assert (names(test), test.classes) == (["b.png", "sub/c.png"], images.classes)
    assert images.on_side("validation") is None


def test_real_folder_and_npz(nih_opacity: Path, pneumoniamnist: Path) -> None:
    folder = open_images(nih_opacity, group_pattern=r"^(\d+)_")
    assert folder.counts == {"no_finding": 294, "pneumonia": 309}
    assert len({record.group for record in folder.records}) < len(folder)
    array = open_images(pneumoniamnist)
    assert array.classes == ("0", "1")
    assert {record.split for record in array.records} == {"train", "validation", "test"}
