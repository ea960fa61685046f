"""The delta: what a model adds to a public network, in a few kilobytes, from which the model file is rebuilt.

A tensor that is, bit for bit, a slice of the published one goes without saying; every other one is stored: scales,
head, and a first convolution that was folded. Which slices is told by one bit for each channel of the original.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from chanscale import __version__, artifact
from chanscale.artifact import (
    ModelInfo,
    model_path,
    pack_tensors,
    parse_info,
    read_model,
    read_tensors,
    rebuild,
)
from chanscale.classifier import Classifier, to_channels_last
from chanscale.errors import ArtifactError, ChanscaleError, DigestError, WeightsError, brief, one_line
from chanscale.files import write_atomically
from chanscale.provenance import Origin, Origins, require_public, same_bits

FORMAT: Final = "chanscale-delta/1"
DELTA = "delta.safetensors"
"""What a delta is called in a run folder."""

KEPT = "kept"
"""The tensor of bits, uint8: one for each channel of each group, in the order of the metadata, the highest first."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _Header:
    """The metadata of a delta.

    `weights`: the digest of the public weights. `sha256`: of the model file. `widths`: the channels that each group has
    in the original. `model`: the metadata of the model file, with null in place of the kept channels.
    """

    format: Literal["chanscale-delta/1"]
    chanscale: str
    weights: Digest
    sha256: Digest
    widths: dict[str, Annotated[int, Field(gt=0)]]
    model: dict[str, Any]


_HEADER = TypeAdapter(_Header)


@dataclass(frozen=True)
class Delta:
    """A delta as it was read: what it says of the model, and the tensors that no checkpoint holds, by name.

    `weights`, `sha256`: the digests of the public weights, and of the model file, of which `metadata` are those.
    """

    info: ModelInfo
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weights: str
    sha256: str


def save_delta(run: str | Path, path: str | Path | None = None, *, weights: Path | None = None) -> Path:
    """Write to `path` what the model of a run folder, or of a model file, adds to its public network; return it.

    `path`: default: in the run folder. `weights`: a file to take the public weights from; default: the cache, then
    their sources. The delta is tried before it is written. Raises ArtifactError, WeightsError.
    """
    file = model_path(Path(run))
    tensors, metadata = read_model(file)
    info = parse_info(metadata, file)
    require_public(info)
    with _fitting(file, info):
        origin = Origins(weights=weights).find(info)
        slices = origin.slices(info.kept)
    own = {name: tensor for name, tensor in tensors.items() if not _goes_without_saying(name, tensor, slices)}
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    delta = Delta(info, metadata, own, origin.digest, sha256)
    _rebuild(delta, origin, file)
    header = _Header(
        FORMAT, __version__, origin.digest, sha256, _widths(info, origin), _with_kept(metadata, None)
    )
    content = pack_tensors({**own, KEPT: _pack_kept(info.kept, header.widths)}, asdict(header))
    target = file.with_name(DELTA) if path is None else Path(path)
    write_atomically(target, content)
    return target


def read_delta(path: Path) -> Delta:
    """Return what the delta at `path`, or in a run folder, says; not yet whether it is true. Raises ArtifactError."""
    path = path / DELTA if path.is_dir() else path
    if not path.is_file():
        raise ArtifactError(f"there is no delta at {path}; chanscale export RUN --format delta writes one")
    tensors, found = read_tensors(path)
    header = _parse_header(found, path)
    bits = tensors.pop(KEPT, None)
    metadata = _with_kept(header.model, _unpack_kept(bits, header.widths, path))
    info = parse_info(metadata, path)
    require_public(info)
    return Delta(info, metadata, tensors, header.weights, header.sha256)


class Restorer:
    """Rebuilds models from their deltas; a public network is read once and held once, for as many as there are.

    A tensor of which nothing was removed is the same memory in all of them: it is not to be written to.
    `origins`: those networks; default: from the cache, then from their sources.
    """

    def __init__(self, origins: Origins | None = None) -> None:
        self.origins = origins or Origins()

    def restore(self, path: Path | str) -> tuple[Classifier, ModelInfo]:
        """Return the model of a delta, in eval mode, and what its file says of it, as `load_model` does.

        Raises ArtifactError, DigestError when the public weights are others, WeightsError when there are none.
        """
        model, delta, _ = self._restore(Path(path))
        return model, delta.info

    def rebuild(self, path: Path | str) -> bytes:
        """Return the model file that the delta at `path` was made from, byte for byte. Raises as `restore` does."""
        return self._restore(Path(path))[2]

    def _restore(self, path: Path) -> tuple[Classifier, Delta, bytes]:
        delta = read_delta(path)
        with _fitting(path, delta.info):
            origin = self.origins.find(delta.info)
        if delta.weights != origin.digest:
            raise DigestError(
                f"{path} is for other weights of {delta.info.backbone} ({delta.weights[:12]}...) than these "
                f"({origin.digest[:12]}...); take the version of chanscale that wrote it"
            )
        model, content = _rebuild(delta, origin, path)
        return model, delta, content


