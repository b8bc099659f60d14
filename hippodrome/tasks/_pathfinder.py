"""Pathfinder images (Linsley, Kim, Veerabadran, Windolf, Serre, 2018; Tay et al., 2021), drawn fast and each from its number.

Two paths of dashes begin a fixed distance apart and grow in turns; short paths distract; two discs mark either the ends of one
path (label 1) or an end of each (label 0). A dash leaves a joint at an angle near that of the dash before,

    p(angle) ~ cos(c delta)^2 (1 - taken),   c delta < pi / 2,   c the continuity, delta the turn

stays a margin away from its joints, and may not run over what lies there: a dash takes a mask that is wider than itself by a
margin. Paths that get stuck begin anew, both; a distractor is given up after five tries. Geometry and retries are those of the
public generator (github.com/drewlinsley/pathfinder, as LRA and DLR ran it). What is slow there, full images for each dash and
hundreds of attempts at an image, is done here in windows, from tables of every dash at every angle, for many attempts side by
side. The random stream is ours: images are alike, not equal.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hippodrome.tasks import _dashes

VERSION = 2
"""Changes when the same seed and number give another image."""

_TRIALS = 3
"""Dashes tried at a joint, and places tried for a distractor's first dash."""
_ATTEMPTS, _ROOM = (8, 16, 32, 64, 128), 1 << 22
"""Attempts at two paths made side by side, the last number again and again, and bytes their fields may take above the fewest.
Of those that succeed the first counts."""
_TRIES = (1, 4)
"""Tries at a distractor: one, then four side by side."""
_BUSY = 0.01
"""Share of free pixels below which nothing more is begun."""
_TAKEN, _CLASH = 76, 459
"""Of masks, in bytes: above 0.3 a pixel is taken, from 1.8 on the sum of two masks is a collision."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Lengths in pixels. A dash of `paddle_length` and `paddle_thickness`; `margins`: one is drawn an image.

    seed_distance: between the beginnings of the paths; twice that between the first and the edge. padding: an edge kept empty.
    contrasts: of the paths' dashes and the distractors', where a marker is 1. mark_distractors: they begin with a disc, too.
    """

    size: int
    seed_distance: int
    marker_radius: float
    distractors: int
    paddle_thickness: float
    margins: tuple[int, ...]
    contrasts: tuple[float, float] = (1.0, 1.0)
    contour_length: int = 14
    distractor_length: int = 4
    paddle_length: int = 5
    continuity: float = 1.8
    padding: int = 1
    fine: int = 2
    mark_distractors: bool = False


_32 = Geometry(
    size=32,
    seed_distance=7,
    marker_radius=1.5,
    distractors=5,
    paddle_length=2,
    paddle_thickness=0.5,
    margins=(1,),
    continuity=1.0,
    # Snake contrast 2, paddle contrast 0.75, of which the public generator gives the latter to the two paths alone.
    contrasts=(1.5, 2.0),
)
_64 = Geometry(
    size=64,
    seed_distance=12,
    marker_radius=2.5,
    distractors=5,
    paddle_thickness=1.0,
    margins=(1,),
    contrasts=(0.8, 0.8),
)
_128 = Geometry(
    size=128,
    seed_distance=20,
    marker_radius=3.0,
    distractors=8,
    paddle_thickness=1.5,
    margins=(2, 3),
    contrasts=(0.9, 0.9),
)
_256 = Geometry(
    size=256,
    seed_distance=27,
    marker_radius=5.0,
    distractors=7,
    paddle_thickness=2.0,
    margins=(3,),
    padding=22,
)
LRA = {made.size: made for made in (_32, _64, _128, _256)}
"""The sets of Long Range Arena by size: "hard", of 14 dashes a path."""

_DISTRACTING = {32: 20, 64: 22, 128: 35, 256: 30}
"""Dashes that distract, which short paths of a third of a path's length share out among them."""


def easier(size: int, contour_length: int) -> Geometry:
    """A set of Long Range Arena with paths of so many dashes; of 14 it is `LRA`'s."""
    short = contour_length // 3
    distractors = _DISTRACTING[size] // short
    return replace(LRA[size], contour_length=contour_length, distractor_length=short, distractors=distractors)


