"""Building the page: whole or not at all, from a runtime that is the published one."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from chanscale.artifact import ModelInfo
from chanscale.conformal import PredictionSets
from chanscale.errors import ArtifactError
from chanscale.export import web
from chanscale.export.web import RUNTIME, build_page, find_registry, read_runtime
from chanscale.operating_point import OperatingPoint
from chanscale.wording import NOTICE

INFO = ModelInfo("tiny", ("no", "yes"), kept={}, preprocessing={}, image_size=32, channels=1)
MEMBERS = dict.fromkeys(RUNTIME.members, b"a piece of the runtime")
ABOUT = {
    "classes": ["clear", "</script><script>alert(1)</script>"], "name": "a <b>bold</b> model", "channels": 1,
    "grey_only": True, "notice": "Only for tests.",
}  # fmt: skip


def pack(members: Mapping[str, bytes]) -> bytes:
    """Return a tarball as npm makes them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(file.getvalue(), mtime=0)


def publish(monkeypatch, tarball: bytes) -> None:
    """Make `tarball` the published runtime."""
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    monkeypatch.setattr(web, "RUNTIME", replace(RUNTIME, size=len(tarball), integrity=integrity))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache and a home without settings; the network is off until a test asks for it."""
    monkeypatch.setenv("CHANSCALE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CHANSCALE_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for setting in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(setting, raising=False)
    return tmp_path


@pytest.fixture
def cached(home, monkeypatch) -> Path:
    """A small runtime in the cache."""
    tarball = pack(MEMBERS)
    publish(monkeypatch, tarball)
    file = home / "cache" / RUNTIME.filename
    file.parent.mkdir()
    file.write_bytes(tarball)
    return file


@pytest.fixture
def registry(monkeypatch):
    """A registry on this machine, chosen as npm's; returns what it gives, and what it was asked for."""
    given, asked = {"body": b""}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(given["body"])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/mirror/")
        monkeypatch.setenv("CHANSCALE_OFFLINE", "0")
        yield given, asked
        server.shutdown()
        thread.join()


def test_the_folder_holds_the_page_the_model_and_the_runtime(cached, home):
    folder = build_page(b"a model", home / "site", **ABOUT)
    assert folder == home / "site"
    assert {path.name for path in folder.iterdir()} == {
        *web.PAGE, *RUNTIME.members.values(), "model.json", "model.onnx",
    }  # fmt: skip
    assert (folder / "model.onnx").read_bytes() == b"a model"
    about = json.loads((folder / "model.json").read_text())
    assert not {"operating_point", "prediction_sets"} & about.keys()
    assert {key: about[key] for key in ABOUT} == ABOUT
    assert about["bytes"] == 7


def test_the_rules_of_the_model_travel_with_the_page(cached, home):
    point = OperatingPoint(0.25, 0.9, 20, 2)
    info = replace(INFO, operating_point=point, prediction_sets=PredictionSets(0.8, (0.3, 0.1), (9, 9)))
    folder = build_page(b"a model", home / "site", rules=info.rules, **ABOUT)
    about = json.loads((folder / "model.json").read_text())
    assert about["operating_point"] == {"threshold": 0.25, "sensitivity": 0.9, "positives": 20, "rests_on": 2}
    assert about["prediction_sets"] == {"coverage": 0.8, "least": [0.3, 0.1], "images": [9, 9]}


