"""S5: one diagonal state space with many inputs and outputs, run by a scan (Smith, Warrington, Linderman, ICLR 2023).

    x_k = Abar_k x_(k-1) + Bbar_k u_k,   y_k = 2 Re(C x_k) + D u_k,   Delta_k = dt_k step_rescale exp(log_step)
    zoh:       Abar = exp(Lambda Delta),                               Bbar = B (exp(Lambda Delta) - 1) / Lambda
    bilinear:  Abar = (1 + Lambda Delta / 2) / (1 - Lambda Delta / 2), Bbar = Delta B / (1 - Lambda Delta / 2)
    half_glu1: g * sigmoid(W g), g = gelu(y);   half_glu2: y * sigmoid(W g);   full_glu: V g * sigmoid(W g);   gelu: g

u, y (B, L, D); x (B, L, P / 2), one state of each conjugate pair, or all P of them with Re for 2 Re. The time steps dt_k are 1
unless they are given: nothing but the scan depends on their being equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.inits import truncated_normal_
from hippodrome.lti._hippo import Complex, nplr
from hippodrome.lti._zoh import expm1_over
from hippodrome.model import Mixer
from hippodrome.norms import Fp32Parameters
from hippodrome.ops import _tf32
from hippodrome.ops.scan import scan
from hippodrome.part import BadInput, OptimRule
from hippodrome.state import State
from hippodrome.stepper import Stepper


@dataclass(frozen=True)
class S5State(State):
    """x (B, P / 2) complex, at least complex64; (B, P) without conjugate symmetry. Its size depends on nothing else."""

    x: Tensor


class S5(Mixer[S5State]):
    """S5 layer without its norm and residual: the system and the activation after it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """d_state: P, of which `blocks` HiPPO-LegS blocks of even size are the start; with conj_sym half of them are kept.

        clip_eigs: real parts of Lambda count as at most -1e-4, so that no state grows. The authors do so for images.
        C_init: complex_normal of variance 1, or in the eigenbasis of HiPPO from truncated normals of variance 1 / P
        (trunc_standard_normal) or 1 / (D P) (lecun_normal), as the authors name them.
        bidirectional: not causal, and so without a state; the two directions share all but C.
        step_rescale: 2 reads every second sample of what the model was made for.
        optim: what trains at a rate of at most ssm_lr. standard: Lambda, log_step and B, not decayed. BandCdecay: B decayed.
        BfastandCdecay: B as all else. noBCdecay: C and D too, not decayed. dt_global: log_step as all else.
        dropout: after the gelu, one mask for all tokens of a row.
        """

        d_state: int = 64
        blocks: int = 1
        conj_sym: bool = True
        clip_eigs: bool = True
        disc: Literal["zoh", "bilinear"] = "zoh"
        C_init: Literal["lecun_normal", "trunc_standard_normal", "complex_normal"] = "lecun_normal"
        activation: Literal["half_glu1", "half_glu2", "full_glu", "gelu"] = "half_glu1"
        bidirectional: bool = False
        step_rescale: float = 1.0
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        dropout: float = 0.0
        optim: Literal["standard", "BandCdecay", "BfastandCdecay", "noBCdecay"] = "standard"
        dt_global: bool = False
        ssm_lr: float = 1e-3

        def __post_init__(self) -> None:
            if self.blocks < 1 or self.d_state < 2 or self.d_state % (2 * self.blocks):
                even = 2 * max(1, self.blocks)
                good = even * max(1, round(self.d_state / even))
                raise BadInput(f"d_state {self.d_state} is not {self.blocks} blocks of an even size: take {good}")
            if not 0 < self.dt_min <= self.dt_max:
                raise BadInput(f"the time steps [{self.dt_min}, {self.dt_max}] are no range: 0 < dt_min <= dt_max")
            if self.step_rescale <= 0:
                raise BadInput(f"step_rescale is {self.step_rescale}: it must be positive, 1 for the rate of training")
            if not 0 <= self.dropout < 1:
                raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        self.causal = not config.bidirectional
        self.activation, self.dropout = config.activation, config.dropout
        self.system = _System(config, d_model)
        self.value_linear = nn.Linear(d_model, d_model) if config.activation == "full_glu" else None
        self.gate_linear = nn.Linear(d_model, d_model) if config.activation != "gelu" else None
        self.optim_rules = _rules(config)  # type: ignore[misc]

    def forward(
        self, x: Tensor, state: S5State | None = None, *, lengths: Tensor | None = None, dt: Tensor | None = None
    ) -> tuple[Tensor, S5State | None]:
        """dt (B, L) or (L,), positive: the time since the token before, or since the state, in time steps. None: 1."""
        if state is not None:
            self._refuse_without_causality()
        if dt is not None and (dt.dim() not in (1, 2) or dt.shape not in (x.shape[:2], x.shape[1:2], (1, x.shape[1]))):
            raise BadInput(f"time steps of shape {tuple(dt.shape)} for inputs {tuple(x.shape)}: they are (B, L) or (L,)")
        y, states = self.system(x, None if state is None else state.x, lengths, dt)
        return self._activated(y), None if state is None else _last(states, state, lengths)

    def init_state(self, batch: int, max_len: int | None = None) -> S5State:
        self._refuse_without_causality()
        return S5State(torch.view_as_complex(self.system.B.new_zeros(batch, self.system.B.shape[0], 2)))

    def step(self, x: Tensor, state: S5State, *, dt: Tensor | None = None) -> tuple[Tensor, S5State]:
        """dt (B,): the time since the token before."""
        y, after = self(x.unsqueeze(1), state, dt=None if dt is None else dt.unsqueeze(-1))
        assert after is not None
        return y.squeeze(1), after

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[S5State]:
        return _S5Stepper(self) if self.causal else super().stepper(state_dtype)

    def _refuse_without_causality(self) -> None:
        if not self.causal:
            raise BadInput("a bidirectional S5 sees the future and has no state: build it with bidirectional=False")

    def _activated(self, y: Tensor) -> Tensor:
        g = F.gelu(y, approximate="tanh")
        if self.training and self.dropout:
            shape = len(g), *[1] * (g.dim() - 2), g.shape[-1]
            g = g * F.dropout(g.new_ones(shape), self.dropout)
        if self.gate_linear is None:
            return g
        gated = y if self.activation == "half_glu2" else g if self.value_linear is None else self.value_linear(g)
        return gated * torch.sigmoid(self.gate_linear(g))


