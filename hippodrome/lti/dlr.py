"""DLR: diagonal linear RNNs (Gupta, Mehta, Berant, 2022): no time step, no discretisation, one set of modes for all channels.

    Lambda_n = -root_decay_n^2 + i omega_n,   K_l = sum_n W_n exp(Lambda_n l),   y = read-out(K) * u + D u
    read-outs:  real Re K,  imag Im K,  sum Re K + Im K,  product Re K Im K

A product of two answers is no recurrence of N modes: it is one of the N (N + 1) / 2 sums of two modes, since
Re K Im K = Im(K^2) / 2. Those are its state; without a state the two kernels are multiplied and no pair is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hippodrome.lti._base import LTI, Diagonal, DiagonalState
from hippodrome.ops.diagonal_ssm import mode_kernel
from hippodrome.part import BadInput, OptimRule

Readout = Literal["real", "imag", "sum", "product"]

MANY = 256
"""With more modes one kernel for the whole batch costs less than the modes of every row, and all channels share its table."""
_ROTATION = {"real": 1, "imag": -1j, "sum": 1 - 1j}
"""What W is multiplied by, so that the real part is the read-out."""


class DLR(Diagonal):
    """A bank of H diagonal linear RNNs that share their N modes.

    Parameters, all real and fp32: root_decay, omega (N,), W (H, N, 2) as (re, im) pairs or (H, N, 1), D (H,).
    """

    optim_rules: ClassVar[Mapping[str, OptimRule]] = dict.fromkeys(("root_decay", "omega", "W"), OptimRule(weight_decay=0.0))

    @dataclass(frozen=True, kw_only=True)
    class Config(Diagonal.Config):
        """init: omega starts at the frequencies 2 pi n / N of the discrete Fourier transform ("omega") or at random ("random").

        eigenvalues: "imaginary" modes do not decay, "real" ones do not turn: root_decay or omega is fixed at zero.
        real_weights: W without an imaginary part. Decays start at 0.5 dt a token, dt log-uniform in [dt_min, dt_max].
        The paper's models have up to 4096 states; "product" then remembers eight million numbers a channel.
        """

        d_state: int = 64
        init: Literal["omega", "random"] = "omega"
        readout: Readout = "real"
        eigenvalues: Literal["complex", "imaginary", "real"] = "complex"
        real_weights: bool = False
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 1:
                raise BadInput(f"d_state is {self.d_state}: a DLR needs at least 1 mode")
            if not 0 < self.dt_min <= self.dt_max:
                raise BadInput(f"the time steps [{self.dt_min}, {self.dt_max}] are no range: 0 < dt_min <= dt_max")
            if self.eigenvalues == "real" and self.real_weights and self.readout in ("imag", "product"):
                raise BadInput(f"readout {self.readout!r} of real modes and real weights is zero: take 'real' or 'sum'")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        n_state, low, high = config.d_state, math.log(config.dt_min), math.log(config.dt_max)
        self.readout = config.readout
        decays, turns = config.eigenvalues != "imaginary", config.eigenvalues != "real"
        root = (0.5 * torch.empty(n_state).uniform_(low, high).exp()).sqrt()
        angle = 2 * math.pi * torch.arange(n_state) / n_state if config.init == "omega" else torch.randn(n_state)
        self.root_decay = nn.Parameter(root if decays else torch.zeros_like(root), requires_grad=decays)
        self.omega = nn.Parameter(angle.remainder(2 * math.pi) if turns else torch.zeros_like(root), requires_grad=turns)
        self.W = nn.Parameter(torch.randn(channels, n_state, 1 if config.real_weights else 2) / n_state)
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None

    def modes(self) -> tuple[Tensor, Tensor]:
        """Lambda of every channel and the weights whose real part is the read-out; of "product" for all pairs of modes.

        The phases of pairs are summed in float64 and brought to [-pi, pi).
        """
        rate, w = self._lambda(torch.float64), self._w(torch.float64)
        if self.readout == "product":
            first, second = torch.triu_indices(len(rate), len(rate), device=rate.device)
            pair = rate[first] + rate[second]
            rate = torch.complex(pair.real, (pair.imag + math.pi).remainder(2 * math.pi) - math.pi)
            w = w[:, first] * w[:, second] * torch.where(first == second, 0.5, 1.0) * -1j
        else:
            w = w * _ROTATION[self.readout]
        kept = torch.promote_types(self.W.dtype, torch.complex64)
        return rate.repeat(len(w), 1), w.to(kept)

    def kernel(self, length: int) -> Tensor:
        """From one table of powers for all channels."""
        rate, w = self._lambda(torch.float64), self._w(self.W.dtype)
        if self.readout == "product":
            return mode_kernel(rate, w, length) * mode_kernel(rate, -1j * w, length)
        return mode_kernel(rate, w * _ROTATION[self.readout], length)

    def convolve(
        self,
        u: Tensor,
        state: DiagonalState | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, DiagonalState | None]:
        if state is None and (self.readout == "product" or len(self.omega) > MANY):
            return LTI.convolve(self, u, pre_gate=pre_gate, post_gate=post_gate)
        return super().convolve(u, state, pre_gate=pre_gate, post_gate=post_gate, lengths=lengths)

    def _lambda(self, real: torch.dtype) -> Tensor:
        """Lambda (N,), complex."""
        return torch.complex(-(self.root_decay.to(real) ** 2), self.omega.to(real))

    def _w(self, real: torch.dtype) -> Tensor:
        """W (H, N), complex."""
        parts = self.W.to(real)
        return torch.complex(parts[..., 0], parts[..., 1] if parts.shape[-1] == 2 else torch.zeros_like(parts[..., 0]))
