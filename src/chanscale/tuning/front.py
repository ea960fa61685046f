"""The trials that no other beats in both AUC and size, and the one of them to take."""

from collections.abc import Sequence

from chanscale.tuning.trials import COMPLETE, Result


def find_front(results: Sequence[Result], *, of: str | None) -> list[Result]:
    """Return the trials that came to an end and that none matches or beats in both figures, the smallest first.

    `of`: `parameters` or `macs`; None: the best AUC alone. Of equal ones, the first is taken.
    """
    ended = [result for result in results if result["state"] == COMPLETE]
    best_first = sorted(ended, key=lambda result: (-result["validation_auc"], _cost(result, of)))
    front: list[Result] = []
    for result in best_first:
        if not front or _cost(result, of) < _cost(front[-1], of):
            front.append(result)
    return front[::-1]


def choose(front: Sequence[Result], *, within: float) -> Result:
    """Return the first of the `front`, the smallest, whose validation AUC is within `within` of the best there."""
    best = max(result["validation_auc"] for result in front)
    return next(result for result in front if result["validation_auc"] >= best - within)


def _cost(result: Result, of: str | None) -> float:
    return 0.0 if of is None else float(result[of]["kept"])
