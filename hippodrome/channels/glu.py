"""Glu: y = W_3 (act(W_1 x) * W_2 x), gated linear units (Shazeer, 2020: SwiGLU, GEGLU). Shapes: x, y (B, L, D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Aux, ChannelMixer
from hippodrome.part import BadInput


class Glu(ChannelMixer):
    """A gate times a linear map, then another linear map; no biases."""

    residual_out: ClassVar[tuple[str, ...]] = ("fc2",)

    @dataclass(frozen=True, kw_only=True)
    class Config(ChannelMixer.Config):
        d_ff: int | None = None
        """Inner width; None: 8/3 of d_model rounded up to a multiple of 8, which costs what a four times wide Mlp does."""
        activation: Literal["silu", "gelu"] = "silu"

        def width(self, d_model: int) -> int:
            """The inner width at this d_model."""
            return -(-8 * d_model // 24) * 8 if self.d_ff is None else self.d_ff

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        d_ff = config.width(d_model)
        if d_ff < 1:
            raise BadInput(f"d_ff is {d_ff}: it must be at least 1")
        self.activation = F.silu if config.activation == "silu" else F.gelu
        self.fc1 = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.fc2 = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        gate, inner = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * inner), {}
