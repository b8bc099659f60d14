"""LTI: everything a long convolution must know of a linear time-invariant system; Diagonal: those with diagonal states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.norms import Fp32Parameters
from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_kernel, mode_powers
from hippodrome.ops.long_conv import long_conv
from hippodrome.part import Part
from hippodrome.state import State

S = TypeVar("S", bound=State)


class LTI(Part, Fp32Parameters, Generic[S], folder="lti"):
    """A bank of `channels` single-input, single-output linear systems. Built as `config.build(channels)`.

    Signals are (..., H, L) with the batch first; the axes between batch and H share the systems. Parameters are fp32 and
    stay fp32. `D` (H,) is the skip from input to output, or None.
    """

    D: nn.Parameter | None

    def kernel(self, length: int) -> Tensor:
        """The impulse response (H, length) without the skip, fp32."""
        raise NotImplementedError

    def response(self, state: S, length: int) -> Tensor:
        """The outputs (..., H, length) still owed to the inputs that `state` remembers."""
        raise NotImplementedError

    def advance(self, u: Tensor, state: S, lengths: Tensor | None = None) -> S:
        """The state after the chunk u (..., H, L), of which the first `lengths` (B,) tokens a row are real."""
        raise NotImplementedError

    def init_state(self, *batch: int) -> S:
        """The state of systems at rest; `batch` are the axes before H."""
        raise NotImplementedError

    def step(self, u: Tensor, state: S) -> tuple[Tensor, S]:
        """One token: u (..., H) -> y (..., H), skip included. Equal to `convolve` on a chunk of one."""
        y, after = self.convolve(u.unsqueeze(-1), state)
        assert after is not None
        return y.squeeze(-1), after

    def stepper(self) -> Callable[[Tensor, S], tuple[Tensor, S]]:
        """`step` under weights that do not change, without gradients: what follows from them alone is computed once."""
        return self.step

    def convolve(
        self,
        u: Tensor,
        state: S | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, S | None]:
        """post * (system(pre * u) + D * pre * u) in u's dtype, and the state after the last real token if one was given.

        u and the gates: (..., H, L). A given state's answer is added to the outputs before the gate.
        """
        with torch.autocast(u.device.type, enabled=False):
            v = u if pre_gate is None else u * pre_gate
            if state is None:
                return long_conv(v, self.kernel(u.shape[-1]), skip=self.D, post_gate=post_gate), None
            y = long_conv(v, self.kernel(u.shape[-1]), skip=self.D) + self.response(state, u.shape[-1]).to(u.dtype)
            return y if post_gate is None else y * post_gate, self.advance(v, state, lengths)

    def from_the_future(self, u: Tensor, lag: int = 1) -> Tensor:
        """The system run from right to left, sum_(s>=t+lag) K_(s-t-lag) u_s plus the skip: (..., H, L) -> (..., H, L).

        lag 1: the first tap meets the next token, for a layer whose forward system answers the present one. lag 0: this one.
        """
        y = self.convolve(u.flip(-1))[0].flip(-1)
        return y if lag == 0 else F.pad(y[..., lag:], (0, lag))

    def both_ways(self, u: Tensor, backward: LTI[Any], lag: int = 1) -> Tensor:
        """This system run from the left and `backward`, which has no skip, from the right: (..., H, L) -> (..., H, L)."""
        length = u.shape[-1]
        with torch.autocast(u.device.type, enabled=False):
            reverse = F.pad(backward.kernel(length)[..., : length - lag], (lag, 0))
            return long_conv(u, self.kernel(length), kernel_rev=reverse, skip=self.D)


@dataclass(frozen=True)
class DiagonalState(State):
    """z (..., H, N) complex64: the modes after the last token, with z_t = exp(log_modes) z_(t-1) + u_t."""

    z: Tensor


class Diagonal(LTI[DiagonalState]):
    """A system with a diagonal state matrix: it has to state its modes, and all else follows.

    z_t = exp(log_modes) z_(t-1) + u_t,    y_t = Re sum_n weights_n z_t,n + D u_t
    """

    def modes(self) -> tuple[Tensor, Tensor]:
        """log_modes and output weights, (H, N): logarithms of the discrete eigenvalues, complex128, since a phase rounded to
        float32 is lost after a million tokens, and C times B, complex64 as the state is."""
        raise NotImplementedError

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """exp(log_modes) and output weights, (H, N) complex: what one step needs. Override it where it is cheaper to get."""
        log_modes, weights = self.modes()
        return torch.exp(log_modes).to(weights.dtype), weights

    def kernel(self, length: int) -> Tensor:
        return mode_kernel(*self.modes(), length)

    def both_ways(self, u: Tensor, backward: LTI[Any], lag: int = 1) -> Tensor:
        # Passing states needs no kernels, and is the faster way even twice.
        return self.convolve(u)[0] + backward.from_the_future(u, lag)

    def response(self, state: DiagonalState, length: int) -> Tensor:
        log_modes, weights = self.modes()
        powers = mode_powers(log_modes, length + 1, weights.dtype)[..., 1:]
        return torch.einsum("...hn,hnl->...hl", state.z * weights, powers).real

    def advance(self, u: Tensor, state: DiagonalState, lengths: Tensor | None = None) -> DiagonalState:
        log_modes, weights = self.modes()
        return self._advance(u, state, lengths, log_modes, weights)

    def init_state(self, *batch: int) -> DiagonalState:
        _, weights = self.modes()
        return DiagonalState(torch.zeros(*batch, *weights.shape, dtype=weights.dtype, device=weights.device))

    def step(self, u: Tensor, state: DiagonalState) -> tuple[Tensor, DiagonalState]:
        return self._step(u, state, *self.recurrence())

    @torch.no_grad()
    def stepper(self) -> Callable[[Tensor, DiagonalState], tuple[Tensor, DiagonalState]]:
        modes, weights = self.recurrence()
        return lambda u, state: self._step(u, state, modes, weights)

    def _step(self, u: Tensor, state: DiagonalState, modes: Tensor, weights: Tensor) -> tuple[Tensor, DiagonalState]:
        with torch.autocast(u.device.type, enabled=False):
            z = modes * state.z + u.to(torch.promote_types(u.dtype, torch.float32)).unsqueeze(-1)
            y = (weights * z).real.sum(-1)
            return (y if self.D is None else y + self.D * u).to(u.dtype), DiagonalState(z)

    def convolve(
        self,
        u: Tensor,
        state: DiagonalState | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, DiagonalState | None]:
        with torch.autocast(u.device.type, enabled=False):
            log_modes, weights = self.modes()
            gates: dict[str, Any] = {"skip": self.D, "pre_gate": pre_gate, "post_gate": post_gate}
            if state is None:
                return diagonal_ssm(u, log_modes, weights, **gates)[0], None
            if lengths is None:
                y, z = diagonal_ssm(u, log_modes, weights, state=state.z, return_state=True, **gates)
                return y, DiagonalState(z)
            y, _ = diagonal_ssm(u, log_modes, weights, state=state.z, **gates)
            v = u if pre_gate is None else u * pre_gate
            return y, self._advance(v, state, lengths, log_modes, weights)

    def _advance(
        self, u: Tensor, state: DiagonalState, lengths: Tensor | None, log_modes: Tensor, weights: Tensor
    ) -> DiagonalState:
        if lengths is None:
            return DiagonalState(diagonal_ssm(u, log_modes, weights, state=state.z, return_state=True)[1])
        # Padding decays a state and cannot be undone, so real tokens are moved to the end and silence goes in front.
        _, driven = diagonal_ssm(right_align(u, lengths), log_modes, weights, return_state=True)
        count = lengths.reshape(-1, *[1] * (u.dim() - 1)).to(log_modes.real.dtype)
        return DiagonalState(driven + torch.exp(count * log_modes).to(weights.dtype) * state.z)


def right_align(u: Tensor, lengths: Tensor) -> Tensor:
    """Rows of u (B, ..., L) with their first `lengths` (B,) tokens moved to the end and zeros in front."""
    length = u.shape[-1]
    source = torch.arange(length, device=u.device) - (length - lengths[:, None])
    shape = (u.shape[0], *[1] * (u.dim() - 2), length)
    moved = u.gather(-1, source.clamp(min=0).reshape(shape).expand(u.shape))
    return moved * (source >= 0).reshape(shape)
