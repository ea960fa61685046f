"""Procedural frontal chest radiographs, with and without opacities, from a seed.

What is modelled: a patient (neck, shoulders, trunk, arms, breasts; lungs with apices, costophrenic
angles and domes of the diaphragm; heart, great vessels, airway, branching lung vessels; ribs,
clavicles, scapulae, spine; gas under the diaphragm) as thickness along parallel beams, Beer-Lambert
attenuation at one energy, scatter as a wide blur, unsharpness, quantum noise, a display curve, and
what lies on the patient or the film (electrodes, lines, tubes, folds of skin, markers, collimation).
Opacities are soft, ragged clouds that replace part of the lung's air, so they end at the pleura and
take the border from a heart or a diaphragm that they touch. Everything but the opacities is drawn
without looking at the label.

What is not: diverging beams, the spectrum, grids, real scatter; lobes and fissures, air
bronchograms, effusion, collapse, nodules, oedema, chronic disease, children, lateral views; how
often anything occurs in people, and how disease goes with age, sex or the kind of film. A phantom
shows that the software works. It is no substitute for patients, and a figure measured on phantoms
says nothing about any.
"""

import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chanscale.data import anatomy, film
from chanscale.data.anatomy import Build
from chanscale.data.projection import Array, Frame, Generator
from chanscale.errors import ConfigError, DataError

Box = tuple[float, float, float, float]

CLASSES = ("normal", "opacity")
SIZES = (64, 1024)
AIR = 0.72  # share of a lung's thickness that is air; the rest is tissue and blood
OPACITIES = (0.55, 0.3, 0.15)  # how often a patient has one, two or three
CONTRAST = (0.5, 1.0)  # share of the air that an opacity replaces at its middle
RADIUS = (0.08, 0.2)  # half axes of an opacity, in patient units (2 to 5 cm)
EDGE = 0.35  # a box holds what is above this share of the opacity's maximum
REPEATS = 0.3  # share of patients with a second film


@dataclass(frozen=True)
class Phantom:
    """One film: `image` uint8 (size, size), `label` 0 or 1, `boxes` (x, y, width, height) in pixels."""

    image: NDArray[np.uint8]
    label: int
    boxes: tuple[Box, ...]
    patient: int


def draw_phantom(seed: int, *, size: int, label: int, patient: int = 0, image: int = 0) -> Phantom:
    """Draw one film of `size` pixels a side, with opacities where `label` is 1.

    It depends on its arguments only. `seed` and `patient` choose the anatomy; `image` the pose, the
    exposure, the hardware and the opacities; `size` the pixels: one patient looks the same at any of
    them. The other label gives the same film without, or with, the opacities. Raises ConfigError.
    """
    _check(seed, size, label)
    body, shot, disease, noise = (
        np.random.default_rng(key)
        for key in (
            (seed, patient, 0),
            (seed, patient, image, 1),
            (seed, patient, image, 2),
            (seed, patient, image, 3),
        )
    )
    frame, exposure = Frame(size, film.draw_pose(shot)), film.draw_exposure(shot)
    build = anatomy.draw_build(body, breath=max(0.0, shot.normal(0.02, 0.06)))
    air = _air(frame, build, body)
    usual = _thickness(frame, build, air, body, shot)
    solids = _opacities(frame, build, air, disease) if label else []
    thickness = usual + AIR * np.maximum.reduce([np.zeros_like(air), *solids])
    picture = film.label_film(film.develop(frame, thickness, usual, exposure, noise), frame, shot)
    pixels = (picture * 255 + 0.5).astype(np.uint8)
    return Phantom(pixels, label, tuple(_box(solid) for solid in solids), patient)


