"""Lm: logits of the next token, y = W h, tied to the token embedding or its own (Press and Wolf, 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from hippodrome.model import Embed, Readout
from hippodrome.ops.cross_entropy import cross_entropy
from hippodrome.part import BadInput
from hippodrome.task import Batch


class Lm(Readout):
    """hidden (B, L, D) -> logits (B, L, V), V the rows of the embedding's table."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        tied: bool = True

    def __init__(self, config: Config, d_model: int, embed: Embed) -> None:
        super().__init__()
        table = getattr(embed, "weight", None)
        if not isinstance(table, Tensor):
            raise BadInput(
                f"a language model reads out of a vocabulary, and {type(embed).__name__} embeds none: use embeds/tokens"
            )
        self.linear = None if config.tied else nn.Linear(d_model, table.shape[0], bias=False)
        # In a tuple, so that the embedding is not a submodule of both and its weight is saved once.
        self._embed = (embed,)

    @property
    def weight(self) -> Tensor:
        """The map (V, D)."""
        return cast(Tensor, self._embed[0].weight) if self.linear is None else self.linear.weight

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        return nn.functional.linear(hidden, self.weight)

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return cross_entropy(hidden, self.weight, batch.targets)
