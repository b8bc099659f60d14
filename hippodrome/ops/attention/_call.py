"""What of a call is neither a tensor nor a shape, and how its kernels find their tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hippodrome.ops.attention import _tiles
from hippodrome.ops.attention._spelled import Spelled, read, spelled
from hippodrome.patterns import And, Butterfly, Causal, Chunk, Full, Pattern, Prefix, Window

CODES: dict[type[Pattern], int] = {Full: 0, Causal: 1, Window: 2, Chunk: 3, Prefix: 4}
"""The patterns that the kernels compute as intervals: `_walk.FULL`, ..."""
BUTTERFLY, CAUSAL_BUTTERFLY = 5, 6
"""Those that they compute from the numbers of tiles; any other is a list of tiles."""
UNLISTED: Spelled = ("", ())
"""In the place of a pattern, where there are no lists."""


@dataclass(frozen=True)
class Call:
    """What of a call is neither a tensor nor a shape."""

    code: int
    a: int
    r: int
    tile: int
    """The side of a program's own tiles, of a butterfly or in lists; 0: an interval."""
    scale: float
    cap: float
    drop: float

    @property
    def side(self) -> int:
        """The side of the tiles that are met, as the pattern has them: 16 where there are none."""
        return self.a if self.code in (BUTTERFLY, CAUSAL_BUTTERFLY) else self.tile or 16

    def even(self, n: int, offsets: Tensor | None, k_lengths: Tensor | None) -> bool:
        """Whether every tile over n keys (or queries) has all of them: then wholly visible ones need no mask."""
        return bool(self.tile) and n % self.side == 0 and offsets is None and k_lengths is None

    def numbers(self) -> tuple[int, int, int, int, float, float, float]:
        return (self.code, self.a, self.r, self.tile, self.scale, self.cap, self.drop)


def at_once(q: Tensor, k: Tensor, pattern: Pattern, k_offsets: Tensor | None) -> bool:
    """Whether the kernels compute a pattern's tiles, of all documents of a pack too."""
    return type(pattern) in CODES or (k_offsets is None and butterfly(pattern, k.shape[2] - q.shape[2]) is not None)


def butterfly(pattern: Pattern, ahead: int) -> tuple[int, int, int] | None:
    """Code, tile and powers of two of a flat butterfly whose tiles are those of queries `ahead` of their indices; else None."""
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    flat = [part for part in parts if isinstance(part, Butterfly)]
    if len(flat) != 1 or any(not isinstance(part, Butterfly | Causal) for part in parts):
        return None
    tile, most = flat[0].tile, 30 if flat[0].n_factors is None else min(flat[0].n_factors, 30)
    if tile < _tiles.SIDES[-1] or tile & (tile - 1) or ahead < 0 or ahead % tile:
        return None
    return CAUSAL_BUTTERFLY if len(parts) > 1 else BUTTERFLY, tile, 2**most - 1


def walks(q: Tensor, k: Tensor, pattern: Pattern, numbers: tuple[float, float, float]) -> tuple[Call, Spelled]:
    """How the kernels find their tiles: as an interval, as a butterfly, or by the lists of a pattern, which is spelled."""
    code = CODES.get(type(pattern))
    if code is not None:
        size, right = getattr(pattern, "size", 0), getattr(pattern, "right", 0)
        return Call(code, size, right, 0, *numbers), UNLISTED
    tile = _tiles.side(pattern, 64 if q.dtype == torch.float32 else 128)
    found = butterfly(pattern, k.shape[2] - q.shape[2])
    if found is not None:
        return Call(*found, tile, *numbers), UNLISTED
    return Call(CODES[Full], 0, 0, tile, *numbers), spelled(pattern)


def listed(q: Tensor, k: Tensor, pattern: str, sizes: list[int], call: Call) -> tuple[Call, int, int, list[Tensor]]:
    """The call, slots for pieces of rows and of columns, and the lists. The leaves ask for those, not their callers: what
    depends on a pattern and lengths alone is no part of a graph, and whoever remembers a call remembers no lists.
    """
    if not pattern:
        return call, 0, 0, []
    lengths = q.shape[2], k.shape[2], q.shape[1]
    of_q, of_k, table, triangular = _tiles.lists(read(pattern, tuple(sizes)), *lengths, call.tile, q.device)
    call = replace(call, code=CODES[Causal if triangular else Full])
    return call, of_q.slots, of_k.slots, [*of_q.tensors(), *of_k.tensors(), table]
