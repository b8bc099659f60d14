"""Patterns that are laid out in tiles: whether a query sees a key is said by the two tiles in which they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.patterns._pattern import CELLS, Box, Pattern

_SLOTS = 64
"""Random tiles a row at most: more is no sparse pattern, and every slot costs a comparison a pair."""


@dataclass(frozen=True)
class TilePattern(Pattern):
    """A pattern of tiles of `side` tokens. A causal one hides the keys after a query within what its tiles show."""

    @property
    def side(self) -> int:
        raise NotImplementedError

    def sees(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Bool: whether queries in tile `row` see keys in tile `column`."""
        raise NotImplementedError

    def visible(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = self.sees(head, q // self.side, k // self.side)
        return seen & (k <= q) if self.causal else seen

    def bounds(self, head: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        side = self.side
        i0, i1, j0, j1 = (edge[..., None] // side for edge in box)
        down, right = (torch.arange(int((last - first).max()) + 1, dtype=last.dtype) for first, last in ((i0, i1), (j0, j1)))
        some, every = torch.tensor(False), torch.tensor(True)
        # All tiles of a rectangle at once, as many of them as lie in memory; past its edge the last one is asked for again.
        rectangles = math.prod(torch.broadcast_shapes(head.shape, *(edge.shape for edge in box)))
        for offsets in torch.cartesian_prod(down, right).split(max(1, CELLS // rectangles)):
            i, j = torch.minimum(i0 + offsets[:, 0], i1), torch.minimum(j0 + offsets[:, 1], j1)
            seen = self.sees(head[..., None], i, j)
            whole = seen
            if self.causal:
                q0, q1 = torch.maximum(box.q0[..., None], i * side), torch.minimum(box.q1[..., None], i * side + side - 1)
                k0, k1 = torch.maximum(box.k0[..., None], j * side), torch.minimum(box.k1[..., None], j * side + side - 1)
                seen, whole = seen & (k0 <= q1), seen & (k1 <= q0)
            some, every = some | seen.any(-1), every & whole.all(-1)
        return some, every

    @property
    def moves(self) -> bool:
        return False


@dataclass(frozen=True)
class Chunk(TilePattern):
    """The sequence is cut into chunks of `size` tokens; a query sees itself and the keys before it in its own chunk."""

    size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise BadInput(f"a chunk of {self.size} keys holds nothing: size must be at least 1")

    @property
    def side(self) -> int:
        return self.size

    def sees(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row == column

    @property
    def reach(self) -> int | None:
        return self.size


@dataclass(frozen=True)
class Butterfly(TilePattern):
    """Flat block butterfly (Chen et al., 2022): tile i sees tile j if i = j or i xor j is a power of two below 2^n_factors.

    Without `n_factors` every power counts. A number of tiles that is no power of two takes the pattern of the next one,
    cropped: its last rows have fewer neighbours. Symmetric: with `& Causal()` for a language model.
    """

    tile: int = 64
    n_factors: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.tile)
        if self.n_factors is not None and not 0 <= self.n_factors <= 32:
            raise BadInput(f"n_factors is {self.n_factors}: it must be from 0 to 32, or None for all")

    @property
    def side(self) -> int:
        return self.tile

    def sees(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        apart = row ^ column
        seen = (apart & (apart - 1)) == 0
        return seen if self.n_factors is None else seen & (apart < 2**self.n_factors)

    @property
    def causal(self) -> bool:
        return False


@dataclass(frozen=True)
class Random(TilePattern):
    """Each tile of queries sees its own tile and `per_row` others, drawn anew for every head.

    Without `length` they are drawn from the tiles before it, and the pattern is causal; with it from all of that many tokens.
    The draw is a hash of (seed, head, row): the same at any length, on any device and in any order.
    """

    tile: int = 64
    per_row: int = 3
    seed: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.tile)
        check_slots(self.per_row)
        if self.length is not None and self.length < 1:
            raise BadInput(f"a random pattern of {self.length} tokens: length must be at least 1, or None for the past alone")

    @property
    def side(self) -> int:
        return self.tile

    def sees(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        n = row if self.length is None else torch.full_like(row, -(-self.length // self.tile) - 1)
        seen = row == column
        for drawn in draws(self.seed, head, row, n, self.per_row):
            seen = seen | (torch.where(drawn >= row, drawn + 1, drawn) == column)
        return seen

    def sized(self, length: int, n_head: int) -> Pattern:
        if self.length is not None and length > self.length:
            raise BadInput(f"{length} tokens do not fit a random pattern of {self.length}: give it length={length}")
        return self

    @property
    def causal(self) -> bool:
        return self.length is None

    @property
    def by_head(self) -> bool:
        return True


def draws(seed: int, head: Tensor, row: Tensor, n: Tensor, slots: int) -> list[Tensor]:
    """`slots` different numbers below n for each head and row, -2 where n is too small to give one more.

    Floyd's sampling without replacement: slot s draws from the first n - slots + s + 1 numbers and takes the last of them if
    its draw is taken already.
    """
    taken: list[Tensor] = []
    for slot in range(slots):
        last = n - slots + slot
        number = _hash(seed, head, row, slot) % (last + 1).clamp(min=1)
        again = torch.zeros_like(number, dtype=torch.bool)
        for earlier in taken:
            again = again | (number == earlier)
        number = torch.where(again, last, number)
        taken.append(torch.where(last >= 0, number, -2))
    return taken


def _hash(seed: int, head: Tensor, row: Tensor, slot: int) -> Tensor:
    """31 bits of (seed, head, row, slot): the finaliser of MurmurHash3 on 32-bit words, once a word."""
    # Filled on the device, as a copy from the host would make it wait and cannot be part of a CUDA graph.
    mixed = _mixed(torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=row.device))
    for word in (head.long(), row.long(), slot):
        mixed = _mixed((mixed ^ word) + 0x9E3779B9 & 0xFFFFFFFF)
    return (mixed >> 1).to(torch.promote_types(head.dtype, row.dtype))


def _mixed(x: Tensor) -> Tensor:
    # Products wrap modulo 2^64, which leaves their low 32 bits right.
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def check_tile(tile: int) -> None:
    """`BadInput` unless a tile of so many tokens exists."""
    if tile < 1:
        raise BadInput(f"a tile of {tile} tokens holds nothing: tile must be at least 1")


def check_slots(number: int) -> None:
    """`BadInput` unless a row can have so many random tiles."""
    if not 0 <= number <= _SLOTS:
        raise BadInput(f"{number} random tiles a row: there must be from 0 to {_SLOTS}")
