"""Where weights are looked for, that only the published ones pass, and that no failure leaves a broken file.

No test here uses the network: addresses are file://.
"""

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from chanscale import cli, weight_sources, weights
from chanscale.backbones import BACKBONES, Backbone, Preprocessing
from chanscale.errors import ConfigError, DigestError, WeightsError
from chanscale.weight_sources import UrlSource, WheelSource
from chanscale.weights import (
    cache_folder,
    cache_path,
    describe_tensor,
    fetch_weights,
    read_manifest,
    resolve_weights,
    weights_status,
)
from tiny_weights import (
    DIGESTS,
    FORMATS,
    NAMES,
    PICKLES,
    TENSORS,
    TORCH_WHEEL,
    WHEEL,
    Tiny,
    equal,
    one_line_of,
    published,
    url_source,
    write,
)

REAL_WEIGHTS = cache_path("vgg16")  # before the fixture moves the cache


def set_sources(monkeypatch, *sources, digests=DIGESTS):
    entry = Backbone("tiny", Tiny, Preprocessing, 200, 112, "MIT", "here", sources, NAMES, digests)
    manifest = {name: describe_tensor(tensor) for name, tensor in TENSORS.items()}
    monkeypatch.setitem(BACKBONES, "tiny", entry)
    monkeypatch.setattr(
        weights, "read_manifest", lambda name: manifest if name == "tiny" else read_manifest(name)
    )


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of its own, and a backbone 'tiny' that has no sources yet."""
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHANSCALE_OFFLINE", raising=False)
    set_sources(monkeypatch)
    return tmp_path / "home"


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """The file that the one source of 'tiny' brings."""
    path = write(tmp_path / "w.h5")
    set_sources(monkeypatch, url_source(path))
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# --- a file that the user gives


@pytest.mark.parametrize("filename", FORMATS)
def test_a_given_file_is_used_and_not_cached(tmp_path, home, filename):
    assert equal(resolve_weights("tiny", path=write(tmp_path / filename)))
    assert not home.exists()


@pytest.fixture
def changed():
    """The tensors, but for the last bits of one value."""
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["features.0.bias"][2] += 1e-6
    return tensors


CHANGED = r"'features\.0\.bias' must be float32 \[4\] with SHA-256"


@pytest.mark.parametrize("filename", [name for name in FORMATS if name not in PICKLES])
def test_a_changed_tensor_is_refused_in_every_format(tmp_path, changed, filename):
    with pytest.raises(DigestError, match=CHANGED) as caught:
        resolve_weights("tiny", path=write(tmp_path / filename, changed))
    assert "Give another file" in one_line_of(caught)


@pytest.mark.parametrize("filename", PICKLES)
def test_a_changed_pickle_is_refused_as_a_whole(tmp_path, changed, filename):
    with pytest.raises(DigestError, match="must be the published one") as caught:
        resolve_weights("tiny", path=write(tmp_path / filename, changed))
    assert "Give another file" in one_line_of(caught)


def test_the_digest_of_a_pickle_does_not_stand_for_those_of_its_tensors(tmp_path, changed, monkeypatch):
    (tmp_path / "w.pth").write_bytes(content := published(changed))
    set_sources(monkeypatch, digests={".pth": hashlib.sha256(content).hexdigest()})
    with pytest.raises(DigestError, match=CHANGED):
        resolve_weights("tiny", path=tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_refused(tmp_path, dtype):
    other = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    with pytest.raises(DigestError, match=str(dtype).removeprefix("torch.")):
        resolve_weights("tiny", path=write(tmp_path / "w.safetensors", other))


@pytest.mark.usefixtures("origin")
def test_a_given_file_that_fails_is_not_replaced_by_a_source(tmp_path):
    with pytest.raises(WeightsError, match=r"no file at .*mine\.h5"):
        resolve_weights("tiny", path=tmp_path / "mine.h5")


# --- the cache


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "home"
    monkeypatch.delenv("CHANSCALE_HOME")
    assert cache_folder() == tmp_path / "xdg" / "chanscale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "chanscale"
    monkeypatch.setenv("CHANSCALE_HOME", "~no such user/cache")  # a folder by that name: no error of its own
    assert cache_folder() == Path("~no such user/cache")


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told_in_one_line_to_name_a_cache(capsys):
    assert cli.run(["weights", "list"]) == 2
    assert capsys.readouterr().err == (
        "error: this user has no home folder for the cache; set CHANSCALE_HOME to a folder to use in its place\n"
    )


def test_fetching_fills_the_cache_once(origin, home):
    path = fetch_weights("tiny")
    origin.unlink()  # a second download would fail
    assert path == fetch_weights("tiny") == home / "tiny.safetensors"
    assert left_in(home) == ["tiny.safetensors"]
    assert equal(safetensors.torch.load_file(path))
    assert equal(resolve_weights("tiny"))


@pytest.mark.usefixtures("origin")
def test_a_damaged_cache_is_fetched_again(caplog):
    content = bytearray(fetch_weights("tiny").read_bytes())
    content[-1] ^= 1
    cache_path("tiny").write_bytes(content)
    assert equal(resolve_weights("tiny"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "fetching the weights again" in caplog.text
    assert equal(safetensors.torch.load_file(cache_path("tiny")))


def test_a_damaged_cache_without_sources_is_an_error_that_names_it(home):
    home.mkdir()
    cache_path("tiny").write_bytes(b"half a downl")
    with pytest.raises(WeightsError, match=r"tiny\.safetensors is damaged"):
        resolve_weights("tiny")


@pytest.mark.usefixtures("origin")
def test_leftovers_of_a_killed_process_are_written_over(home):
    home.mkdir()
    (home / "tiny.partial").write_bytes(b"half")
    fetch_weights("tiny")
    assert left_in(home) == ["tiny.safetensors"]


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """A cache that not even root can write: its parent is a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path / "file" / "home"))


