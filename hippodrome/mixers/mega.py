"""Mega: attention of one head over moving averages, gated (Ma et al., ICLR 2023). With chunks its time is linear.

    m = silu(EMA(n)),  n = norm(x);   [u, s, r, c] = W m + b with u = sigmoid(u), s, r = silu(s, r);   v = silu(W_v n + b_v)
    q = s * scale_q + shift_q,  k = s * scale_k + shift_k;   h = silu(c + W_o (attention(q, k, v) * r) + b_o)
    y = u * (h - x)                                      which the block adds to x

The attention weights of the keys a query sees, with learned biases of their distance j - i:

    softmax(q_i . k_j / sqrt(Z) + bias), or f(q_i . k_j / count_i + bias) without a sum over the keys: count_i is how many there
    are, f the distribution function of N(1/sqrt(2), 1/(4 pi)) ("laplace") or relu(x)^2

The norm and the dropout are the block's, used within. Both directions of the bidirectional EMA answer the present token.
Shapes: x (B, L, D); q, k (B, L, Z); v, r (B, L, V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.lti._base import DiagonalState
from hippodrome.lti.ema import EMA
from hippodrome.mixers._distance import Function, RotaryBias, SimpleBias, attend
from hippodrome.mixers._slices import by_distance, in_slices
from hippodrome.mixers.attention import AttentionState
from hippodrome.model import Mixer
from hippodrome.ops.long_conv import long_conv
from hippodrome.part import BadInput
from hippodrome.state import State
from hippodrome.stepper import Stepper


@dataclass(frozen=True)
class MegaState(State):
    """The averages, and the keys and values (B, 1, S, Z or V) seen: all of them, or those of the chunk that is being filled."""

    average: DiagonalState
    memory: AttentionState


class Mega(Mixer[MegaState]):
    """Moving average equipped gated attention."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """d_key: Z, an even number; None: D / 4. d_value: V; None: 2 D. d_state: averages of a channel.

        chunk: attention stays within chunks of so many tokens, which the averages cross; None: it is over all. bias: "simple"
        is one number a distance, below `max_positions`, or `chunk` where there are chunks; "rotary" is good at any distance.
        truncation: taps of the averages' kernels, where bidirectional; None: all. hidden_dropout: of the values.
        """

        d_key: int | None = None
        d_value: int | None = None
        d_state: int = 16
        function: Function = "softmax"
        bias: Literal["simple", "rotary"] = "rotary"
        max_positions: int = 1024
        chunk: int | None = None
        bidirectional: bool = False
        truncation: int | None = None
        attention_dropout: float = 0.0
        hidden_dropout: float = 0.0

        def __post_init__(self) -> None:
            for name in ("d_key", "d_value", "max_positions", "chunk", "truncation"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise BadInput(f"{name} is {value}: it must be at least 1")
            if self.d_key is not None and self.d_key % 2:
                raise BadInput(f"d_key is {self.d_key}: it must be even, take {self.d_key + 1}")
            for name in ("attention_dropout", "hidden_dropout"):
                if not 0 <= getattr(self, name) < 1:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
            if self.truncation is not None and not self.bidirectional:
                raise BadInput("truncation is for bidirectional layers: the state of a causal one forgets nothing at once")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.causal = not config.bidirectional
        d_key = config.d_key or max(2, d_model // 8 * 2)
        d_value = config.d_value or 2 * d_model
        self.norm: nn.Module = nn.Identity()
        self.dropout: nn.Module = nn.Identity()
        system = EMA.Config(d_state=config.d_state)
        self.average: EMA = system.build(d_model)
        self.backward_average: EMA | None = None
        if config.bidirectional:
            backward: EMA = dataclasses.replace(system, skip=False).build(d_model)
            self.backward_average = backward
        self._sizes = (d_model, d_key + d_value, d_model), (d_key, d_value)
        self.value_proj = nn.Linear(d_model, d_value)
        self.mix_proj = nn.Linear(d_model, sum(self._sizes[0]))
        self.out_proj = nn.Linear(d_value, d_model)
        self.scale = nn.Parameter(0.02 * torch.randn(2, d_key))
        self.shift = nn.Parameter(torch.zeros(2, d_key))
        reach = config.max_positions if config.chunk is None else config.chunk
        self.bias: SimpleBias | RotaryBias = SimpleBias(reach) if config.bias == "simple" else RotaryBias(d_key)

    def claim(self, norm: nn.Module, dropout: nn.Module) -> tuple[nn.Module, nn.Module]:
        self.norm, self.dropout = norm, dropout
        return nn.Identity(), nn.Identity()

    def forward(
        self, x: Tensor, state: MegaState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, MegaState | None]:
        normed = self.norm(x)
        u = normed.transpose(1, 2)
        if torch.is_autocast_enabled(u.device.type) and u.dtype != torch.float64:
            u = u.to(torch.get_autocast_dtype(u.device.type))
        if self.backward_average is not None:
            if state is not None:
                raise BadInput("a bidirectional Mega sees the future and takes no state: build it with bidirectional=False")
            averaged, average = self._both_ways(u, self.backward_average, lengths), None
        else:
            averaged, average = self.average.convolve(u, None if state is None else state.average, lengths=lengths)
        q, k, v, gates = self._project(normed, averaged.transpose(1, 2))
        if state is None or average is None:
            return self._gated(x, self._attend_all(q, k, v, lengths), *gates), None
        y, memory = self._continue(q, k, v, state.memory, lengths)
        return self._gated(x, y, *gates), MegaState(average, memory)

    def init_state(self, batch: int, max_len: int | None = None) -> MegaState:
        if not self.causal:
            raise BadInput("a bidirectional Mega sees the future and has no state: build it with bidirectional=False")
        weight, chunk = self.mix_proj.weight, self.config.chunk
        if max_len is not None and chunk is None:
            self.bias.check(max_len)
        size = 0 if max_len is None else max_len if chunk is None else min(max_len, chunk)
        k, v = (weight.new_zeros(batch, 1, size, width) for width in self._sizes[1])
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return MegaState(self.average.init_state(batch), AttentionState(k, v, position, chunk, max_len is not None))

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        return super().step(x, state) if not self.causal else self.step_with(x, state, self.average.step, self.bias.table)

    def step_with(
        self,
        x: Tensor,
        state: MegaState,
        average: Callable[[Tensor, DiagonalState], tuple[Tensor, DiagonalState]],
        table: Callable[[int], Tensor],
    ) -> tuple[Tensor, MegaState]:
        """`step`, by the given step of the averages and table of biases."""
        normed = self.norm(x)
        averaged, moved = average(normed, state.average)
        q, k, v, gates = self._project(normed, averaged)
        memory, newest = self._with_room(state.memory, k, v, None)
        position, memory = memory.position[:, None], memory.written(k[:, None, None], v[:, None, None], None)
        keys, values, at = memory.k[:, 0, :newest], memory.v[:, 0, :newest], memory.key_position[:, :newest]
        y = self._look_back(q[:, None], keys, values, position, at, table)
        return self._gated(x, y.squeeze(1), *gates), MegaState(moved, memory)

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[MegaState]:
        return _MegaStepper(self) if self.causal else super().stepper(state_dtype)

    def _both_ways(self, u: Tensor, backward: EMA, lengths: Tensor | None) -> Tensor:
        """The averages of u (B, D, L) from the left and from the right."""
        real = u if lengths is None else u * (torch.arange(u.shape[-1], device=u.device) < lengths[:, None, None])
        taps = min(u.shape[-1], self.config.truncation or u.shape[-1])
        with torch.autocast(u.device.type, enabled=False):
            y = long_conv(real, self.average.kernel(taps), kernel_rev=backward.kernel(taps), skip=self.average.D)
            if lengths is None:
                return y
            # As the authors have it, padding is silent to the averages and not to the skip.
            assert self.average.D is not None
            return y + (self.average.D[:, None] * (u - real)).to(y.dtype)

    def _project(self, normed: Tensor, averaged: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """q, k, v (..., Z or V), and what gates them: u, r and the share c of h that does not come from attention."""
        v = F.dropout(F.silu(self.value_proj(normed)), self.config.hidden_dropout, self.training)
        u, sr, c = self.mix_proj(self.dropout(F.silu(averaged))).split(self._sizes[0], -1)
        s, r = F.silu(sr).split(self._sizes[1], -1)
        q, k = (s.unsqueeze(-2) * self.scale + self.shift).unbind(-2)
        return q, k, v, (torch.sigmoid(u), r, c)

    def _gated(self, x: Tensor, y: Tensor, u: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return u * (self.dropout(F.silu(c + self.out_proj(y * r))) - x)

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """The attention of whole rows (B, L, .), or of chunks that begin where these do."""
        length = q.shape[1]
        size = length if self.config.chunk is None else min(length, self.config.chunk)
        q, k, v = (F.pad(t, (0, 0, 0, -length % size)).unflatten(1, (-1, size)) for t in (q, k, v))
        at, hidden = torch.arange(size, device=q.device), None
        if not self.causal and (lengths is not None or length % size):
            # In a causal layer no real token sees the padding on its right.
            filled = torch.full_like(at[:1], length) if lengths is None else lengths
            hidden = at >= (filled[:, None] - size * torch.arange(q.shape[1], device=q.device))[..., None, None]
        if self.config.chunk is None:
            self.bias.check(size)
        table, how = self.bias.table(size), self._how()

        def some(start: int, stop: int) -> Tensor:
            keys = stop if self.causal else size
            if self.causal:
                unseen, count = at[:keys] > at[start:stop, None], at[start:stop, None] + 1
            elif hidden is None:
                unseen, count = at[:keys] < 0, at[-1:] + 1
            else:
                unseen, count = hidden, (~hidden).sum(-1, keepdim=True).clamp(min=1)
            bias = by_distance(table, start, stop, keys)
            return attend(q[..., start:stop, :], k[..., :keys, :], v[..., :keys, :], bias, unseen, count, **how)

        return in_slices(some, size, q.shape[0] * q.shape[1] * size, how["dropout"]).flatten(1, 2)[:, :length]

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, memory: AttentionState, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """What the queries (B, L, Z) take from the memory and each other, and the memory after them."""
        chunk, length = self.config.chunk, q.shape[1]
        memory, newest = self._with_room(memory, k, v, lengths)
        inside = memory.position if chunk is None else memory.position % chunk
        if newest is not None and length > 1 and not bool(inside.any()):
            return self._attend_all(q, k, v, lengths), memory.written(k[:, None], v[:, None], lengths)
        at = memory.position[:, None] + torch.arange(length, device=q.device)
        if chunk is None:
            memory = memory.written(k[:, None], v[:, None], lengths)
            keys, values, k_at = memory.k[:, 0, :newest], memory.v[:, 0, :newest], memory.key_position[:, :newest]
            return self._look_back(q, keys, values, at, k_at, self.bias.table), memory
        outputs = []
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            counts = None if lengths is None else (lengths - start).clamp(0, q[:, part].shape[1])
            # Writing these drops keys that the first of them still need, so they look at old and new side by side.
            keys, values = torch.cat([memory.k[:, 0], k[:, part]], 1), torch.cat([memory.v[:, 0], v[:, part]], 1)
            k_at = torch.cat([memory.key_position, at[:, part]], 1)
            outputs.append(self._look_back(q[:, part], keys, values, at[:, part], k_at, self.bias.table))
            memory = memory.written(k[:, None, part], v[:, None, part], counts)
        return torch.cat(outputs, 1), memory

    def _look_back(self, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, table: Callable[[int], Tensor]) -> Tensor:
        """Causal attention of queries (B, L, Z) at positions q_at (B, L) to keys (B, S, Z) at k_at (B, S), negative: none."""
        chunk = self.config.chunk
        biases = table(k.shape[1] if chunk is None else chunk)
        newest = len(biases) // 2
        first = torch.zeros_like(q_at) if chunk is None else q_at - q_at % chunk
        how = self._how()

        def some(start: int, stop: int) -> Tensor:
            begin, now = first[:, None, start:stop, None], q_at[:, None, start:stop, None]
            there = k_at[:, None, None]
            bias = biases[(newest + there - now).clamp(0, newest)]
            unseen = (there > now) | (there < begin)
            return attend(q[:, None, start:stop], k[:, None], v[:, None], bias, unseen, now - begin + 1, **how)

        return in_slices(some, q.shape[1], len(k) * k.shape[1], how["dropout"]).squeeze(1)

    def _with_room(
        self, memory: AttentionState, k: Tensor, v: Tensor, lengths: Tensor | None
    ) -> tuple[AttentionState, int | None]:
        memory = dataclasses.replace(memory, k=memory.k.to(k.dtype), v=memory.v.to(v.dtype))
        memory, newest = memory.with_room(1 if k.dim() == 2 else k.shape[1], lengths)
        if newest is not None and self.config.chunk is None:
            self.bias.check(newest)
        return memory, newest

    def _how(self) -> dict[str, Any]:
        return {"function": self.config.function, "dropout": self.config.attention_dropout if self.training else 0.0}


class _MegaStepper(Stepper[MegaState]):
    """The averages' constants once, and the biases of distances until there are more of them."""

    mixer: Mega

    def __init__(self, mixer: Mega) -> None:
        super().__init__(mixer)
        self._average, self._size = mixer.average.stepper(), 0
        self._biases: Tensor | None = None

    def step(self, x: Tensor, state: MegaState, position: Tensor) -> tuple[Tensor, MegaState]:
        return self.mixer.step_with(x, state, self._average, self._table)

    def traffic(self, state: MegaState, position: Tensor) -> int:
        return 2 * state.average.nbytes + state.memory.nbytes

    @torch.no_grad()
    def _table(self, size: int) -> Tensor:
        if self._biases is None or size > self._size:
            self._size = 2 * size
            self._biases = self.mixer.bias.table(self._size)
        return self._biases
