"""How much of the trunk is used: it ends where a linear head reads the images best.

The last layers of a network tell the classes of ImageNet apart. For images that look otherwise, the layers in the
middle often say more (Yosinski et al. 2014, section 2; Raghu et al. 2019, "Transfusion", section 4), and they come
at a fraction of the parameters. So a linear head is fitted behind every layer where the trunk can end, judged by
cross-validation on the training images alone, and what lies behind the best of them is left out.

The head reads all channels of a layer, and the budget leaves a part of them. Where that is a small part, channels are
lost that it read, and more of them the deeper the layer. So a place counts for less where the budget leaves too little
of what lies in front of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from chanscale.channels import carry_groups
from chanscale.classifier import Classifier, LeftOut, assemble, to_channels_last
from chanscale.config import FitConfig
from chanscale.costs import TrunkCost, trunk_cost
from chanscale.cutting_points import Cut, cut_trunk, find_cuts
from chanscale.data.label_columns import UNKNOWN
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.devices import on_device
from chanscale.errors import BudgetError, ConfigError
from chanscale.metrics import Floats, Ints, mean_auc
from chanscale.modes import device_of, hooked
from chanscale.probe import pooled_features, regress
from chanscale.progress import Watcher
from chanscale.proof import channel_groups
from chanscale.team import Portion

MOST = 20
"""Places that are tried; of more, as many are taken at even distances."""

READ = 1000
"""Training images that are read at most, at even distances: enough to tell the layers apart."""

RARE = 20
"""A class of which fewer would be read is read whole."""

FOLDS, REPEATS = 5, 4

ROOM, PRICE = 8, 0.02
"""A place with up to `ROOM` times in front of it what the budget leaves counts for what a head reads there; each
doubling beyond that costs `PRICE` (docs/benchmarks/method.md)."""

END = "the end"
"""Stands for the trunk's own end where layers are named; no module can have this name."""


@dataclass(frozen=True)
class Depth:
    """Where the trunk ends: behind `layer`, or None for its own end; `without`: the modules that are left out.

    `aucs`: of a linear head behind each layer tried, in order, and at `END`, cross-validated on the training images.
    `times`: what lies in front of each of these, in multiples of what the budget leaves.
    """

    layer: str | None
    without: tuple[str, ...]
    aucs: Mapping[str, float]
    times: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        plain = {"layer": self.layer, "without": list(self.without), "aucs": dict(self.aucs)}
        return plain | {"times": dict(self.times)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the depth that `to_dict` told."""
        times = dict(values["times"]) if "times" in values else {}  # older runs have none
        return cls(values["layer"], tuple(values["without"]), dict(values["aucs"]), times)


WHOLE = Depth(None, (), {})


def choose_depth(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher
) -> Depth:
    """Return where the trunk of `model` is to end, as `config.depth` says.

    Only places that leave more than the budget does are tried: the rest is for the selection. Raises ConfigError for
    a layer where the trunk cannot end, BudgetError for one that leaves too little.
    """
    if config.depth == "full":
        return WHOLE
    model = on_device(model, config)
    example = data.batch(splits.train[:2])[0].to(device_of(model))
    cost = trunk_cost(model, (), example)
    cuts = find_allowed(model, example, config, cost=cost, most=MOST if config.depth == "auto" else None)
    if config.depth != "auto":
        every = partial(find_cuts, model.trunk, model.preprocessing(example))
        return _find_named(config.depth, cuts, every)
    if not cuts:
        return WHOLE
    read = _sample(data, splits.train)
    features, labels = features_behind(model, cuts, data, read, watcher, batch_size=config.micro_batch)
    groups = data.images.group_keys[read]
    aucs = []
    for done, found in enumerate(features):
        watcher.on_step("finding the depth", done, len(features))
        aucs.append(cross_validate(found, labels, groups, classes=len(model.classes), seed=config.seed))
    watcher.on_step("finding the depth", len(features), len(features))
    if np.isnan(aucs).all():
        return WHOLE
    names = [*(cut.layer for cut in cuts), END]
    fronts = [*(_cost_before(cut, cost) for cut in cuts), cost]
    times = [front.of(config.budget_of) / _limit(cost, config) for front in fronts]
    best = int(np.nanargmax([worth(auc, more) for auc, more in zip(aucs, times, strict=True)]))
    told = [
        {names[i]: round(figures[i], digits) for i in np.flatnonzero(~np.isnan(aucs))}
        for figures, digits in ((aucs, 4), (times, 2))
    ]
    if best == len(cuts):
        return Depth(None, (), *told)
    return Depth(cuts[best].layer, cuts[best].without, *told)


def worth(auc: float, times: float) -> float:
    """Return what a place counts for where a head reads `auc`, with `times` in front of it what the budget leaves."""
    return auc - PRICE * max(0.0, math.log2(times / ROOM))


def end_trunk(model: Classifier, depth: Depth, example: Tensor) -> Classifier:
    """Return `model`, on the same tensors, with a trunk that ends at `depth`, and a new head; it knows its groups.

    `example`: (N, C, H, W), pixels in [0, 1].
    """
    if depth.layer is None:
        return model
    trunk = cut_trunk(model.trunk, depth.without)
    shorter = to_channels_last(
        assemble(model.preprocessing, trunk, example, classes=model.classes, multilabel=model.multilabel)
    )
    whole, left = (trunk_cost(net, (), example) for net in (model, shorter))
    shorter.left_out = LeftOut(
        whole.original("parameters") - left.parameters(), whole.original("macs") - left.macs()
    )
    return carry_groups(shorter, channel_groups(shorter, example))


def cross_validate(
    features: Tensor, labels: Tensor, groups: NDArray[Any], *, classes: int, seed: int
) -> float:
    """Return the mean AUC of logistic regressions on `features` (N, C), tested on `groups` they have not seen.

    `labels`, `groups`: (N,). Of several labels (N, K), the mean over them, each where it is known. Five folds, drawn
    four times; fewer where a class has fewer groups. nan where one has but one, or a feature is not finite.
    """
    x, y = features.numpy(), labels.numpy()
    if y.ndim == 2:
        aucs = [
            cross_validate(features[known], labels[known, label], groups[known], classes=2, seed=seed)
            for label, known in enumerate((y != UNKNOWN).T)
        ]
        return float("nan") if np.isnan(aucs).all() else float(np.nanmean(aucs))
    folds = min(FOLDS, *(len(set(groups[y == label])) for label in range(classes)))
    if folds < 2 or not np.isfinite(x).all():
        return float("nan")
    aucs = [
        judge_probe(x, y, train, test)
        for train, test in draw_folds(y, groups, folds, seed=seed)
        if len(set(y[train])) == len(set(y[test])) == classes
    ]
    return float(np.mean(aucs)) if aucs else float("nan")


def draw_folds(labels: Ints, groups: NDArray[Any], folds: int, *, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield the rows to fit on and those to test on, for each of the `folds`, drawn `REPEATS` times by group."""
    for repeat in range(REPEATS):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=(seed + repeat) % 2**32)
        yield from splitter.split(labels, labels, groups)


