"""What Pathfinder images are made of: anti-aliased dashes and discs as small stamps, and the masks that keep dashes apart.

A stamp is drawn on a grid `fine` times finer and shrunk by a Lanczos filter of three lobes, a byte deep as in an image program:
the published images were made so, and the grey fringes are part of what a model sees. Stamps are square, of odd side, centred
on the pixel where the dash or disc begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_LOBES = 3
DIGITS = 9
"""Decimals that count: far below a pixel's and far above the last bits of a sine."""


class Dash(NamedTuple):
    """ink and mask (2r + 1, 2r + 1) uint8: a dash, and the dash with its margin around, from the centre on."""

    ink: np.ndarray
    mask: np.ndarray


def reach(length: int, thickness: float, margin: int) -> int:
    """Half the side r of a dash's stamp: what a dash and its margin can cover in any direction."""
    return length + int(np.ceil(thickness)) + margin


def dash(angle: float, length: int, thickness: float, margin: int, fine: int) -> Dash:
    """A dash from the centre at `angle` (radians, from x towards y). Lengths are pixels, `thickness` a multiple of 1 / fine."""
    radius = reach(length, thickness, margin)
    line = _line(angle, length * fine, round(thickness * fine), radius * fine)
    side = 2 * radius + 1
    return Dash(_shrunk(line, side), _shrunk(_grown(line, margin * fine), side))


def disc(radius: float, fine: int) -> np.ndarray:
    """A disc (2r + 1, 2r + 1) uint8 around the centre."""
    half = int(np.ceil(radius)) + _LOBES
    at = np.arange(fine * (2 * half + 1)) - fine * half
    return _shrunk(at[:, None] ** 2 + at**2 <= (radius * fine) ** 2, 2 * half + 1)


def _line(angle: float, length: int, thickness: int, half: int) -> np.ndarray:
    """A thick line on the fine grid (2 half + 1, 2 half + 1) bool, from the centre to a whole pixel, its ends included.

    Pillow's line: the rectangle's corners are whole pixels, and each row is filled from rounded edge to rounded edge.
    """
    down, right = whole(np.ceil, length * np.array([np.sin(angle), np.cos(angle)]))
    size, columns = float(np.hypot(down, right)), np.arange(-half, half + 1)
    if thickness == 1:
        line, steps = np.zeros((len(columns), len(columns)), bool), np.linspace(0, 1, int(max(abs(down), abs(right))) + 1)
        line[(half + _half_away(down * steps)).astype(int), (half + _half_away(right * steps)).astype(int)] = True
        return line
    thin, thick = np.ceil((thickness - 1) / 2 - 0.5) / size, np.floor((thickness - 1) / 2 + 0.5) / size
    left, over = _half_to_zero(np.array([thin, thick]) * down)
    above, below = _half_away(np.array([thin, thick]) * right)
    return _quadrangle([(below, -left), (down + below, right - left), (down - above, right + over), (-above, over)], columns)


def whole(rounded: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """Values brought to whole numbers by floor, ceil or rint, and none for the sake of a rounding error.

    Sines, hypotenuses and matrix products differ in their last bits from one processor to another; images must not.
    """
    return rounded(np.round(values, DIGITS))


def _half_away(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * whole(np.floor, np.abs(values) + 0.5)


def _half_to_zero(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * whole(np.ceil, np.abs(values) - 0.5)


def _quadrangle(corners: list[tuple[float, float]], columns: np.ndarray) -> np.ndarray:
    """A convex quadrangle with corners (row, column) at whole pixels, on the square grid of `columns`, bool."""
    first, last = np.full(len(columns), np.inf), np.full(len(columns), -np.inf)
    for (y, x), (to_y, to_x) in zip(corners, corners[1:] + corners[:1], strict=True):
        rows = (columns >= min(y, to_y)) & (columns <= max(y, to_y))
        steps = columns[rows] - y
        for share in (steps / (to_y - y),) if y != to_y else (0.0, 1.0):
            edge = x + share * (to_x - x)
            first[rows], last[rows] = np.minimum(first[rows], edge), np.maximum(last[rows], edge)
    return (columns >= whole(np.floor, first + 0.5)[:, None]) & (columns <= whole(np.ceil, last - 0.5)[:, None])


def _grown(shape: np.ndarray, radius: int) -> np.ndarray:
    """A convex shape and every pixel within `radius` of it. Shape and disc have one interval a row, and so has their sum."""
    side = len(shape)
    filled = shape.max(1)
    first = np.where(filled, shape.argmax(1), side)
    last = np.where(filled, side - 1 - shape[:, ::-1].argmax(1), -side)
    shifts = np.arange(-radius, radius + 1)
    width = np.sqrt(radius**2 - shifts**2).astype(int)
    rows = np.arange(side)[:, None] + shifts
    inside = (rows >= 0) & (rows < side)
    rows = rows.clip(0, side - 1)
    left = np.where(inside & filled[rows], first[rows] - width, 2 * side).min(1)
    right = np.where(inside & filled[rows], last[rows] + width, -2 * side).max(1)
    columns = np.arange(side)
    return (columns >= left[:, None]) & (columns <= right[:, None])


def _shrunk(shape: np.ndarray, side: int) -> np.ndarray:
    """A shape (n, n) bool as grey (side, side) uint8; each of the two passes rounds to a byte."""
    weights = lanczos(len(shape), side)
    grey = whole(np.rint, 255.0 * (shape @ weights.T)).clip(0, 255)
    return whole(np.rint, weights @ grey).clip(0, 255).astype(np.uint8)


def lanczos(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that shrinks `old` samples to `new`: sinc(t) sinc(t / 3), |t| < 3 pixels of the new grid."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    support = _LOBES * scale
    at = np.arange(old)
    low, high = np.floor(centres - support + 0.5), np.floor(centres + support + 0.5)
    t = (at + 0.5 - centres) / scale
    weights = np.where((at >= low) & (at < high) & (np.abs(t) < _LOBES), np.sinc(t) * np.sinc(t / _LOBES), 0.0)
    return weights / weights.sum(1, keepdims=True)
