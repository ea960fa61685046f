"""A logarithmic axis spans what is drawn, on any processor."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from chanscale.plotting import add_log_axes


def draw(values: list[float]) -> tuple[float, float]:
    figure = Figure()
    axes = add_log_axes(figure, values, xlabel="x", ylabel="y")
    for value in values:
        axes.errorbar([value], [0.5], [[0.1], [0.1]])
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    return float(low), float(high)


@pytest.mark.parametrize("values", [[730_000.0], [1000.0, np.nextafter(1000, 2000)], [25, 50], [7e5, 15e6]])
def test_the_axis_spans_its_values_and_a_decade(values):
    low, high = draw(values)
    assert low < min(values) <= max(values) < high
    assert high / low >= 10
    # What is missing to a decade is added on both sides alike.
    assert low * high == pytest.approx(min(values) * max(values))


def test_what_spans_more_than_a_decade_has_a_twentieth_on_either_side():
    low, high = draw([1, 1e4])
    assert (low, high) == (pytest.approx(10**-0.2), pytest.approx(10**4.2))