_DLR_128 = replace(_128, seed_distance=22, marker_radius=2.1, distractors=16, mark_distractors=True)
_DLR_256 = Geometry(
    size=256,
    seed_distance=27,
    marker_radius=4.2,
    contour_length=16,
    distractor_length=5,
    distractors=16,
    paddle_length=8,
    paddle_thickness=2.0,
    margins=(4,),
    continuity=2.2,
    mark_distractors=True,
)
_DLR_512 = Geometry(
    size=512,
    seed_distance=40,
    marker_radius=9.0,
    contour_length=12,
    distractors=18,
    paddle_length=22,
    paddle_thickness=6.0,
    margins=(7,),
    continuity=2.5,
    fine=3,
    mark_distractors=True,
)
SEGMENTATION = {made.size: made for made in (_DLR_128, _DLR_256, _DLR_512)}
"""The sets of DLR's segmentation by size."""


class Drawing(NamedTuple):
    """image (H, W) uint8; label 1 where one path joins the marks; paths (2, H, W) bool, the pixels that each path inks; marks
    (2, 2), the discs' centres as (y, x); marked, the path that each disc is an end of; distractors, how many found room.
    """

    image: np.ndarray
    label: int
    paths: np.ndarray
    marks: np.ndarray
    marked: tuple[int, int]
    distractors: int


def draw(geometry: Geometry, seed: int, index: int) -> Drawing:
    """Image number `index` of a seed: a pure function of both."""
    rng = np.random.default_rng([seed, index])
    label, first = int(rng.integers(2)), int(rng.integers(2))
    table = _table(geometry, geometry.margins[int(rng.integers(len(geometry.margins)))])
    field, paths = _two_paths(table, rng)
    distractors = []
    for _ in range(geometry.distractors):
        found = _distractor(table, field, rng)
        if found is not None:
            field, path = found
            distractors.append(path)
    return _painted(table, paths, distractors, (first, first if label else 1 - first))


def classes(drawing: Drawing) -> np.ndarray:
    """What DLR's segmentation asks, (H, W) uint8: 2 on a path that joins the discs, 1 on one that does not, 0 elsewhere."""
    found = drawing.paths.astype(np.uint8)
    if drawing.label:
        found[drawing.marked[0]] *= 2
    return found.max(0)


