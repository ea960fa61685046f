"""Find the pretrained weights of a backbone: a file, the cache, then the sources; all verified alike.

Trust does not depend on where the bytes came from: each tensor's SHA-256 (of its little-endian float32
bytes, row-major) must stand in the manifest that the package ships. What passes is converted once, to
safetensors, in the cache: `CHANSCALE_HOME`, else `XDG_CACHE_HOME/chanscale`, else `~/.cache/chanscale`.
`CHANSCALE_OFFLINE=1` keeps everything here off the network.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from chanscale.backbones import BACKBONES, Backbone, find_backbone
from chanscale.errors import DigestError, WeightsError, one_line
from chanscale.files import exists, is_file, user_folder
from chanscale.weight_files import read_tensors
from chanscale.weight_sources import Progress, Source

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorEntry:
    """What the manifest says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class WeightsStatus:
    """A backbone's weights on this machine; `path` is None unless they are in the cache, and intact.

    `files`: the names under which the weights may be put into the cache by hand, and how to get each.
    """

    name: str
    path: Path | None
    bytes: int
    licence: str
    origin: str
    digest: str
    files: Mapping[str, str]


def resolve_weights(
    name: str, *, path: Path | None = None, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Return the verified float32 tensors of a backbone, by their names in its state dict.

    `path`: a .safetensors file, or one of a format that the backbone has names for (Keras .h5, .onnx, .pth, a
    .whl), and then nothing else is tried. A cache that cannot be written costs a logged warning, and the
    download again next time. Raises WeightsError, DigestError.
    """
    backbone = find_backbone(name)
    if path is not None:
        return _read_given(backbone, path)
    with suppress(WeightsError):  # absent or damaged: told below, under the lock
        return _read_verified(backbone, cache_path(name))
    return _obtain(backbone, progress, must_store=False)


def fetch_weights(name: str, *, progress: Progress | None = None) -> Path:
    """Put the verified weights into the cache, unless they are there, and return the file's path.

    Raises WeightsError, also when the cache cannot be written.
    """
    backbone = find_backbone(name)
    try:
        _read_verified(backbone, cache_path(name))
    except WeightsError:
        _obtain(backbone, progress, must_store=True)
    return cache_path(name)


def weights_status() -> list[WeightsStatus]:
    """Say for each backbone whether its weights are in the cache, verified; `bytes` is the tensors' size."""
    return [_status(backbone) for backbone in BACKBONES.values()]


def cache_folder() -> Path:
    """Return the folder of the cache, which need not exist. Raises WeightsError for a user without a home folder."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise WeightsError(
            "this user has no home folder for the cache; set CHANSCALE_HOME to a folder to use in its place"
        )
    return folder


def cache_path(name: str) -> Path:
    """Return the file that a backbone's weights have in the cache, which need not exist."""
    return cache_folder() / f"{name}.safetensors"


def read_manifest(name: str) -> dict[str, TensorEntry]:
    """Return the manifest that the package ships for a backbone, by tensor name."""
    text = resources.files("chanscale").joinpath(f"{name}_manifest.json").read_text(encoding="utf-8")
    tensors: dict[str, dict[str, Any]] = json.loads(text)["tensors"]
    return {
        key: TensorEntry(tuple(item["shape"]), item["dtype"], item["sha256"]) for key, item in tensors.items()
    }


def describe_tensor(tensor: Tensor) -> TensorEntry:
    """Return the manifest's entry for a tensor."""
    array = np.ascontiguousarray(tensor.float().numpy(), dtype="<f4")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(tuple(tensor.shape), dtype, hashlib.sha256(array.data).hexdigest())


def combine_digests(entries: Iterable[TensorEntry]) -> str:
    """Return the digest that stands for all tensors of a backbone, in the order of its state dict."""
    return hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()


def verify_tensors(tensors: Mapping[str, Tensor], manifest: Mapping[str, TensorEntry], where: str) -> None:
    """Raise DigestError, naming `where` and the first tensor that is not the published one, if one is not."""
    for name, wanted in manifest.items():
        got = describe_tensor(tensors[name])
        if got != wanted:
            raise DigestError(f"{where}: {name!r} must be {_brief(wanted)}. Got {_brief(got)} instead.")


def _brief(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)} with SHA-256 {entry.sha256[:12]}..."


