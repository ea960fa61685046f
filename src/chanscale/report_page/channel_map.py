"""Every channel of the original network as a small cell: kept, removed, or behind the end of the network."""

from collections.abc import Mapping
from dataclasses import dataclass

from chanscale.artifact import ModelInfo
from chanscale.channels import free_groups
from chanscale.classifier import Classifier
from chanscale.errors import ModelError
from chanscale.group_scales import GroupScales, scale_parameters
from chanscale.programs import Program
from chanscale.report import label_layers

LEVELS = 5
"""Shades of a kept channel, by the size of its scale."""
COLUMNS = 64
MOST_CELLS = 20_000
"""Channels of a network that is drawn in cells; of a larger one, each layer is a bar: the page must stay small."""


@dataclass(frozen=True)
class Cell:
    """A channel: its place in the original, its level from 1 (small scale) to 5, or 0: gone, and |scale| if known."""

    index: int
    level: int
    scale: float | None

    @property
    def column(self) -> int:
        """Where it is drawn in its row."""
        return self.index % COLUMNS

    @property
    def row(self) -> int:
        """In which row it is drawn."""
        return self.index // COLUMNS


@dataclass(frozen=True)
class Layer:
    """The channels of one layer of the original; `left_out`: it lies behind the end of the network."""

    label: str
    width: int
    kept: tuple[Cell, ...]
    left_out: bool

    @property
    def rows(self) -> int:
        """How many rows of cells it takes."""
        return -(-self.width // COLUMNS)

    def removed(self) -> list[Cell]:
        """Return the cells of the channels that are gone."""
        kept = {cell.index for cell in self.kept}
        return [Cell(index, 0, None) for index in range(self.width) if index not in kept]


def map_channels(model: Classifier | Program, info: ModelInfo, widths: Mapping[str, int]) -> list[Layer]:
    """Return the layers of the original, of these `widths`, in order; none where those are not known."""
    labels = dict(zip(widths, label_layers(widths), strict=True))
    sizes = find_sizes(model, info)
    return [
        Layer(
            labels[name],
            width,
            _cells(info.kept.get(name, []), sizes.get(name)),
            is_left_out(name, info),
        )
        for name, width in widths.items()
    ]


def is_left_out(name: str, info: ModelInfo) -> bool:
    """Tell whether a layer lies behind the end of the network."""
    inner = name.removeprefix("trunk.")
    return any(inner == module or inner.startswith(f"{module}.") for module in info.without)


def _cells(kept: list[int], sizes: list[float] | None) -> tuple[Cell, ...]:
    if sizes is None or len(sizes) != len(kept):
        return tuple(Cell(index, LEVELS, None) for index in kept)
    largest = max(sizes, default=0) or 1.0
    return tuple(
        Cell(index, 1 + min(LEVELS - 1, int(LEVELS * size / largest)), size)
        for index, size in zip(kept, sizes, strict=True)
    )


def find_sizes(model: Classifier | Program, info: ModelInfo) -> dict[str, list[float]]:
    """Return |scale| of each kept channel, by group, as far as it is known.

    A network that carries its groups tells all; a loaded one those whose scale sits behind the convolution itself.
    """
    if isinstance(model, Program):
        return {}
    try:
        if free_groups(model):
            return {name: norms.tolist() for name, norms in GroupScales(model).norms().items()}
    except ModelError:
        pass
    scales = {name: scale.detach().abs().tolist() for name, scale in scale_parameters(model).items()}
    return {name: scales[name] for name in info.kept if name in scales}
