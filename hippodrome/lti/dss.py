"""DSS: diagonal state spaces (Gupta, Gu, Berant, NeurIPS 2022), the first that did without S4's low-rank term.

    exp:     Lambda = -exp(Lambda_re) + i Lambda_im
    clip:    Lambda = min(Lambda_re, 1e-4) + i Lambda_im
    softmax: Lambda = Lambda_re + i Lambda_im
    kernel:  K_l = Re sum_n W_n (exp(dt Lambda_n) - 1) / Lambda_n exp(dt Lambda_n l) of exp and clip,
             K_l = Re sum_n W_n / Lambda_n softmax_l(dt Lambda_n l), l < length, of softmax

All channels share Lambda; there are no conjugate pairs and no B. The softmax makes the weights depend on `length` and lets
modes grow: what grows is scaled to be one at the end of the length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hippodrome.lti._base import Diagonal
from hippodrome.lti._hippo import nplr
from hippodrome.lti._zoh import expm1_over
from hippodrome.part import BadInput, OptimRule

EPSILON = 1e-7
"""Keeps the softmax's division from zero, as in the authors' code: 1 / x is conj(x) / (|x|^2 + EPSILON)."""


class DSS(Diagonal):
    """A bank of H diagonal state spaces with N modes.

    Parameters, all real and fp32: log_dt (H,), or (H, 2) for the real and imaginary part; Lambda_re, Lambda_im (N,);
    W (H, N, 2) as (re, im) pairs; D (H,).
    """

    optim_rules: ClassVar[Mapping[str, OptimRule]] = dict.fromkeys(
        ("log_dt", "Lambda_re", "Lambda_im", "W"), OptimRule(lr_max=1e-3, weight_decay=0.0)
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(Diagonal.Config):
        """init: Lambda starts at the eigenvalues of HiPPO-LegS' normal part whose imaginary part is positive ("legs"), or at
        S4D-Lin's -1/2 + i pi n ("lin").

        dt starts log-uniform in [dt_min, dt_max]. version: see above.
        imag: "exp" takes the exponential of Lambda_im, "zero" fixes it at zero.
        length: the tokens of the softmax; the other versions ignore it. A growing mode must stay below exp(80) within it.
        scale: False leaves the factor (exp(dt Lambda) - 1) / Lambda out. separate_dt: a time step each for decay and frequency.
        """

        d_state: int = 64
        version: Literal["exp", "softmax", "clip"] = "exp"
        init: Literal["legs", "lin"] = "legs"
        imag: Literal["plain", "exp", "zero"] = "plain"
        length: int = 1024
        scale: bool = True
        separate_dt: bool = False
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 1 or self.length < 1:
                raise BadInput(f"d_state {self.d_state} and length {self.length} must be at least 1")
            if not 0 < self.dt_min <= self.dt_max:
                raise BadInput(f"the time steps [{self.dt_min}, {self.dt_max}] are no range: 0 < dt_min <= dt_max")
            if self.init == "lin" and self.imag == "exp":
                raise BadInput(
                    "init 'lin' begins with a mode that does not turn, which imag 'exp' cannot hold: take imag='plain'"
                )
            if self.version == "softmax" and not self.scale:
                raise BadInput("version 'softmax' is its scale: take scale=True, or version 'exp'")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.config = config
        if config.init == "lin":
            real, imag = torch.full((config.d_state,), -0.5), math.pi * torch.arange(config.d_state).float()
        else:
            start = nplr("legs", 2 * config.d_state).w.conj()
            real, imag = torch.tensor(start.real.tolist()), torch.tensor(start.imag.tolist())
        if config.imag == "zero":
            imag = torch.zeros_like(imag)
        log_dt = torch.empty(channels).uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.log_dt = nn.Parameter(log_dt.unsqueeze(-1).repeat(1, 2) if config.separate_dt else log_dt)
        self.Lambda_re = nn.Parameter((-real).log() if config.version == "exp" else real)
        self.Lambda_im = nn.Parameter(imag.log() if config.imag == "exp" else imag, requires_grad=config.imag != "zero")
        self.W = nn.Parameter(torch.randn(channels, config.d_state, 2))
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None

    def modes(self) -> tuple[Tensor, Tensor]:
        """dt Lambda and the scaled W, computed in float64: every error here grows with the length."""
        re, im = self.Lambda_re.double(), self.Lambda_im.double()
        if self.config.version != "softmax":
            re = -re.exp() if self.config.version == "exp" else re.clamp(max=1e-4)
        im = im.exp() if self.config.imag == "exp" else im
        dt = self.log_dt.double().exp()
        dt_re, dt_im = dt.unbind(-1) if self.config.separate_dt else (dt, dt)
        dt_lambda = torch.complex(dt_re.outer(re), dt_im.outer(im))
        rate, w = torch.complex(re, im), torch.view_as_complex(self.W.double())
        if self.config.version == "softmax":
            w = w * _softmax_scale(dt_lambda, rate, self.config.length)
        elif self.config.scale:
            w = w * expm1_over(dt_lambda) * (dt_lambda / rate)
        kept = torch.promote_types(self.W.dtype, torch.complex64)
        return dt_lambda, w.to(kept)


def _softmax_scale(dt_lambda: Tensor, rate: Tensor, length: int) -> Tensor:
    """1 / (Lambda sum_(l<length) exp(dt Lambda l)), (H, N): rate is Lambda (N,).

    A growing mode is counted from the end of the length. Like the authors', that shift passes no gradient.
    """
    grows = rate.real > 0
    decaying = torch.where(grows, -dt_lambda, dt_lambda)
    divisor = torch.expm1(decaying * length) * rate
    shift = torch.where(grows, torch.exp(-dt_lambda * (length - 1)), torch.ones_like(dt_lambda)).detach()
    return torch.expm1(decaying) * shift * divisor.conj() / (divisor * divisor.conj() + EPSILON)
