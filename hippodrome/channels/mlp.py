"""Mlp: y = W_2 act(W_1 x), the Transformer's feed-forward layer (Vaswani et al., 2017). Shapes: x, y (B, L, D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Aux, ChannelMixer
from hippodrome.part import BadInput


class Mlp(ChannelMixer):
    """Two linear maps with an activation between them."""

    residual_out: ClassVar[tuple[str, ...]] = ("fc2",)

    @dataclass(frozen=True, kw_only=True)
    class Config(ChannelMixer.Config):
        d_ff: int | None = None
        """Inner width; None: four times d_model."""
        activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"

        def width(self, d_model: int) -> int:
            """The inner width at this d_model."""
            return 4 * d_model if self.d_ff is None else self.d_ff

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        d_ff = config.width(d_model)
        if d_ff < 1:
            raise BadInput(f"d_ff is {d_ff}: it must be at least 1")
        self.activation = config.activation
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        inner = self.fc1(x)
        if self.activation == "relu":
            inner = F.relu(inner)
        else:
            inner = F.gelu(inner, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(inner), {}
