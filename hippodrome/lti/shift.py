"""Shift: the shift state space of H3, a learned causal filter of d_state taps (Dao, Fu et al., ICLR 2023).

    x_t = (0, x_(t-1)[0], ..., x_(t-1)[N-2]) + B u_t,   y_t = C x_t + D u_t
    kernel:  K_i = sum_n C_(n+i) B_n  for i < N,  0 beyond

The state that is kept is the last N inputs, of which x is a linear function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hippodrome.lti._base import LTI
from hippodrome.ops.long_conv import long_conv
from hippodrome.part import BadInput, OptimRule
from hippodrome.state import State


@dataclass(frozen=True)
class ShiftState(State):
    """inputs (..., H, N): the last N inputs, oldest first and newest last; zeros where there were fewer."""

    inputs: Tensor


class Shift(LTI[ShiftState]):
    """Shift state space. Parameters: B, C (H, N), and D (H,) with `skip`; all fp32."""

    optim_rules: ClassVar[Mapping[str, OptimRule]] = {"B": OptimRule(lr_max=1e-3, weight_decay=0.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config(LTI.Config):
        """d_state: N, the number of taps. skip: whether the input is added, times D, to the output."""

        d_state: int = 64
        skip: bool = True

        def __post_init__(self) -> None:
            if self.d_state < 1:
                raise BadInput(f"a shift of d_state {self.d_state} holds no tap: it must be at least 1")

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.d_state = config.d_state
        one = torch.zeros(channels, config.d_state)
        one[:, 0] = 1.0
        bound = 1 / math.sqrt(config.d_state)
        self.B = nn.Parameter(one)
        self.C = nn.Parameter(torch.empty(channels, config.d_state).uniform_(-bound, bound))
        self.D = nn.Parameter(torch.randn(channels)) if config.skip else None

    def kernel(self, length: int) -> Tensor:
        taps = self._taps()[:, :length]
        return nn.functional.pad(taps, (0, length - taps.shape[1]))

    def response(self, state: ShiftState, length: int) -> Tensor:
        silence = state.inputs.new_zeros(*state.inputs.shape[:-1], length)
        return self.convolve(silence, state)[0]

    def advance(self, u: Tensor, state: ShiftState, lengths: Tensor | None = None) -> ShiftState:
        return self._last(self._with_past(u, state), lengths)

    def init_state(self, *batch: int) -> ShiftState:
        return ShiftState(self.B.new_zeros(*batch, *self.B.shape))

    def step(self, u: Tensor, state: ShiftState) -> tuple[Tensor, ShiftState]:
        return self._step(u, state, self._taps())

    @torch.no_grad()
    def stepper(self) -> Callable[[Tensor, ShiftState], tuple[Tensor, ShiftState]]:
        taps = self._taps()
        return lambda u, state: self._step(u, state, taps)

    @torch.no_grad()
    def step_taps(self) -> Tensor:
        """(N, H): how a step weighs the input of so many tokens ago, the skip included."""
        return self.taps().t().contiguous()

    def taps(self) -> Tensor:
        """The kernel without its zeros, the skip in its first tap: (H, N)."""
        taps = self._taps()
        return taps if self.D is None else torch.cat([taps[:, :1] + self.D[:, None], taps[:, 1:]], 1)

    def _step(self, u: Tensor, state: ShiftState, taps: Tensor) -> tuple[Tensor, ShiftState]:
        with torch.autocast(u.device.type, enabled=False):
            window = self._with_past(u.unsqueeze(-1), state)[..., 1:]
            y = (window * taps.flip(-1)).sum(-1)
            return (y if self.D is None else y + self.D * u).to(u.dtype), ShiftState(window)

    def convolve(
        self,
        u: Tensor,
        state: ShiftState | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ShiftState | None]:
        with torch.autocast(u.device.type, enabled=False):
            if state is None:
                return long_conv(u, self._taps(), skip=self.D, pre_gate=pre_gate, post_gate=post_gate), None
            v = u if pre_gate is None else u.to(self.B.dtype) * pre_gate
            signal = self._with_past(v, state)
            y = long_conv(signal, self._taps(), skip=self.D)[..., self.d_state :]
            y = y if post_gate is None else y * post_gate
            return y.to(u.dtype), self._last(signal, lengths)

    def _taps(self) -> Tensor:
        """The kernel without its zeros, (H, N): the correlation of C with B."""
        size = 2 * self.d_state
        spectrum = torch.fft.rfft(self.B, size).conj() * torch.fft.rfft(self.C, size)
        return torch.fft.irfft(spectrum, size)[:, : self.d_state]

    def _with_past(self, u: Tensor, state: ShiftState) -> Tensor:
        return torch.cat([state.inputs, u.to(state.inputs.dtype)], -1)

    def _last(self, signal: Tensor, lengths: Tensor | None) -> ShiftState:
        """The last N of a signal that begins with the N inputs before the chunk; `lengths` counts what came after them."""
        if lengths is None:
            # A copy: a view would keep the whole chunk.
            return ShiftState(signal[..., -self.d_state :].clone())
        index = lengths[:, None] + torch.arange(self.d_state, device=signal.device)
        index = index.reshape(len(lengths), *[1] * (signal.dim() - 2), self.d_state)
        return ShiftState(signal.gather(-1, index.expand(*signal.shape[:-1], self.d_state)))
