"""Regression: numbers at every position, y = W h + b, learned by their squared errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.part import BadInput
from hippodrome.task import Batch


class Regression(Readout):
    """hidden (B, L, D) -> numbers (B, L, outputs)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        outputs: int = 1

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        if config.outputs < 1:
            raise BadInput(f"outputs is {config.outputs}: it must be at least 1")
        self.linear = nn.Linear(d_model, config.outputs)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.linear(hidden)

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum, count) of the squared errors in fp32 over the numbers that are asked for."""
        said, asked = self(hidden), batch.asked
        error = said.to(torch.promote_types(said.dtype, torch.float32)) - batch.targets.where(asked, 0)
        # Masked twice: what is said where nothing is asked may be anything.
        return error.where(asked, 0).square().sum(), asked.sum()
