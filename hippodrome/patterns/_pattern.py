"""What a pattern is, and how two make a third."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from hippodrome.part import BadInput, Choice

MOST = 1 << 30
"""Largest size in a pattern: positions are 32 bits in tile maps and kernels, and so must be a position and a size together."""
CELLS = 1 << 22
"""Pairs or tiles looked at in one piece: a map of 4096 x 4096 tiles, or a mask behind it, never lies in memory whole."""


class Box(NamedTuple):
    """Rectangles of pairs: int tensors that broadcast, first and last query, first and last key, both included."""

    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor


class Kept(NamedTuple):
    """The tiles that hold visible pairs, row after row: `columns[rows[i]:rows[i + 1]]` are those of query tile i, ascending.

    rows (n + 1,) and columns int32; whole (len(columns),) bool: every pair of the tile is visible. In a multiset a tile whose
    keys count c times stands there c times.
    """

    rows: Tensor
    columns: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Pattern(Choice):
    """Which keys a query may see."""

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self) if field.name != "seed"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and number > MOST:
                    raise BadInput(f"{name} of {type(self).__name__} is {number}: it must be at most {MOST}")

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Bool, broadcast over integer head numbers, query positions and key positions."""
        raise NotImplementedError

    def count(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """How often a visible key counts in the softmax, int and at least 1; None: what is seen is a set."""
        return None

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Whether a rectangle holds a visible pair, and whether it holds nothing else; here by looking at every pair."""
        return _looked_at(self, head, box)

    def sized(self, length: int, n_head: int) -> Pattern:
        """The pattern for so many tokens and heads, for those that depend on it; `BadInput` where it has no room for them."""
        return self

    @property
    def causal(self) -> bool:
        """Whether no query sees a key after it."""
        return True

    @property
    def reach(self) -> int | None:
        """How many keys, its own included, the farthest-looking query needs; None when there is no bound."""
        return None

    @property
    def moves(self) -> bool:
        """Whether what a query sees depends on distances alone, so that it moves along with the query."""
        return True

    @property
    def by_head(self) -> bool:
        """Whether heads see different keys."""
        return False

    @property
    def count_tile(self) -> int | None:
        """The side of the tiles in which `count` is constant; None: it counts nothing twice."""
        return None

    def __and__(self, other: Pattern) -> And:
        return And((*_parts(And, self), *_parts(And, other)))

    def __or__(self, other: Pattern) -> Or:
        return Or((*_parts(Or, self), *_parts(Or, other)))

    def mask(self, n_q: int, n_k: int, q_start: int = 0, head: int = 0) -> Tensor:
        """The (n_q, n_k) bool mask of queries q_start, q_start + 1, ... against keys 0, 1, ..."""
        q, k = torch.arange(q_start, q_start + n_q), torch.arange(n_k)
        return self.visible(torch.tensor(head), q[:, None], k[None, :]).expand(n_q, n_k)

    def tiles(self, n_q: int, n_k: int, size: int, q_start: int = 0, head: int = 0) -> Tensor:
        """Which `size` x `size` tiles hold any visible pair: bool (ceil(n_q/size), ceil(n_k/size))."""
        return torch.cat([some for _, some, _ in self._maps(n_q, n_k, size, q_start, head)])

    def full_tiles(self, n_q: int, n_k: int, size: int, q_start: int = 0, head: int = 0) -> Tensor:
        """Which tiles hold visible pairs only: bool, as `tiles`; what lies beyond the last query or key does not count."""
        return torch.cat([every for _, _, every in self._maps(n_q, n_k, size, q_start, head)])

    def kept(self, n_q: int, n_k: int, tile: int, q_start: int = 0, head: int = 0) -> Kept:
        """The lists that a block-sparse kernel walks, of one head; computed in pieces, from tiles alone."""
        side = self.count_tile
        if side is not None and (side % tile or q_start % tile):
            raise BadInput(f"tiles of {tile} keys that count unevenly in {self}: take a divisor of {side}")
        counts, columns, wholes = [], [], []
        for row, some, every in self._maps(n_q, n_k, tile, q_start, head):
            i, j = some.nonzero(as_tuple=True)
            times = None if side is None else self.count(torch.tensor(head), q_start + (row + i) * tile, j * tile)
            again = torch.ones_like(i) if times is None else times.expand_as(i)
            counts.append(torch.zeros(len(some), dtype=torch.int64).index_add_(0, i, again.long()))
            columns.append(j.repeat_interleave(again).int())
            wholes.append(every[i, j].repeat_interleave(again))
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0).int()
        return Kept(rows, torch.cat(columns), torch.cat(wholes))

    def _maps(self, n_q: int, n_k: int, size: int, q_start: int, head: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pieces of the two tile maps and the first tile row of each."""
        if min(n_q, n_k, size) < 1:
            raise BadInput(f"{n_q} queries, {n_k} keys and tiles of {size}: a tile map needs at least 1 of each")
        k0 = torch.arange(0, n_k, size, dtype=torch.int32)
        firsts = torch.arange(0, n_q, size, dtype=torch.int32)
        at = torch.tensor(head)
        step = max(1, CELLS // len(k0))
        for row in range(0, len(firsts), step):
            q0 = firsts[row : row + step, None]
            q1 = (q0 + size - 1).clamp(max=n_q - 1)
            box = Box(q0 + q_start, q1 + q_start, k0[None], (k0[None] + size - 1).clamp(max=n_k - 1))
            shape = (len(q0), len(k0))
            some, every = (each.expand(shape) for each in self.bounds(at, box))
            yield row, some, every


@dataclass(frozen=True)
class _Combined(Pattern):
    """Several patterns as one."""

    parts: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise BadInput(f"{type(self).__name__} of no patterns: it needs at least 1")
        super().__post_init__()

    def sized(self, length: int, n_head: int) -> Pattern:
        return type(self)(tuple(part.sized(length, n_head) for part in self.parts))

    @property
    def moves(self) -> bool:
        return all(part.moves for part in self.parts)

    @property
    def by_head(self) -> bool:
        return any(part.by_head for part in self.parts)

    @property
    def count_tile(self) -> int | None:
        sides = [part.count_tile for part in self.parts if part.count_tile is not None]
        return math.gcd(*sides) if sides else None


@dataclass(frozen=True)
class And(_Combined):
    """What all of `parts` show. A key counts as often as the parts' counts multiplied."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(head, q, k)
        for part in self.parts[1:]:
            seen = seen & part.visible(head, q, k)
        return seen

    def count(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        # Plain loops: what mixers call is compiled, and torch.compile does not read comprehensions over arguments everywhere.
        product = None
        for part in self.parts:
            count = part.count(head, q, k)
            if count is not None:
                product = count if product is None else product * count
        return product

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        found = [part.bounds(head, box) for part in self.parts]
        some = reduce(torch.logical_and, (each[0] for each in found))
        every = reduce(torch.logical_and, (each[1] for each in found))
        # Where at most one part hides anything, what that one shows is what all show.
        partial = sum(~each[1] for each in found)
        return _refined(self, head, box, some, some & (partial > 1), 0), every

    @property
    def causal(self) -> bool:
        return any(part.causal for part in self.parts)

    @property
    def reach(self) -> int | None:
        return min((part.reach for part in self.parts if part.reach is not None), default=None)


@dataclass(frozen=True)
class Or(_Combined):
    """What any of `parts` shows. A key counts as often as in the part in which it counts most."""

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self.parts[0].visible(head, q, k)
        for part in self.parts[1:]:
            seen = seen | part.visible(head, q, k)
        return seen

    def count(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        if self.count_tile is None:
            return None
        most = torch.ones((), dtype=torch.int32, device=q.device)
        for part in self.parts:
            count = part.count(head, q, k)
            if count is not None:
                most = torch.maximum(most, count * part.visible(head, q, k))
        return most

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        found = [part.bounds(head, box) for part in self.parts]
        some = reduce(torch.logical_or, (each[0] for each in found))
        every = reduce(torch.logical_or, (each[1] for each in found))
        # Parts that each show a piece of a tile may show it whole together.
        partial = sum(each[0] for each in found)
        return some, _refined(self, head, box, every, ~every & (partial > 1), 1)

    @property
    def count_tile(self) -> int | None:
        # Within its tiles an And may hide a key that counts twice, and another part show it once.
        cut = any(isinstance(part, And) and part.count_tile is not None for part in self.parts)
        return 1 if cut else super().count_tile

    @property
    def causal(self) -> bool:
        return all(part.causal for part in self.parts)

    @property
    def reach(self) -> int | None:
        reaches = [part.reach for part in self.parts]
        return None if None in reaches else max(reach for reach in reaches if reach is not None)


def _parts(kind: type[_Combined], pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, kind) else (pattern,)


def _refined(pattern: Pattern, head: Tensor, box: Box, known: Tensor, open_: Tensor, which: int) -> Tensor:
    """`known`, with what `_looked_at` finds as its `which` where the rectangles alone leave it open."""
    where = open_.nonzero(as_tuple=True)
    if not len(where[0]):
        return known
    chosen = Box(*(edge.expand(open_.shape)[where] for edge in box))
    at = head.expand(open_.shape)[where]
    known = known.expand(open_.shape).clone()
    known[where] = _looked_at(pattern, at, chosen)[which]
    return known


def _looked_at(pattern: Pattern, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """`bounds` by asking `visible` for every pair, some rectangles at a time."""
    shape = torch.broadcast_shapes(head.shape, *(edge.shape for edge in box))
    at, q0, q1, k0, k1 = (edge.expand(shape).flatten() for edge in (head, *box))
    height, width = (int((last - first).max()) + 1 for first, last in ((q0, q1), (k0, k1)))
    found = []
    for head_, a, b, c, d in zip(
        *(edge.split(max(1, CELLS // (height * width))) for edge in (at, q0, q1, k0, k1)), strict=True
    ):
        # Rectangles at an edge are smaller: their last row or column is looked at again.
        q = torch.minimum(a[:, None] + torch.arange(height), b[:, None])[:, :, None]
        k = torch.minimum(c[:, None] + torch.arange(width), d[:, None])[:, None]
        seen = pattern.visible(head_[:, None, None], q, k).expand(len(a), height, width).flatten(1)
        found.append((seen.any(1), seen.all(1)))
    some, every = (torch.cat(each).view(shape) for each in zip(*found, strict=True))
    return some, every
