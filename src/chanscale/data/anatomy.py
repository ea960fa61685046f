"""The patient of a phantom: thickness maps of what a frontal chest film shows, structure by structure.

Each function draws its own proportions from the patient's generator and returns a map of shape
(size, size) in the units of `projection`; what is drawn never depends on the image size, so the same
patient at two sizes has the same anatomy. `side` is -1 for the patient's right lung, which is left in
the image, and +1 for the left one.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from chanscale.data.projection import Array, Frame, Generator

SIDES = (-1, 1)
APEX = 0.27  # how far the lung apices lie from the midline
FLOOR = 0.6  # height of the costophrenic angles after a full breath
RIBS = 10
HILAR_BRANCHES = 9
VESSEL_GENERATIONS = 5


@dataclass(frozen=True)
class Build:
    """The proportions that several structures share, in patient units; `breath` is the image's own."""

    chest: float  # half width of the rib cage at its widest
    apex: float  # height of the lung apices
    base: float  # height of the right dome of the diaphragm
    lag: float  # how much lower the left dome stands
    fat: float  # soft tissue outside the ribs
    depth: float  # front to back, at the chest
    lung: float  # front to back, of the air
    bone: float  # mineral content, 1 is usual
    breast: float  # 0 for none
    slope: float  # how far a rib falls from back to front
    breath: float  # how far this image's diaphragm stands above a full breath

    def dome(self, side: int) -> float:
        """Height of one dome of the diaphragm."""
        return self.base - self.breath + (self.lag if side > 0 else 0.0)

    def descent(self, y: Array) -> Array:
        """Heights as a share of the way from the apices, 0, to the costophrenic angles, 1."""
        share: Array = np.clip((y - self.apex) / (FLOOR - self.apex), 0, 1)
        return share

    def half_width(self, descent: Array) -> Array:
        """Half width of the lungs at these shares of the way down."""
        width: Array = APEX + (self.chest - APEX) * np.sqrt(1 - (1 - descent) ** 2.6)
        return width


def draw_build(rng: Generator, *, breath: float) -> Build:
    """Draw a patient."""
    fat = 0.06 + 0.09 * rng.beta(1.5, 3)
    return Build(
        chest=rng.normal(0.64, 0.035),
        apex=rng.normal(-0.68, 0.03),
        base=rng.normal(0.36, 0.06),
        lag=rng.normal(0.045, 0.025),
        fat=fat,
        depth=rng.normal(0.95, 0.06) + 1.8 * fat,
        lung=rng.normal(0.74, 0.04),
        bone=rng.uniform(0.7, 1.3),
        breast=rng.uniform(0.4, 1.2) if rng.random() < 0.45 else 0.0,
        slope=rng.uniform(0.34, 0.54),
        breath=breath,
    )


# --- soft tissue


def torso(frame: Frame, build: Build, rng: Generator) -> Array:
    """Neck, shoulders, trunk and arms."""
    neck, trunk, top = rng.uniform(0.23, 0.31), build.chest + build.fat, build.apex + rng.uniform(-0.04, 0.1)
    knots = [-2, top - 0.32, top - 0.16, top - 0.02, top + 0.12, top + 0.4, top + 0.62, 0.2, 0.6, 2]
    widths = [
        neck,
        neck,
        neck + 0.12,
        trunk - 0.02,
        trunk + 0.2,
        trunk + 0.14,
        trunk + 0.01,
        trunk,
        trunk,
        trunk,
    ]
    depths = np.array([0.6, 0.6, 0.62, 0.66, 0.74, 0.9, 1, 1.02, 1.04, 1.05]) * build.depth
    height = np.linspace(-2, 2, 401)
    outline = gaussian_filter1d(np.interp(height, knots, widths), 6)
    depth = gaussian_filter1d(np.interp(height, knots, depths), 8)
    radius = np.abs(frame.x) / np.interp(frame.y, height, outline).astype(np.float32)
    section = np.sqrt(np.clip(1 - radius**3, 0, None))
    trunk_map: Array = section * np.interp(frame.y, height, depth).astype(np.float32)
    return np.maximum(trunk_map, _arms(frame, build, rng, top))


