"""Which options a search may try, in what ranges, and how the parameters of a trial become options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanscale.config import FitConfig
from chanscale.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

BUDGET = "budget"
KEPT = "kept"
"""What a trial draws in place of the budget: the share that is left. From 2 % to 1 % is as far as from 20 % to 10 %."""

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """What an option is drawn from. `log`: by its logarithm; `step`: whole numbers, this far apart."""

    low: float
    high: float
    log: bool = False
    step: int | None = None

    def to_distribution(self) -> "BaseDistribution":
        """Return it as Optuna wants it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.step is not None:
            return IntDistribution(int(self.low), int(self.high), step=self.step)
        return FloatDistribution(self.low, self.high, log=self.log)


SPACE: dict[str, Range] = {
    BUDGET: Range(0.7, 0.99),
    "image_size": Range(80, 224, step=16),
    "pressure": Range(0.1, 1.6, log=True),
    "concavity": Range(0, 8),
    "refine_lr": Range(1e-3, 1e-1, log=True),
    "head_lr": Range(1e-4, 1e-2, log=True),
}
"""The options that can be searched: how much goes, what the network sees, how the penalty acts, learning rates.

What kind of penalty there is (`penalty`) is not among them: only with the proximal one is every removal exact.
"""


def choose_options(config: FitConfig, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the options to search: those `wanted`, or all of SPACE that were not set in `config`.

    Raises ConfigError.
    """
    names = [name for name in SPACE if name not in config.model_fields_set] if wanted is None else wanted
    if not names:
        raise ConfigError(
            f"all that can be searched is fixed ({', '.join(SPACE)}); leave one out, or name it with --search"
        )
    for name in names:
        if name not in SPACE:
            raise ConfigError(f"--search must be among {', '.join(SPACE)}. Got {name!r}.")
        _require_within(name, getattr(config, name))
    if config.tolerance is not None:
        raise ConfigError(
            "--tolerance looks for the smallest network itself; leave it out, and search the budget"
        )
    return tuple(name for name in SPACE if name in names)


def distributions(names: Sequence[str]) -> "dict[str, BaseDistribution]":
    """Return what the parameters of a trial are drawn from, by name."""
    ranges = {name: SPACE[name] for name in names}
    if BUDGET in ranges:
        budget = ranges.pop(BUDGET)
        ranges = {KEPT: Range(_complement(budget.high), _complement(budget.low), log=True), **ranges}
    return {name: range_.to_distribution() for name, range_ in ranges.items()}


def to_params(config: FitConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of the trial that has the options of `config`."""
    params = {name: getattr(config, name) for name in names}
    return {KEPT: _complement(params.pop(BUDGET)), **params} if BUDGET in params else params


def to_options(params: Params) -> dict[str, Any]:
    """Return the options that a trial stands for; three digits are more than the figures can tell apart."""
    options = {name: _round(value) for name, value in params.items() if name != KEPT}
    return {BUDGET: _complement(_round(params[KEPT])), **options} if KEPT in params else options


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.3g}")


def _complement(share: float) -> float:
    return round(1 - share, 10)  # without the last bits of a difference


def _require_within(name: str, value: float) -> None:
    low, high, step = SPACE[name].low, SPACE[name].high, SPACE[name].step
    if not low <= value <= high or (step and (value - low) % step):
        steps = f" in steps of {step}" if step else ""
        raise ConfigError(
            f"{name} is searched from {low:g} to {high:g}{steps}, beginning at what is given. Got {name}={value:g}."
        )
