"""Where the tensors of a model come from: which are slices of a public network, filter by filter and bit by bit.

Which channels hang together is traced anew; nothing is proven by running it, since bits either agree or do not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.artifact import ModelInfo, load_model, model_path, parse_info, read_model
from chanscale.backbones import BACKBONES, Backbone, Preprocessing, load_backbone
from chanscale.channels import ChannelGroup, removed_positions
from chanscale.classifier import Classifier, assemble
from chanscale.coupling import couple_channels
from chanscale.cutting_points import cut_trunk
from chanscale.errors import ArtifactError, ModelError
from chanscale.folding import fold_weight
from chanscale.pruning import remove_positions, share
from chanscale.scaling import SCALE
from chanscale.slicing import output_width
from chanscale.weight_sources import Progress
from chanscale.weights import combine_digests, describe_tensor

TRACED = 64
"""Pixels of the image that a network is traced with: trunks of convolutions hang together alike at any size."""

TRUNK = "trunk."
"""What the names of the pretrained tensors begin with."""

COUNT = "num_batches_tracked"
"""What a norm counts in training; no checkpoint says it, and eval does not read it."""


@dataclass(frozen=True)
class Origin:
    """A public network, as a model began with it, and which of its channels hang together.

    `whole`: the network with all of its channels, but without the modules that the model lacks; its head means
    nothing. `digest`: of all published tensors, as `chanscale weights list` has it.
    """

    backbone: Backbone
    digest: str
    whole: Classifier
    groups: tuple[ChannelGroup, ...]

    def slices(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return what is left of each tensor of the trunk, by name, when only the channels `kept` are.

        A tensor that is left whole is the network's own, and not to be written to. Raises ModelError.
        """
        sliced = share(self.whole)
        remove_positions(sliced, self.groups, self._choose(kept))
        return {name: tensor for name, tensor in sliced.state_dict().items() if name.startswith(TRUNK)}

    def positions(self, kept: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return which outputs of each layer of the trunk, counted in the original, are left. Raises ModelError."""
        gone = removed_positions(self.groups, self._choose(kept))
        return {
            name: sorted(set(range(output_width(layer))) - set(gone.get(("outputs", name), ())))
            for name, layer in self.layers()
        }

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name of each layer of the trunk that has tensors, and the layer, in the order of the network."""
        for name, layer in self.whole.named_modules():
            if name.startswith(TRUNK) and layer.state_dict() and not list(layer.children()):
                yield name, layer

    def _choose(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        widths = {group.name: group.width for group in self.groups if group.protected is None}
        for name, indices in kept.items():
            if name not in widths:
                raise ModelError(
                    f"{name!r} is no group of channels of {self.backbone.name} that can be removed"
                )
            if not indices or not all(a < b for a, b in pairwise((-1, *indices, widths[name]))):
                raise ModelError(
                    f"the channels kept of {name!r} must ascend within 0..{widths[name] - 1}. "
                    f"Got {list(indices[:8])} instead."
                )
        return {name: torch.tensor(indices) for name, indices in kept.items()}


class Origins:
    """The public networks that models come from; each is read and verified once, and held once.

    `weights`: a file to take the weights from; default: the cache, then their sources.
    """

    def __init__(self, *, weights: Path | None = None, progress: Progress | None = None) -> None:
        self._weights, self._progress = weights, progress
        self._trunks: dict[str, tuple[nn.Module, str]] = {}
        self._origins: dict[tuple[str, tuple[str, ...]], Origin] = {}

    def find(self, info: ModelInfo) -> Origin:
        """Return where the model that `info` describes comes from. Raises ArtifactError, ModelError, WeightsError."""
        require_public(info)
        key = info.backbone, info.without
        if key not in self._origins:
            trunk, digest = self._load(info.backbone)
            self._origins[key] = _trace(BACKBONES[info.backbone], cut_trunk(trunk, info.without), digest)
        return self._origins[key]

    def _load(self, name: str) -> tuple[nn.Module, str]:
        if name not in self._trunks:
            trunk = load_backbone(name, weights=self._weights, progress=self._progress)
            digest = combine_digests(
                describe_tensor(tensor)
                for leaf, tensor in trunk.state_dict().items()
                if not leaf.endswith(COUNT)
            )
            # As a model that is loaded lies in memory: tensors that are left whole are then shared, not copied.
            trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._trunks[name] = trunk.requires_grad_(False), digest
        return self._trunks[name]


def require_public(info: ModelInfo) -> None:
    """Raise ArtifactError unless the model comes from weights that are public, and known by their digests."""
    if info.backbone not in BACKBONES:
        raise ArtifactError(
            f"only models of {', '.join(sorted(BACKBONES))} have public weights that are known by their digests, "
            f"of which they could be shown to be slices. Got one of {info.backbone!r}: keep its model.safetensors"
        )


def _trace(backbone: Backbone, trunk: nn.Module, digest: str) -> Origin:
    # The backbone's own preprocessing: one that was folded is for a network that was.
    example = torch.zeros(1, 3, TRACED, TRACED)
    whole = assemble(backbone.preprocessing(), trunk, example, classes=("no", "yes")).eval()
    return Origin(backbone, digest, whole, couple_channels(whole, example))


@dataclass(frozen=True)
class TensorProof:
    """The SHA-256 of a tensor of a layer, such as its weight, and of the published one that it is a slice of."""

    name: str
    kept: str
    original: str


@dataclass(frozen=True)
class LayerProof:
    """A frozen layer whose every tensor is a slice; `kept`: the positions of its outputs in the original.

    `kind`: "filters" for a convolution, "channels" for a norm. `width`: outputs of the original.
    """

    layer: str
    kind: str
    kept: tuple[int, ...]
    width: int
    tensors: tuple[TensorProof, ...]


@dataclass(frozen=True)
class Provenance:
    """What a model took from a public network, and what not.

    `scales`, `head`, `others`: the tensors that are its own, by name. `folded`: the first convolution, whose filters
    are sums of the slice's over the colours, for grey images, bit for bit; its tensor is among the others.
    """

    origin: Origin
    layers: tuple[LayerProof, ...]
    scales: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    folded: str | None

    def count(self, kind: str) -> tuple[int, int]:
        """Return how many filters, or channels of norms, are slices; and in how many layers."""
        counts = [len(layer.kept) for layer in self.layers if layer.kind == kind]
        return sum(counts), len(counts)


def verify_model(
    run: Path | str, *, weights: Path | None = None, origins: Origins | None = None
) -> Provenance:
    """Return the proof that the frozen tensors of a run folder, or of a model file, are slices of a public checkpoint.

    `weights`: a file to take the public weights from; default: the cache, then their sources; or `origins`, which has
    them already. Raises ArtifactError, which names the first filter that differs in a bit, or says that the file
    holds something else than its network; WeightsError.
    """
    file = model_path(Path(run))
    tensors, metadata = read_model(file)
    info = parse_info(metadata, file)
    require_public(info)
    load_model(file)  # nothing but what belongs to the network is in it
    return prove(tensors, info, (origins or Origins(weights=weights)).find(info))


def prove(tensors: Mapping[str, Tensor], info: ModelInfo, origin: Origin) -> Provenance:
    """Return the proof that the frozen `tensors`, a model's state dict, are slices of its `origin`, bit for bit.

    Of a first convolution that was folded for grey images, that its filters are what folding makes of the slice.
    Raises ArtifactError, which names the layer, the filter and its index in the original, for a single bit that is not.
    """
    slices, positions = origin.slices(info.kept), origin.positions(info.kept)
    folded = _find_folded(tensors, slices, origin) if info.preprocessing["folded"] else None
    for name, part in slices.items():
        wanted = fold_weight(part, Preprocessing.from_dict(info.preprocessing)) if name == folded else part
        _require_same(name, tensors.get(name), wanted, positions[name.rpartition(".")[0]], origin)
    own = {name: tensor for name, tensor in tensors.items() if name not in slices or name == folded}
    scales = {name: tensor for name, tensor in own.items() if name.endswith(f".{SCALE}.weight")}
    head = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
    return Provenance(
        origin,
        layers=tuple(
            _describe_layer(name, module, tensors, positions[name])
            for name, module in origin.layers()
            if f"{name}.weight" != folded
        ),
        scales=scales,
        head=head,
        others={name: tensor for name, tensor in own.items() if name not in scales and name not in head},
        folded=folded.rpartition(".")[0] if folded else None,
    )


def _describe_layer(
    name: str, original: nn.Module, tensors: Mapping[str, Tensor], kept: Sequence[int]
) -> LayerProof:
    return LayerProof(
        layer=name,
        kind="filters" if isinstance(original, _ConvNd) else "channels",
        kept=tuple(kept),
        width=output_width(original),
        tensors=tuple(
            TensorProof(leaf, _digest(tensors[f"{name}.{leaf}"]), _digest(tensor))
            for leaf, tensor in original.state_dict().items()
            if leaf != COUNT
        ),
    )


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Tell whether two tensors hold the same bits: -0.0 is not 0.0, and a nan equals itself."""
    alike = got.shape == wanted.shape and got.dtype == wanted.dtype
    return alike and torch.equal(_bits(got), _bits(wanted))


def differing_rows(got: Tensor, wanted: Tensor) -> tuple[int, int, int]:
    """Return the first row whose bits differ, how many of its numbers do, and how many more rows differ.

    Both are of one shape, (rows, *) or of one number, and do differ.
    """
    differ = (_bits(got) != _bits(wanted)).reshape(len(wanted) if wanted.dim() else 1, -1)
    first, *more = differ.any(1).nonzero().flatten().tolist()
    return first, int(differ[first].sum()), len(more)


def _bits(tensor: Tensor) -> Tensor:
    """Return `tensor`, which holds numbers of 1 to 8 bytes, as integers."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def _digest(tensor: Tensor) -> str:
    return describe_tensor(tensor).sha256


def _find_folded(tensors: Mapping[str, Tensor], slices: Mapping[str, Tensor], origin: Origin) -> str | None:
    """Return the weight that has two inputs where the original has three colours: that of `fold_grey`."""
    for layer, module in origin.layers():
        name = f"{layer}.weight"
        if isinstance(module, _ConvNd) and module.in_channels == 3 and name in tensors:
            shape, wanted = tensors[name].shape, slices[name].shape
            if shape != wanted and shape == (wanted[0], 2, *wanted[2:]):
                return name
    return None


def _require_same(name: str, got: Tensor | None, wanted: Tensor, kept: Sequence[int], origin: Origin) -> None:
    if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
        told = "missing" if got is None else f"{got.dtype} {tuple(got.shape)}"
        raise ArtifactError(
            f"{name!r} must be {wanted.dtype} {tuple(wanted.shape)}, the slice of {origin.backbone.name}. "
            f"Got {told} instead: the model does not come from there as it says"
        )
    if not same_bits(got, wanted):
        raise ArtifactError(_describe_difference(name, got, wanted, kept, origin))


def _describe_difference(name: str, got: Tensor, wanted: Tensor, kept: Sequence[int], origin: Origin) -> str:
    first, count, more = differing_rows(got, wanted)
    others = f"; {more} more differ too" if more else ""
    place = f"filter {first} ({kept[first]} in {origin.backbone.name})" if wanted.dim() else "its one number"
    size = wanted[first].numel() if wanted.dim() else 1
    return (
        f"{name!r} is not what was published: of {place}, {count} of {size} weights differ{others}. "
        f"Restore the model from its delta, or fit it again"
    )