def _arms(frame: Frame, build: Build, rng: Generator, top: float) -> Array:
    """Upper arms that hang from the shoulders, with their bones."""
    spread, radius = rng.uniform(0.0, 0.4), 0.16 + 0.8 * build.fat
    root = build.chest + build.fat + 0.14
    down = frame.y - (top + 0.17)
    hang = np.clip(down, 0, None)
    off = np.abs(frame.x) - (root + spread * hang)
    away = off**2 + np.minimum(down, 0) ** 2
    arm = 2 * radius * np.sqrt(np.clip(1 - away / radius**2, 0, None))
    humerus = 0.09 * np.clip(1 - hang / 0.2, 0, 1) + 0.05
    bone = np.sqrt(np.clip(1 - away / humerus**2, 0, None))
    limb: Array = arm + 0.1 * build.bone * bone * (arm > 0)
    return limb


def breasts(frame: Frame, build: Build, rng: Generator) -> Array:
    """Breast shadows over the lower zones, and sometimes nipples."""
    x, y, width = rng.uniform(0.34, 0.42), rng.uniform(0.22, 0.5), rng.uniform(0.26, 0.36)
    nipple = 0.045 if rng.random() < 0.2 else 0.0
    total = np.zeros_like(frame.x)
    for side in SIDES:
        shape = frame.ellipse(side * x, y, width, width * 0.85, angle=side * 0.3)
        total += 0.15 * build.breast * shape * np.clip(0.7 + (frame.y - y) / width, 0, 1)
        total += nipple * frame.ellipse(side * x * 1.05, y + 0.1, 0.026, 0.026)
    return total


def abdomen_gas(frame: Frame, build: Build, rng: Generator) -> Array:
    """Air in the stomach, under the left dome, and in the colon; absent in many."""
    total, dome = np.zeros_like(frame.x), build.dome(1)
    if rng.random() < 0.35:
        width, height = rng.uniform(0.06, 0.17), rng.uniform(0.04, 0.1)
        x, y = rng.uniform(0.24, 0.42), dome + height + rng.uniform(0.03, 0.08)
        total += rng.uniform(0.1, 0.4) * frame.ellipse(x, y, width, height, angle=rng.normal(0, 0.2))
    for _ in range(rng.integers(0, 4)):
        x, y, radius = rng.uniform(-0.5, 0.6), rng.uniform(dome + 0.3, 1.1), rng.uniform(0.03, 0.07)
        loop = frame.ellipse(x, y, radius * 1.5, radius, angle=rng.normal(0, 0.6))
        total += rng.uniform(0.05, 0.2) * loop**2
    return total


# --- lungs, heart and great vessels


def lung(frame: Frame, build: Build, side: int) -> Array:
    """Air of one lung before the heart and the diaphragm take their places."""
    medial, descent = 0.075, build.descent(frame.y)
    outer = build.half_width(descent)
    inner = medial + (APEX - medial) * np.clip(1 - descent / 0.28, 0, 1) ** 2
    across = 2 * (side * frame.x - inner) / np.clip(outer - inner, 1e-3, None) - 1
    section = np.sqrt(np.clip(1 - np.abs(across) ** 3.5, 0, None))
    air: Array = section * build.lung * np.clip(descent / 0.45, 0, 1) ** 0.55
    return air


def above_diaphragm(frame: Frame, build: Build, side: int) -> Array:
    """Share of the beam that passes above the dome; it falls like a root below it, a sharp edge."""
    lateral, crest = side * frame.x, 0.3
    outwards = np.clip((lateral - crest) / (build.chest - crest), 0, None)
    inwards = np.clip((crest - lateral) / crest, 0, None)
    height = build.dome(side) + 0.2 * outwards**2.2 + 0.06 * inwards**2
    share: Array = np.clip(1 - np.sqrt(np.clip((frame.y - height) / 0.16, 0, None)), 0, 1)
    return share


