"""Signal: real-valued samples (B, L, C) to vectors (B, L, D) by one linear map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hippodrome.model import Embed
from hippodrome.part import BadInput


class Signal(Embed):
    """A linear map of the channels of a signal."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Embed.Config):
        channels: int = 1

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        if config.channels < 1:
            raise BadInput(f"channels is {config.channels}: a signal has at least 1")
        self.channels = config.channels
        self.linear = nn.Linear(config.channels, d_model)

    def forward(self, inputs: Tensor, position: Tensor | None = None) -> Tensor:
        if inputs.shape[-1] != self.channels:
            raise BadInput(f"the signal has {inputs.shape[-1]} channels, the model takes {self.channels}")
        return self.linear(inputs.to(self.linear.weight.dtype))