class _Table:
    """Every dash at every heading, and what may follow it, of a geometry and a margin.

    A field is the image within a rim of taken pixels, (stride, stride) uint8 of what is taken; a place is a flat index into it,
    an offset the difference of two. Headings 0 to 359 are those of first dashes, in degrees from -180 on; the rest lead from a
    joint to the pixels of a circle around it. A first dash lies at its outer end and points inwards, any other at its tip.
    """

    def __init__(self, geometry: Geometry, margin: int) -> None:
        self.geometry, self.margin = geometry, margin
        length, step = geometry.paddle_length, geometry.paddle_length + margin
        self.radius = _dashes.reach(length, geometry.paddle_thickness, margin)
        self.rim = self.radius + 2 * margin + 2
        self.stride = geometry.size + 2 * self.rim
        around = np.arange(0, 360, 360 / (2 * np.pi * step)) * np.pi / 180
        circle = np.unique(_dashes.whole(np.floor, step * np.stack([np.sin(around), np.cos(around)], 1)).astype(int), axis=0)
        self.angles = np.concatenate([np.arange(-180, 180) * np.pi / 180, np.arctan2(*circle.T)])
        self.advance = self.flat(self._moved(length + 2 * margin))
        """(n,) from a joint to the next one, by the heading between them."""
        self.pivot = self.flat(self._moved(length) + self._moved(-step))
        """(n,) from the place of a first dash to the joint before it."""
        self.chances, self.headings, self.tips = self._turns(circle)
        at = np.arange(-margin, margin + 1)
        self.disc = self.flat(np.argwhere(at[:, None] ** 2 + at**2 <= margin**2) - margin)
        """(d,) all pixels within a margin."""
        side, area = 2 * self.radius + 1, (length + 2 * margin + 4) * (int(geometry.paddle_thickness) + 2 * margin + 4)
        self.inks = np.zeros((len(self.angles), side, side), np.uint8)
        self.spots = np.zeros((len(self.angles), area), int)
        self.masks = np.zeros((len(self.angles), area), np.uint8)
        self.spare = np.zeros((len(self.angles), area), np.uint8)
        """Spots are the pixels that a dash and its margin cover, the last one repeated, (n, area): their offsets, the mask, and
        what may lie there already; more is a collision."""
        self._solid: dict[int, np.ndarray] = {}
        self._made = np.zeros(len(self.angles), bool)
        self.marker = _dashes.disc(geometry.marker_radius, geometry.fine)

    def make(self, headings: np.ndarray) -> None:
        """Fill `inks` and the spots of these headings."""
        missing = headings[~self._made[headings]]
        for heading in set(missing.tolist()):
            angle, made = self.angles[heading] + (np.pi if heading >= 360 else 0.0), self.geometry
            dash = _dashes.dash(angle, made.paddle_length, made.paddle_thickness, self.margin, made.fine)
            spots = np.argwhere(dash.mask)
            mask = dash.mask[tuple(spots.T)]
            rest = (0, self.spots.shape[1] - len(spots))
            self.inks[heading] = dash.ink
            self.spots[heading] = np.pad(self.flat(spots - self.radius), rest, "edge")
            self.masks[heading] = np.pad(mask, rest, "edge")
            self.spare[heading] = (_CLASH - 1 - self.masks[heading].astype(int)).clip(0, 255)
            # What must be free around a first dash. A pixel off, and cut at a step: so it is in the public generator.
            solid = spots[mask == 255] - self.radius + 1
            self._solid[heading] = solid[(np.abs(solid) <= made.paddle_length + self.margin).all(1)]
        self._made[missing] = True

    def solid(self, heading: int) -> np.ndarray:
        """What must be free around a first dash, (n, 2) offsets as (y, x)."""
        self.make(np.array([heading]))
        return self._solid[heading]

    def flat(self, offsets: np.ndarray) -> np.ndarray:
        return offsets[..., 0] * self.stride + offsets[..., 1]

    def place(self, at: np.ndarray) -> np.ndarray:
        """Places of pixels (..., 2) of the image."""
        return self.flat(at + self.rim)

    def inside(self, field: np.ndarray) -> np.ndarray:
        """The image in a field, a view."""
        return field[..., self.rim : -self.rim, self.rim : -self.rim]

    def claim(self, flat: np.ndarray, places: np.ndarray, headings: np.ndarray) -> None:
        """Take what dashes and their margins cover, in flat fields that the places tell apart."""
        self.make(headings)
        covered = places[:, None] + self.spots[headings]
        flat[covered] = np.maximum(flat.take(covered), self.masks[headings])

    def _moved(self, length: int) -> np.ndarray:
        return _dashes.whole(np.ceil, length * np.stack([np.sin(self.angles), np.cos(self.angles)], 1)).astype(int)

    def _turns(self, circle: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each heading the next ones: (n, k) chances, headings and offsets of tips from the joint. Unused ends are 0."""
        delta = np.abs(self.angles[360:] - self.angles[:, None])
        delta = np.minimum(np.minimum(delta, 2 * np.pi - delta) * self.geometry.continuity, np.pi / 2)
        # Rounded, so that equal chances are equal on every machine and stay in order.
        chances = np.where(delta < np.pi / 2, np.round(np.cos(delta) ** 2, _dashes.DIGITS), 0.0)
        count = int((chances > 0).sum(1).max())
        best = np.argsort(-chances, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(chances, best, 1), best + 360, self.flat(circle)[best]


@functools.lru_cache(maxsize=16)
def _table(geometry: Geometry, margin: int) -> _Table:
    return _Table(geometry, margin)


def _two_paths(table: _Table, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The field and the dashes (2, contour_length, 2) of two whole paths, whatever number of attempts it takes."""
    made, edge = table.geometry, table.rim + table.geometry.padding
    most = max(_ATTEMPTS[0], _ROOM // table.stride**2)
    attempts = itertools.chain(_ATTEMPTS, itertools.repeat(_ATTEMPTS[-1]))
    while True:
        places, headings = _two_seeds(table, min(next(attempts), most), rng)
        fields = np.full((len(places), table.stride, table.stride), 255, np.uint8)
        fields[:, edge:-edge, edge:-edge] = 0
        grown = _grow(table, fields, places, headings, made.contour_length, rng)
        if grown is not None:
            field, paths = grown
            # As in the public generator, of the two last dashes only the second path's is kept free of distractors.
            table.claim(field.reshape(-1), paths[1:, -1, 0], paths[1:, -1, 1])
            return field, paths


def _two_seeds(table: _Table, attempts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places and headings (attempts, 2) of first dashes: one within a square in the middle, one at seed_distance from it."""
    made, headings = table.geometry, rng.integers(360, size=(attempts, 2))
    angles, share = rng.integers(360, size=attempts) * np.pi / 180, rng.random((attempts, 2))
    boxes = np.array([[solid.min(0), solid.max(0)] for solid in map(table.solid, headings[:, 0].tolist())])
    low, high = 2 * made.seed_distance - boxes[:, 0], made.size - 2 * made.seed_distance - boxes[:, 1]
    fits = (high > low).all(1)
    first = low + np.floor(share * (high - low)).astype(int)
    other = _dashes.whole(np.rint, first + made.seed_distance * np.stack([np.sin(angles), np.cos(angles)], 1)).astype(int)
    return table.place(np.stack([first, other], 1))[fits], headings[fits]


def _grow(
    table: _Table, fields: np.ndarray, places: np.ndarray, headings: np.ndarray, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Several attempts to grow paths from first dashes (attempts, paths), one dash each in turn.

    Of the first attempt to succeed: its field, in which all but the last dashes are claimed, and its dashes (paths, length, 2)
    as places and headings. None where all get stuck. Each attempt has its field and keeps to it.
    """
    flat, base = fields.reshape(-1), np.arange(len(fields)) * table.stride**2
    pivots = places + table.pivot[headings]
    dashes = np.zeros((*places.shape, length, 2), int)
    dashes[:, :, 0] = np.stack([places, headings], -1)
    for number in range(1, length):
        for path in range(places.shape[1]):
            pivots[:, path] += table.advance[dashes[:, path, number - 1, 1]]
            place, heading = _next(table, flat, base + pivots[:, path], dashes[:, path, number - 1, 1], rng)
            dashes[:, path, number] = np.stack([place - base, heading], -1)
            going = heading >= 0
            if not going.all():
                base, pivots, dashes = base[going], pivots[going], dashes[going]
            if not len(base):
                return None
            before = dashes[:, path, number - 1]
            table.claim(flat, base + before[:, 0], before[:, 1])
    return fields[base[0] // table.stride**2], dashes[0]


def _next(
    table: _Table, flat: np.ndarray, joints: np.ndarray, headings: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Places and headings (attempts,) of dashes that leave the joints, turning from the headings before; -1 where none can."""
    tips = joints[:, None] + table.tips[headings]
    taken = flat.take(tips[..., None] + table.disc).max(2)
    odds = (table.chances[headings] * (255 - taken)).cumsum(1)
    drawn = rng.random((_TRIALS, len(joints))) * odds[:, -1]
    place, heading = np.full(len(joints), -1), np.full(len(joints), -1)
    waiting = np.flatnonzero(odds[:, -1] >= 1e-4 * 255)
    for chance in drawn:
        pick = (odds[waiting] <= chance[waiting, None]).sum(1)
        chosen, tip = table.headings[headings[waiting], pick], tips[waiting, pick]
        table.make(chosen)
        clash = (flat.take(tip[:, None] + table.spots[chosen]) > table.spare[chosen]).any(1)
        place[waiting[~clash]], heading[waiting[~clash]] = tip[~clash], chosen[~clash]
        waiting = waiting[clash]
        if not len(waiting):
            break
    return place, heading


def _distractor(table: _Table, field: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """A field with a short path in it, and the path's dashes (distractor_length, 2); None where no try found room."""
    for tries in _TRIES:
        found = [first for _ in range(tries) if (first := _first_dash(table, field, rng)) is not None]
        if not found:
            continue
        places, headings = np.array(found).T[:, :, None]
        # On copies: a path that gets stuck leaves no trace.
        fields = np.repeat(field[None], len(found), axis=0)
        grown = _grow(table, fields, places, headings, table.geometry.distractor_length, rng)
        if grown is not None:
            after, paths = grown
            table.claim(after.reshape(-1), paths[:, -1, 0], paths[:, -1, 1])
            return after, paths[0]
    return None


def _first_dash(table: _Table, field: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """Place and heading of a first dash where it is free; None where that is nowhere."""
    size = table.geometry.size
    if np.count_nonzero(table.inside(field) <= _TAKEN) < _BUSY * size**2:
        return None
    for _ in range(_TRIALS):
        heading = int(rng.integers(360))
        place = _free_place(table, field, table.solid(heading), rng)
        if place is None:
            return None
        y, x = divmod(place + int(table.pivot[heading]), table.stride)
        if table.rim <= y < table.rim + size and table.rim <= x < table.rim + size:
            return place, heading
    return None


def _free_place(table: _Table, field: np.ndarray, solid: np.ndarray, rng: np.random.Generator) -> int | None:
    """A place of the image, uniform over those around which no offset of `solid` is taken; None where there is none."""
    size, flat, offsets = table.geometry.size, field.reshape(-1), table.flat(solid)

    def free(places: np.ndarray) -> np.ndarray:
        return places[flat.take(places[:, None] + offsets).max(1) <= _TAKEN]

    found = free(table.place(rng.integers(size, size=(64, 2))))
    if not len(found):
        # Few are free, or none. A few offsets rule out most places of the image.
        taken = np.zeros((), np.uint8)
        for y, x in solid[:: len(solid) // 8 + 1] + table.rim:
            taken = np.maximum(taken, field[y : y + size, x : x + size])
        found = free(table.place(np.argwhere(taken <= _TAKEN)))
    return int(found[rng.integers(len(found))]) if len(found) else None


def _painted(table: _Table, paths: np.ndarray, distractors: list[np.ndarray], marked: tuple[int, int]) -> Drawing:
    """The image of two paths and some short ones; the discs lie on the first dash of one path and the last of one."""
    made = table.geometry
    # A layer for each path and one for the rest.
    layers = np.zeros((3, table.stride, table.stride), np.float32)
    for layer, path in [(0, paths[0]), (1, paths[1]), *((2, path) for path in distractors)]:
        table.make(path[:, 1])
        contrast = made.contrasts[layer // 2] / 255
        for place, heading in path.tolist():
            _stamp(layers[layer], place, table.inks[heading] * np.float32(contrast))
    marks = [int(paths[marked[0], 0, 0]), int(paths[marked[1], -1, 0])]
    begun = [int(path[0, 0] + table.pivot[path[0, 1]]) for path in distractors] if made.mark_distractors else []
    for place in marks + begun:
        _stamp(layers[2], place, table.marker / np.float32(255))
    inked = table.inside(layers)
    inked *= 255 / inked.max()
    image = np.floor(inked.max(0) + 0.5).astype(np.uint8)
    centres = np.array([divmod(place, table.stride) for place in marks]) - table.rim
    return Drawing(image, int(marked[0] == marked[1]), inked[:2] >= 0.5, centres, marked, len(distractors))


def _stamp(layer: np.ndarray, place: int, stamp: np.ndarray) -> None:
    """Paint a stamp centred at a place: the brighter wins."""
    y, x = divmod(place, layer.shape[1])
    half = len(stamp) // 2
    window = layer[y - half : y + half + 1, x - half : x + half + 1]
    np.maximum(window, stamp, out=window)
