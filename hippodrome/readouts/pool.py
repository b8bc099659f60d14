"""Pool: one answer a sequence: class logits (B, classes) of the mean, the last or the first real position."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput
from hippodrome.readouts._pooled import How, pooled
from hippodrome.task import IGNORE, Batch


class Pool(Readout):
    """hidden (B, L, D) -> logits (B, classes). Padding is outside of the mean."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        classes: int
        how: How = "mean"

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        if config.classes < 1:
            raise BadInput(f"classes is {config.classes}: it must be at least 1")
        self.how = config.how
        self.linear = nn.Linear(d_model, config.classes)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.linear(pooled(hidden, lengths, self.how))

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self(hidden, batch.lengths).float()
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum"), (batch.targets != IGNORE).sum()
