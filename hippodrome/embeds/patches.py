"""Patches: pictures to vectors, one a square of pixels (ViT: Dosovitskiy et al., ICLR 2021).

    x = [token; W p_1 + b; ...; W p_N + b] + positions      p_i the pixels of patch i, in raster order

which is a convolution with a stride of one patch. Shapes: pictures (B, H, W, C), or their pixels in raster order (B, H W, C),
to vectors (B, L, D), L = (H / patch) (W / patch), and one more with a class token. The start is that of the authors' JAX code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.inits import lecun_normal_
from hippodrome.model import Embed
from hippodrome.part import BadInput, OptimRule


class Patches(Embed):
    """A linear map of each patch, a class token before them, and learned positions."""

    # A vector stands for many pixels, so that a picture can neither come in chunks nor be padded.
    streams: ClassVar[bool] = False
    optim_rules: ClassVar[Mapping[str, OptimRule]] = {"positions": OptimRule(weight_decay=0.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Embed.Config):
        height: int = 28
        width: int = 28
        channels: int = 1
        patch: int = 4
        """Side of a patch, in pixels."""
        token: bool = False
        """A learned vector, the class token, comes before the patches."""
        dropout: float = 0.0

        @property
        def grid(self) -> tuple[int, int]:
            """Patches in a column and in a row."""
            return self.height // self.patch, self.width // self.patch

        @property
        def length(self) -> int:
            """Vectors of a picture."""
            return math.prod(self.grid) + self.token

        def __post_init__(self) -> None:
            for name in ("height", "width", "channels", "patch"):
                if getattr(self, name) < 1:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
            if self.height % self.patch or self.width % self.patch:
                sides = [n for n in range(1, min(self.height, self.width) + 1) if self.height % n == self.width % n == 0]
                near = min(sides, key=lambda side: abs(side - self.patch))
                raise BadInput(f"patch {self.patch} does not divide a picture of {self.height} x {self.width}: take {near}")
            if not 0 <= self.dropout < 1:
                raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.patch**2 * config.channels, d_model)
        self.token = nn.Parameter(torch.zeros(d_model)) if config.token else None
        self.positions = nn.Parameter(torch.zeros(config.length, d_model))
        self.dropout = nn.Dropout(config.dropout)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        lecun_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, inputs: Tensor, position: Tensor | None = None) -> Tensor:
        if position is not None:
            raise BadInput("a model of patches reads pictures whole: it has no state and cannot generate")
        x = self.linear(self._patches(inputs).to(self.linear.weight.dtype))
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], 1)
        return self.dropout(x + self.positions)

    def _patches(self, inputs: Tensor) -> Tensor:
        """The pixels of every patch (B, N, patch^2 C), row by row of a patch, the channels of a pixel together."""
        config, (rows, columns) = self.config, self.config.grid
        wanted = (config.height, config.width, config.channels)
        if tuple(inputs.shape[1:]) not in (wanted, (config.height * config.width, config.channels)):
            raise BadInput(
                f"the pictures are {' x '.join(map(str, inputs.shape[1:]))}, the model takes {' x '.join(map(str, wanted))}, "
                f"or their pixels as {config.height * config.width} x {config.channels}"
            )
        cut = inputs.reshape(-1, rows, config.patch, columns, config.patch, config.channels)
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions (L, D) of a grid of `old` (height, width) patches for one of `new`, by linear interpolation.

    Corners stay corners. The vectors before the grid, those of a class token, stay as they are.
    """
    extra = len(positions) - math.prod(old)
    if extra < 0:
        raise BadInput(f"{len(positions)} positions are fewer than a grid of {old[0]} x {old[1]} patches has")
    if old == new:
        return positions
    grid = positions[extra:].unflatten(0, old).permute(2, 0, 1).unsqueeze(0)
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return torch.cat([positions[:extra], grid.squeeze(0).permute(1, 2, 0).flatten(0, 1)])
