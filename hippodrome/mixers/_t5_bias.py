"""T5's relative positions: one learned number a head and bucket of distances into the past (Raffel et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hippodrome import positions
from hippodrome.norms import Fp32Parameters

BUCKETS = positions.T5Bias()
"""32, the last for all distances from 128 on."""


class T5Bias(Fp32Parameters):
    """Biases of attention scores by head and distance."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_head, BUCKETS.buckets) / BUCKETS.buckets**0.5)

    def forward(self, distance: Tensor) -> Tensor:
        """(H, ...) for distances (...) int64 into the past, at least 0."""
        return self.weight[:, BUCKETS.bucket(distance, torch.zeros_like(distance))]
