"""Pool: one answer a sequence: class logits (B, classes) of the mean, the last or the first real position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch


class Pool(Readout):
    """hidden (B, L, D) -> logits (B, classes). Padding is outside of the mean."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        classes: int
        how: Literal["mean", "last", "first"] = "mean"

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        if config.classes < 1:
            raise BadInput(f"classes is {config.classes}: it must be at least 1")
        self.how = config.how
        self.linear = nn.Linear(d_model, config.classes)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            start = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
            stop = torch.full_like(start, hidden.shape[1])
        elif lengths.dim() == 1:
            start, stop = torch.zeros_like(lengths), lengths
        else:
            start, stop = lengths.unbind(1)
        return self.linear(self._pooled(hidden, start, stop))

    def _pooled(self, hidden: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        if self.how == "mean":
            at = torch.arange(hidden.shape[1], device=hidden.device)
            real = (at >= start[:, None]) & (at < stop[:, None])
            # The sum of many vectors is taken in fp32, whatever the model runs in.
            total = torch.where(real.unsqueeze(-1), hidden, 0).sum(1, dtype=torch.float32)
            return (total / (stop - start).clamp(min=1).unsqueeze(-1)).to(hidden.dtype)
        index = start if self.how == "first" else (stop - 1).clamp(min=0)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self(hidden, batch.lengths).float()
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum"), (batch.targets != IGNORE).sum()
