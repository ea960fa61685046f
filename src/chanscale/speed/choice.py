"""What can be chosen, what was measured of it, and what that came to: plain values, which files hold."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from chanscale.config import WORKERS, FixedPrecision

_PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16"}


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(_Facts):
    """How a run computes. `threads`: of the processor; None: what PyTorch takes. `workers`: threads that decode."""

    precision: FixedPrecision
    channels_last: bool = True
    threads: int | None = Field(None, ge=1)
    workers: int = Field(WORKERS, ge=0)

    @property
    def words(self) -> str:
        """What it is, for a line: `2 threads, channels_last, fp32`."""
        threads = [] if self.threads is None else [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        layout = "channels_last" if self.channels_last else "contiguous"
        return ", ".join([*threads, layout, _PRECISIONS[self.precision]])


class Measurement(_Facts):
    """Images a second at one value of a `knob`, with all others as they stood: the median over `turns`."""

    knob: str
    value: bool | int | str
    rate: float = Field(gt=0)
    turns: int = Field(ge=1)


class Calibration(_Facts):
    """What was chosen, and why: from what was `measured`, in its order, or for a `reason`.

    `rate`, `plain`: images a second of a training step as chosen, and with PyTorch's defaults (contiguous, fp32, all
    threads), in turns; None where that was not measured.
    """

    chosen: Choice
    measured: tuple[Measurement, ...] = ()
    rate: float | None = Field(None, gt=0)
    plain: float | None = Field(None, gt=0)
    reason: str | None = None

    @property
    def gain(self) -> float | None:
        """How many times the images a second of PyTorch's defaults."""
        return self.rate / self.plain if self.rate and self.plain else None

    def describe(self) -> str:
        """Return what was chosen and what it gains, in a line."""
        gain = self.gain
        if self.rate is None or self.plain is None or gain is None:
            return f"speed: {self.chosen.words}{f' ({self.reason})' if self.reason else ''}"
        rates = f"{_three_digits(self.rate)} against {_three_digits(self.plain)}"
        return f"speed: {self.chosen.words}; {gain:.2f} times the images a second of PyTorch's defaults ({rates})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as metrics.json has them; `from_dict` takes them back."""
        return self.model_dump(mode="json") | {"gain": self.gain}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return what `to_dict` told. Raises ValueError for anything else."""
        if not isinstance(values, dict):
            raise ValueError("it must be an object")
        facts = {name: value for name, value in values.items() if name != "gain"}
        return cls.model_validate(facts)


def _three_digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:#.3g}"
