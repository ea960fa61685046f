import os
from pathlib import Path

import pytest

from chanscale.data.listing import list_folders, list_images
from chanscale.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_images_are_listed_in_order_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a/2.JPG", "a/1.tif", ".x.png", ".y/1.png", "__MACOSX/1.png", "notes.txt")
    assert listed(tmp_path) == ["a/1.tif", "a/2.JPG", "b.png"]


def test_folders_behind_links_are_entered(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.png", "deep/2.png")
    folder = touch(tmp_path / "images", "0.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert listed(folder) == ["0.png", "link/1.png", "link/deep/2.png"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    folder = touch(tmp_path / "images", "1.png", "sub/2.png")
    (folder / "self").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "sub" / "up").symlink_to(folder)
    assert listed(folder) == ["1.png", "sub/2.png"]


def test_a_folder_of_two_names_is_listed_under_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "sub/1.png")
    (tmp_path / "also").symlink_to(tmp_path / "sub")
    assert listed(tmp_path) == ["sub/1.png"]


def test_an_image_that_is_a_lost_link_is_listed(tmp_path: Path) -> None:
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    assert listed(tmp_path) == ["1.png"]


@pytest.mark.parametrize("target", ["gone", "lost"])  # the second leads to itself
def test_a_folder_that_is_a_lost_link_is_named(tmp_path: Path, target: str) -> None:
    touch(tmp_path, "sub/1.png")
    (tmp_path / "sub" / "lost").symlink_to(tmp_path / "sub" / target)
    for list_below, folder in ((list_images, tmp_path), (list_folders, tmp_path / "sub")):
        with pytest.raises(DataError, match=r"sub/lost is a link that leads nowhere; mend it"):
            list_below(folder)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "open/1.png", "shut/2.png")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:  # root may read everything
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        DataError, match=r"cannot list the folder .*shut \(Permission denied\); make it readable"
    ):
        list_images(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot list the folder"):
        list_folders(tmp_path / "gone")