def heart(frame: Frame, build: Build, rng: Generator) -> Array:
    """Both ventricles, the right atrium, the aortic knob, the pulmonary trunk and the descending aorta."""
    size, front, dome = rng.normal(1, 0.1), frame.pose.turn, build.dome(-1)
    angle, knob = rng.uniform(0.75, 1.05), rng.uniform(0.06, 0.1)
    ventricle = frame.distance(0.13 + front, dome - 0.06, 0.36 * size, 0.24 * size, angle=angle)
    atrium = frame.distance(-0.03 + front, dome - 0.06, 0.15 * size, 0.24 * size)
    arch = frame.distance(0.065, build.apex + 0.38, knob, knob + 0.03)
    trunk = frame.distance(0.06 + front, build.apex + 0.56, rng.uniform(0.08, 0.12), 0.16)
    aorta = frame.distance(0.06 - front, build.apex + 0.9, 0.07, 0.6)
    shapes = ((ventricle, 0.6), (atrium, 0.45), (arch, 0.34), (trunk, 0.36), (aorta, 0.14))
    # A power below a half makes the sides steeper than an ellipsoid's: the borders show clearly.
    total: Array = np.maximum.reduce([depth * np.clip(1 - away, 0, None) ** 0.35 for away, depth in shapes])
    return total


def airway(frame: Frame, build: Build, rng: Generator) -> Array:
    """Air in the trachea and the main bronchi."""
    carina = build.apex + 0.42 + rng.normal(0, 0.02)
    middle, bend = 0.3 * frame.pose.turn, rng.normal(-0.01, 0.008)
    trachea = [[middle, -1.3], [middle, -0.9], [middle + bend, carina - 0.15], [middle + bend, carina]]
    right = [[middle + bend, carina], [-0.06, carina + 0.07], [-0.1, carina + 0.12], [-0.14, carina + 0.18]]
    left = [[middle + bend, carina], [0.07, carina + 0.06], [0.13, carina + 0.1], [0.2, carina + 0.13]]
    radii = np.array([[0.042] * 4, [0.03, 0.03, 0.026, 0.02], [0.028, 0.026, 0.022, 0.016]])
    return frame.tubes(np.array([trachea, right, left]), radii)


def vessels(frame: Frame, build: Build, rng: Generator) -> Array:
    """Branching lung vessels that leave the hila and taper outwards."""
    side: Array = np.repeat(SIDES, HILAR_BRANCHES).astype(np.float32)
    angle: Array = np.tile(np.linspace(-1.25, 1.5, HILAR_BRANCHES), 2) + rng.normal(0, 0.12, len(side))
    hilum = build.apex + np.where(side < 0, 0.58, 0.53)  # the left one stands higher
    at: Array = np.stack([side * 0.13, hilum + 0.12 * np.sin(angle)], -1)
    radius: Array = rng.uniform(0.85, 1.2) * rng.uniform(0.018, 0.034, len(side))
    total = 0.12 * frame.ellipse(-0.14, build.apex + 0.58, 0.07, 0.12, angle=0.3)
    total += 0.12 * frame.ellipse(0.14, build.apex + 0.53, 0.07, 0.12, angle=-0.3)
    for generation in range(VESSEL_GENERATIONS):
        paths, radii, angle = _grow(rng, at, angle, radius, side, 0.17 * 0.86**generation)
        total += frame.tubes(paths, radii)
        at, radius, side = np.repeat(paths[:, -1], 2, 0), np.repeat(radii[:, -1] * 0.8, 2), np.repeat(side, 2)
        fork = np.tile([-0.35, 0.35], len(angle))
        angle = np.repeat(angle, 2) + fork + rng.normal(0, 0.2, len(fork))
    return total


def _grow(
    rng: Generator, at: Array, angle: Array, radius: Array, side: Array, length: float
) -> tuple[Array, Array, Array]:
    """One generation of branches: paths (n, 6, 2), tapering radii (n, 6) and the final angles (n,)."""
    bend = np.cumsum(rng.normal(0, 0.12, (len(at), 5)), 1) + angle[:, None]
    step = length / 5 * rng.uniform(0.6, 1.2, (len(at), 1))
    moves = np.stack([side[:, None] * np.cos(bend), np.sin(bend)], -1) * step[..., None]
    paths = np.concatenate([at[:, None], at[:, None] + np.cumsum(moves, 1)], 1)
    return paths, radius[:, None] * np.linspace(1, 0.8, 6), bend[:, -1]


