"""EMA: the damped multi-dimensional exponential moving average of Mega (Ma et al., ICLR 2023).

    p = sigmoid(delta),  q = 1 - p sigmoid(alpha),   h_t = q h_(t-1) + p beta x_t,   y_t = sum_n gamma_n h_t,n / sqrt(N) + D x_t

All real, one set for each channel. Mega applies a silu to y, and D is its omega. In its bidirectional form both directions
answer the present token: `LTI.from_the_future` with lag 0. The state here is z with h = p beta z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hippodrome.lti._base import Diagonal
from hippodrome.part import BadInput


class EMA(Diagonal):
    """A bank of H moving averages of N speeds.

    Parameters, fp32: delta, alpha, beta, gamma (H, N), D (H,). They train like any other, as in Mega.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Diagonal.Config):
        """d_state: N, Mega's ndim. skip: whether D x is added."""

        d_state: int = 16
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 1:
                raise BadInput(f"d_state is {self.d_state}: an EMA needs at least 1 dimension")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        shape = channels, config.d_state
        signs = 1.0 - 2.0 * (torch.arange(config.d_state) % 2)
        self.delta = nn.Parameter(0.2 * torch.randn(shape))
        self.alpha = nn.Parameter(0.2 * torch.randn(shape))
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(shape))
        self.gamma = nn.Parameter(torch.randn(shape))
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None

    def modes(self) -> tuple[Tensor, Tensor]:
        """log q and gamma p beta / sqrt(N). In float64, where q may come close to one and to zero."""
        log_q = torch.log1p(-torch.sigmoid(self.delta.double()) * torch.sigmoid(self.alpha.double()))
        weights = self.input_weights() * self.gamma * self.gamma.shape[1] ** -0.5
        kept = torch.promote_types(self.gamma.dtype, torch.complex64)
        return log_q.to(torch.complex128), weights.to(kept)

    def input_weights(self) -> Tensor:
        """p beta (H, N): the authors' state h is p beta z."""
        return torch.sigmoid(self.delta) * self.beta
