"""Pool: one answer a sequence: class logits (B, classes) of the mean, the last or the first real position.

y = W h + b,   with `d_hidden` y = W tanh(V h + c) + b    (ViT's representation layer: Dosovitskiy et al., ICLR 2021)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.inits import lecun_normal_
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
        d_hidden: int | None = None
        """Width of a layer with tanh before the classes; None: there is none."""
        init: Literal["model", "zeros"] = "model"
        """model: as the model begins. zeros: all classes begin alike, and the hidden layer as in ViT."""

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        if config.classes < 1:
            raise BadInput(f"classes is {config.classes}: it must be at least 1")
        if config.d_hidden is not None and config.d_hidden < 1:
            raise BadInput(f"d_hidden is {config.d_hidden}: it must be at least 1, or none")
        self.how, self.init = config.how, config.init
        self.hidden = None if config.d_hidden is None else nn.Linear(d_model, config.d_hidden)
        self.linear = nn.Linear(d_model if config.d_hidden is None else config.d_hidden, config.classes)

    def init_weights(self) -> None:
        if self.init == "zeros":
            nn.init.zeros_(self.linear.weight)
            if self.hidden is not None:
                lecun_normal_(self.hidden.weight)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        vector = pooled(hidden, lengths, self.how)
        return self.linear(vector if self.hidden is None else self.hidden(vector).tanh())

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self(hidden, batch.lengths).float()
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum"), (batch.targets != IGNORE).sum()