def write_phantoms(
    out: Path, *, count: int, image_size: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write `count` films to `out/{normal,opacity}/PPPPP_III.png` and their boxes to `out/boxes.csv`.

    The classes are equal in number, or differ by one; a patient has one label. `PPPPP` is the patient
    and `III` the film, so the group pattern is `^(\\d+)_`. The first images of a large set are those
    of a small one. Nothing is left behind when it is stopped. Returns `out`. Raises ConfigError, and
    DataError where `out` exists or cannot be written.
    """
    if count < 2:
        raise ConfigError(f"count must be at least 2, one image of each class. Got count={count}.")
    _check(seed, image_size, label=0)
    if out.exists():
        raise DataError(f"{out} exists already; remove it, or choose another folder for the phantoms")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "phantoms"
            _write(folder, count, image_size, seed, progress)
            folder.rename(out)
    except OSError as error:
        raise DataError(f"cannot write phantoms to {out}: {error.strerror}; choose another folder") from error
    return out


def _check(seed: int, size: int, label: int) -> None:
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more. Got seed={seed}.")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ConfigError(f"the size of a phantom must be {SIZES[0]} to {SIZES[1]} pixels. Got {size}.")
    if label not in (0, 1):
        raise ConfigError(f"label must be 0 ({CLASSES[0]}) or 1 ({CLASSES[1]}). Got label={label!r}.")


def _write(
    folder: Path, count: int, size: int, seed: int, progress: Callable[[int, int], None] | None
) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    with (folder / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "x", "y", "width", "height"])
        for done, (patient, image, label) in enumerate(islice(_schedule(seed), count), 1):
            phantom = draw_phantom(seed, size=size, label=label, patient=patient, image=image)
            name = f"{patient:05d}_{image:03d}.png"
            Image.fromarray(phantom.image).save(folder / CLASSES[label] / name)
            table.writerows([name, *box] for box in phantom.boxes)
            if progress is not None:
                progress(done, count)


def _schedule(seed: int) -> Iterator[tuple[int, int, int]]:
    """Patient, image and label without end; patients come in pairs, one of each class, for balance."""
    for pair in count_from():
        rng = np.random.default_rng((seed, pair, 4))
        first, films = int(rng.random() < 0.5), 1 + int(rng.random() < REPEATS)
        for image in range(films):
            yield 2 * pair, image, first
            yield 2 * pair + 1, image, 1 - first


# --- the patient, put together


def _air(frame: Frame, build: Build, rng: Generator) -> Array:
    """Thickness of lung that the heart and the diaphragm leave, shape (size, size)."""
    heart = anatomy.heart(frame, build, rng)
    right, left = (
        np.clip(anatomy.lung(frame, build, side) - heart, 0, None)
        * anatomy.above_diaphragm(frame, build, side)
        for side in anatomy.SIDES
    )
    air: Array = np.maximum(right, left)
    return air


def _thickness(frame: Frame, build: Build, air: Array, body: Generator, shot: Generator) -> Array:
    """Thickness of all that is there without opacities, in units of water."""
    soft = anatomy.torso(frame, build, body) + anatomy.breasts(frame, build, body)
    hollow = anatomy.airway(frame, build, body) + anatomy.abdomen_gas(frame, build, body)
    bones = anatomy.ribs(frame, build, body) + anatomy.shoulder_girdle(frame, build, body)
    bones += anatomy.spine(frame, build, body)
    vessels = anatomy.vessels(frame, build, body) * np.clip(air / 0.25, 0, 1)
    markings = 1 + body.uniform(0.015, 0.05) * frame.cloud(body, 24, 45, 80)
    applied = film.hardware(frame, shot) + film.skin_fold(frame, shot)
    total = soft + bones + 1.2 * vessels + applied - AIR * air * markings - 0.8 * hollow
    thickness: Array = np.clip(total, 0, None) * (soft > 0)
    return thickness


# --- opacities


def _opacities(frame: Frame, build: Build, air: Array, rng: Generator) -> list[Array]:
    """One to three maps of the lung's air that is filled, each shape (size, size)."""
    number = rng.choice(len(OPACITIES), p=OPACITIES) + 1
    return [air * _cloud(frame, *_place(frame, build, air, rng), rng) for _ in range(number)]


def _place(frame: Frame, build: Build, air: Array, rng: Generator) -> tuple[float, float]:
    """Middle of an opacity: the first of eight places in the lungs with air enough to show it."""
    side = rng.choice(anatomy.SIDES, 8)
    x = side * rng.uniform(0.17, build.chest - 0.12, 8)
    y = rng.uniform(build.apex + 0.22, build.dome(-1) + 0.06, 8)
    column, row = (np.clip(np.rint(at), 0, frame.size - 1).astype(int) for at in frame.to_pixels(x, y))
    chosen = int(np.argmax(np.minimum(air[row, column], 0.25)))
    return float(x[chosen]), float(y[chosen])


def _cloud(frame: Frame, x: float, y: float, rng: Generator) -> Array:
    """Share of the air that is filled: a ragged, textured ellipse without a sharp edge."""
    width, height = rng.uniform(*RADIUS, 2)
    away = frame.distance(x, y, width, height, angle=rng.uniform(0, np.pi))
    ragged = np.clip(1.25 * np.exp(0.35 * frame.cloud(rng, 7, 14) - 1.1 * away), 0, 1)
    texture = np.clip(1 + 0.25 * frame.cloud(rng, 20, 36), 0.2, 1.6)
    filled: Array = np.clip(rng.uniform(*CONTRAST) * ragged * texture, 0, 1)
    return filled


def _box(solid: Array) -> Box:
    rows, columns = np.nonzero(solid >= EDGE * solid.max())
    left, top = float(columns.min()), float(rows.min())
    return left, top, float(columns.max()) + 1 - left, float(rows.max()) + 1 - top
