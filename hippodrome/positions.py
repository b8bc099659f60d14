"""How attention knows where tokens stand: small choices, each of which turns queries and keys or adds to their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput, Choice


@dataclass(frozen=True)
class Position(Choice):
    """What positions do to attention."""


@dataclass(frozen=True)
class Rotary(Position):
    """Queries and keys turn with their positions (RoFormer: Su et al., 2021), `dim` channels of each head; None: all."""

    dim: int | None = None
    base: float = 10000.0
    closed: bool = False
    """The slowest pair turns by exactly 1 / base a token (Perceiver AR's table), not a little faster."""


@dataclass(frozen=True)
class Alibi(Position):
    """Scores fall with distance, by a slope a head that is not learned (Press et al., ICLR 2022)."""

    def slopes(self, n_head: int, device: torch.device | None = None) -> Tensor:
        """(n_head,) float32: 2^(-8/n), 2^(-16/n), ..., 2^-8 for n a power of two.

        Otherwise those of the next smaller power, and then every other one of twice as many heads, from the first.
        """
        power = 1 << n_head.bit_length() - 1
        exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (8 / power)
        between = (torch.arange(n_head - power, dtype=torch.float32, device=device) * 2 + 1) * (4 / power)
        return torch.exp2(-torch.cat([exponents, between]))


@dataclass(frozen=True)
class T5Bias(Position):
    """A learned number for each head and bucket of distances is added to the scores (T5: Raffel et al., JMLR 2020).

    buckets: half of them hold one distance each, the others grow with its logarithm up to max_distance, and the last holds all
        beyond. bidirectional: half of the buckets are for keys after the query, which else share the bucket of distance 0.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        least = 4 if self.bidirectional else 2
        if self.buckets < least or self.buckets % least:
            raise BadInput(f"T5Bias has {self.buckets} buckets: take a multiple of {least}, such as 32")
        if self.max_distance <= self.exact:
            raise BadInput(
                f"T5Bias has max_distance {self.max_distance}: it must be above {self.exact}, the distances told apart"
            )

    @property
    def exact(self) -> int:
        """How many distances have a bucket of their own."""
        return self.buckets // (4 if self.bidirectional else 2)

    def bucket(self, q: Tensor, k: Tensor) -> Tensor:
        """Bucket of each pair, int64, broadcast over query and key positions."""
        distance, exact = q - k, self.exact
        first = torch.where(distance < 0, 2 * exact, 0) if self.bidirectional else torch.zeros_like(distance)
        distance = distance.abs() if self.bidirectional else distance.clamp(min=0)
        share = (distance.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (share * exact).long()).clamp(max=2 * exact - 1)
        return first + torch.where(distance < exact, distance, far)
