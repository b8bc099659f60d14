"""Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): random bits that are a function of a key and a counter.

Whoever knows the seed and where in the score matrix a weight stands knows whether dropout keeps it: nothing is stored, any
order of tiles draws the same, and the backward pass draws it again. The bits are those of Triton's `tl.philox`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_UNIT = 4.6566127342e-10
"""Just under 2^-31, so that the largest draw stays below one in float32."""


def philox(seed: Tensor | int, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of random bits, int64 in [0, 2^32), of four broadcasting int64 counters in that range, under a 64-bit key."""
    a, b, c, d = counter
    low, high = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # The products of 32-bit words wrap around in int64, which leaves their 64 bits right.
        of_a, of_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = of_c >> 32 & _WORD ^ b ^ low, of_c & _WORD, of_a >> 32 & _WORD ^ d ^ high, of_a & _WORD
        low, high = low + _WEYL[0] & _WORD, high + _WEYL[1] & _WORD
    return a, b, c, d


def uniform(word: Tensor) -> Tensor:
    """float32 in [0, 1) of a word in [0, 2^32), as Triton's `uint_to_uniform_float`: 31 bits, x and its complement alike."""
    return torch.where(word < 1 << 31, word, _WORD - word).float() * _UNIT


def kept(seed: Tensor | int, dropout: float, queries: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
    """Which weights dropout keeps: bool, broadcast over query and key indices and heads counted over the batch (b H + h)."""
    return uniform(philox(seed, keys, queries, heads, torch.zeros_like(keys))[0]) >= dropout