def judge_probe(x: Floats, y: Ints, train: Ints, test: Ints) -> float:
    """Return the AUC on the rows `test` of a logistic regression fitted to the rows `train`.

    `x`: features (N, C), which are standardised by those rows. `y`: labels (N,).
    """
    mean, deviation = x[train].mean(0), x[train].std(0)
    standardised = (x - mean) / np.where(deviation > 0, deviation, np.inf)
    fitted = regress(standardised[train], y[train])
    return mean_auc(fitted.predict_proba(standardised[test]), y[test])


def find_allowed(
    model: Classifier, example: Tensor, config: FitConfig, *, cost: TrunkCost, most: int | None = None
) -> list[Cut]:
    """Return the cuts that leave a convolution, and more than the budget does; `most` of them, at even distances.

    `cost`: that of the trunk of `model`.
    """

    def narrow(cuts: list[Cut]) -> list[Cut]:
        limit = _limit(cost, config)
        allowed = [cut for cut in cuts if _cost_before(cut, cost).of(config.budget_of) > limit]
        return allowed[:: -(-len(allowed) // most)] if most and allowed else allowed

    return find_cuts(model.trunk, model.preprocessing(example), narrow=narrow)


def _limit(cost: TrunkCost, config: FitConfig) -> float:
    return cost.limit(config.budget_of, config.budget)


def _cost_before(cut: Cut, cost: TrunkCost) -> TrunkCost:
    gone = tuple(f"trunk.{name}." for name in cut.without)
    return TrunkCost(
        tuple(layer for layer in cost.layers if not f"{layer.name}.".startswith(gone)),
        (),
        loose={name: size for name, size in cost.loose.items() if not name.startswith(gone)},
    )


def _find_named(layer: str, cuts: Sequence[Cut], every: Callable[[], Sequence[Cut]]) -> Depth:
    """Return the one of the `cuts` that is called `layer`; `every`: gives those, too, that leave too little."""

    def named(cuts: Sequence[Cut]) -> Iterator[Cut]:
        return (cut for cut in cuts if layer in (cut.layer, f"trunk.{cut.layer}"))

    for cut in named(cuts):
        return Depth(cut.layer, cut.without, {})
    names = ", ".join(cut.layer for cut in cuts) or "there is none"
    if any(named(every())):
        raise BudgetError(
            f"a trunk that ends behind {layer} has no more left than the budget leaves; lower the budget, or choose a "
            f"later end for depth ({names})"
        )
    raise ConfigError(
        "`depth` must be auto, full, or a layer where the trunk can end, all that follows being one module behind the "
        f"other, and still has more than the budget leaves ({names}). Got depth={layer!r} instead."
    )


def _sample(data: DecodedImages, train: Sequence[int]) -> list[int]:
    """Return about `READ` of the images, each class with its share; of one that is rare, all."""
    strata = data.images.strata[list(train)]
    ordered = np.array(train)[np.lexsort(~strata.T[::-1])]
    step = -(-len(train) // READ)
    chosen = {int(index) for index in ordered[::step]}
    rare = strata[:, strata.sum(0) < RARE * step].any(1)
    return sorted(chosen | set(np.array(train)[rare].tolist()))


def features_behind(
    model: Classifier,
    cuts: Sequence[Cut],
    data: DecodedImages,
    indices: Sequence[int],
    watcher: Watcher,
    *,
    batch_size: int,
) -> tuple[list[Tensor], Tensor]:
    """Return the pooled features (N, C) of some images behind each of the `cuts` and at the end; and labels (N,)."""
    pooled: list[list[Tensor]] = [[] for _ in cuts]

    def note(place: int) -> Callable[..., None]:
        # At once: what follows may write into the map.
        return lambda *call: pooled[place].append(model.head.pool(call[-1]))

    layers = [model.trunk.get_submodule(cut.layer) for cut in cuts]
    with hooked(layer.register_forward_hook(note(place)) for place, layer in enumerate(layers)):
        last, labels = pooled_features(
            model,
            data,
            indices,
            batch_size=batch_size,
            progress=partial(watcher.on_step, "reading every layer"),
        )
    portion = Portion(indices)
    return [*(portion.gather(torch.cat(found)).cpu() for found in pooled), last], labels