class _System(Fp32Parameters):
    """The state space. Parameters, real and fp32, S states: Lambda_re, Lambda_im, log_step (S,), B (S, D, 2) and C (D, S, 2) as
    (re, im) pairs, C (D, 2 S, 2) for two directions, D (D,)."""

    def __init__(self, config: S5.Config, d_model: int) -> None:
        super().__init__()
        self.disc, self.clip, self.step_rescale = config.disc, config.clip_eigs, config.step_rescale
        self.conj_sym = config.conj_sym
        rate, basis = hippo_blocks(config)
        self.Lambda_re, self.Lambda_im = nn.Parameter(_tensor(rate.real)), nn.Parameter(_tensor(rate.imag))
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_step = nn.Parameter(torch.empty(len(rate)).uniform_(low, high))
        self.B = nn.Parameter(_initial_b(config, basis, d_model))
        sides = [_initial_c(config, basis, d_model) for _ in range(2 if config.bidirectional else 1)]
        self.C = nn.Parameter(torch.cat(sides, 1))
        self.D = nn.Parameter(torch.randn(d_model))

    def forward(self, u: Tensor, before: Tensor | None, lengths: Tensor | None, dt: Tensor | None) -> tuple[Tensor, Tensor]:
        """y like u (B, L, D), and all states (B, L, S) that the past has left.

        States are fp32 and their steps too; of half precision, or under autocast, the products before and behind them are of
        factors in tf32, as the authors' are on a GPU.
        """
        rough = torch.finfo(u.dtype).bits == 16 or torch.is_autocast_enabled(u.device.type)
        with torch.autocast(u.device.type, enabled=False):
            wide = u.to(torch.promote_types(u.dtype, self.D.dtype))
            a, gain = self.discretised(dt)
            driven = self._driven(wide, gain, rough)
            x = scan(a, driven, before)
            past, *future = self._read_out().split(2 * len(self.B), 1)
            y = _tf32.linear(_pairs(x), past, rough=rough) + self.D * wide
            if future:
                if lengths is not None:
                    # The states that come from the right would carry padding into the row.
                    real = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
                    driven = driven * real.unsqueeze(-1)
                y = y + _tf32.linear(_pairs(_from_the_future(a, driven)), future[0], rough=rough)
            return y.to(u.dtype), x

    def discretised(self, dt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Abar, and what B is multiplied with to give Bbar: (S,), or (..., S) for time steps dt (...).

        Steps that are all the same are computed in float64: there are few, and every error grows with the length.
        """
        kind = torch.float64 if dt is None else self.D.dtype
        step, re = torch.exp(self.log_step.to(kind)) * self.step_rescale, self.Lambda_re.to(kind)
        if dt is not None:
            step = step * dt.to(kind).unsqueeze(-1)
        turn = step * torch.complex(re.clamp(max=-1e-4) if self.clip else re, self.Lambda_im.to(kind))
        if self.disc == "zoh":
            a, gain = torch.exp(turn), step * expm1_over(turn)
        else:
            a, gain = (1 + turn / 2) / (1 - turn / 2), step / (1 - turn / 2)
        kept = torch.promote_types(self.D.dtype, torch.complex64)
        return a.to(kept), gain.to(kept)

    @torch.no_grad()
    def stepper(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One token (B, D) and the state before it -> y and the state after, under weights that do not change."""
        a, gain = self.discretised()
        read_in, read_out = self._read_in(gain), self._read_out()

        def step(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(u.device.type, enabled=False):
                wide = u.to(torch.promote_types(u.dtype, self.D.dtype))
                x = a * x + _complex(F.linear(wide, read_in))
                return (F.linear(_pairs(x), read_out) + self.D * wide).to(u.dtype), x

        return step

    def _driven(self, u: Tensor, gain: Tensor, rough: bool) -> Tensor:
        """Bbar u, (B, L, S). A gain of all tokens is one of the weights."""
        if gain.dim() == 1:
            return _complex(_tf32.linear(u, self._read_in(gain), rough=rough))
        return gain * _complex(_tf32.linear(u, self._read_in(), rough=rough))

    def _read_in(self, gain: Tensor | None = None) -> Tensor:
        """B, or Bbar, as a real matrix (2 S, D)."""
        b = torch.view_as_complex(self.B)
        return torch.view_as_real(b if gain is None else gain.unsqueeze(-1) * b).transpose(1, 2).flatten(0, 1)

    def _read_out(self) -> Tensor:
        """C as a real matrix, (D, 2 S) or (D, 4 S): of (re, im) pairs it makes Re(C x), of halves of pairs twice that."""
        conj = torch.view_as_complex(self.C).conj().resolve_conj()
        return _pairs(2 * conj if self.conj_sym else conj)


class _S5Stepper(Stepper[S5State]):
    """The system's constants once."""

    def __init__(self, mixer: S5) -> None:
        super().__init__(mixer)
        self._activated, self._system = mixer._activated, mixer.system.stepper()

    def step(self, x: Tensor, state: S5State, position: Tensor) -> tuple[Tensor, S5State]:
        y, after = self._system(x, state.x)
        return self._activated(y), S5State(after)


def hippo_blocks(config: S5.Config) -> tuple[Complex, Complex]:
    """Lambda (S,) at the start, and the eigenvectors (R, R / 2 or R) of one of its equal blocks of size R."""
    found = nplr("legs", config.d_state // config.blocks)
    rate, basis = found.w, found.V
    if not config.conj_sym:
        rate, basis = np.concatenate([rate, rate[::-1].conj()]), np.concatenate([basis, basis[:, ::-1].conj()], 1)
    return np.tile(rate, config.blocks), basis


def _initial_b(config: S5.Config, basis: Complex, d_model: int) -> Tensor:
    """B (S, D, 2): real and of variance 1 / P in the basis of HiPPO, and then in the eigenbasis."""
    plain = _truncated_normal((config.blocks, len(basis), d_model), config.d_state**-0.5)
    vectors = _tensor(np.stack([basis.real, -basis.imag], -1))
    return torch.einsum("rmi,jrd->jmdi", vectors, plain).flatten(0, 1).contiguous()


def _initial_c(config: S5.Config, basis: Complex, d_model: int) -> Tensor:
    """C (D, S, 2) of one direction."""
    if config.C_init == "complex_normal":
        return torch.randn(d_model, basis.shape[1] * config.blocks, 2) * 0.5**0.5
    fan_in = config.d_state * (d_model if config.C_init == "lecun_normal" else 1)
    plain = torch.view_as_complex(_truncated_normal((d_model, config.blocks, len(basis), 2), fan_in**-0.5))
    vectors = torch.view_as_complex(_tensor(np.stack([basis.real, basis.imag], -1)))
    return torch.view_as_real((plain @ vectors).flatten(1))


def _truncated_normal(shape: tuple[int, ...], std: float) -> Tensor:
    """Numbers of this standard deviation, from a normal distribution cut at twice its own."""
    return truncated_normal_(torch.empty(shape), std)


def _rules(config: S5.Config) -> dict[str, OptimRule]:
    names = ["Lambda_re", "Lambda_im", *([] if config.dt_global else ["log_step"])]
    names += {"standard": ["B"], "noBCdecay": ["B", "C", "D"]}.get(config.optim, [])
    rules = dict.fromkeys(names, OptimRule(lr_max=config.ssm_lr, weight_decay=0.0))
    if config.optim == "BandCdecay":
        rules["B"] = OptimRule(lr_max=config.ssm_lr)
    return {f"system.{name}": rule for name, rule in rules.items()}


def _from_the_future(a: Tensor, driven: Tensor) -> Tensor:
    """The states (B, L, S) read from right to left. Between a token and the next lies the next one's time step."""
    if a.dim() > 1:
        # The last token meets a zero, whatever its coefficient.
        a = torch.cat([a[..., 1:, :], a[..., :1, :]], -2)
    return scan(a, driven, reverse=True)


def _last(states: Tensor, before: S5State, lengths: Tensor | None) -> S5State:
    """The state after the last real token; a copy, which does not keep all the others."""
    if lengths is None:
        return S5State(states[:, -1].clone())
    last = states[torch.arange(len(states), device=states.device), (lengths - 1).clamp(min=0)]
    return S5State(torch.where((lengths > 0).unsqueeze(-1), last, before.x))


def _tensor(values: np.ndarray) -> Tensor:
    # torch.tensor and not from_numpy: the former heeds the device that a model is being built on, "meta" among them.
    return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32)


def _pairs(x: Tensor) -> Tensor:
    """(..., S) complex -> (..., 2 S) real."""
    return torch.view_as_real(x).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2 S) real -> (..., S) complex."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
