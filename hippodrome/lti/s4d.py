"""S4D: diagonal state spaces (Gu, Gupta, Goel, Ré, NeurIPS 2022), also the diagonal system of H3.

    x' = A x + B u,   y = 2 Re(C x) + D u,   A = -exp(log_A_real) + i A_imag,   dt = exp(log_dt)
    zoh:       Abar = exp(dt A),                       Bbar = B (exp(dt A) - 1) / A
    bilinear:  Abar = (1 + dt A / 2) / (1 - dt A / 2), Bbar = dt B / (1 - dt A / 2)
    kernel:    K_l = 2 Re sum_n C_n Bbar_n Abar_n^l

Conventions: A and C are used as stored, with H3's sign of A_imag. S4's version 4 writes A = -exp(A_real) - i A_imag: keep the
numbers and conjugate B and C. The state here is z with z_t = Abar z_(t-1) + u_t; the authors' state is Bbar z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hippodrome.lti._base import Diagonal
from hippodrome.lti._hippo import Complex, nplr
from hippodrome.lti._zoh import expm1_over
from hippodrome.ops.diagonal_ssm import mode_kernel
from hippodrome.part import BadInput, OptimRule


class S4D(Diagonal):
    """A bank of diagonal state spaces.

    H channels share S copies of A and B (channel h uses copy h mod S); M = d_state / 2 modes, one of each conjugate pair.
    Parameters, all real and fp32: log_dt (H,), log_A_real, A_imag (S, M), B (S, M, 2), C (H, M, 2) as (re, im) pairs, D (H,).
    With init "real" the modes are M = d_state real ones, not halves of pairs: A_imag is fixed at zero, B and C have no
    imaginary part, (..., 1), and the factor 2 of y is 1.
    """

    optim_rules: ClassVar[Mapping[str, OptimRule]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag", "B"), OptimRule(lr_max=1e-3, weight_decay=0.0)
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(Diagonal.Config):
        """init: where A starts, with n = 0, 1, ... and N = d_state. dt starts log-uniform in [dt_min, dt_max].

        lin: -1/2 + i pi n. inv: -1/2 + i (N / pi)(N / (2n + 1) - 1). legs: the eigenvalues of the normal part of HiPPO-LegS.
        real: -(n + 1). quad: -1/2 + i (2n + 1)^2 / pi.
        B: "hippo" starts B of init legs at HiPPO's, its imaginary part clipped to [-2, 2], as S4 does; "one" starts it at 1,
        as H3 does. B of the other inits starts at 1.
        n_ssm: copies of A and B shared by the channels; None: each its own.
        bandlimit: modes of at least so many times half a turn a sample are silent; at 1 those that alias. None: all sound.
        """

        d_state: int = 64
        init: Literal["lin", "inv", "legs", "real", "quad"] = "lin"
        disc: Literal["zoh", "bilinear"] = "zoh"
        B: Literal["hippo", "one"] = "hippo"
        train_B: bool = True
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        n_ssm: int | None = None
        bandlimit: float | None = None
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 1 or (self.init != "real" and self.d_state % 2):
                raise BadInput(
                    f"d_state {self.d_state} of init {self.init!r} is not {'a' if self.init == 'real' else 'an even'}"
                    f" positive number: take {max(2, self.d_state + self.d_state % 2)}"
                )
            if not 0 < self.dt_min <= self.dt_max:
                raise BadInput(f"the time steps [{self.dt_min}, {self.dt_max}] are no range: 0 < dt_min <= dt_max")
            if self.bandlimit is not None and self.bandlimit <= 0:
                raise BadInput(f"bandlimit {self.bandlimit} silences every mode: take 1, or None for no limit")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        copies = channels if config.n_ssm is None else config.n_ssm
        if copies < 1 or channels % copies:
            raise BadInput(f"n_ssm {copies} does not divide {channels} channels: take {math.gcd(max(copies, 1), channels)}")
        self.real = config.init == "real"
        self.disc, self.bandlimit = config.disc, config.bandlimit
        a, b = _initial(config)
        log_low, log_high = math.log(config.dt_min), math.log(config.dt_max)
        pair = 1 if self.real else 2
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(log_low, log_high))
        self.log_A_real = nn.Parameter(_copies(np.log(-a.real), copies))
        self.A_imag = nn.Parameter(_copies(a.imag, copies), requires_grad=not self.real)
        self.B = nn.Parameter(_copies(np.stack([b.real, b.imag], -1)[:, :pair], copies), requires_grad=config.train_B)
        self.C = nn.Parameter(torch.randn(channels, len(a), pair) * pair**-0.5)
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None

    def modes(self, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """log Abar and the output weights 2 C Bbar. `rate` stretches the time steps: 2 reads every second sample.

        Computed in float64: there are few of them, and every error here grows with the length.
        """
        dt_a, b_bar = self._discretise(torch.float64, rate)
        log_a_bar = dt_a if self.disc == "zoh" else _log_bilinear(dt_a / 2)
        kept = torch.promote_types(self.C.dtype, torch.complex64)
        return log_a_bar, self._weights(b_bar).to(kept)

    def recurrence(self) -> tuple[Tensor, Tensor]:
        dt_a, b_bar = self._discretise(self.C.dtype)
        a_bar = torch.exp(dt_a) if self.disc == "zoh" else (1 + dt_a / 2) / (1 - dt_a / 2)
        return a_bar, self._weights(b_bar)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        return mode_kernel(*self.modes(rate), length)

    def input_weights(self) -> Tensor:
        """Bbar (H, M): the authors' state is Bbar z."""
        return self._discretise(self.C.dtype)[1]

    def _discretise(self, real: torch.dtype, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """dt A and Bbar, (H, M) complex, computed in the dtype `real`."""
        dt = torch.exp(self.log_dt.to(real)).unsqueeze(-1) * rate
        a = torch.complex(-torch.exp(self.log_A_real.to(real)), self.A_imag.to(real))
        dt_a, dt_b = dt * self._each(a), dt * self._each(_complex(self.B.to(real)))
        return dt_a, dt_b * expm1_over(dt_a) if self.disc == "zoh" else dt_b / (1 - dt_a / 2)

    def _each(self, shared: Tensor) -> Tensor:
        """(S, M) to (H, M): channel h uses copy h mod S."""
        return shared.repeat(self.log_dt.shape[0] // shared.shape[0], 1)

    def _weights(self, b_bar: Tensor) -> Tensor:
        weights = _complex(self.C.to(b_bar.real.dtype)) * b_bar
        if self.bandlimit is not None:
            # In turns a sample at the rate the model was made for: another rate hears the same modes.
            turns = self.log_dt.exp().unsqueeze(-1) * self._each(self.A_imag.abs()) / (2 * math.pi)
            weights = weights * (turns < self.bandlimit / 2)
        return weights if self.real else 2 * weights


def _initial(config: S4D.Config) -> tuple[Complex, Complex]:
    """A and B (M,) at the start."""
    n_state = config.d_state
    if config.init == "legs":
        hippo = nplr("legs", n_state)
        start = hippo.B.real + 1j * hippo.B.imag.clip(-2, 2)
        return hippo.w, start if config.B == "hippo" else np.ones_like(start)
    n = np.arange(n_state if config.init == "real" else n_state // 2)
    frequency = {
        "lin": np.pi * n,
        "inv": n_state / np.pi * (n_state / (2 * n + 1) - 1),
        "real": 0.0 * n,
        "quad": (2 * n + 1) ** 2 / np.pi,
    }[config.init]
    decay = n + 1.0 if config.init == "real" else 0.5
    a = np.asarray(-decay + 1j * frequency, dtype=np.complex128)
    return a, np.ones_like(a)


def _copies(values: np.ndarray, copies: int) -> Tensor:
    # torch.tensor and not from_numpy: the former heeds the device that a model is being built on, "meta" among them.
    row = torch.tensor(np.ascontiguousarray(values), dtype=torch.float32)
    return row.expand(copies, *row.shape).clone()


def _complex(parts: Tensor) -> Tensor:
    """Complex numbers (...) from (re, im) pairs (..., 2), or from real parts alone (..., 1)."""
    return torch.complex(parts[..., 0], parts[..., 1] if parts.shape[-1] == 2 else torch.zeros_like(parts[..., 0]))


def _log_bilinear(half: Tensor) -> Tensor:
    """log((1 + half) / (1 - half)), its modulus and its angle each without cancellation."""
    re, im = half.real, half.imag
    modulus = 0.5 * torch.log1p(4 * re / ((1 - re) ** 2 + im**2))
    return torch.complex(modulus, torch.atan2(2 * im, 1 - re**2 - im**2))
