"""Tokens: ids (B, L) int64 to vectors (B, L, D), with positions as an option: learned (Radford et al., 2018) or fixed sines.

Learned positions may have several axes, as the rows, columns and channels of a picture that is read value by value, whose
vectors are summed (as in Perceiver AR: Hawthorne et al., 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hippodrome.model import Embed
from hippodrome.part import BadInput


class Tokens(Embed):
    """A table of vectors, one an id."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Embed.Config):
        vocab_size: int
        pad_to_multiple: int = 8
        """Rows of the table are rounded up to this, as matrix units like it. The extra ids never occur."""
        positions: int = 0
        """How many positions have a learned vector; 0: none, the mixers must tell order apart."""
        axes: tuple[int, ...] = ()
        """Sizes of axes, the last the fastest: a position is a place on them, with a learned vector for each coordinate."""
        sines: float | None = None
        """Slowest time scale of fixed positions, sines then cosines over tokens, that are added; None: none."""
        dropout: float = 0.0

        @property
        def rows(self) -> int:
            """Rows of the table, which is also the number of logits of a language model."""
            return -(-self.vocab_size // self.pad_to_multiple) * self.pad_to_multiple

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise BadInput(f"vocab_size is {config.vocab_size}: it must be at least 1")
        if config.positions < 0:
            raise BadInput(f"positions is {config.positions}: it must be 0 or more")
        if config.axes and (config.positions or min(config.axes) < 1):
            raise BadInput(f"axes are {config.axes}: sizes of at least 1, and then positions must be 0, not {config.positions}")
        if config.pad_to_multiple < 1:
            raise BadInput(f"pad_to_multiple is {config.pad_to_multiple}: it must be at least 1")
        if not 0 <= config.dropout < 1:
            raise BadInput(f"dropout is {config.dropout}: it must be at least 0 and below 1")
        if config.sines is not None and (config.sines <= 1 or d_model % 2):
            raise BadInput(f"sines is {config.sines} at d_model {d_model}: it must be above 1, and the width even")
        self.sines = config.sines
        self.table = nn.Embedding(config.rows, d_model)
        self.positions = nn.Embedding(config.positions, d_model) if config.positions else None
        self.sizes, self.places = config.axes, math.prod(config.axes)
        self.axes = nn.ModuleList(nn.Embedding(size, d_model) for size in config.axes)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def weight(self) -> Tensor:
        """The table (rows, D), for a readout that ties to it."""
        return self.table.weight

    def forward(self, inputs: Tensor, position: Tensor | None = None) -> Tensor:
        self._check(inputs)
        x = self.table(inputs)
        if self.positions is not None:
            x = x + self.positions(self._where(inputs, position, self.positions.num_embeddings))
        if len(self.axes):
            x = x + self._placed(inputs, position)
        if self.sines is not None:
            x = x + self._waves(inputs, position).to(x.dtype)
        return self.dropout(x)

    def _waves(self, inputs: Tensor, position: Tensor | None) -> Tensor:
        """(1 or B, L, D) fp32: sin t / w_j, then cos t / w_j, time scales w_j in equal ratios from 1 to `sines`."""
        assert self.sines is not None
        half = self.table.embedding_dim // 2
        at = torch.arange(inputs.shape[1], device=inputs.device)[None]
        at = at if position is None else at + position[:, None]
        scale = self.sines ** (-torch.arange(half, dtype=torch.float32, device=at.device) / max(half - 1, 1))
        angle = at[..., None] * scale
        return torch.cat([angle.sin(), angle.cos()], -1)

    def _placed(self, inputs: Tensor, position: Tensor | None) -> Tensor:
        """(L, D) or (B, L, D): the sum over the axes of the vectors of a token's coordinates."""
        at, step = self._where(inputs, position, self.places), self.places
        vectors = []
        for size, table in zip(self.sizes, self.axes, strict=True):
            step //= size
            vectors.append(table(at // step))
            at = at % step
        return torch.stack(vectors).sum(0)

    def _where(self, inputs: Tensor, position: Tensor | None, room: int) -> Tensor:
        """The positions (L,) or (B, L) of the inputs, below `room`."""
        at = torch.arange(inputs.shape[1], device=inputs.device)
        if inputs.shape[1] > room:
            raise BadInput(f"{inputs.shape[1]} tokens, but only {room} positions have a learned vector")
        if position is None:
            return at
        at = at + position[:, None]
        if at.device.type == "cpu" and not torch.compiler.is_compiling() and at.numel() and int(at.max()) >= room:
            raise BadInput(f"token {int(at.max())} has no learned vector: the model knows {room} positions")
        return at

    def _check(self, inputs: Tensor) -> None:
        # Looking at the ids would stall a GPU; there the lookup itself asserts, and so it does for positions.
        if inputs.device.type != "cpu" or torch.compiler.is_compiling() or not inputs.numel():
            return
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= self.table.num_embeddings:
            wrong = low if low < 0 else high
            raise BadInput(f"token id {wrong} is outside of the vocabulary: ids go from 0 to {self.table.num_embeddings - 1}")
