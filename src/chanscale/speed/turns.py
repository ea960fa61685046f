"""Choices timed in turns, and one knob after the other turned to where it is fastest."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Generic, TypeVar

from chanscale.speed.choice import Calibration, Choice, Measurement

TURNS, LEAST = 7, 3
"""Turns of each choice, where time allows, and without which nothing is concluded."""

MARGIN = 1.1
"""How many times faster a rival must be: less may be what else the machine does, and would be chosen by chance."""

HOPELESS = 4
"""How many times longer the first step of a rival may take, in which memory is taken and kernels are chosen."""

T = TypeVar("T")
Value = TypeVar("Value", bool, int, str)
Taken = dict[T, list[float]]
Stopwatch = Callable[[T], float]
Clock = Callable[[], float]
Knobs = Mapping[str, Sequence[bool | int | str]]


class Turns(Generic[T]):
    """Times choices, for about `limit` seconds from now. `typical`: the seconds of a step, as far as known."""

    def __init__(
        self, time_step: Stopwatch[T], *, typical: float, limit: float, clock: Clock = perf_counter
    ) -> None:
        self._time, self._typical, self._clock = time_step, typical, clock
        self._until = clock() + limit
        self._warm: set[T] = set()

    def take(self, choices: Sequence[T], *, late: bool = False) -> Taken[T]:
        """Return the seconds of each turn of those `choices` that can be timed; without the time, of none.

        The first of them leads, and a rival far behind it is left out. `late`: whether there is time or not.
        """
        new = len(set(choices) - self._warm)
        if not late and self._clock() + (new + LEAST * len(choices)) * self._typical > self._until:
            return {}
        fit = [choice for choice in choices if self._is_fit(choice) or choice == choices[0]]
        taken: Taken[T] = {choice: [] for choice in fit}
        for turn in range(TURNS):
            for choice in list(taken)[:: -1 if turn % 2 else 1]:
                taken[choice].append(self._time(choice))
            if turn + 1 >= LEAST and self._clock() + len(taken) * self._typical > self._until:
                break
        return taken

    def _is_fit(self, choice: T) -> bool:
        if choice in self._warm:
            return True
        self._warm.add(choice)
        return self._time(choice) <= HOPELESS * self._typical


def find_faster(taken: Taken[T]) -> T:
    """Return which of the choices to take: the first, unless another beats it by the margin, and in most turns."""
    first, *rivals = taken
    best = min(rivals, key=lambda rival: statistics.median(taken[rival]), default=first)
    wins = sum(one < other for one, other in zip(taken[best], taken[first], strict=True))
    clear = statistics.median(taken[first]) > MARGIN * statistics.median(taken[best])
    return best if clear and wins > 0.75 * len(taken[best]) else first


def calibrate(
    time_step: Stopwatch[Choice], start: Choice, knobs: Knobs, *,
    images: int, typical: float, limit: float, clock: Clock = perf_counter,
) -> Calibration:  # fmt: skip
    """Turn each of the `knobs` in their order, from `start`, to the fastest of their values, in about `limit` seconds.

    `images`: those of a step; `typical`: its seconds, measured.
    """
    turns = Turns(time_step, typical=typical, limit=limit, clock=clock)
    chosen, measured, races = start, list[Measurement](), list[Taken[Choice]]()
    for knob, values in knobs.items():
        rivals = [chosen.model_copy(update={knob: value}) for value in values]
        taken = turns.take([chosen, *rivals])
        measured += describe_turns({getattr(choice, knob): taken[choice] for choice in taken}, knob, images)
        if taken:
            races.append(taken)
            chosen = find_faster(taken)
    if not races:
        return Calibration(chosen=start, reason="there was no time to try anything")
    rate, plain = _compare(chosen, plain_of(start), races, turns, images)
    return Calibration(chosen=chosen, measured=tuple(measured), rate=rate, plain=plain)


def plain_of(start: Choice) -> Choice:
    """Return PyTorch's defaults: contiguous, fp32, as many threads as it takes."""
    return start.model_copy(update={"precision": "32-true", "channels_last": False})


def _compare(
    chosen: Choice, plain: Choice, races: Sequence[Taken[Choice]], turns: Turns[Choice], images: int
) -> tuple[float | None, float | None]:
    """Return the images a second of both, in the same turns; None for what cannot be measured."""
    known = next((race for race in races[::-1] if {chosen, plain} <= race.keys()), None)
    rates = _rates(known or turns.take([chosen, plain], late=True), images)
    return rates.get(chosen), rates.get(plain)


def _rates(taken: Taken[T], images: int) -> dict[T, float]:
    """Return the images a second of each choice, by the median; without those that failed."""
    medians = {choice: statistics.median(seconds) for choice, seconds in taken.items()}
    return {choice: images / seconds for choice, seconds in medians.items() if math.isfinite(seconds)}


def describe_turns(taken: Taken[Value], knob: str, images: int) -> list[Measurement]:
    """Return what the turns of each value of `knob` came to; `images`: those of a step."""
    return [
        Measurement(knob=knob, value=value, rate=rate, turns=len(taken[value]))
        for value, rate in _rates(taken, images).items()
    ]
