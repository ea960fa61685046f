"""Why an image is unusual, in words."""

import numpy as np
from numpy.typing import NDArray

from chanscale.novelty.facts import FACTS, Fact
from chanscale.novelty.gaussian import Floats
from chanscale.novelty.thumbnails import MIRRORED, TURNS, undo
from chanscale.novelty.traits import Traits
from chanscale.novelty.views import Views, single_facts

MOST = 3
"""Reasons that are given for an image."""

COLOUR = 1 / 512
"""Less colour than this in all training images is none: they are grey."""

WORDS = {
    "pixels": "its grey levels, taken together, are unlike those of the training images",
    "appearance": "where it is bright and dark differs",
    "spectrum": "its coarse and fine detail, taken together, are unlike those of the training images",
    "features": "its features are far from those of the training images",
    "together": "its grey levels and its features, taken together, are unlike those of the training images",
}


def give_reasons(
    views: Views, traits: Traits, surprise: Floats, flagged: NDArray[np.bool_], *, threshold: float
) -> list[tuple[str, ...]]:
    """Return the reasons for each image that is flagged, the strongest first, and none for the others.

    `surprise` (N, D), as `Views.scores` has its columns.
    """
    reasons: list[tuple[str, ...]] = []
    for row, found in enumerate(flagged.tolist()):
        if not found:
            reasons.append(())
            continue
        columns = np.argsort(-surprise[row], kind="stable").tolist()
        wanted = [column for column in columns if surprise[row, column] >= threshold]
        one = traits.of(np.arange(len(traits)) == row)
        words = (_name(views, one, column) for column in wanted)
        reasons.append(tuple(dict.fromkeys(words))[:MOST])
    return reasons


def _name(views: Views, one: Traits, column: int) -> str:
    """Return in words what is high in a column of the scores of one image."""
    if column < 2 * len(FACTS):
        place, much = column % len(FACTS), column >= len(FACTS)
        return _tell(
            FACTS[place], much, float(single_facts(one)[0, place]), views.low[place], views.high[place]
        )
    view = views.names[column - 2 * len(FACTS)]
    turns = {"turned": TURNS, "mirrored": MIRRORED}.get(view)
    if turns is None:
        return WORDS[view]
    return list(turns)[int(undo(turns, one.thumbnails, views.appearance).argmax())]


def _tell(fact: Fact, much: bool, value: float, low: float, high: float) -> str:
    if fact.name == "colour" and much and high < COLOUR:
        return "in colour; the training images are grey"
    beyond = value > high if much else value < low
    words = fact.more if much else fact.less
    return str(words).format("all training images" if beyond else "nearly all training images")
