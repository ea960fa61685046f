"""Which images a cell of a comparison tests, validates and trains on."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from chanscale.data.sources import ImageSet
from chanscale.data.splits import Splits, split_images
from chanscale.errors import ConfigError, SplitError


def split_for_cell(
    images: ImageSet,
    *,
    fold: int,
    folds: int,
    fold_seed: int,
    seed: int,
    size: int | None,
    validation: float,
    test: float,
) -> Splits:
    """Return the sides of one cell; those of all methods are the same, and the test images of all sizes.

    Fold `fold` of `folds` is test; of the rest, the share `validation` chooses the epoch, drawn by `seed`; `size`
    images of the others train (None: all), drawn by `seed`, and at most as many validate: who has 25 images to train
    on has no 100 to choose by. With one fold, the sides are those that `fit` has with this seed. Raises SplitError,
    ConfigError.
    """
    if images.is_multilabel:
        raise ConfigError(
            f"the images of {images.source} have several labels, and comparisons and cross-validations take one class "
            "each; `fit` takes both"
        )
    if folds == 1:
        splits = split_images(images, validation=validation, test=test, seed=seed)
    else:
        splits = _leave_fold_out(
            images, assign_folds(images, folds=folds, seed=fold_seed) == fold, validation, seed
        )
    if not splits.test:
        raise ConfigError("a comparison needs test images; use a --test above 0, or more --folds")
    if size is None:
        return splits
    if size > len(splits.train):
        raise ConfigError(
            f"--sizes {size} is more than the {len(splits.train)} training images there are; use all"
        )
    return replace(
        splits,
        train=_draw(images, splits.train, "training", size, seed),
        validation=_draw(images, splits.validation, "validation", size, seed),
    )


def assign_folds(images: ImageSet, *, folds: int, seed: int) -> NDArray[np.intp]:
    """Return the fold of each image, (len,): each group in one, each class in all, in about equal shares.

    Raises SplitError where there are too few groups, or the source itself puts images on sides.
    """
    if any(record.split is not None for record in images.records):
        raise SplitError(
            f"{images.source} puts its images on sides of its own; use --folds 1, which keeps them"
        )
    groups = images.group_keys
    labels = images.labels
    for label, name in enumerate(images.classes):
        count = len(set(groups[labels == label].tolist()))
        if count < folds:
            raise SplitError(
                f"class {name!r} of {images.source} has {count} groups (patients, or single images), "
                f"too few for --folds {folds}; use fewer"
            )
    assigned = np.zeros(len(images), dtype=np.intp)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(labels, labels, groups)):
        assigned[members] = fold
        if len(set(labels[members].tolist())) < len(images.classes):
            raise SplitError(f"fold {fold} of {images.source} lacks a class; use fewer than {folds} --folds")
    return assigned


def order_images(images: ImageSet, indices: Sequence[int], *, seed: int) -> list[int]:
    """Return `indices` in an order in which the first n, for any n, are a stratified sample of groups.

    The next group is always one of the class that lags most behind its share; which one, `seed` decides. A sample
    of fewer images thus lies within one of more, and at most its last group is cut.
    """
    members: dict[str, list[int]] = {}
    for index in indices:
        members.setdefault(images.records[index].group, []).append(index)
    classes = len(images.classes)
    counts = {
        group: np.bincount(images.labels[own], minlength=classes).astype(float)
        for group, own in members.items()
    }
    drawn = np.random.default_rng((seed, 1)).permutation(list(members)).tolist()
    queues = [deque(group for group in drawn if counts[group][label]) for label in range(classes)]
    shares = sum(counts.values(), np.zeros(classes)) / len(indices)
    taken, order = np.zeros(classes), dict[int, None]()
    while len(order) < len(indices):
        lags = shares * (taken.sum() + 1) - taken
        label = max((label for label in range(classes) if queues[label]), key=lambda label: lags[label])
        group = queues[label].popleft()
        if members[group][0] not in order:  # a group of several classes waits in several queues
            taken += counts[group]
            order |= dict.fromkeys(members[group])
    return list(order)


def learning_and_test(images: ImageSet, splits: Splits) -> tuple[ImageSet, ImageSet]:
    """Return the images that a method may see, each with its side, and those that judge it."""
    side_of = dict.fromkeys(splits.train, "train") | dict.fromkeys(splits.validation, "validation")
    seen = tuple(replace(images.records[i], split=side) for i, side in sorted(side_of.items()))  # type: ignore[arg-type]
    unseen = tuple(images.records[i] for i in splits.test)
    return replace(images, records=seen), replace(images, records=unseen)


def _leave_fold_out(images: ImageSet, test: NDArray[np.bool_], validation: float, seed: int) -> Splits:
    rest = np.flatnonzero(~test)
    others = replace(images, records=tuple(images.records[i] for i in rest))
    splits = split_images(others, validation=validation, test=0, seed=seed)
    return Splits(
        train=tuple(rest[list(splits.train)].tolist()),
        validation=tuple(rest[list(splits.validation)].tolist()),
        test=tuple(np.flatnonzero(test).tolist()),
    )


def _draw(images: ImageSet, indices: Sequence[int], side: str, size: int, seed: int) -> tuple[int, ...]:
    """Return at most `size` of the images of a side, those of a smaller size among them."""
    chosen = sorted(order_images(images, indices, seed=seed)[:size])
    if absent := set(range(len(images.classes))) - set(images.labels[chosen].tolist()):
        raise ConfigError(
            f"--sizes {size} leaves no {side} image of {images.classes[min(absent)]!r}; use more"
        )
    return tuple(chosen)
