"""S4: state spaces with a diagonal plus low-rank matrix (Gu, Goel, Ré, ICLR 2022), bilinear.

    x' = A x + B u,   y = 2 Re(C x) + D u,   A = diag(-exp(log_A_real) + i A_imag) - sum_r P_r P_r^*,   dt = exp(log_dt)
    Abar = 2 (1 - dt A / 2)^-1 - 1,   Bbar = dt (1 - dt A / 2)^-1 B,   kernel K_l = 2 Re(C Abar^l Bbar)
    on the circle, w = e^(-2 pi i j / L):   sum_(l<L) K_l w^l = Ct (1 - w Abar)^-1 Bbar,   Ct = C (1 - Abar^L)

The sum on the circle is Cauchy sums over the diagonal part, corrected for the low rank (Woodbury); an inverse FFT gives K.

Conventions: of each conjugate pair the authors' mode is kept; their version 4 writes A_imag with the other sign. The state is
theirs. What is stored and trained is Ct, together with the L it belongs to, never C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hippodrome.lti._base import LTI, right_align
from hippodrome.lti._cauchy import spectrum
from hippodrome.lti._dense import answer, driven, power
from hippodrome.lti._hippo import Complex, Measure, nplr
from hippodrome.part import BadInput, OptimRule
from hippodrome.state import State


@dataclass(frozen=True)
class S4State(State):
    """x (..., H, M) complex64: the modes after the last token, x_t = Abar x_(t-1) + Bbar u_t."""

    x: Tensor


class S4(LTI[S4State]):
    """A bank of diagonal plus low-rank state spaces.

    H channels share S copies of A and B (channel h uses copy h mod S); M = d_state / 2 modes, rank R (LegT 2, else 1).
    Parameters, real and fp32: log_dt (H,), log_A_real, A_imag (S, M), D (H,), and as (re, im) pairs B (S, M, 2), P (S, R, M, 2)
    and C (H, M, 2), which holds Ct. The buffer `C_length` (int64) is the L that Ct belongs to; a state dict brings its own.
    """

    C_length: Tensor
    optim_rules: ClassVar[Mapping[str, OptimRule]] = dict.fromkeys(
        ("log_dt", "log_A_real", "A_imag", "B", "P"), OptimRule(lr_max=1e-3, weight_decay=0.0)
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(LTI.Config):
        """init: the HiPPO matrix; "mixed" gives the first half of the copies LegS and the second FouT. dt starts log-uniform.

        length: the L of Ct, best the training length. Shorter kernels cost as much, longer ones a doubling each.
        B_clip: limit of B's imaginary part at the start, as in the authors' version 4; None: HiPPO's B, as in the paper.
        n_ssm: copies of A and B shared by the channels; None: each its own.
        """

        d_state: int = 64
        init: Literal["legs", "legt", "fout", "mixed"] = "legs"
        length: int = 1024
        B_clip: float | None = 2.0
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        n_ssm: int | None = None
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 2 or self.d_state % 2:
                raise BadInput(f"d_state {self.d_state} is not an even positive number: take {max(2, self.d_state + 1)}")
            if self.length < 1:
                raise BadInput(f"length {self.length} is no length of a kernel: take 1 or more")
            if not 0 < self.dt_min <= self.dt_max:
                raise BadInput(f"the time steps [{self.dt_min}, {self.dt_max}] are no range: 0 < dt_min <= dt_max")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        copies = channels if config.n_ssm is None else config.n_ssm
        if copies < 1 or channels % copies:
            raise BadInput(f"n_ssm {copies} does not divide {channels} channels: take {math.gcd(max(copies, 1), channels)}")
        a, b, p = _initial(config, copies)
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_A_real = nn.Parameter(_tensor(np.log(np.maximum(-a.real, 1e-4))))
        self.A_imag = nn.Parameter(_tensor(a.imag))
        self.B, self.P = nn.Parameter(_tensor(_pairs(b))), nn.Parameter(_tensor(_pairs(p)))
        self.C = nn.Parameter(torch.empty(channels, a.shape[-1], 2))
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None
        self.length = config.length
        self.register_buffer("C_length", torch.tensor(config.length))
        self.register_load_state_dict_post_hook(_read_length)
        self.set_output(torch.randn_like(self.C) * 0.5**0.5)

    @torch.no_grad()
    def set_output(self, c: Tensor) -> None:
        """Stores the Ct of output weights C (H, M, 2), (re, im) pairs, under the present A and dt."""
        row = _row(torch.view_as_complex(c.double()))
        truncated = row - _times(row, torch.linalg.matrix_power(_matrix(self._discretise()), self.length))
        self.C.copy_(torch.view_as_real(_unrow(truncated)))

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """`rate` stretches the time steps: 2 reads every second sample. On a GPU a compiled model leaves it as it is."""
        beside = torch.compiler.is_compiling() and not _compiles(self.C)
        return _uncompiled(self, length, rate) if beside else self._kernel(length, rate)

    def _kernel(self, length: int, rate: float) -> Tensor:
        ct, belongs = self._truncated_output(length, rate)
        points = round(belongs / rate)
        dt, a, b, p = self._continuous(rate)
        left, right = torch.cat([ct.unsqueeze(1), p.conj()], 1), torch.cat([b.unsqueeze(1), p], 1)
        weights = (dt[:, None, None, None] * left.unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)
        angles = torch.arange(points // 2 + 1, device=a.device, dtype=torch.float64) * (math.pi / points)
        return torch.fft.irfft(spectrum(angles, dt.unsqueeze(-1) * a, weights), points)[..., :length].to(self.C.dtype)

    def response(self, state: S4State, length: int) -> Tensor:
        transition = _matrix(self._discretise())
        output = _times(_row(self._output(transition)), transition)
        return answer(transition, output, _columns(state.x), length).reshape(*state.x.shape[:-1], length)

    def advance(self, u: Tensor, state: S4State, lengths: Tensor | None = None) -> S4State:
        length, batch, modes = u.shape[-1], u.shape[:-2], state.x.shape[-1]
        count = torch.full(batch, length, device=u.device) if lengths is None else lengths.reshape(-1, *[1] * (len(batch) - 1))
        inputs = (u if lengths is None else right_align(u, lengths)).flatten(0, -3)
        parts = self._discretise()
        transition = _matrix(parts)
        silent = power(transition, _columns(state.x), count.expand(batch).reshape(-1), length)
        after = silent + driven(transition, _column(parts.b), inputs.to(silent.dtype))
        x = torch.complex(after[:, :modes], after[:, modes:]).permute(2, 0, 1)
        return S4State(x.reshape(state.x.shape))

    def init_state(self, *batch: int) -> S4State:
        kept = torch.promote_types(self.C.dtype, torch.complex64)
        return S4State(torch.zeros(*batch, *self.C.shape[:2], dtype=kept, device=self.C.device))

    def convolve(
        self,
        u: Tensor,
        state: S4State | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, S4State | None]:
        # With a state two answers are added: rounded once, after it.
        wide = u if state is None else u.to(torch.promote_types(u.dtype, torch.float32))
        y, after = super().convolve(wide, state, pre_gate=pre_gate, post_gate=post_gate, lengths=lengths)
        return y.to(u.dtype), after

    def step(self, u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
        return self._stepping("linear")(u, state)

    @torch.no_grad()
    def stepper(self, form: Literal["linear", "dense"] = "linear") -> Callable[[Tensor, S4State], tuple[Tensor, S4State]]:
        """linear: Abar as a diagonal and R outer products, O(M) a channel; dense: a matrix of 2 M x 2 M reals a channel."""
        return self._stepping(form)

    def _stepping(self, form: str) -> Callable[[Tensor, S4State], tuple[Tensor, S4State]]:
        parts = self._discretise()
        matrix = _matrix(parts)
        kept = torch.promote_types(self.C.dtype, torch.complex64)
        output, matrix, parts = self._output(matrix).to(kept), matrix.to(self.C.dtype), _Discrete(*(t.to(kept) for t in parts))

        def move(x: Tensor) -> Tensor:
            if form == "dense":
                moved = torch.einsum("hnm,...hm->...hn", matrix, _column(x))
                return torch.complex(*moved.chunk(2, -1))
            seen = 2 * torch.einsum("hrm,...hm->...hr", parts.s, x).real
            return parts.e * x - torch.einsum("...hr,hrm->...hm", seen.to(x.dtype), parts.g)

        def step(u: Tensor, state: S4State) -> tuple[Tensor, S4State]:
            with torch.autocast(u.device.type, enabled=False):
                v = u.to(torch.promote_types(u.dtype, torch.float32))
                x = move(state.x) + parts.b * v.unsqueeze(-1)
                y = 2 * (output * x).real.sum(-1)
                return (y if self.D is None else y + self.D * v).to(u.dtype), S4State(x)

        return step

    def _continuous(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (H,), the diagonal of A and B (H, M), P (H, R, M), of every channel, float64 and complex128."""
        shares = self.log_dt.shape[0] // self.B.shape[0]
        a = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        b, p = torch.view_as_complex(self.B.double()), torch.view_as_complex(self.P.double())
        return torch.exp(self.log_dt.double()) * rate, a.repeat(shares, 1), b.repeat(shares, 1), p.repeat(shares, 1, 1)

    def _discretise(self) -> _Discrete:
        dt, a, b, p = self._continuous()
        dt = dt.unsqueeze(-1)
        resolvent, p = 1 / (1 - dt * a / 2), p * (dt / 2).sqrt().unsqueeze(-1)
        s = p.conj() * resolvent.unsqueeze(1)
        gram = 2 * (s @ p.mT).real
        # No check of the result, which would wait for the device: 1 + gram is never singular, since A is dissipative.
        inverse = torch.linalg.inv_ex(torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + gram)[0]
        g = 2 * (inverse.mT.to(p.dtype) @ p) * resolvent.unsqueeze(1)
        seen = (s @ b.unsqueeze(-1)).real  # twice the real part, halved as g is doubled
        return _Discrete(2 * resolvent - 1, g, s, dt * (resolvent * b - (g * seen).sum(1)))

    def _truncated_output(self, length: int, rate: float) -> tuple[Tensor, int]:
        """Ct (H, M) complex128 of the first L = C_length 2^k >= rate length, and that L. Ct (1 + Abar^L) is that of 2 L."""
        ct, belongs = torch.view_as_complex(self.C.double()), self.length
        if round(belongs / rate) >= length:
            return ct, belongs
        row, leap = _row(ct), torch.linalg.matrix_power(_matrix(self._discretise()), belongs)
        while round(belongs / rate) < length:
            row, leap, belongs = row + _times(row, leap), leap @ leap, 2 * belongs
        return _unrow(row), belongs

    def _output(self, transition: Tensor) -> Tensor:
        """C (H, M) complex128 from Ct."""
        rest = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
        rest = rest - torch.linalg.matrix_power(transition, self.length)
        row = _row(torch.view_as_complex(self.C.double())).unsqueeze(1)
        return _unrow(torch.linalg.solve_ex(rest, row, left=False)[0].squeeze(1))


