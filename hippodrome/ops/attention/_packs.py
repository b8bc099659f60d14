"""Packs under patterns whose lists depend on a document's length: one document after another."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hippodrome.ops.attention._check import numbers as on_host
from hippodrome.ops.attention._fused import launched
from hippodrome.patterns import Pattern


def each_document(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counters: Tensor | None,
    offsets: Tensor, k_offsets: Tensor, numbers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A pack whose documents have lists of their own, one after another."""
    at, k_at = on_host(offsets), on_host(k_offsets)
    sizes, k_sizes = ([b - a for a, b in itertools.pairwise(ends)] for ends in (at, k_at))
    # Pieces of one split: their gradients are put together once.
    keys, values = k.split(k_sizes, 2), v.split(k_sizes, 2)
    biases = None if bias is None else bias.split(sizes, 2)
    found = []
    for i, some in enumerate(q.split(sizes, 2)):
        if not sizes[i] or not k_sizes[i]:
            found.append((torch.zeros_like(some), some.new_full(some.shape[:3], -torch.inf, dtype=torch.float32)))
            continue
        own_bias = None if biases is None else biases[i][..., k_at[i] : k_at[i + 1]]
        own = None if counters is None else torch.stack((counters[0], offsets[i].long(), k_offsets[i].long()))
        found.append(launched(some, keys[i], values[i], pattern, own_bias, slopes, own, None, None, None, numbers))
    return torch.cat([y for y, _ in found], 2), torch.cat([lse for _, lse in found], 2)
