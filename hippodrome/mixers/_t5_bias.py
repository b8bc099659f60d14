"""T5's relative positions: one learned number a head and bucket of distances into the past (Raffel et al., 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hippodrome.norms import Fp32Parameters

BUCKETS = 32
FARTHEST = 128
"""Distances from here on share the last bucket."""


def bucket(distance: Tensor) -> Tensor:
    """The bucket, int64, of distances of at least 0: one each for the first half of the buckets, then in log steps."""
    exact = BUCKETS // 2
    # float32 as in T5: at a few distances the logarithm is next to a whole number.
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(FARTHEST / exact) * (BUCKETS - exact)
    far = (exact + steps.to(torch.int64)).clamp(max=BUCKETS - 1)
    return torch.where(distance < exact, distance, far)


class T5Bias(Fp32Parameters):
    """Biases of attention scores by head and distance."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_head, BUCKETS) / BUCKETS**0.5)

    def forward(self, distance: Tensor) -> Tensor:
        """(H, ...) for distances (...) int64 into the past, at least 0."""
        return self.weight[:, bucket(distance)]
