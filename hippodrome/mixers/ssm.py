"""SSM: the layer of S4 around any linear system (Gu, Goel, Ré, ICLR 2022; S4D, NeurIPS 2022).

    y = W g,   g = gelu(system(x)),   with `glu` the output is a * sigmoid(b) where [a, b] = W g
    bidirectional: system(x)_t + sum_(s>=t+lag) K'_(s-t-lag) x_s before the gelu, K' the kernel of a second system

x (B, L, D); the system has one channel each of the D. A system's own state is the mixer's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.lti._base import LTI
from hippodrome.lti.s4d import S4D
from hippodrome.model import Mixer
from hippodrome.part import BadInput
from hippodrome.state import State
from hippodrome.stepper import Stepper


class SSM(Mixer[State]):
    """Long convolution, GELU, linear map."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """glu: the linear map is twice as wide and gates itself. bidirectional: not causal, and so without a state.

        lag: the token the backward kernel meets first. 1: the next, as in S4, DSS and DLR. 0: the present, as in Mega's EMA.
        """

        system: LTI.Config = field(default_factory=S4D.Config)
        bidirectional: bool = False
        lag: Literal[0, 1] = 1
        glu: bool = True
        dropout: float = 0.0

        def __post_init__(self) -> None:
            if not 0 <= self.dropout < 1:
                raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        self.causal = not config.bidirectional
        self.glu, self.lag = config.glu, config.lag
        self.system: LTI[Any] = config.system.build(d_model)
        self.backward_system: LTI[Any] | None = None
        if config.bidirectional:
            backward: LTI[Any] = config.system.build(d_model)
            backward.D = None  # the skip is the forward system's
            self.backward_system = backward
        self.dropout = nn.Dropout(config.dropout)
        self.output_linear = nn.Linear(d_model, 2 * d_model if config.glu else d_model)

    def forward(self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None) -> tuple[Tensor, State | None]:
        u = x.transpose(1, 2)
        if torch.is_autocast_enabled(u.device.type) and u.dtype != torch.float64:
            # The norm before is an fp32 island; the system's input is what the other mixers' products make of theirs.
            u = u.to(torch.get_autocast_dtype(u.device.type))
        if self.backward_system is None:
            y, after = self.system.convolve(u, state, lengths=lengths)
            return self._mix_channels(y.transpose(1, 2)), after
        self._refuse(state)
        if lengths is not None:
            # The backward system would carry padding into the row.
            u = u * (torch.arange(u.shape[-1], device=u.device) < lengths[:, None, None])
        y = self.system.both_ways(u, self.backward_system, self.lag)
        return self._mix_channels(y.transpose(1, 2)), None

    def init_state(self, batch: int, max_len: int | None = None) -> State:
        if not self.causal:
            raise BadInput("a bidirectional SSM sees the future and has no state: build it with bidirectional=False")
        return self.system.init_state(batch)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.causal:
            return super().step(x, state)
        y, after = self.system.step(x, state)
        return self._mix_channels(y), after

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[State]:
        return _SSMStepper(self) if self.causal else super().stepper(state_dtype)

    def _refuse(self, state: State | None) -> None:
        if state is not None:
            raise BadInput("a bidirectional SSM sees the future and takes no state: build it with bidirectional=False")

    def _mix_channels(self, y: Tensor) -> Tensor:
        mixed = self.output_linear(self.dropout(F.gelu(y)))
        return F.glu(mixed, -1) if self.glu else mixed


class _SSMStepper(Stepper[State]):
    """The system's constants once."""

    def __init__(self, mixer: SSM) -> None:
        super().__init__(mixer)
        self._mix_channels, self._system = mixer._mix_channels, mixer.system.stepper()

    def step(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        y, after = self._system(x, state)
        return self._mix_channels(y), after
