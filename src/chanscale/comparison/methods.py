"""What a grid compares: the baselines by their names, those that cut also at budgets of their own, and ours, also with
other options; and what each tries."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from chanscale.baselines import BUDGETED, LEARNING_RATES
from chanscale.config import READING, FitConfig
from chanscale.errors import ConfigError, one_line

OURS = "chanscale"
COMMON = frozenset({
    "image_size", "group_pattern", "frames", "positive", "validation", "test", "skip_bad", "augment", "workers",
    "spacing", "window", "cache_gib", "backbone", "weights", "batch_size", "seed", "precision", "device", "speed",
    "label_columns", "devices", "nodes",
})  # fmt: skip
"""Options that all methods of a comparison have in common: with others, it would be another comparison."""

MAX_NAME = 150
"""Characters of a method; with what else is in the name of a cell's file, file systems take it."""


def parse_methods(
    names: Iterable[str], baselines: Iterable[str], common: FitConfig | None = None
) -> tuple[str, ...]:
    """Return the methods of these names, each once. Raises ConfigError.

    `chanscale@0.99+round_to=1` is ours at that budget and with that option, whatever the others have, and
    `random@0.99` is a baseline that cuts, at that budget. What is returned has the options in order and is a safe name
    of a file: each method has one name, without what `common`, the options that all have, says already.
    """
    known = (*baselines, OURS)
    return tuple(dict.fromkeys(_parse(name, known, common) for name in names))


def is_ours(method: str) -> bool:
    """Tell whether this is our method, with any options."""
    return plain(method) == OURS


def plain(method: str) -> str:
    """Return the name of a method without budget and options: that of a baseline, or of ours."""
    return re.split("[@+]", method, maxsplit=1)[0]


def ours_like(method: str) -> str:
    """Return the name of ours at the budget that `method` has in its name, if it has one there."""
    return OURS + method.removeprefix(plain(method))


def configure(method: str, config: FitConfig, *, seed: int, lr: float | None = None) -> FitConfig:
    """Return `config` for one cell of `method`; `lr`: None for its default. Raises ConfigError."""
    own = _read_options(method) | {"seed": seed}
    if is_ours(method) and lr is not None:
        own["refine_lr"] = lr
    try:
        return FitConfig.build(config.model_dump() | own)
    except ConfigError as error:
        raise ConfigError(f"{method}: {error}") from error


def learning_rates(method: str, config: FitConfig) -> tuple[float, ...]:
    """Return what `method` chooses from by validation, ascending; the middle one is its default. () if it has none.

    Ours: `refine_lr` and, as far apart as those of the baselines that train scales, one on either side.
    """
    if not is_ours(method):
        return LEARNING_RATES.get(plain(method), ())
    lr = configure(method, config, seed=config.seed).refine_lr
    return float(f"{0.3 * lr:g}"), lr, float(f"{3 * lr:g}")


def find_tries(method: str, config: FitConfig, count: int) -> tuple[float | None, ...]:
    """Return the learning rates of up to `count` tries: the default, which is None; the lower; the higher."""
    rates = learning_rates(method, config)
    return (None, rates[0], rates[-1])[:count] if rates else (None,)


def find_reference(methods: Sequence[str]) -> str | None:
    """Return the method that others are compared with: ours, with the common options if it is there."""
    ours = [method for method in methods if is_ours(method)]
    return OURS if OURS in ours else next(iter(ours), None)


def _parse(name: str, known: Sequence[str], common: FitConfig | None) -> str:
    if name in known:
        return name
    base = plain(name)
    cuts = base in BUDGETED.intersection(known)
    if not is_ours(name) and not cuts:
        raise ConfigError(
            f"--methods must be among {', '.join(known)}, METHOD@BUDGET for those that cut, and "
            f"{OURS}@BUDGET+OPTION=VALUE. Got {name!r}."
        )
    if cuts and "+" in name:
        raise ConfigError(f"{name}: only {OURS} takes options; write {base} or {base}@BUDGET")
    own = configure(name, common or FitConfig(), seed=0)
    values = {option: getattr(own, option) for option in sorted(_read_options(name))}
    texts = {
        option: _to_text(value)
        for option, value in values.items()
        if common is None or value != getattr(common, option)
    }
    budget = f"@{texts.pop('budget')}" if "budget" in texts else ""
    method = base + budget + "".join(f"+{option}={text}" for option, text in texts.items())
    if len(method) > MAX_NAME:
        raise ConfigError(f"{method} becomes part of a file name, and is too long; give it fewer options")
    return method


def _read_options(method: str) -> dict[str, Any]:
    """Return the options that the name of a method holds, not yet validated. Raises ConfigError."""
    first, *pairs = method.split("+")
    if "@" in first:
        pairs.insert(0, f"budget={first.partition('@')[2]}")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, text = pair.partition("=")
        if fault := _find_fault(option, text, options) if equals else f"{pair!r} must be OPTION=VALUE":
            raise ConfigError(f"{method}: {fault}")
        try:
            options[option] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{method}: {option} must be a YAML value: {one_line(error)}") from error
    return options


def _find_fault(option: str, text: str, options: dict[str, Any]) -> str | None:
    """Return what is wrong with an option beside the `options` read before it; None if nothing is."""
    if option not in FitConfig.model_fields:
        return f"there is no option {option!r}; chanscale fit --help lists them, here with _ in place of -"
    if option in COMMON:
        return f"{option} must be the same for all methods; leave it out here, and set it for the whole grid"
    if option in READING:
        return f"{option} says how probabilities are read, and changes no cell; leave it out"
    if option in options:
        return f"{option} is given twice; leave one out"
    if "/" in text or "\\" in text:
        return f"{option} becomes part of a file name, and must be without / and \\. Got {text!r}."
    return None


def _to_text(value: bool | int | float | str | None) -> str:
    """Return a value as YAML, always the same for the same value."""
    if isinstance(value, float):
        return f"{value:.15g}".replace("e+", "e")  # a + begins another option
    return value if isinstance(value, str) else json.dumps(value)
