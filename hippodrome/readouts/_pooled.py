"""One vector a sequence: the mean, the last or the first of its real positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

How = Literal["mean", "last", "first"]


def pooled(hidden: Tensor, lengths: Tensor | None, how: How) -> Tensor:
    """hidden (B, L, D) -> (B, D). `lengths`: real positions (B,), or spans (B, 2) as start and stop; None: all are real."""
    if lengths is None:
        start = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        stop = torch.full_like(start, hidden.shape[1])
    elif lengths.dim() == 1:
        start, stop = torch.zeros_like(lengths), lengths
    else:
        start, stop = lengths.unbind(1)
    if how == "mean":
        at = torch.arange(hidden.shape[1], device=hidden.device)
        real = (at >= start[:, None]) & (at < stop[:, None])
        # The sum of many vectors is taken in fp32, whatever the model runs in.
        total = torch.where(real.unsqueeze(-1), hidden, 0).sum(1, dtype=torch.float32)
        return (total / (stop - start).clamp(min=1).unsqueeze(-1)).to(hidden.dtype)
    index = start if how == "first" else (stop - 1).clamp(min=0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