def _compiles(t: Tensor) -> bool:
    """What Inductor copies of complex numbers it copies by a kernel of its own, and Triton's know none: KeyError in 2.11."""
    return t.is_cpu


def _uncompiled(system: S4, length: int, rate: float) -> Tensor:
    # Made here: to make it once, on import, would bring all of the compiler.
    return torch.compiler.disable(system._kernel)(length, rate)


class _Discrete(NamedTuple):
    """Abar x = e x - sum_r g_r 2 Re(s_r x) and Bbar; e, b (H, M), g, s (H, R, M)."""

    e: Tensor
    g: Tensor
    s: Tensor
    b: Tensor


def _column(x: Tensor) -> Tensor:
    """A state (..., M) as the real vector (..., 2 M) on which Abar is a matrix."""
    return torch.cat([x.real, x.imag], -1)


def _columns(x: Tensor) -> Tensor:
    """States (..., H, M) as real columns (H, 2 M, B)."""
    return _column(x).flatten(0, -3).permute(1, 2, 0)


def _row(c: Tensor) -> Tensor:
    """(..., M) -> (..., 2 M) real with row . column = 2 Re(c x)."""
    return torch.cat([2 * c.real, -2 * c.imag], -1)


def _unrow(row: Tensor) -> Tensor:
    real, imaginary = row.chunk(2, -1)
    return torch.complex(real / 2, -imaginary / 2)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    return (row.unsqueeze(-2) @ matrix).squeeze(-2)


