"""H3: Hungry Hungry Hippos (Dao, Fu et al., ICLR 2023).

    q, k, v = W_q x, W_k x, W_v x;   k' = shift(k)
    s_ij = diagonal(k'_i v_j);       y_j = sum_i q_i s_ij;   output W_o y

i, j run over the p = head_dim channels of a head; head h has the channels h p + i. With p = 1 this is
q * diagonal(shift(k) * v). x (B, L, D); `shift` has D channels, `diagonal` one a head, which its p^2 products share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.lti._base import LTI, Diagonal, DiagonalState
from hippodrome.lti.s4d import S4D
from hippodrome.lti.shift import Shift, ShiftState
from hippodrome.model import Mixer
from hippodrome.ops.h3 import gather, h3, outer
from hippodrome.ops.h3_step import ages, h3_step
from hippodrome.part import BadInput
from hippodrome.state import State
from hippodrome.stepper import Stepper


@dataclass(frozen=True)
class H3State(State):
    """The two systems' states, `diagonal` with batch axes (B, p, p). shift: None in an H3 without its shift."""

    shift: State | None
    diagonal: State


class H3(Mixer[H3State]):
    """Two state spaces and two gates: one remembers the recent tokens, the other what followed what.

    The systems compute in fp32 whatever the dtype of the linear maps. The output map is not named in `residual_out`: the
    authors start it like any other.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """d_state: that of both systems, where they are not given. use_shift: False makes k' = k, the paper's ablation.

        shift: None is the shift system of d_state taps. diagonal: None is S4D-Lin, bilinear, as the authors train it.
        """

        head_dim: int = 1
        d_state: int = 64
        use_shift: bool = True
        shift: LTI.Config | None = None
        diagonal: LTI.Config | None = None

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        if config.head_dim < 1 or d_model % config.head_dim:
            near = _nearest_divisor(config.head_dim, d_model)
            raise BadInput(f"head_dim {config.head_dim} does not divide d_model {d_model}: take {near}")
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        shift = config.shift or Shift.Config(d_state=config.d_state)
        diagonal = config.diagonal or S4D.Config(d_state=config.d_state, init="lin", disc="bilinear")
        self.shift: LTI[Any] | None = shift.build(d_model) if config.use_shift else None
        self.diagonal: LTI[Any] = diagonal.build(d_model // config.head_dim)
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, state: H3State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, H3State | None]:
        q, k, v = (_channels_first(linear, x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        fused = isinstance(self.diagonal, Diagonal) and (self.shift is None or isinstance(self.shift, Shift))
        mix = self._mix if fused and (state is None or lengths is None) else self._mix_in_turn
        y, after = mix(q, k, v, state, lengths)
        return self.output_linear(y.to(q.dtype).transpose(1, 2)), after

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, state: H3State | None, lengths: Tensor | None
    ) -> tuple[Tensor, H3State | None]:
        """Both systems and both gates as one op."""
        diagonal, shift = cast(Diagonal, self.diagonal), cast("Shift | None", self.shift)
        with torch.autocast(q.device.type, enabled=False):
            log_modes, weights = diagonal.modes()
            taps = None if shift is None else shift.taps()
            if state is None:
                return h3(q, k, v, taps, log_modes, weights, skip=diagonal.D)[0], None
            before = cast("ShiftState | None", state.shift)
            y, z = h3(
                q, k, v, taps, log_modes, weights, skip=diagonal.D, past=None if before is None else before.inputs,
                state=cast(DiagonalState, state.diagonal).z, return_state=True,
            )  # fmt: skip
            assert z is not None
            return y, H3State(None if shift is None or before is None else shift.advance(k, before), DiagonalState(z))

    def _mix_in_turn(
        self, q: Tensor, k: Tensor, v: Tensor, state: H3State | None, lengths: Tensor | None
    ) -> tuple[Tensor, H3State | None]:
        """Any two systems, one after the other."""
        k, shift = _at_least_fp32(k), None
        if self.shift is not None:
            k, shift = self.shift.convolve(k, None if state is None else state.shift, lengths=lengths)
        q, k, v = outer(q, k, v, q.shape[1] // self.head_dim)
        y, diagonal = self.diagonal.convolve(
            k, None if state is None else state.diagonal, pre_gate=v, post_gate=q, lengths=lengths
        )
        return gather(y), None if diagonal is None else H3State(shift, diagonal)

    def init_state(self, batch: int, max_len: int | None = None) -> H3State:
        shift = None if self.shift is None else self.shift.init_state(batch)
        return H3State(shift, self.diagonal.init_state(batch, self.head_dim, self.head_dim))

    def step(self, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k, shift = _at_least_fp32(k), None
        if self.shift is not None:
            k, shift = self.shift.step(k, state.shift)
        q, k, v = outer(q, k, v, q.shape[1] // self.head_dim)
        s, diagonal = self.diagonal.step(k * v, state.diagonal)
        return self.output_linear(gather(q * s).to(q.dtype)), H3State(shift, diagonal)

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[H3State]:
        if isinstance(self.diagonal, Diagonal) and (self.shift is None or isinstance(self.shift, Shift)):
            return _H3Stepper(self, self.shift, self.diagonal, state_dtype)
        return super().stepper(state_dtype)


@dataclass(frozen=True)
class _H3StepState(State):
    """ring (B, T, D): the last T keys, that of position p in slot p % T. z (B, p, p, H, N, 2): the modes, (re, im)."""

    ring: Tensor
    z: Tensor


class _H3Stepper(Stepper[H3State]):
    """One product for q, k and v, one op for both systems and gates, one product out.

    The ring stores keys as the projection makes them. Without a shift it has one slot and one tap, 1.
    """

    @torch.no_grad()
    def __init__(self, mixer: H3, shift: Shift | None, diagonal: Diagonal, state_dtype: torch.dtype | None) -> None:
        super().__init__(mixer)
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self._weight = torch.cat([linear.weight for linear in projections])
        self._bias = torch.cat([linear.bias for linear in projections])
        self._out, self._state_dtype = mixer.output_linear, state_dtype
        self._modes, self._weights = (constant.contiguous() for constant in diagonal.recurrence())
        self._skip = None if diagonal.D is None else diagonal.D.detach()
        self._taps = self._modes.real.new_ones(1, len(self._bias) // 3) if shift is None else shift.step_taps()

    def begin(self, state: H3State, position: Tensor) -> _H3StepState:
        z = torch.view_as_real(cast(DiagonalState, state.diagonal).z)
        length, width = self._taps.shape
        if state.shift is None:
            ring = self._weight.new_zeros(len(z), length, width)
        else:
            keys = cast(ShiftState, state.shift).inputs.to(self._weight.dtype).transpose(1, 2)
            ring = _slots(keys, -ages(position, length) % length)
        return _H3StepState(ring, z.to(self._state_dtype or z.dtype).contiguous())

    def step(self, x: Tensor, state: _H3StepState, position: Tensor) -> tuple[Tensor, _H3StepState]:
        q, k, v = F.linear(x, self._weight, self._bias).chunk(3, -1)
        constants = self._taps, self._modes, self._weights, self._skip
        y, ring, z = h3_step(q, k, v, *constants, state.ring, position, state.z)
        return self._out(y), _H3StepState(ring, z)

    def end(self, state: _H3StepState, position: Tensor) -> H3State:
        real, length = self._modes.real.dtype, len(self._taps)
        diagonal = DiagonalState(torch.view_as_complex(state.z.to(real)))
        if cast(H3, self.mixer).shift is None:
            return H3State(None, diagonal)
        order = (position[:, None] + torch.arange(length, device=position.device)) % length
        return H3State(ShiftState(_slots(state.ring, order).transpose(1, 2).to(real)), diagonal)

    def traffic(self, state: _H3StepState, position: Tensor) -> int:
        return 2 * state.z.nbytes + state.ring.nbytes


def _slots(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, T, D) in the order `index` (B, T), contiguous."""
    return rows.gather(1, index[..., None].expand(rows.shape)).contiguous()


def _channels_first(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x) for x (B, L, D), as (B, D, L) with L contiguous: the product writes this layout, nothing is transposed."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.addmm(linear.bias.unsqueeze(1), linear.weight, flat.t())
    return y.unflatten(1, x.shape[:2]).transpose(0, 1)


def _at_least_fp32(signal: Tensor) -> Tensor:
    return signal.to(torch.promote_types(signal.dtype, torch.float32))


def _nearest_divisor(wanted: int, number: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
