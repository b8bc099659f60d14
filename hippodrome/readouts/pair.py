"""Pair: one answer for two sequences, read apart by the same model (two towers): duplicates, citations, retrieval.

    x1, x2 = pooled hidden vectors of the two,   y = W_3 relu(W_2 relu(W_1 [x1, x2, x1 * x2, x1 - x2]))

The head of Long Range Arena's retrieval task (Tay et al., ICLR 2021), whose inner widths are d_ff and d_ff / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput
from hippodrome.readouts._pooled import How, pooled
from hippodrome.task import IGNORE, Batch


class Pair(Readout):
    """hidden (2 B, L, D), sequence after sequence of B rows that are two each -> logits (B, classes)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        classes: int = 2
        how: How = "mean"
        """Which vector stands for a sequence."""
        d_ff: int | None = None
        """Width after the first map, and half of it after the second; None: four times d_model, as published."""

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        d_ff = 4 * d_model if config.d_ff is None else config.d_ff
        for name, least, value in (("classes", 1, config.classes), ("d_ff", 2, d_ff)):
            if value < least:
                raise BadInput(f"{name} is {value}: it must be at least {least}")
        self.how = config.how
        self.fc1 = nn.Linear(4 * d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_ff // 2)
        self.linear = nn.Linear(d_ff // 2, config.classes)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        if len(hidden) % 2:
            raise BadInput(f"{len(hidden)} sequences are no pairs: inputs of a pair are (B, 2, L)")
        first, second = pooled(hidden, lengths, self.how).unflatten(0, (-1, 2)).unbind(1)
        joined = torch.cat([first, second, first * second, first - second], -1)
        return self.linear(F.relu(self.fc2(F.relu(self.fc1(joined)))))

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self(hidden, batch.lengths).float()
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum"), (batch.targets != IGNORE).sum()