def restore_model(path: Path | str, *, weights: Path | None = None) -> tuple[Classifier, ModelInfo]:
    """Return the model of a delta, and what its file says of it; of many deltas, a `Restorer` shares the network.

    `weights`: a file to take the public weights from; default: the cache, then their sources. Raises ArtifactError,
    DigestError, WeightsError.
    """
    return Restorer(Origins(weights=weights)).restore(path)


def _goes_without_saying(name: str, tensor: Tensor, slices: Mapping[str, Tensor]) -> bool:
    return name in slices and same_bits(tensor, slices[name])


def _rebuild(delta: Delta, origin: Origin, path: Path) -> tuple[Classifier, bytes]:
    """Return the model, and the bytes of its file. Raises ArtifactError, naming `path`, for bytes of another digest."""
    with _fitting(path, delta.info):
        state = _state(delta, origin)
    content = _pack_model(delta, state, path)
    with _fitting(path, delta.info):
        model = to_channels_last(rebuild(delta.info, state))
    return model.requires_grad_(False).eval(), content


def _state(delta: Delta, origin: Origin) -> dict[str, Tensor]:
    """Return the state dict of the model, as a file holds it: slices are laid out row by row."""
    whole = {tensor.data_ptr() for tensor in origin.whole.state_dict().values()}
    slices = {
        name: part if part.data_ptr() in whole else part.clone(memory_format=torch.contiguous_format)
        for name, part in origin.slices(delta.info.kept).items()
    }
    return {**slices, **delta.tensors}


def _pack_model(delta: Delta, state: Mapping[str, Tensor], path: Path) -> bytes:
    """Return the bytes of the model file. Raises ArtifactError, naming `path`, unless they have the digest."""
    content = pack_tensors(state, delta.metadata)
    got = hashlib.sha256(content).hexdigest()
    if got != delta.sha256:
        raise ArtifactError(
            f"{path} does not give the model file that it stands for: SHA-256 {delta.sha256[:12]}... was wanted, and "
            f"{got[:12]}... came out; it was changed or damaged: get it again"
        )
    return content


@contextmanager
def _fitting(path: Path, info: ModelInfo) -> Iterator[None]:
    """Say in one line that the file at `path` does not fit its network. Raises ArtifactError."""
    try:
        yield
    except (WeightsError, ArtifactError):
        raise
    except (ChanscaleError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ArtifactError(f"{path} does not fit {info.backbone!r}: {reason}") from error


def _with_kept(metadata: Mapping[str, Any], kept: Mapping[str, list[int]] | None) -> dict[str, Any]:
    """Return the metadata of a model file with other `kept` channels, in the same place of the same order."""
    return {**metadata, "info": {**metadata["info"], KEPT: kept}}


def _widths(info: ModelInfo, origin: Origin) -> dict[str, int]:
    widths = {group.name: group.width for group in origin.groups}
    return {name: widths[name] for name in info.kept}


def _pack_kept(kept: Mapping[str, list[int]], widths: Mapping[str, int]) -> Tensor:
    rows = [np.isin(np.arange(widths[name]), indices) for name, indices in kept.items()]
    return torch.from_numpy(np.packbits(np.concatenate(rows) if rows else np.zeros(0, dtype=bool)))


def _unpack_kept(bits: Tensor | None, widths: Mapping[str, int], path: Path) -> dict[str, list[int]]:
    """Return the kept channels of each group, ascending. Raises ArtifactError unless there is a bit for each."""
    total = sum(widths.values())
    if bits is None or bits.dtype != torch.uint8 or bits.shape != (-(-total // 8),):
        told = "none" if bits is None else f"{bits.dtype} {tuple(bits.shape)}"
        raise ArtifactError(
            f"{path} must have {total} bits, one for each channel, in {-(-total // 8)} bytes. Got {told}; get it again"
        )
    flags = np.unpackbits(bits.numpy())
    if flags[total:].any():
        raise ArtifactError(f"{path} keeps channels that are not there, behind the last; get it again")
    parts = np.split(flags[:total], np.cumsum(list(widths.values()))[:-1]) if widths else []
    return {name: np.flatnonzero(part).tolist() for name, part in zip(widths, parts, strict=True)}


def _parse_header(found: Mapping[str, Any], path: Path) -> _Header:
    header = artifact.parse_header(_HEADER, found, path, wanted=FORMAT, kind="delta", advice="get it again")
    told = header.model.get("format")
    if told != artifact.FORMAT or not isinstance(header.model.get("info"), dict):
        raise ArtifactError(
            f"{path} is of a model of format {brief(told)}, not {artifact.FORMAT!r}; get it again"
        )
    return header
