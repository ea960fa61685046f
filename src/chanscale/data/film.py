"""From line integrals to a film: scatter, quantum noise, display curve, and what lies on the film.

Nothing here looks at the label, so that neither exposure nor hardware can give it away.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

from chanscale.data.projection import Array, Frame, Generator, Pose

WATER = 3.4  # attenuation of water per patient unit: 0.17 per cm at 120 kVp, and 20 cm to the unit

LETTERS = {"L": ("100", "100", "100", "100", "111"), "R": ("110", "101", "110", "101", "101")}


@dataclass(frozen=True)
class Exposure:
    """How one film was exposed and developed."""

    scatter: float  # scattered against primary radiation
    dose: float  # quanta in a pixel of a 128 px film, behind nothing
    blur: float  # of focal spot and detector, in patient units
    dark: float  # where black stands below the darkest lung, in units of the film's range
    bright: float  # where white stands above the mediastinum
    curve: float  # steepness of the display curve
    edge: float  # strength of the unsharp mask


def draw_pose(rng: Generator) -> Pose:
    """Draw how the patient stands."""
    return Pose(
        tilt=rng.normal(0, 0.04),
        magnification=rng.uniform(1.0, 1.32),
        shift_x=rng.normal(0, 0.05),
        shift_y=rng.normal(0.02, 0.06),
        turn=rng.normal(0, 0.025),
    )


def draw_exposure(rng: Generator) -> Exposure:
    """Draw an exposure; a third of the films are bedside ones, softer and flatter."""
    bedside = rng.random() < 0.35
    return Exposure(
        scatter=rng.uniform(0.5, 1.1) if bedside else rng.uniform(0.1, 0.5),
        dose=10 ** rng.uniform(4.8, 6.2),
        blur=rng.uniform(0.006, 0.014) if bedside else rng.uniform(0.003, 0.009),
        dark=rng.uniform(0.3, 1.0) if bedside else rng.uniform(0.1, 0.5),
        bright=rng.uniform(0.05, 0.4),
        curve=rng.uniform(0.6, 2.4),
        edge=rng.uniform(0, 0.6),
    )


def develop(frame: Frame, thickness: Array, usual: Array, exposure: Exposure, rng: Generator) -> Array:
    """Film in [0, 1], shape (size, size), of `thickness` in units of water.

    The window is set on `usual`, the same patient without opacities, so that it does not adapt to them.
    """
    signal = _transmit(frame, thickness, exposure)
    quanta = exposure.dose * (128 / frame.size) ** 2
    noisy = signal + np.sqrt(signal / quanta) * rng.standard_normal(signal.shape, np.float32)
    density = -np.log(np.clip(noisy, 1e-4, None))
    density += exposure.edge * (density - uniform_filter(density, _odd(0.1 / frame.pixel)))
    return _display(density, -np.log(_transmit(frame, usual, exposure)), exposure)


def _display(density: Array, reference: Array, exposure: Exposure) -> Array:
    """Grey in [0, 1]: a window from the darkest lung to the mediastinum of `reference`, then a sigmoid."""
    step = max(1, len(reference) // 64)  # a few thousand pixels are enough for two quantiles
    reference = reference[::step, ::step]
    low, high = np.quantile(reference[reference > 0.25 * reference.max()], [0.04, 0.85])
    span = high - low
    level = (density - low + exposure.dark * span) / (span * (1 + exposure.dark + exposure.bright))
    grey, black, white = (1 / (1 + np.exp(-exposure.curve * (2 * at - 1.1))) for at in (level, 0.0, 1.0))
    shown: Array = np.clip((grey - black) / (white - black), 0, 1).astype(np.float32)
    return shown


def _transmit(frame: Frame, thickness: Array, exposure: Exposure) -> Array:
    """Beer and Lambert, then scatter, which is a wide blur of the same, then unsharpness."""
    primary = np.exp(-WATER * thickness)
    width = _odd(0.22 / frame.pixel)
    # Air beside the patient scatters little: its bright beam must not veil the shoulders.
    wide = np.minimum(primary, 0.4)
    for _ in range(2):
        wide = uniform_filter(wide, width, mode="nearest")
    sharp = primary + exposure.scatter * wide
    blurred: Array = gaussian_filter(sharp, exposure.blur / frame.pixel, truncate=3)
    return blurred


def _odd(pixels: float) -> int:
    return 2 * int(pixels / 2) + 1


# --- what lies on the patient or on the film, healthy or not


def hardware(frame: Frame, rng: Generator) -> Array:
    """Thickness in units of water of electrodes and wires, a line or a tube; none for most patients."""
    total = np.zeros_like(frame.x)
    if rng.random() < 0.22:
        for _ in range(rng.integers(2, 5)):
            total += _electrode(frame, rng)
    if rng.random() < 0.12:
        side = rng.choice([-1, 1])
        line = [[side * 0.5, -0.75], [side * 0.28, -0.66], [-0.07, -0.45], [-0.09, rng.uniform(-0.2, 0.1)]]
        total += 2.5 * frame.tubes(_smooth(line), np.full((1, 24), 0.009))
    if rng.random() < 0.08:
        tube = [[0.02, -1.2], [0.0, -0.8], [0.0, -0.6], [0.0, rng.uniform(-0.5, -0.38)]]
        total += 1.2 * frame.tubes(_smooth(tube), np.full((1, 24), 0.018), rim=2)
    return total


def _electrode(frame: Frame, rng: Generator) -> Array:
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5)
    bend, radius = rng.uniform(-0.3, 0.3, 4), rng.uniform(0.02, 0.032)
    wire = [[x, y], [x + bend[0], y + 0.3], [x + 2 * bend[1], y + 0.6], [bend[2] + x, 1.3]]
    pad = frame.ellipse(x, y, radius, radius) > 0
    return 0.1 * pad.astype(np.float32) + 2.5 * frame.tubes(_smooth(wire), np.full((1, 24), 0.006))


def _smooth(points: list[list[float]]) -> Array:
    """Bezier curve over four points, shape (1, 24, 2)."""
    part = np.linspace(0, 1, 24)[:, None]
    weights = np.concatenate(
        [(1 - part) ** 3, 3 * part * (1 - part) ** 2, 3 * part**2 * (1 - part), part**3], 1
    )
    curve: Array = (weights @ np.array(points))[None]
    return curve


def skin_fold(frame: Frame, rng: Generator) -> Array:
    """Thickness of a fold of skin: it rises towards a long edge and ends there; none for most films."""
    x, slant, sign, strength = rng.uniform(0.25, 0.6), rng.normal(0, 0.25), rng.choice([-1, 1]), rng.random()
    beyond = sign * (frame.x - sign * x) - slant * frame.y + 0.1 * frame.y**2
    fold = np.exp(np.minimum(beyond, 0) / 0.12) * (beyond < 0) * np.clip(4 - 6 * np.abs(frame.y + 0.1), 0, 1)
    thickness: Array = 0.4 * max(0.0, strength - 0.8) * fold
    return thickness


def label_film(film: Array, frame: Frame, rng: Generator) -> Array:
    """Add a side marker, and the black rim of a collimated or turned plate, to some films."""
    film = film.copy()
    axis = (np.arange(frame.size) + 0.5) / frame.size
    rim, turn = rng.uniform(-0.06, 0.06, 4), rng.normal(0, 0.015, 4)
    across, down = axis[None, :], axis[:, None]
    plate = (across > rim[0] + turn[0] * down) & (across < 1 - rim[1] + turn[1] * down)
    plate &= (down > rim[2] + turn[2] * across) & (down < 1 - rim[3] + turn[3] * across)
    if rng.random() < 0.3:
        film[~plate] = rng.choice([0.0, 0.02, 1.0], p=[0.6, 0.3, 0.1])
    letter, height = rng.choice(["L", "R"], p=[0.75, 0.25]), rng.uniform(0.03, 0.055)
    left, top = rng.uniform(0.86, 0.93), rng.uniform(0.03, 0.3)
    left = 1 - left - 0.6 * height if letter == "R" else left
    bitmap = np.array([[int(bit) for bit in row] for row in LETTERS[letter]], bool)
    row, column = np.floor((down - top) / height * 5), np.floor((across - left) / height * 5)
    inside = (row >= 0) & (row < 5) & (column >= 0) & (column < 3)
    marker = inside & bitmap[np.clip(row, 0, 4).astype(int), np.clip(column, 0, 2).astype(int)]
    if rng.random() < 0.7:
        film[marker] = np.maximum(film[marker], rng.uniform(0.8, 1.0))
    return film