def _matrix(parts: _Discrete) -> Tensor:
    """Abar (H, 2 M, 2 M), float64."""
    real, imaginary = torch.diag_embed(parts.e.real), torch.diag_embed(parts.e.imag)
    diagonal = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
    return diagonal - _column(parts.g).mT @ _row(parts.s)


def _initial(config: S4.Config, copies: int) -> tuple[Complex, Complex, Complex]:
    """A's diagonal, B (copies, M) and P (copies, R, M) at the start."""
    measures: tuple[Measure, ...] = ("legs", "fout") if config.init == "mixed" else (config.init,)
    if copies % len(measures):
        raise BadInput(f"init 'mixed' halves the copies and {copies} is odd: take n_ssm={max(2, copies - 1)}")
    found = [nplr(measure, config.d_state) for measure in measures for _ in range(copies // len(measures))]
    b = np.stack([hippo.B for hippo in found])
    if config.B_clip is not None:
        b = b.real + 1j * b.imag.clip(-config.B_clip, config.B_clip)
    return np.stack([hippo.w for hippo in found]), b, np.stack([hippo.P for hippo in found])


def _pairs(values: Complex) -> np.ndarray:
    return np.stack([values.real, values.imag], -1)


def _tensor(values: np.ndarray) -> Tensor:
    # torch.tensor and not from_numpy: the former heeds the device that a model is being built on, "meta" among them.
    return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32)


def _read_length(system: Any, _: Any) -> None:
    system.length = int(system.C_length)
