"""What a grid compares: the baselines by their names, and ours, also at budgets of its own."""

from collections.abc import Iterable, Sequence

from chanscale.config import FitConfig
from chanscale.errors import ConfigError

OURS = "chanscale"


def parse_methods(names: Iterable[str], baselines: Iterable[str]) -> tuple[str, ...]:
    """Return the methods of these names, each once; `chanscale@0.99` is ours at that budget. Raises ConfigError."""
    known = (*baselines, OURS)
    return tuple(dict.fromkeys(_parse(name, known) for name in names))


def is_ours(method: str) -> bool:
    """Tell whether this is our method, at any budget."""
    return method.split("@")[0] == OURS


def configure(method: str, config: FitConfig, *, seed: int) -> FitConfig:
    """Return `config` for one cell of `method`. Raises ConfigError for a budget that cannot be."""
    own: dict[str, float | int] = {"seed": seed}
    if "@" in method:
        own["budget"] = float(method.split("@")[1])
    return FitConfig.build(config.model_dump() | own)


def find_reference(methods: Sequence[str]) -> str | None:
    """Return the method that others are compared with: ours, at the common budget if it is there."""
    ours = [method for method in methods if is_ours(method)]
    return OURS if OURS in ours else next(iter(ours), None)


def _parse(name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    method, _, budget = name.partition("@")
    try:
        if method == OURS:
            return f"{OURS}@{float(budget):g}"
    except ValueError:
        pass
    raise ConfigError(f"--methods must be among {', '.join(known)} and {OURS}@BUDGET. Got {name!r}.")
