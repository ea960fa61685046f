"""The pixel grid on which a phantom's anatomy is projected.

Everything is laid out in patient units, the same at any image size: the origin is the middle of the
thorax, x points to the right of the image (the patient's left), y points down, and 1 is half the
side of an unposed image, about 20 cm. Thicknesses along the beam are in the same unit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Generator = np.random.Generator

POINT_SPACING = 0.8  # pixels between the points that draw a tube: below 1, so that no gaps appear


@dataclass(frozen=True)
class Pose:
    """How one film was taken: in-plane tilt (radians), magnification, shift, and turn about the long axis.

    `turn` moves what lies in front (sternum, heart) by +turn and the spine by -turn, in patient units.
    """

    tilt: float = 0.0
    magnification: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    turn: float = 0.0


class Frame:
    """A square grid of pixels seen through a pose.

    `x` and `y` hold the patient coordinates of the pixels, shape (size, size).
    """

    def __init__(self, size: int, pose: Pose) -> None:
        self.size = size
        self.pose = pose
        self.pixel = 2 / (size * pose.magnification)  # side of a pixel, in patient units
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        right, down = axis[None, :] - pose.shift_x, axis[:, None] - pose.shift_y
        cosine, sine = np.cos(pose.tilt) / pose.magnification, np.sin(pose.tilt) / pose.magnification
        self.x: Array = (cosine * right + sine * down).astype(np.float32)
        self.y: Array = (cosine * down - sine * right).astype(np.float32)

    def to_pixels(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Column and row, as fractions counted from pixel centres, of points in patient coordinates."""
        cosine, sine = np.cos(self.pose.tilt), np.sin(self.pose.tilt)
        right = (cosine * x - sine * y) * self.pose.magnification + self.pose.shift_x
        down = (sine * x + cosine * y) * self.pose.magnification + self.pose.shift_y
        half = self.size / 2
        return (right + 1) * half - 0.5, (down + 1) * half - 0.5

    def deposit(self, x: Array, y: Array, volume: Array) -> Array:
        """Thickness map, shape (size, size), of small volumes put down at points of any equal shape."""
        column, row = self.to_pixels(x, y)
        inside = (column > -1) & (column < self.size) & (row > -1) & (row < self.size)
        column, row, volume = column[inside], row[inside], volume[inside]
        left, top = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
        across, along = column - left, row - top
        padded = self.size + 2  # a margin of one pixel takes what falls half outside
        corner = (top + 1) * padded + left + 1
        total = np.zeros(padded * padded)
        for offset, weight in (
            (0, (1 - across) * (1 - along)),
            (1, across * (1 - along)),
            (padded, (1 - across) * along),
            (padded + 1, across * along),
        ):
            total += np.bincount(corner + offset, weight * volume, minlength=padded * padded)
        picture = total.reshape(padded, padded)[1:-1, 1:-1]
        return (picture / self.pixel**2).astype(np.float32)

    def tubes(self, paths: Array, radii: Array, *, rim: float = 0.0) -> Array:
        """Thickness map of tubes along `paths`, shape (tubes, points, 2), with `radii` (tubes, points).

        A tube holds the volume of a solid cylinder; `rim` above 0 moves that much of it to the two
        edges, as the cortex of a bone does. The volume is kept at any image size, so a tube thinner
        than a pixel grows faint instead of vanishing.
        """
        paths, radii = self._refine(paths.astype(np.float32), radii.astype(np.float32))
        step = np.gradient(paths, axis=1)
        length = np.hypot(step[..., 0], step[..., 1]) + 1e-9
        count = max(1, int(np.ceil(2 * float(radii.max()) / (self.pixel * POINT_SPACING))))
        offset = ((np.arange(count) + 0.5) / count * 2 - 1).astype(np.float32)
        share = np.sqrt(1 - offset**2) + rim * 4 * offset**8
        share /= share.sum()
        volume = (np.pi * radii**2 * length)[..., None] * share
        across = (radii / length)[..., None] * offset
        x = paths[..., 0, None] - across * step[..., 1, None]
        y = paths[..., 1, None] + across * step[..., 0, None]
        return self.deposit(x, y, volume.astype(np.float32))

    def _refine(self, paths: Array, radii: Array) -> tuple[Array, Array]:
        """Resample paths and radii linearly until neighbours are less than a pixel apart."""
        points = paths.shape[1]
        longest = np.hypot(*np.moveaxis(np.diff(paths, axis=1), -1, 0)).max()
        count = (points - 1) * max(1, int(np.ceil(longest / (self.pixel * POINT_SPACING)))) + 1
        position = np.linspace(0, points - 1, count)
        index = np.minimum(position.astype(np.int64), points - 2)
        part = (position - index).astype(np.float32)
        radii = radii[:, index] * (1 - part) + radii[:, index + 1] * part
        part = part[:, None]
        return paths[:, index] * (1 - part) + paths[:, index + 1] * part, radii

    def ellipse(self, x: float, y: float, width: float, height: float, *, angle: float = 0.0) -> Array:
        """Thickness, 0 to 1, of an ellipsoid at (x, y) with these half axes, turned by `angle` radians."""
        depth: Array = np.sqrt(np.clip(1 - self.distance(x, y, width, height, angle=angle), 0, None))
        return depth

    def distance(self, x: float, y: float, width: float, height: float, *, angle: float = 0.0) -> Array:
        """Squared distance from (x, y) in units of the half axes: 1 on the ellipse, shape (size, size)."""
        right, down = self.x - x, self.y - y
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        across, along = cosine * right + sine * down, cosine * down - sine * right
        return (across / np.float32(width)) ** 2 + (along / np.float32(height)) ** 2

    def cloud(self, rng: Generator, *cells: int) -> Array:
        """Smooth random field of mean 0 and deviation about 1; each of `cells` adds details that fine."""
        total = np.zeros((self.size, self.size), np.float32)
        for count in cells:
            lattice = rng.normal(size=(count + 3, count + 3))
            basis = _spline_basis(self.size, count)
            total += (basis @ lattice @ basis.T).astype(np.float32)
        return total * np.float32(2 / np.sqrt(len(cells)))


def _spline_basis(size: int, cells: int) -> Array:
    """Uniform cubic B-splines at the pixel centres, shape (size, cells + 3)."""
    position = (np.arange(size) + 0.5) / size * cells
    distance = np.abs(position[:, None] - (np.arange(cells + 3) - 1))
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)
