"""Positions: one answer a position: class logits y_t = W h_t + b, for labels along the sequence (of pixels, of sub-trees).

    loss = sum_t -log p(target_t)                                        over the positions asked for
    balanced: loss = n / K sum_k mean over the positions of class k      n positions asked for, K classes among them

The balanced loss is that of weights 1 / count_k taken from each batch, which DLR's Pathfinder segmentation trains with (Gupta,
Mehta, Berant, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch


class Positions(Readout):
    """hidden (B, L, D) -> logits (B, L, classes). Targets (B, L) are `IGNORE` where nothing is asked, so also on padding."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        classes: int
        balanced: bool = False
        """Every class of a batch weighs alike in the loss, however few its positions."""

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        if config.classes < 1:
            raise BadInput(f"classes is {config.classes}: it must be at least 1")
        self.classes, self.balanced = config.classes, config.balanced
        self.linear = nn.Linear(d_model, config.classes)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.linear(hidden)

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = self(hidden).flatten(0, -2).float(), batch.targets.flatten()
        asked = targets != IGNORE
        if not self.balanced:
            return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), asked.sum()
        sizes = torch.zeros(self.classes, dtype=torch.int64, device=targets.device)
        sizes.scatter_add_(0, targets.clamp(min=0), asked.long())
        weight = 1 / sizes.clamp(min=1)
        means = F.cross_entropy(logits, targets, weight=weight, ignore_index=IGNORE, reduction="sum")
        return means * sizes.sum() / (sizes > 0).sum().clamp(min=1), asked.sum()
