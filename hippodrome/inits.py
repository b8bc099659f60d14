"""Starts that torch has not."""

from __future__ import annotations

from torch import Tensor, nn

_SHRUNK = 0.87962566103423978
"""Standard deviation of a standard normal that is cut at two."""


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with numbers of this standard deviation, from a normal distribution cut at twice its own."""
    whole = std / _SHRUNK
    return nn.init.trunc_normal_(tensor, std=whole, a=-2 * whole, b=2 * whole)


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill weight (out, in) with numbers of variance 1 / in, from a normal distribution cut at twice its deviation."""
    return truncated_normal_(weight, weight.shape[1] ** -0.5)