def test_the_html_is_the_same_for_every_model(cached, home):
    folder = build_page(b"", home / "site", **ABOUT)
    html = (folder / "index.html").read_bytes()
    assert html == (Path(web.__file__).parent / "page" / "index.html").read_bytes()
    assert NOTICE.encode() in html


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_already_is_refused_and_stays(cached, home, kind):
    there = home / "site"
    there.write_text("mine") if kind == "file" else there.mkdir()
    with pytest.raises(ArtifactError, match="exists already; remove it"):
        build_page(b"", there, **ABOUT)
    assert there.read_text() == "mine" if kind == "file" else not list(there.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_or_interrupt_leaves_nothing_behind(cached, home, monkeypatch, error):
    write = Path.write_bytes

    def fail(path, content):
        if path.name == "model.onnx":
            raise error
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    before = set(home.iterdir())
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        build_page(b"", home / "site", **ABOUT)
    assert set(home.iterdir()) == before


def test_a_missing_parent_is_said_in_a_sentence(cached, home):
    with pytest.raises(ArtifactError, match="No such file or directory; choose another --out"):
        build_page(b"", home / "no" / "site", **ABOUT)


def test_the_runtime_is_downloaded_once_from_the_chosen_registry(registry, home, monkeypatch):
    given, asked = registry
    given["body"] = pack(MEMBERS)
    publish(monkeypatch, given["body"])
    heard = []
    files = read_runtime(lambda *step: heard.append(step))
    assert files == dict.fromkeys(RUNTIME.members.values(), b"a piece of the runtime")
    assert read_runtime() == files
    assert asked == [f"/mirror/onnxruntime-web/-/{RUNTIME.filename}"]
    size = len(given["body"])
    assert heard == [(RUNTIME.filename, 0, size), (RUNTIME.filename, size, size)]


def test_a_damaged_cache_is_downloaded_again(registry, cached):
    given, asked = registry
    given["body"] = cached.read_bytes()
    cached.write_bytes(b"half")
    assert len(read_runtime()) == len(RUNTIME.members)
    assert cached.read_bytes() == given["body"]
    assert len(asked) == 1


def test_what_is_not_the_published_runtime_is_never_kept(registry, home):
    given, _ = registry
    given["body"] = pack(MEMBERS)  # the true digest still stands in RUNTIME
    with pytest.raises(ArtifactError, match=r"must hold 33106585 bytes with sha512-.*Got \d+ bytes"):
        read_runtime()
    assert not (home / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(registry, home, monkeypatch, caplog):
    given, _ = registry
    given["body"] = pack(MEMBERS)
    publish(monkeypatch, given["body"])
    (home / "cache").write_text("a file where the folder should be")
    assert len(read_runtime()) == len(RUNTIME.members)
    assert "Set CHANSCALE_HOME to a folder" in caplog.text


def test_offline_says_what_to_get_and_where_to_put_it(home):
    with pytest.raises(ArtifactError) as caught:
        read_runtime()
    message = str(caught.value)
    assert "CHANSCALE_OFFLINE is set" in message
    assert "npm pack onnxruntime-web@" in message
    assert str(home / "cache") in message
    assert "\n" not in message


def test_a_registry_that_does_not_answer_is_named(home, monkeypatch):
    monkeypatch.setenv("CHANSCALE_OFFLINE", "0")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    with pytest.raises(ArtifactError, match=r"cannot download http://127\.0\.0\.1:1/onnxruntime-web/"):
        read_runtime()


def test_members_are_read_by_exact_name_alone(cached, home, monkeypatch):
    tarball = pack({"../evil.js": b"x", "package/dist/../../ort.wasm.min.mjs": b"x", **MEMBERS})
    publish(monkeypatch, tarball)
    cached.write_bytes(tarball)
    assert read_runtime() == dict.fromkeys(RUNTIME.members.values(), b"a piece of the runtime")
    assert not list(home.rglob("evil.js"))


def test_the_registry_is_that_of_the_variable_then_npmrc_then_the_public_one(home, monkeypatch):
    assert find_registry() == "https://registry.npmjs.org"
    monkeypatch.setenv("HOST", "mirror.example")
    (home / ".npmrc").write_text("fund=false\n;registry=https://old\nregistry = https://${HOST}/npm/\n")
    assert find_registry() == "https://mirror.example/npm"
    monkeypatch.setenv("npm_config_registry", "https://other.example")
    assert find_registry() == "https://other.example"


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_the_public_registry():
    assert find_registry() == "https://registry.npmjs.org"
