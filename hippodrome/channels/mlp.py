"""Mlp: y = W_2 act(W_1 x), the Transformer's feed-forward layer (Vaswani et al., 2017). Shapes: x, y (B, L, D)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Aux, ChannelMixer
from hippodrome.part import BadInput

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


class Mlp(ChannelMixer):
    """Two linear maps with an activation between them."""

    residual_out: ClassVar[tuple[str, ...]] = ("fc2",)

    @dataclass(frozen=True, kw_only=True)
    class Config(ChannelMixer.Config):
        d_ff: int | None = None
        """Inner width; None: four times d_model."""
        activation: Literal["gelu_tanh", "gelu", "relu", "silu", "relu2"] = "gelu_tanh"
        dropout: float = 0.0
        """Share of the inner channels dropped in training."""
        init: Literal["model", "xavier"] = "model"
        """model: as the model begins. xavier: as ViT's MLPs do, uniform of variance 2 / (in + out), biases N(0, 1e-6)."""

        def width(self, d_model: int) -> int:
            """The inner width at this d_model."""
            return 4 * d_model if self.d_ff is None else self.d_ff

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        d_ff = config.width(d_model)
        if d_ff < 1:
            raise BadInput(f"d_ff is {d_ff}: it must be at least 1")
        if not 0 <= config.dropout <= 1:
            raise BadInput(f"dropout is {config.dropout}: it must be at least 0 and at most 1")
        self.init = config.init
        self.activation = _ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def init_weights(self) -> None:
        for linear in (self.fc1, self.fc2) if self.init == "xavier" else ():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        return self.fc2(self.dropout(self.activation(self.fc1(x)))), {}
