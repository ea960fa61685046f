import os
from pathlib import Path

import pytest

from chanscale.errors import ArtifactError, ConfigError
from chanscale.files import require_new, require_writable, write_atomically


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_of_a_name_are_written_as_they_came(tmp_path):
    write_atomically(tmp_path / "file", "ü," + os.fsdecode(b"R\xf6ntgen"))
    assert (tmp_path / "file").read_bytes() == "ü,".encode() + b"R\xf6ntgen"


@pytest.mark.parametrize("name", ["file", "gone/file"])
def test_an_error_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, name):
    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=name) as caught:
        write_atomically(tmp_path / name, "text")
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_file_is_written_to_and_stays(tmp_path):
    write_atomically(tmp_path / "file", "before")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    require_writable(tmp_path / "link")
    write_atomically(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


def test_what_can_be_written_passes(tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "new", tmp_path / "there", Path("new"), Path(os.devnull)):
        require_writable(path)


def test_what_cannot_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"is a folder; name a file to write in it"):
        require_writable(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder .*gone to write file to"):
        require_writable(tmp_path / "gone" / "file")
    (tmp_path / "lost").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "lost")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "file")


def test_a_file_that_is_there_is_not_to_be_written_over_unless_it_is_renewed(tmp_path):
    table = tmp_path / "table.csv"
    require_new(table, ".csv")
    table.touch()  # without content, as a program may have made it to have the name
    require_new(table, ".csv")
    table.write_text("path,label")
    (tmp_path / "link.csv").symlink_to(table)
    for path in (table, tmp_path / "link.csv"):
        with pytest.raises(ArtifactError, match="exists already"):
            require_new(path, ".csv", renewed=tmp_path / "other.csv")
    require_new(table, ".csv", renewed=table)
    require_new(Path("/dev/null"), ".csv")


@pytest.mark.parametrize("name", ["film.png", "p.json", "p.csv.gz"])
def test_a_name_that_belies_what_is_written_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"is not called \.csv, which is what is written"):
        require_new(tmp_path / name, ".csv")
    for name in ("predictions", "P.CSV"):
        require_new(tmp_path / name, ".csv")