# --- bones


def ribs(frame: Frame, build: Build, rng: Generator) -> Array:
    """Ribs as half rings around the chest that fall towards the front, where they fade into cartilage."""
    pitch = (FLOOR - build.apex) / 10.2 * rng.normal(1, 0.02)
    level = build.apex + 0.03 + pitch * np.arange(RIBS)[:, None]
    fall = build.slope * np.linspace(0.5, 1.1, RIBS)[:, None]
    turn = 0.12 + np.linspace(0, 1, 40) * np.linspace(2.35, 1.6, RIBS)[:, None]
    reach = build.half_width(build.descent(level + fall / 2)) + 0.015
    y = level + fall * (1 - np.cos(turn)) / 2 + rng.normal(0, 0.004, (RIBS, 1))
    thin = np.linspace(0.026, 0.018, RIBS)[:, None] * np.sqrt(np.clip((2.5 - turn) / 0.93, 0, 1))
    x = reach * np.sin(turn)
    paths = np.stack([np.concatenate([-x, x]), np.tile(y, (2, 1))], -1)
    paths[..., 1] += rng.normal(0, 0.006, (2 * RIBS, 1))
    paths[..., 0] -= frame.pose.turn * np.cos(np.tile(turn, (2, 1)))
    return 1.4 * build.bone * frame.tubes(paths, np.tile(thin, (2, 1)), rim=0.8)


def shoulder_girdle(frame: Frame, build: Build, rng: Generator) -> Array:
    """Clavicles, and the borders and spines of the scapulae."""
    total, rise, out = np.zeros_like(frame.x), rng.uniform(0.0, 0.16), rng.uniform(-0.02, 0.12)
    chest, apex = build.chest, build.apex
    for side in SIDES:
        x = side * np.array([0.06, 0.16, 0.3, 0.46, 0.6, 0.7]) * (chest / 0.62) + 1.5 * frame.pose.turn
        y = (
            apex
            + np.array([0.17, 0.19, 0.17, 0.14, 0.14, 0.17])
            - rise * np.array([0, 0.2, 0.5, 0.85, 1, 0.9])
        )
        clavicle = np.array([[0.032, 0.024, 0.02, 0.02, 0.023, 0.026]])
        total += 1.5 * frame.tubes(np.stack([x, y], -1)[None], clavicle, rim=0.7)
        border = [[chest - 0.08, apex + 0.1], [chest - 0.06 + out, apex + 0.35], [chest + out, apex + 0.68]]
        margin = [[chest + 0.16, apex + 0.16], [chest + 0.1 + out, apex + 0.45], [chest + out, apex + 0.68]]
        spine = [[chest - 0.08, apex + 0.14], [chest + 0.04, apex + 0.07], [chest + 0.2, apex + 0.02]]
        scapula = np.array([border, margin, spine]) * [side, 1]
        total += 1.5 * frame.tubes(scapula, np.array([[0.009] * 3, [0.022] * 3, [0.02] * 3]), rim=0.5)
    return build.bone * total


def spine(frame: Frame, build: Build, rng: Generator) -> Array:
    """Vertebral bodies between thinner discs, with their spinous processes."""
    lean = rng.normal(0, 0.012) * np.sin(2 * frame.y + rng.uniform(0, 6)) - frame.pose.turn
    phase = (frame.y - build.apex) / 0.125 * 2 * np.pi
    across = (frame.x - lean) / (0.075 + 0.006 * np.cos(phase) + 0.02 * np.clip(frame.y, -0.5, 1))
    body = np.sqrt(np.clip(1 - across**4, 0, None)) * (0.8 + 0.2 * np.tanh(2 * np.cos(phase)))
    process = np.exp(-((across / 0.22) ** 2)) * np.clip(np.cos(phase + 2), 0, 1) ** 2
    column: Array = (0.1 * body + 0.06 * process) * np.clip(0.75 + 0.35 * frame.y, 0.4, 1.3)
    return build.bone * column
