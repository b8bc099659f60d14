"""GSS: gated state spaces (Mehta, Gupta, Cutkosky, Neyshabur, 2022), a narrow diagonal system inside a wide gated unit.

    u = gelu(W_u x),  s = LayerNorm(gelu(W_v x)),   y = W_o (u * W_g (K * s + D s)) + b
    K_l = Re sum_n C_n (exp(Lambda_n) - 1) / Lambda_n exp(Lambda_n l),   Lambda = -exp(Lambda_re) + i exp(Lambda_im)

x (B, L, D). The system has few channels (D / 4) and many modes (512), which all channels share; its time step is 1.
The layer needs no channel mixer: it is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.lti._base import Diagonal, DiagonalState
from hippodrome.lti._zoh import expm1_over
from hippodrome.model import Mixer
from hippodrome.part import BadInput, OptimRule
from hippodrome.stepper import Stepper


class GSS(Mixer[DiagonalState]):
    """Gated state space layer. Its state is width x d_state complex numbers: 1 MiB a row at the paper's D = 1024."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """width: channels of the system, None: D / 4. expansion: width of the gates, in D.

        imag: "exp" takes the imaginary part of Lambda as exp(Lambda_im), as the paper; "plain" as stored, as DSS and S4D.
        init: "random" draws Lambda and C from N(0, 1), as the paper: the slowest mode then remembers some twenty tokens.
        "lin" spreads the frequencies evenly, draws decays of 0.5 dt with dt log-uniform in [0.001, 0.1] and C from N(0, 1 / N).
        """

        d_state: int = 512
        width: int | None = None
        expansion: int = 4
        imag: Literal["exp", "plain"] = "exp"
        init: Literal["random", "lin"] = "random"

        def __post_init__(self) -> None:
            for name in ("d_state", "width", "expansion"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise BadInput(f"{name} is {value}: it must be at least 1")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        width, wide = config.width or max(1, d_model // 4), config.expansion * d_model
        self.u_proj = nn.Linear(d_model, wide, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.inner_norm = nn.LayerNorm(width)
        self.system = _System(config, width)
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.output_linear = nn.Linear(wide, d_model)

    def forward(
        self, x: Tensor, state: DiagonalState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, DiagonalState | None]:
        y, after = self.system.convolve(self.signal(x).transpose(1, 2), state, lengths=lengths)
        return self.gated(x, y.transpose(1, 2)), after

    def init_state(self, batch: int, max_len: int | None = None) -> DiagonalState:
        return self.system.init_state(batch)

    def step(self, x: Tensor, state: DiagonalState) -> tuple[Tensor, DiagonalState]:
        y, after = self.system.step(self.signal(x), state)
        return self.gated(x, y), after

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[DiagonalState]:
        return _GSSStepper(self)

    def signal(self, x: Tensor) -> Tensor:
        """What the system hears: (..., D) -> (..., width)."""
        return self.inner_norm(F.gelu(self.v_proj(x)))

    def gated(self, x: Tensor, y: Tensor) -> Tensor:
        """The output (..., D) of inputs (..., D) and the system's answers (..., width)."""
        return self.output_linear(F.gelu(self.u_proj(x)) * self.gate_proj(y))


class _System(Diagonal):
    """The diagonal system. Parameters, fp32: Lambda_re, Lambda_im (N,), C (H, N, 2) as (re, im) pairs, D (H,)."""

    optim_rules: ClassVar[Mapping[str, OptimRule]] = dict.fromkeys(
        ("Lambda_re", "Lambda_im", "C"), OptimRule(lr_max=1e-3, weight_decay=0.0)
    )

    def __init__(self, config: GSS.Config, channels: int) -> None:
        super().__init__()
        n_state = config.d_state
        self.imag = config.imag
        re, im = torch.randn(n_state), torch.randn(n_state)
        if config.init == "lin":
            re = math.log(0.5) + torch.empty(n_state).uniform_(math.log(1e-3), math.log(1e-1))
            im = math.pi * (torch.arange(n_state) + 0.5) / n_state
            im = im.log() if config.imag == "exp" else im
        self.Lambda_re, self.Lambda_im = nn.Parameter(re), nn.Parameter(im)
        self.C = nn.Parameter(torch.randn(channels, n_state, 2) * (n_state**-0.5 if config.init == "lin" else 1.0))
        self.D = nn.Parameter(torch.randn(channels))

    def modes(self) -> tuple[Tensor, Tensor]:
        """Lambda and C (exp(Lambda) - 1) / Lambda, computed in float64: every error here grows with the length."""
        im = self.Lambda_im.double()
        rate = torch.complex(-self.Lambda_re.double().exp(), im.exp() if self.imag == "exp" else im)
        weights = torch.view_as_complex(self.C.double()) * expm1_over(rate)
        kept = torch.promote_types(self.C.dtype, torch.complex64)
        return rate.to(kept).repeat(len(self.C), 1), weights.to(kept)


class _GSSStepper(Stepper[DiagonalState]):
    """The system's constants once."""

    def __init__(self, mixer: GSS) -> None:
        super().__init__(mixer)
        self._signal, self._gated, self._system = mixer.signal, mixer.gated, mixer.system.stepper()

    def step(self, x: Tensor, state: DiagonalState, position: Tensor) -> tuple[Tensor, DiagonalState]:
        y, after = self._system(self._signal(x), state)
        return self._gated(x, y), after
