"""Atomic: the eleven elementary manipulations of a sequence that DLR's paper tests systems with (Gupta, Mehta, Berant, 2022).

x (L): independent N(0, 1) over their largest magnitude. Every input ends with cos(2 pi t / T), sin(2 pi t / T), T its length.

    shift          y_t = x_(t - h L / 8), h = 0 .. 7           cumsum   y_t = sum_(j<=t) x_j / sqrt(t), t from 1
    cummax         y_t = max_(j<=t) x_j                        reverse  y = x backwards, asked after L zeros
    sort           y = x by |x_i - x_0|, asked after L zeros
    select         y = the M marked of M + L values, in order, asked after them in M zeros; select_fixed: always the same places
    solve          y = X, asked in the last places, from the rows of [A | A X], A orthogonal, |X| = 1; solve_fixed: one A
    context_shift  [cos(2 pi r / L), sin(2 pi r / L), x], y = all of it shifted right by r
    mips           q, k, v unit vectors in R^4, y_t = v_j at the largest q_t . k_j, j <= t

What is shifted in is zero. Rows are drawn anew for ever: a row is a function of the seed, the split and its number alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.part import BadInput, nearest
from hippodrome.task import Batch, Split
from hippodrome.tasks._regression import _Regression

Name = Literal[
    "shift", "cumsum", "cummax", "reverse", "sort", "select", "select_fixed", "solve", "solve_fixed", "context_shift", "mips"
]

SHIFTS, DIMENSION = 8, 4
_SPLITS: tuple[Split, ...] = get_args(Split)
_SCORES = 1 << 22
"""Products q . k held at once."""


class Atomic(_Regression):
    """One of the eleven. Inputs (B, T, channels), targets (B, T, outputs), NaN before the answer begins."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Regression.Config):
        """`channels`, `outputs`: numbers a position, in and out. `tokens`: T."""

        task: Name = "shift"
        length: int = 512
        """L of the definition; T is 2 L for reverse and sort, and L + 2 M for select."""
        marked: int = 32
        """M of select."""
        test_rows: int = 1600
        """Rows of the test split, and of the valid split."""
        seed: int = 0

        def __post_init__(self) -> None:
            if self.task not in get_args(Name):
                raise BadInput(f"task is {self.task!r}: {nearest(self.task, get_args(Name))}")
            for name, least in {"length": SHIFTS, "marked": 1, "test_rows": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")

        @property
        def channels(self) -> int:
            return _KINDS[self.task].channels + 2

        @property
        def outputs(self) -> int:
            return _KINDS[self.task].outputs

        @property
        def tokens(self) -> int:
            if self.task in ("select", "select_fixed"):
                return self.length + 2 * self.marked
            return 2 * self.length if self.task in ("reverse", "sort") else self.length

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def batch(self, split: Split, index: int, size: int) -> Batch:
        first, rows = index * size, self.size(split)
        last = first + size if rows is None else min(first + size, rows)
        if first >= last:
            raise IndexError(f"batch {index} of {size} rows: the split has only {rows} rows")
        number = _SPLITS.index(split)
        dice = [np.random.default_rng([self.config.seed, number, row]) for row in range(first, last)]
        x, y = _KINDS[self.config.task].draw(dice, self.config)
        x = F.pad(x, (0, 0, 0, self.config.tokens - x.shape[1]))
        return Batch(with_positions(x), F.pad(y, (0, 0, x.shape[1] - y.shape[1], 0), value=math.nan))

    def size(self, split: Split) -> int | None:
        return None if split == "train" else self.config.test_rows


Dice = Sequence[np.random.Generator]
"""A generator a row."""


def with_positions(x: Tensor) -> Tensor:
    """x (B, T, C) with cos and sin of one turn over its length behind its channels."""
    angle = 2 * math.pi * torch.arange(x.shape[1], dtype=torch.float64) / x.shape[1]
    turn = torch.stack([angle.cos(), angle.sin()], -1).to(x.dtype)
    return torch.cat([x, turn.expand(len(x), -1, -1)], -1)


def shift(x: Tensor) -> Tensor:
    """(B, L) -> (B, L, SHIFTS): x after h L / SHIFTS zeros, where that is no integer as many as the authors have."""
    length = x.shape[1]
    longest = length * (SHIFTS - 1) // SHIFTS
    return torch.stack([F.pad(x, (h * longest // (SHIFTS - 1), 0))[:, :length] for h in range(SHIFTS)], -1)


def cumsum(x: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1), summed in float64."""
    root = torch.arange(1, x.shape[1] + 1, dtype=torch.float64).sqrt()
    return (x.double().cumsum(1) / root).to(x.dtype).unsqueeze(-1)


def cummax(x: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1)."""
    return x.cummax(1).values.unsqueeze(-1)


def reverse(x: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1)."""
    return x.flip(1).unsqueeze(-1)


def sort(x: Tensor) -> Tensor:
    """(B, L) -> (B, L, 1): by the distance to the first; equal distances keep their order."""
    order = (x - x[:, :1]).abs().argsort(dim=1, stable=True)
    return x.gather(1, order).unsqueeze(-1)


def select(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, M + L), places (B, M) in order -> values and marks (B, M + L, 2), the marked values (B, M, 1)."""
    marks = torch.zeros_like(x).scatter(1, places, 1.0)
    return torch.stack([x, marks], -1), x.gather(1, places).unsqueeze(-1)


def solve(a: Tensor, solution: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A (B, n, n), X (B, n) -> the rows of [A | A X] in a row of `length` (B, L, 1), and X (B, n, 1)."""
    column = solution.unsqueeze(-1)
    rows = torch.cat([a, a @ column], -1).flatten(1)
    return F.pad(rows, (0, length - rows.shape[1])).unsqueeze(-1), column


def context_shift(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, L - 2), by (B,) int64 -> what says the shift and x (B, L, 1), and all of it shifted (B, L, 1)."""
    length = x.shape[1] + 2
    angle = (2 * math.pi * by.double() / length).unsqueeze(-1)
    x = torch.cat([angle.cos().to(x.dtype), angle.sin().to(x.dtype), x], 1)
    source = torch.arange(length) - by.unsqueeze(-1)
    y = x.gather(1, source.clamp(min=0)).where(source >= 0, 0.0)
    return x.unsqueeze(-1), y.unsqueeze(-1)


def mips(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, E) each -> (B, L, E): the value of the best key so far. Queries are taken a block at a time."""
    batch, length, _ = q.shape
    block = max(1, _SCORES // (batch * length))
    found = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = q[:, start:stop] @ k[:, :stop].transpose(1, 2)
        later = torch.arange(stop) > torch.arange(start, stop).unsqueeze(-1)
        found.append(scores.masked_fill_(later, -math.inf).argmax(-1))
    return v.gather(1, torch.cat(found, 1).unsqueeze(-1).expand_as(v))


def orthogonal(gaussian: Tensor) -> Tensor:
    """The orthogonal factor (..., n, n) of the polar decomposition."""
    u, _, vh = torch.linalg.svd(gaussian)
    return u @ vh


def _normal(dice: Dice, *shape: int) -> Tensor:
    """(B, *shape) fp32."""
    return torch.from_numpy(np.stack([die.standard_normal(shape, dtype=np.float32) for die in dice]))


def _noise(dice: Dice, length: int) -> Tensor:
    x = _normal(dice, length)
    return x / x.abs().amax(1, keepdim=True)


def _plain(define: Callable[[Tensor], Tensor]) -> Callable[[Dice, Atomic.Config], tuple[Tensor, Tensor]]:
    def draw(dice: Dice, config: Atomic.Config) -> tuple[Tensor, Tensor]:
        x = _noise(dice, config.length)
        return x.unsqueeze(-1), define(x)

    return draw


def _select(dice: Dice, config: Atomic.Config) -> tuple[Tensor, Tensor]:
    room = config.marked + config.length
    if config.task == "select_fixed":
        # The authors' places: the M largest of numbers from torch's generator of seed 0.
        numbers = torch.rand(room, generator=torch.Generator().manual_seed(0)).expand(len(dice), -1)
        places = numbers.topk(config.marked).indices
    else:
        places = torch.from_numpy(np.stack([die.choice(room, config.marked, replace=False) for die in dice]))
    return select(_noise(dice, room), places.sort(1).values)


def _solve(dice: Dice, config: Atomic.Config) -> tuple[Tensor, Tensor]:
    n = math.isqrt(config.length + 1) - 1
    if config.task == "solve_fixed":
        # The authors' matrix.
        a = orthogonal(torch.randn(n, n, generator=torch.Generator().manual_seed(0))).expand(len(dice), -1, -1)
    else:
        a = orthogonal(_normal(dice, n, n))
    return solve(a, F.normalize(_normal(dice, n), dim=-1), config.length)


def _context_shift(dice: Dice, config: Atomic.Config) -> tuple[Tensor, Tensor]:
    by = torch.tensor([int(die.integers(config.length - 2)) for die in dice])
    return context_shift(_noise(dice, config.length - 2), by)


def _mips(dice: Dice, config: Atomic.Config) -> tuple[Tensor, Tensor]:
    q, k, v = F.normalize(_normal(dice, 3, config.length, DIMENSION), dim=-1).unbind(1)
    return torch.cat([q, k, v], -1), mips(q, k, v)


class _Kind(NamedTuple):
    draw: Callable[[Dice, Atomic.Config], tuple[Tensor, Tensor]]
    channels: int = 1
    outputs: int = 1


_KINDS: dict[Name, _Kind] = {
    "shift": _Kind(_plain(shift), outputs=SHIFTS),
    "cumsum": _Kind(_plain(cumsum)),
    "cummax": _Kind(_plain(cummax)),
    "reverse": _Kind(_plain(reverse)),
    "sort": _Kind(_plain(sort)),
    "select": _Kind(_select, channels=2),
    "select_fixed": _Kind(_select, channels=2),
    "solve": _Kind(_solve),
    "solve_fixed": _Kind(_solve),
    "context_shift": _Kind(_context_shift),
    "mips": _Kind(_mips, channels=3 * DIMENSION, outputs=DIMENSION),
}
