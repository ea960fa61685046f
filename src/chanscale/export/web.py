"""A folder that any static server can host: a page that classifies images in the browser, with the model in it.

The page is ours, in `page/`. What runs the model there is onnxruntime-web: it comes from npm's registry when a page
is built, is trusted by its SHA-512 alone, and stays in the cache. What the page knows of the model it reads from
`model.json`: no name is ever pasted into HTML.
"""

import base64
import hashlib
import http.client
import io
import logging
import os
import re
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from chanscale.errors import ArtifactError, one_line
from chanscale.files import claiming, is_file, require_absent, to_json, whole_folder, write_atomically
from chanscale.weight_sources import Progress
from chanscale.weights import cache_folder

FORMAT = "chanscale-page/1"
PAGE = ("index.html", "app.js", "style.css", "onnxruntime-web.LICENSE.txt")
REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60
"""Seconds without an answer after which a registry is given up: a mirror may first have to get the file itself."""

_REGISTRY_SETTINGS = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """A release of onnxruntime-web: bytes and integrity of its tarball, as the registry publishes them.

    `members`: the files of the tarball that a page needs, and their names there: a .js, since not every server knows
    what an .mjs is, and browsers run only what is served as JavaScript.
    """

    version: str
    size: int
    integrity: str
    members: Mapping[str, str]

    @property
    def package(self) -> str:
        """The name and version, as npm takes them."""
        return f"onnxruntime-web@{self.version}"

    @property
    def filename(self) -> str:
        """The tarball's name, in the registry and in the cache."""
        return f"onnxruntime-web-{self.version}.tgz"


RUNTIME = Runtime(
    version="1.30.0",
    size=33_106_585,
    integrity="sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    members={
        "package/dist/ort.wasm.min.mjs": "ort.wasm.min.js",
        "package/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
        "package/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    },
)


def build_page(
    model: bytes,
    folder: Path,
    *,
    classes: Sequence[str],
    name: str,
    channels: int,
    grey_only: bool,
    multilabel: bool = False,
    rules: Mapping[str, Any] | None = None,
    notice: str,
    progress: Progress | None = None,
) -> Path:
    """Write the page for an ONNX model to `folder`, whole or not at all, and return it.

    `model`: input `pixels` (N, 1 or 3, H, W), 0 to 255; outputs `probabilities` (N, K) and, if it has one, `class_map`
    (N, M, h, w). `channels`: of the images it was trained on; `grey_only`: it takes no others than grey ones;
    `multilabel`: an image may have several of the classes, or none. `rules`: those of `ModelInfo.rules`, by which
    the page reads probabilities as `predict` does. `name` and `notice` are shown as text. Raises ArtifactError, also
    when `folder` is there already or the runtime is not to be had, and WeightsError where there is no cache to keep it.
    """
    require_absent(folder)
    about = {
        "format": FORMAT, "name": name, "classes": list(classes), "channels": channels, "grey_only": grey_only,
        "multilabel": multilabel, "notice": notice, "bytes": len(model), "runtime": RUNTIME.package,
        **(rules or {}),
    }  # fmt: skip
    page = resources.files("chanscale.export").joinpath("page")
    files = {part: page.joinpath(part).read_bytes() for part in PAGE} | read_runtime(progress)
    files |= {"model.onnx": model, "model.json": to_json(about).encode()}
    with whole_folder(folder) as partial, claiming(folder):
        for part, content in files.items():
            (partial / part).write_bytes(content)
    return folder


def read_runtime(progress: Progress | None = None) -> dict[str, bytes]:
    """Return the files of the runtime, by their names in a page: from the cache, else from the registry.

    A cache that cannot be written costs a logged warning, and the download again next time. Raises ArtifactError, and
    WeightsError for a user without a home folder.
    """
    cached = cache_folder() / RUNTIME.filename
    try:
        return _unpack(_read_cached(cached))
    except ArtifactError as error:
        tarball = _download(str(error), progress)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, tarball)
    except OSError as error:
        _log.warning(
            "cannot write %s (%s). Set CHANSCALE_HOME to a folder that can be.", cached, one_line(error)
        )
    return _unpack(tarball)


def find_registry() -> str:
    """Return the address of the npm registry that the user has chosen: by variable, in ~/.npmrc, or the public one."""
    chosen = [os.environ.get(setting) for setting in _REGISTRY_SETTINGS]
    npmrc = Path(os.path.expanduser("~/.npmrc"))  # noqa: PTH111 - Path.home raises where a user has none
    return next(filter(None, [*chosen, _read_npmrc(npmrc), REGISTRY])).rstrip("/")


def _read_npmrc(path: Path) -> str | None:
    if not is_file(path):
        return None
    lines = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^[ \t]*registry[ \t]*=[ \t]*[\"']?([^\"'\s]+)", lines, re.MULTILINE)
    return os.path.expandvars(found[-1]) if found else None  # npm takes ${VARIABLE} there, and the last line


def _read_cached(path: Path) -> bytes:
    if not is_file(path):
        raise ArtifactError(f"not in the cache {path.parent}")
    try:
        return _verify(path.read_bytes(), str(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path} ({error.strerror})") from error


def _download(missing: str, progress: Progress | None) -> bytes:
    # By urllib, not `npm pack`: who uses a Python package need not have npm. A registry that wants a password,
    # which npm would know, is what the advice is for.
    url = f"{find_registry()}/onnxruntime-web/-/{RUNTIME.filename}"
    try:
        if os.environ.get("CHANSCALE_OFFLINE", "0") not in ("", "0"):
            raise ArtifactError("not asked for (CHANSCALE_OFFLINE is set)")
        return _verify(_fetch(url, progress), url)
    except ArtifactError as error:
        raise ArtifactError(
            f"no verified {RUNTIME.filename}: {missing.rstrip('.')}; {str(error).rstrip('.')}. On a machine with a "
            f"network, run `npm pack {RUNTIME.package}` or download {REGISTRY}/onnxruntime-web/-/{RUNTIME.filename}; "
            f"then put the file into {cache_folder()}."
        ) from error


def _fetch(url: str, progress: Progress | None) -> bytes:
    content = bytearray()
    if progress:
        progress(RUNTIME.filename, 0, RUNTIME.size)  # a registry that hangs is then seen to be tried
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            # A page that a firewall sends in place of the file may have no end: stop where the file must.
            while len(content) <= RUNTIME.size and (chunk := response.read(_CHUNK)):
                content += chunk
                if progress:
                    progress(RUNTIME.filename, min(len(content), RUNTIME.size), RUNTIME.size)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ArtifactError(f"cannot download {url} ({one_line(error)})") from error
    return bytes(content)


def _verify(content: bytes, where: str) -> bytes:
    """Return `content` if it is the published tarball. Raises ArtifactError, which names `where`."""
    got = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if got != RUNTIME.integrity:
        raise ArtifactError(
            f"{where} must hold {RUNTIME.size} bytes with {RUNTIME.integrity[:19]}... "
            f"Got {len(content)} bytes with {got[:19]}... instead"
        )
    return content


def _unpack(tarball: bytes) -> dict[str, bytes]:
    """Return the members that a page needs, read by their exact names: nothing is extracted."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name in RUNTIME.members else None
            if file:
                found[RUNTIME.members[member.name]] = file.read()
    return found
