"""Scenes of shapes, and their pictures: for `shapes`.

Shapes never touch. All that is drawn comes from a RandomState, because NumPy has frozen its streams (NEP 19).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

SIDE = 32  # pixels
MARGIN, GAP = 3.0, 1.0  # pixels, by which a relation is clear, and between shapes
FAR = 16.0  # pixels, between the centres of shapes that are to be compared
COLOURS = {  # by the alphabet; RGB
    "blue": (0.20, 0.35, 0.95),
    "cyan": (0.20, 0.85, 0.90),
    "green": (0.15, 0.65, 0.20),
    "magenta": (0.90, 0.25, 0.85),
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.95, 0.90, 0.20),
}
BACKGROUND = (0.15, 0.15, 0.15)
RADII = {"large": (4.6, 5.2), "small": (2.6, 3.0)}  # pixels, the range of each size
REACH = 1.3  # no form goes further from its centre, in radii

# Signed distance in pixels from the edge of a form at the origin, negative inside; y grows downwards. Areas are about equal.
FORMS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.sqrt(x * x + y * y) - r,
    "cross": lambda x, y, r: np.minimum(_box(x, y, 1.15 * r, 0.45 * r), _box(x, y, 0.45 * r, 1.15 * r)),
    "square": lambda x, y, r: _box(x, y, 0.89 * r, 0.89 * r),
    "triangle": lambda x, y, r: np.maximum(y - 0.65 * r, (math.sqrt(3) * abs(x) - y) / 2 - 0.65 * r),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape; x to the right and y down, of its centre, in pixels."""

    size: str
    colour: str
    form: str
    x: float
    y: float
    radius: float


def draw_scene(rng: np.random.RandomState, max_shapes: int) -> list[Shape]:
    """1 to max_shapes shapes in the order in which they are named; what they are is uniform, and where, among the places that a caption is clear for."""
    n = 1 + rng.randint(max_shapes)
    # Numbers of size and colour in one, so that sorting them is the order of names.
    sizes, colours = np.divmod(np.sort(rng.permutation(len(RADII) * len(COLOURS))[:n]), len(COLOURS))
    forms = rng.randint(len(FORMS), size=n)
    least, most = np.array(list(RADII.values()))[sizes].T
    radii = rng.uniform(least, most)
    reach_n1 = REACH * radii[:, None]

    def clear(tries_Rn2):
        i, j = np.triu_indices(n, 1)
        apart = (_squared_distances(tries_Rn2) > (reach_n1[i] + reach_n1[j] + GAP).T ** 2).all(axis=1)
        across, down = np.moveaxis(abs(np.diff(tries_Rn2, axis=1)), -1, 0)
        return apart & (abs(across - down) >= MARGIN).all(axis=1)

    return _shapes(sizes, colours, forms, radii, place(rng, radii, clear))


def draw_comparison(rng: np.random.RandomState, n: int, same: bool) -> list[Shape]:
    """n small shapes, FAR apart, of which two share a colour if `same`, else none; all else is uniform. In the order of colour, form and place."""
    colours = rng.permutation(len(COLOURS))[: n - same]
    colours = np.append(colours, colours[:same])
    forms = rng.randint(len(FORMS), size=n)
    radii = rng.uniform(*RADII["small"], size=n)
    place_n2 = place(rng, radii, lambda tries_Rn2: (_squared_distances(tries_Rn2) > FAR**2).all(axis=1))
    order = np.lexsort((*place_n2.T, forms, colours))
    sizes = np.full(n, list(RADII).index("small"))
    return _shapes(sizes, colours[order], forms[order], radii[order], place_n2[order])


def place(rng: np.random.RandomState, radii_n: np.ndarray, fits: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Centres [n, 2] of shapes that lie within the picture: the first draw that `fits`, which says of R draws [R, n, 2] which do."""
    reach_n1 = REACH * radii_n[:, None]
    while True:
        tries_Rn2 = rng.uniform(reach_n1, SIDE - reach_n1, size=(16, len(radii_n), 2))
        fitting = tries_Rn2[fits(tries_Rn2)]
        if len(fitting):
            return fitting[0]


def _squared_distances(tries_Rn2: np.ndarray) -> np.ndarray:
    """Of every pair of centres, [R, pairs]."""
    i, j = np.triu_indices(tries_Rn2.shape[1], 1)
    return np.square(tries_Rn2[:, i] - tries_Rn2[:, j]).sum(axis=-1)


def _shapes(sizes, colours, forms, radii, place_n2) -> list[Shape]:
    names = zip(*([list(table)[i] for i in index] for table, index in ((RADII, sizes), (COLOURS, colours), (FORMS, forms))))
    return [Shape(*name, float(x), float(y), float(radius)) for name, (x, y), radius in zip(names, place_n2, radii)]


def draw(shapes: list[Shape], noise: float, rng: np.random.RandomState) -> np.ndarray:
    """The picture of a scene, uint8 [SIDE, SIDE, 3]; a pixel that an edge crosses is mixed by how far inside its centre is."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    deviate = lambda *shape: rng.uniform(-noise, noise, size=shape)
    picture = np.broadcast_to(BACKGROUND + deviate(3), (SIDE, SIDE, 3))
    for s in shapes:
        inside = np.clip(0.5 - FORMS[s.form](x - s.x, y - s.y, s.radius), 0, 1)[..., None]
        picture = picture + inside * (COLOURS[s.colour] + deviate(3) - picture)
    return np.rint(255 * np.clip(picture + deviate(SIDE, SIDE, 3), 0, 1)).astype(np.uint8)


def _box(x, y, half_width, half_height):
    return np.maximum(abs(x) - half_width, abs(y) - half_height)

