"""The floating-point operations of the leaves: those of the tiles that are worked on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hippodrome.ops.attention._call import BUTTERFLY, CAUSAL_BUTTERFLY, CODES, Call, listed
from hippodrome.patterns import Chunk, Full, Window


def _pairs(q: Tensor, k: Tensor, pattern: str, sizes: list[int], code: int, a: int, r: int, tile: int) -> int:
    """Pairs of a query and a key that are worked on: those of kept tiles, or within an interval's triangle or band."""
    rows, n_q, n_k = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if code in (BUTTERFLY, CAUSAL_BUTTERFLY):
        return rows * a * a * _butterfly_tiles((n_k - n_q) // a, -(-n_k // a), r, code == CAUSAL_BUTTERFLY)
    if pattern:
        *_, lists = listed(q, k, pattern, sizes, Call(code, a, r, tile, 1.0, 0.0, 0.0))
        return q.shape[0] * lists[1].shape[0] * tile * tile * (1 if lists[0].shape[0] > 1 else q.shape[1])
    triangle = n_q * n_k - n_q * (n_q - 1) // 2 if n_k >= n_q else n_k * (n_k + 1) // 2
    if code == CODES[Full]:
        return rows * n_q * n_k
    bound = {CODES[Window]: n_q * (a + r), CODES[Chunk]: n_q * (a + 1) // 2}.get(code, triangle)
    return rows * min(bound, triangle if not r else n_q * n_k)


def _butterfly_tiles(first: int, n: int, powers: int, causal: bool) -> int:
    """Tiles that rows first, ..., n - 1 of a flat butterfly keep."""
    bits = [1 << s for s in range(n.bit_length()) if powers >> s & 1]
    return sum(1 + sum((i ^ bit) < (i if causal else n) for bit in bits) for i in range(first, n))


def flops(q: Any, k: Any, v: Any, bias: Any, slopes: Any, seed: Any, offsets: Any, k_offsets: Any, k_lengths: Any, pattern: str, sizes: Any, code: int, a: int, r: int, tile: int, *rest: Any, **out: Any) -> int:  # fmt: skip # noqa: E501
    """Two products, two a multiply-add. Packs are counted as if one document."""
    return 4 * q.shape[3] * _pairs(q, k, pattern, sizes, code, a, r, tile)


def flops_backward(d_y: Any, d_lse: Any, y: Any, lse: Any, *rest: Any, **out: Any) -> int:
    """Seven products: scores and the weights' gradients are made twice, so that no sum has two owners."""
    return 7 * flops(*rest) // 2
