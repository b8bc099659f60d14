"""Zero-order hold: what holding the input for a step makes of the input weights, without loss of digits near zero."""

from __future__ import annotations

import torch
from torch import Tensor


def expm1_over(a: Tensor) -> Tensor:
    """(exp(a) - 1) / a. Near a = 0, where the gradient of the formula loses its digits, by its series."""
    small = a.abs() < 1e-3
    series = 1 + a / 2 * (1 + a / 3 * (1 + a / 4 * (1 + a / 5)))
    safe = torch.where(small, torch.ones_like(a), a)
    return torch.where(small, series, torch.expm1(safe) / safe)
