"""Attention with a bias of every pair of tokens in memory that grows with the tokens: in slices of the queries."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES = 2**25
"""Scores held at once: more are computed in slices of the queries, and in training anew for the gradient."""


def in_slices(some: Callable[[int, int], Tensor], queries: int, scores: int, dropout: float) -> Tensor:
    """some(0, queries) (..., queries, V), in slices of so many queries that few scores exist at once; one has `scores`."""
    size = max(1, SCORES // max(1, scores))
    if size >= queries:
        return some(0, queries)
    if torch.is_grad_enabled():
        # Only dropout has to be drawn alike a second time; to remember where the dice stood makes a device wait.
        some = functools.partial(checkpoint, some, use_reentrant=False, preserve_rng_state=dropout > 0)
    return torch.cat([some(start, min(queries, start + size)) for start in range(0, queries, size)], -2)


def by_distance(table: Tensor, start: int, stop: int, keys: int) -> Tensor:
    """Biases (stop - start, ..., keys) of the queries at start ... stop - 1, of keys at 0, 1, ...

    table (2 n - 1, ...): those of keys that stand -(n - 1) ... n - 1 places behind a query.
    """
    newest = len(table) // 2
    # A window a query: one token further, and it begins one place to the left. Its gradient is a sum without atomics.
    return table[newest + 1 - stop : newest - start + keys].unfold(0, keys, 1).flip(0)
