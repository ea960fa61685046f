"""Is an explanation a fact about the images, or about the seed? Runs that differ in the seed, compared.

Two things may agree: which channels were kept, and where the maps of an image point. Each is shown beside chance:
channels drawn at random at the same widths, and maps of different images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from chanscale.errors import ConfigError

STABILITY = "stability.json"
"""The file in a run folder that says how far its explanations depend on the seed."""

DRAWS = 1000
"""Random selections that chance is estimated by."""

Maps = NDArray[np.floating]


@dataclass(frozen=True)
class Agreement:
    """A mean over pairs of runs, the least and the largest of them, and what chance gives."""

    mean: float
    least: float
    most: float
    chance: float

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers."""
        return {"mean": self.mean, "least": self.least, "most": self.most, "chance": self.chance}


def jaccard(first: frozenset[object], second: frozenset[object]) -> float:
    """Return what two sets share, over what either has; 1 for two empty ones (Jaccard 1912)."""
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def agree_on_channels(
    runs: Sequence[Mapping[str, Sequence[int]]], widths: Mapping[str, int], *, seed: int = 0
) -> Agreement:
    """Return the Jaccard index of the channels that runs kept, in all layers of `widths`, over all pairs of runs.

    `runs`: of each, by layer, the indices kept; a layer that a run does not name keeps none. `widths`: how many
    channels a layer has. Chance: as many channels, drawn at random from each layer. Raises ConfigError.
    """
    _require_two(runs)
    kept = [_name_channels(run, widths) for run in runs]
    found = [jaccard(first, second) for first, second in combinations(kept, 2)]
    rng = np.random.default_rng(seed)
    chance = [_draw_jaccard(first, second, widths, rng) for first, second in combinations(runs, 2)]
    return _summarise(found, float(np.mean(chance)))


def agree_on_maps(runs: Sequence[Maps]) -> Agreement:
    """Return the rank correlation of the maps that runs make of the same image, over all images and pairs of runs.

    `runs`: of each run the maps (N, h, w) of the same N images, all of one size. Spearman's, as in Adebayo et al. 2018,
    sec. 3.1. Chance: maps of different images, by the same pair of runs: what they share in any case, such as borders.
    Raises ConfigError.
    """
    _require_two(runs)
    if len({np.shape(maps) for maps in runs}) > 1 or len(runs[0]) < 2:
        raise ConfigError("wanted the maps of the same images, two or more, at one size, from each run")
    ranks = [_standard_ranks(maps) for maps in runs]
    tables = [first @ second.T for first, second in combinations(ranks, 2)]
    found = [float(np.mean(np.diag(table))) for table in tables]
    others = ~np.eye(len(runs[0]), dtype=bool)
    return _summarise(found, float(np.mean([table[others].mean() for table in tables])))


def _require_two(runs: Sequence[object]) -> None:
    if len(runs) < 2:
        raise ConfigError(f"wanted two runs or more to compare, got {len(runs)}")


def _summarise(found: Sequence[float], chance: float) -> Agreement:
    return Agreement(float(np.mean(found)), min(found), max(found), chance)


def _name_channels(run: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> frozenset[object]:
    return frozenset((layer, index) for layer in widths for index in run.get(layer, ()))


def _draw_jaccard(
    first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]], widths: Mapping[str, int],
    rng: np.random.Generator,
) -> float:  # fmt: skip
    """Return the mean Jaccard index of random channels, as many in each layer as two runs have."""
    shared, total = np.zeros(DRAWS), 0
    for layer, width in widths.items():
        a, b = len(first.get(layer, ())), len(second.get(layer, ()))
        total += a + b
        if a and b:
            shared += rng.hypergeometric(a, width - a, b, size=DRAWS)
    return float(np.mean(shared / (total - shared))) if total else 1.0


def _standard_ranks(maps: Maps) -> NDArray[np.float64]:
    """Return the ranks of each map's values, (N, h * w), so that a product of two is their rank correlation.

    A map that is flat has no ranks, and correlates 0 with any.
    """
    ranks = rankdata(np.reshape(maps, (len(maps), -1)), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    sizes = np.linalg.norm(ranks, axis=1, keepdims=True)
    standard: NDArray[np.float64] = np.divide(ranks, sizes, out=np.zeros_like(ranks), where=sizes > 0)
    return standard
