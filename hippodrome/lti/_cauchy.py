"""The transform of a diagonal plus low-rank system's kernel on the unit circle: Cauchy sums and the Woodbury identity.

Source: S4 (Gu, Goel, Ré, ICLR 2022), section 3. All is float64: next to a pole, and HiPPO-LegT and FouT have theirs close
to the imaginary axis, the low-rank term cancels what the diagonal one gives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_TERMS, _TERMS_CPU = 1 << 23, 1 << 18
"""Terms (channels x modes x nodes) of the sums held at once."""


def spectrum(angles: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """sum_l K_l w^l at w = exp(-2 i angle), (H, K) complex128, from Ct (1 - w Abar)^-1 Bbar.

    angles (K,) float64 in [0, pi / 2]; a (H, M): dt A; weights (H, (1 + R)^2, M): dt times the products of the rows Ct, P_r^*
    and the columns B, P_r. A few nodes at a time, and again in the backward: channels x modes x nodes are never held at once.
    """
    parts = angles.split(max(1, (_TERMS_CPU if a.is_cpu else _TERMS) // a.numel()))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([_part(part, a, weights) for part in parts], -1)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_part, part, a, weights, **again) for part in parts], -1)


def _part(angles: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    # z = 2 (1 - w) / (1 + w) is i node / cos; multiplied through by cos, nothing is infinite at w = -1.
    cos, node = torch.cos(angles), 2 * torch.sin(angles)
    # v / (z - a) and its conjugate pair over one denominator, z^2 - 2 z Re a + |a|^2.
    size = a.abs().unsqueeze(-1) * cos
    real, imaginary = (size - node) * (size + node), 2 * a.real.unsqueeze(-1) * node * cos
    norm = real**2 + imaginary**2
    numerators = torch.cat([2 * weights.real, -2 * (weights * a.conj().unsqueeze(1)).real], 1)
    slope, constant = torch.complex(numerators @ (real / norm), numerators @ (imaginary / norm)).chunk(2, 1)
    sums = 1j * node * slope + cos * constant
    rank = math.isqrt(sums.shape[1]) - 1
    sums = sums.unflatten(1, (rank + 1, rank + 1))
    for r in range(rank, 0, -1):  # one outer product eliminated after the other
        column, row, pivot = sums[:, :r, r:], sums[:, r:, :r], sums[:, r:, r:]
        sums = sums[:, :r, :r] - cos * column * row / (1 + cos * pivot)
    return torch.exp(1j * angles) * sums[:, 0, 0]
