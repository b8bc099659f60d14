"""BigBird (Zaheer et al., 2020), as its released ITC form and as a causal form of our own.

tile i of nb sees   0, i - 1, i, i + 1, nb - 1 and n_random drawn tiles;   tiles 0 and nb - 1 see all      (encoder)
                    0, i - 1, i and n_random drawn from 1 ... i - 2, no key after the query                  (causal)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.patterns._google_tables import google_table
from hippodrome.patterns._pattern import Pattern
from hippodrome.patterns._tiled import TilePattern, check_slots, check_tile, draws

Table = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class BigBird(TilePattern):
    """Window, global and random tiles.

    The encoder form depends on `length`: its last tile is global. Without one, `sized` (which the attention mixer calls) takes
    the number of keys. Where rows of a batch differ in length, give the longest: a row must not depend on its neighbours.
    """

    tile: int = 64
    n_random: int = 3
    form: Literal["causal", "encoder"] = "causal"
    plan: Literal["uniform", "google", "paper", "general"] = "uniform"
    """Where an encoder's random tiles come from. uniform: from all that are neither global nor in the window, at any length;
    paper, general: the two procedures of the authors' code; google: of these the one that their code takes at this length."""
    seed: int = 0
    """The authors seed with the number of the layer."""
    multiset: bool = False
    """A tile that is listed twice counts twice in the softmax, as in the authors' code; else what is seen is a set."""
    length: int | None = None
    n_head: int | None = None
    """Heads that are drawn for, which the authors' procedures need; `sized` fills it in."""
    table: Table | None = None
    """Instead of a plan: heads x (tiles - 2) x n_random tiles; row r is of tile r + 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.tile)
        check_slots(self.n_random)
        if self.form == "causal" and (self.plan != "uniform" or self.table is not None or self.length is not None):
            raise BadInput("causal BigBird draws from the past alone: plan, table and length belong to form encoder")
        if self.length is not None and self.length < 1:
            raise BadInput(f"BigBird over {self.length} tokens: length must be at least 1")
        if self.n_head is not None and self.n_head < 1:
            raise BadInput(f"BigBird draws for {self.n_head} heads: n_head must be at least 1")
        if self.plan != "uniform" and not 0 <= self.seed < 2**32:
            raise BadInput(
                f"BigBird's plan {self.plan} under seed {self.seed}: its authors' stream takes from 0 to {2**32 - 1}"
            )
        if self.table is not None:
            self._check_table(self.table)

    def _check_table(self, table: Table) -> None:
        rows = {len(row) for head in table for row in head}
        if not table or len({len(head) for head in table}) != 1 or len(rows) > 1:
            raise BadInput("a table of BigBird must have as many rows in every head and as many tiles in every row")
        tiles = {tile for head in table for row in head for tile in row}
        if min(tiles, default=0) < 0 or (self.length is not None and max(tiles, default=0) >= self.n_tiles):
            last = "" if self.length is None else f" to {self.n_tiles - 1}"
            raise BadInput(
                f"a table of BigBird names tile {min(tiles) if min(tiles) < 0 else max(tiles)}: they count from 0{last}"
            )
        if self.length is not None and len(table[0]) != max(self.n_tiles - 2, 0):
            raise BadInput(f"a table of {len(table[0])} rows for {self.n_tiles} tiles: it must have {max(self.n_tiles - 2, 0)}")

    @property
    def side(self) -> int:
        return self.tile

    @property
    def n_tiles(self) -> int:
        """Tiles of the encoder form; the last may be part of one."""
        if self.length is None:
            raise BadInput("BigBird's encoder form needs the number of tokens, its last tile is global: give it length=...")
        return -(-self.length // self.tile)

    def sized(self, length: int, n_head: int) -> Pattern:
        if self.form == "causal":
            return self
        if self.length is not None and length > self.length:
            raise BadInput(f"{length} tokens do not fit BigBird over {self.length}: give it length={length}")
        return dataclasses.replace(self, length=self.length or length, n_head=self.n_head or n_head)

    def sees(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = self._fixed(row, column)
        for drawn in self._drawn(head, row):
            seen = seen | (drawn == column)
        return seen

    def count(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        if not self.multiset:
            return None
        row, column = q // self.tile, k // self.tile
        times = self._fixed(row, column).int()
        for drawn in self._drawn(head, row):
            times = times + (drawn == column)
        return times.clamp(min=1)

    def _fixed(self, row: Tensor, column: Tensor) -> Tensor:
        """The window and the global tiles."""
        near = (column == 0) | ((row - column).abs() <= 1)
        if self.form == "causal":
            return near & (column <= row)
        last = self.n_tiles - 1
        return near | (column == last) | (row == 0) | (row == last)

    def _drawn(self, head: Tensor, row: Tensor) -> list[Tensor]:
        """The random tiles of `row`, -1 where there is none."""
        if self.form == "causal":
            return [drawn + 1 for drawn in draws(self.seed, head, row, row - 2, self.n_random)]
        last = self.n_tiles - 1
        inner = (row > 0) & (row < last)
        if self.table is None and self.plan == "uniform":
            # Candidates are numbered past the window, of which one or two tiles may be global.
            first, stop = (row - 1).clamp(min=1), (row + 2).clamp(max=last)
            numbers = draws(self.seed, head, row, last - 1 - (stop - first), self.n_random)
            tiles = [torch.where(number + 1 >= first, number + 1 + stop - first, number + 1) for number in numbers]
        else:
            table = self._table().to(row.device)
            found = table[head % len(table), (row - 1).clamp(0, max(last - 2, 0))] if table.numel() else None
            tiles = [] if found is None else list(found.unbind(-1))
        return [torch.where(inner, tile, -1) for tile in tiles]

    def _table(self) -> Tensor:
        if self.table is not None:
            return torch.tensor(self.table)
        if self.n_head is None:
            raise BadInput(f"BigBird's plan {self.plan} draws for all heads at once: give it n_head=...")
        return google_table(self.n_tiles, self.tile, self.n_random, self.n_head, self.seed, self.plan)

    @property
    def causal(self) -> bool:
        return self.form == "causal"

    @property
    def by_head(self) -> bool:
        return self.n_random > 0 if self.table is None else len(self.table) > 1

    @property
    def count_tile(self) -> int | None:
        return self.tile if self.multiset else None
