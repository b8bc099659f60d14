"""Attention of one head with biases of distance, by softmax or by functions of each score alone (Ma et al., 2023)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.mixers.attention import rotate
from hippodrome.part import BadInput

Function = Literal["softmax", "laplace", "relu2"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    unseen: Tensor,
    count: Tensor,
    *,
    function: Function = "softmax",
    dropout: float = 0.0,
) -> Tensor:
    """What queries (B, C, Lq, Z) take from values (B, C, Lk, V) with keys (B, C, Lk, Z): (B, C, Lq, V).

    bias, at least float32, and unseen, bool, broadcast over (B, C, Lq, Lk). count, over (B, C, Lq, 1): how many keys a query
    sees, by which the scores are divided that no softmax normalises. dropout: of the weights.
    """
    if function == "softmax":
        # Queries that see nothing, which are padding's, look at everything: their rows would be NaN.
        mask = bias.masked_fill(unseen & ~unseen.all(-1, keepdim=True), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout)
    scores = (q @ k.transpose(-1, -2)).to(bias.dtype) / count + bias
    weights = _laplace(scores) if function == "laplace" else F.relu(scores).square()
    return F.dropout(weights.masked_fill(unseen, 0), dropout).to(v.dtype) @ v


def _laplace(x: Tensor) -> Tensor:
    """The distribution function of N(1/sqrt(2), 1/(4 pi)), at whose mean it has the value and slope of relu(x)^2."""
    return 0.5 * (1 + torch.erf((x - 0.5**0.5) * (2 * math.pi) ** 0.5))


class SimpleBias(nn.Module):
    """One number a distance."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(2 * reach - 1))

    def check(self, tokens: int) -> None:
        """Whether there are numbers for so many tokens."""
        reach = (len(self.weight) + 1) // 2
        if tokens > reach:
            raise BadInput(f"{tokens} tokens are more than the simple bias has numbers for, {reach}: raise max_positions")

    def table(self, size: int) -> Tensor:
        """Biases of the distances -(size - 1) ... size - 1 (2 size - 1,), at least float32; as many as there are."""
        away = max(0, (len(self.weight) + 1) // 2 - size)
        weight = self.weight[away : len(self.weight) - away]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


class RotaryBias(nn.Module):
    """The product of two vectors turned by their positions, which depends on their distance alone."""

    def __init__(self, d_key: int) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(0.02 * torch.randn(d_key)) for _ in range(2))

    def check(self, tokens: int) -> None:
        """There is a bias for any number of tokens."""

    def table(self, size: int) -> Tensor:
        """Biases of the distances -(size - 1) ... size - 1 (2 size - 1,), at least float32."""
        alpha, beta = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.alpha, self.beta))
        distance = torch.arange(1 - size, size, device=beta.device)
        turned = rotate(beta.expand(1, 1, len(distance), -1), distance[None], len(beta), 10000.0)
        return (turned[0, 0] * alpha).sum(-1)