def _read_verified(backbone: Backbone, path: Path) -> dict[str, Tensor]:
    manifest = read_manifest(backbone.name)
    shapes = {name: entry.shape for name, entry in manifest.items()}
    tensors = read_tensors(path, shapes, backbone.names, backbone.digests)
    verify_tensors(tensors, manifest, str(path))
    return tensors


def _read_given(backbone: Backbone, path: Path) -> dict[str, Tensor]:
    try:
        return _read_verified(backbone, path)
    except WeightsError as error:
        advice = f"Give another file, or none to use the cache and the sources of {backbone.name!r}."
        raise type(error)(f"{error} {advice}") from error


def _obtain(backbone: Backbone, progress: Progress | None, *, must_store: bool) -> dict[str, Tensor]:
    """Read the cache or a source, one process at a time, and fill the cache."""
    target = cache_path(backbone.name)
    with ExitStack() as stack:
        problem = _lock(target, stack, progress)
        if problem and must_store:
            raise WeightsError(problem)
        with suppress(WeightsError):  # another process may have filled it while this one waited
            return _read_verified(backbone, target)
        tensors = _first_good(backbone, progress)
        problem = problem or _store(tensors, target)
    if problem and must_store:
        raise WeightsError(problem)
    if problem:
        _log.warning("%s The weights are used from memory, and downloaded again next time.", problem)
    return tensors


def _first_good(backbone: Backbone, progress: Progress | None) -> dict[str, Tensor]:
    failures = _cache_damage(backbone)
    for source in backbone.sources:
        try:
            return _from_source(backbone, source, progress)
        except WeightsError as error:
            failures.append(str(error))
            _log.info("%s; going on to the next source", error)
    tried = "; ".join(failure.rstrip(".") for failure in failures)
    steps = " or ".join(source.manual for source in backbone.sources)
    raise WeightsError(
        f"no verified weights for {backbone.name!r}: {tried}. On a machine with a network, {steps}; "
        f"then put the file into {cache_folder()}, or pass it with --weights FILE."
    )


def _cache_damage(backbone: Backbone) -> list[str]:
    path = cache_path(backbone.name)
    if not exists(path):
        return [f"not in the cache {path.parent}"]
    try:
        _read_verified(backbone, path)
    except WeightsError as error:
        _log.warning("%s; fetching the weights again", error)
        return [str(error)]
    return []


def _from_source(backbone: Backbone, source: Source, progress: Progress | None) -> dict[str, Tensor]:
    by_hand = cache_folder() / source.filename
    if is_file(by_hand):
        return _read_verified(backbone, by_hand)
    if os.environ.get("CHANSCALE_OFFLINE", "0") not in ("", "0"):
        raise WeightsError(f"{source.filename} not asked for (CHANSCALE_OFFLINE is set)")
    try:
        with tempfile.TemporaryDirectory(prefix="chanscale-") as folder:
            return _read_verified(backbone, source.fetch(Path(folder), progress))
    except OSError as error:
        raise WeightsError(f"cannot download {source.filename} ({one_line(error)})") from error


def _lock(target: Path, stack: ExitStack, progress: Progress | None) -> str | None:
    """Enter the cache's lock on `stack`; return what stands in the way, if something does."""
    lock = FileLock(target.with_suffix(".lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                progress("waiting for another process that fetches the weights", 0, 1)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        return _unwritable(target, error)
    stack.callback(lock.release)
    return None


def _store(tensors: dict[str, Tensor], target: Path) -> str | None:
    """Write the cache's file whole or not at all; return what stands in the way, if something does."""
    # One name for all: the lock is held, and what a killed process left there is written over.
    partial = target.with_suffix(".partial")
    try:
        partial.write_bytes(save(tensors))
        partial.replace(target)
    except OSError as error:
        return _unwritable(target, error)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return None


def _unwritable(target: Path, error: Exception) -> str:
    return f"cannot write {target} ({one_line(error)}). Set CHANSCALE_HOME to a folder that can be written."


def _status(backbone: Backbone) -> WeightsStatus:
    manifest = read_manifest(backbone.name)
    path: Path | None = cache_path(backbone.name)
    try:
        _read_verified(backbone, cache_path(backbone.name))
    except WeightsError:
        path = None
    size = sum(4 * math.prod(entry.shape) for entry in manifest.values())
    digest = combine_digests(manifest.values())
    files = {source.filename: source.manual for source in backbone.sources}
    return WeightsStatus(backbone.name, path, size, backbone.licence, backbone.origin, digest, files)