@pytest.mark.usefixtures("unwritable", "origin")
def test_weights_are_used_from_memory_when_the_cache_cannot_be_written(caplog):
    assert equal(resolve_weights("tiny"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Set CHANSCALE_HOME" in caplog.text


@pytest.mark.usefixtures("unwritable", "origin")
def test_fetching_into_a_cache_that_cannot_be_written_is_an_error():
    with pytest.raises(WeightsError, match="Set CHANSCALE_HOME") as caught:
        fetch_weights("tiny")
    one_line_of(caught)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_still_serves_what_it_holds(origin, home):
    fetch_weights("tiny")
    origin.unlink()
    home.chmod(0o500)
    assert equal(resolve_weights("tiny"))


@pytest.mark.usefixtures("origin")
@pytest.mark.parametrize("function", ["resolve_weights", "fetch_weights"])
def test_a_cache_that_cannot_be_read_is_passed_over(home, monkeypatch, caplog, function):
    home.mkdir()
    stat = os.stat

    def refuse(path, *arguments, **options):  # root may read everything
        if not isinstance(path, int) and Path(path).is_relative_to(home) and Path(path) != home:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    def refuse_to_write(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse_to_write)
    if function == "fetch_weights":
        with pytest.raises(WeightsError, match="Set CHANSCALE_HOME"):
            fetch_weights("tiny")
        return
    assert equal(resolve_weights("tiny"))
    assert "Set CHANSCALE_HOME" in caplog.text


def test_a_full_disk_leaves_no_broken_file(origin, home, monkeypatch, caplog):
    def write_half(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert equal(resolve_weights("tiny"))
    assert left_in(home) == []
    assert "No space left" in caplog.text


FETCH_SLOWLY = """
import sys, time
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
import test_weights

class Slow:
    filename = manual = "slow.h5"
    def fetch(self, folder, progress=None):
        with Path(sys.argv[2]).open("a") as log:
            log.write("fetched\\n")
        time.sleep(1)
        return test_weights.write(folder / "slow.h5")

test_weights.set_sources(pytest.MonkeyPatch(), Slow())
assert test_weights.equal(test_weights.resolve_weights("tiny"))
"""


def test_two_processes_fetch_once(tmp_path, home):
    log = tmp_path / "log"
    command = [sys.executable, "-c", FETCH_SLOWLY, str(Path(__file__).parent), str(log)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert log.read_text() == "fetched\n"
    assert left_in(home) == ["tiny.safetensors"]


# --- the sources


def test_the_next_source_is_tried(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    missing = UrlSource((tmp_path / "nowhere.h5").as_uri(), md5="0", size=1)
    tampered = url_source(write(tmp_path / "t.h5", {name: -tensor for name, tensor in TENSORS.items()}))
    set_sources(monkeypatch, missing, tampered, url_source(write(tmp_path / WHEEL)))
    assert equal(resolve_weights("tiny"))
    assert caplog.text.count("going on to the next source") == 2


def test_when_all_fails_the_error_names_the_steps_by_hand(tmp_path, home, monkeypatch):
    monkeypatch.setattr(weight_sources, "_pip", lambda: [str(tmp_path / "no-pip")])
    nowhere = UrlSource((tmp_path / "nowhere.h5").as_uri(), md5="0", size=1)
    set_sources(monkeypatch, nowhere, WheelSource("tiny-weights==1.0", WHEEL, 1))
    with pytest.raises(WeightsError) as caught:
        resolve_weights("tiny")
    steps = (
        f"download {nowhere.url}",
        "`pip download --no-deps tiny-weights==1.0`",
        str(home),
        "--weights FILE",
    )
    assert [step for step in steps if step not in one_line_of(caught)] == []
    assert left_in(home) == []


@pytest.mark.parametrize("filename", ["w.h5", WHEEL, TORCH_WHEEL])
def test_a_file_put_into_the_cache_by_hand_is_used(home, monkeypatch, filename):
    monkeypatch.setenv("CHANSCALE_OFFLINE", "1")
    home.mkdir()
    write(home / filename)
    wheels = [WheelSource("tiny-weights==1.0", name, 1) for name in (WHEEL, TORCH_WHEEL)]
    set_sources(monkeypatch, *wheels, UrlSource("https://absent.invalid/w.h5", "0", 1))
    assert equal(resolve_weights("tiny"))
    assert left_in(home) == sorted([filename, "tiny.safetensors"])


@pytest.mark.usefixtures("origin")
def test_offline_asks_no_source(monkeypatch):
    monkeypatch.setenv("CHANSCALE_OFFLINE", "1")
    with pytest.raises(WeightsError, match="CHANSCALE_OFFLINE is set"):
        resolve_weights("tiny")
    monkeypatch.setenv("CHANSCALE_OFFLINE", "0")
    assert equal(resolve_weights("tiny"))


@pytest.mark.usefixtures("origin")
def test_an_interrupted_download_leaves_nothing(home):
    def interrupt(_, done, __):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_weights("tiny", progress=interrupt)
    assert left_in(home) == []
    assert equal(resolve_weights("tiny"))  # and the lock was given back


# --- what the command line lists, and the real weights


@pytest.mark.usefixtures("origin")
def test_status_tells_what_is_cached(home):
    before = {status.name: status for status in weights_status()}
    assert set(before) == set(BACKBONES)
    assert before["tiny"].path is None
    assert before["tiny"].bytes == 4 * 112
    assert list(before["tiny"].files) == ["w.h5"]
    assert before["tiny"].files["w.h5"].startswith("download file://")
    fetch_weights("tiny")
    after = {status.name: status for status in weights_status()}
    assert after["tiny"] == dataclasses.replace(before["tiny"], path=home / "tiny.safetensors")
    cache_path("tiny").write_bytes(b"damaged")
    assert {status.name: status for status in weights_status()} == before


@pytest.mark.parametrize("function", [resolve_weights, fetch_weights])
def test_unknown_backbone_is_a_config_error(function):
    with pytest.raises(ConfigError, match="Got 'vgg61' instead"):
        function("vgg61")


@pytest.mark.skipif(
    not REAL_WEIGHTS.exists(), reason="no VGG16 in the cache: run `chanscale weights fetch vgg16`"
)
def test_weights_are_the_published_ones():
    """Against values that others have printed: Keras users' listings of the same file, in its HWIO order."""
    state = resolve_weights("vgg16", path=REAL_WEIGHTS)
    kernel = {layer: state[f"features.{layer}.weight"].permute(2, 3, 1, 0).numpy() for layer in (2, 24, 28)}
    bias = {layer: state[f"features.{layer}.bias"].numpy() for layer in (0, 5, 26)}
    got = [kernel[2][2, 2, 63, 63], kernel[24][1, 0, 63, 269], kernel[28][0, 2, 0, 400]]
    got += [bias[0][0], bias[0][25], bias[5][1], bias[26][510]]
    wanted = [0.016082443, -0.011236359, -0.008714244, 0.73429835, 0.7446502, 0.06440781, 0.23517226]
    assert got == [
        np.float32(value) for value in wanted
    ]  # all digits of a float32 are given, so no tolerance
