"""Attention: multi-head softmax attention (Vaswani et al., 2017), with positions as options.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K) + b_ts) v_s     over the keys s that the pattern shows to t

q and k turn with their positions (`Rotary`), or b is -slope_h |t - s| (`Alibi`) or learned (`T5Bias`); by default neither.

Shapes: x (B, L, D); q (B, H, L, K); k, v (B, G, L, K), G = H unless queries are grouped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.mixers._slices import by_distance, in_slices
from hippodrome.model import Mixer
from hippodrome.ops.attention import attention
from hippodrome.ops.attention_step import attention_step, turn
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Pattern, Window
from hippodrome.positions import Alibi, Position, Rotary, T5Bias
from hippodrome.state import State
from hippodrome.stepper import Stepper


@dataclass(frozen=True)
class AttentionState(State):
    """Keys and values seen: k, v (B, G, S, K) in S slots; position (B,) int64, the tokens each row has seen.

    A row's position p lies in slot p, or p % S where S is `reach`, the window: rows of different lengths share the buffers,
    and what a slot holds follows from `position`. S grows with the longest row, up to `reach`; fixed: it is the room asked for.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    reach: int | None = None
    fixed: bool = False

    @property
    def wraps(self) -> bool:
        """Whether new keys take the slots of those that no query will see again."""
        return self.k.shape[2] == self.reach

    @property
    def key_position(self) -> Tensor:
        """(B, S): the position whose key each slot holds, negative in an empty slot."""
        newest, size = self.position[:, None] - 1, self.k.shape[2]
        return newest - (newest - torch.arange(size, device=newest.device)) % max(size, 1)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = max(state.k.shape[2] for state in states)
        joined = super().join([state.padded(size) for state in states])
        return dataclasses.replace(joined, fixed=all(state.fixed for state in states))

    def padded(self, size: int) -> Self:
        """The same rows in `size` slots, which are not fewer than now. A window whose slots have wrapped has all of its."""
        more = (0, 0, 0, size - self.k.shape[2])
        return dataclasses.replace(self, k=F.pad(self.k, more), v=F.pad(self.v, more))

    def with_room(self, length: int, lengths: Tensor | None) -> tuple[Self, int | None]:
        """The state with slots for a chunk, and the tokens of its longest row then; None where the host does not know.

        A single token on a GPU is not worth waiting for, and a compiled graph is not broken for it: a growing state grows by
        `length` then, and whether a fixed one has room is the caller's care.
        """
        size, newest = self.k.shape[2], None
        if not torch.compiler.is_compiling() and (length > 1 or self.position.device.type == "cpu"):
            newest = int((self.position + (length if lengths is None else lengths)).max())
        if not self.fixed:
            wanted = size + length if newest is None else max(size, newest)
            return self.padded(wanted if self.reach is None else min(wanted, self.reach)), newest
        if newest is not None and not self.wraps:
            _check_room(newest, size)
        return self, newest

    def written(self, k: Tensor, v: Tensor, counts: Tensor | None) -> Self:
        """The state after the new keys and values (B, G, L, K), of which the first `counts` (B,) are real; None: all."""
        after = dataclasses.replace(self, position=self.position + (k.shape[2] if counts is None else counts))
        if k.shape[2] == 1 and counts is None:
            return dataclasses.replace(after, k=self._token(self.k, k), v=self._token(self.v, v))
        # For every slot the new token it ends up with, negative where it keeps what it holds.
        source = after.key_position - self.position[:, None]
        return dataclasses.replace(after, k=_refilled(self.k, k, source), v=_refilled(self.v, v, source))

    def _token(self, buffer: Tensor, new: Tensor) -> Tensor:
        """One token a row, in place unless a gradient is to flow through it."""
        slot = self.position % buffer.shape[2] if self.wraps else self.position
        slot = slot[:, None, None, None].expand_as(new)
        return buffer.scatter(2, slot, new) if torch.is_grad_enabled() else buffer.scatter_(2, slot, new)


def _refilled(buffer: Tensor, new: Tensor, source: Tensor) -> Tensor:
    source = source[:, None, :, None]
    index = source.clamp(min=0).expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(source >= 0, new.gather(2, index), buffer)


def rotate(x: Tensor, position: Tensor, dim: int, base: float, closed: bool = False) -> Tensor:
    """Rotary embedding of the first `dim` channels of x (B, H, L, K), half-split pairs, at positions (B or 1, L).

    Angles are fp32; channel j < dim / 2 turns with j + dim / 2 by position * base^(-2 j / dim), or by
    position * base^(-j / (dim / 2 - 1)) where the table is `closed`.
    """
    return turn(x, position[:, None, :, None] * frequencies(dim, base, x.device, closed))


def frequencies(dim: int, base: float, device: torch.device, closed: bool = False) -> Tensor:
    """Radians that each of dim / 2 pairs turns by from one position to the next, fp32."""
    half = dim // 2
    steps = max(half - 1, 1) if closed else half
    return base ** (-torch.arange(half, dtype=torch.float32, device=device) / steps)


class Attention(Mixer[AttentionState]):
    """Multi-head attention under a pattern."""

    residual_out: ClassVar[tuple[str, ...]] = ("out_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        n_head: int = 4
        n_kv_head: int | None = None
        """Heads of keys and values, a divisor of n_head; None: as many as queries."""
        pattern: Pattern = field(default_factory=Causal)
        position: Position | None = None
        dropout: float = 0.0
        """Share of attention weights dropped in training."""
        init: Literal["model", "xavier"] = "model"
        """model: as the model begins. xavier: as ViT's do, each of the four maps uniform of variance 2 / (in + out)."""

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        n_head, n_kv = config.n_head, config.n_head if config.n_kv_head is None else config.n_kv_head
        if n_head < 1 or d_model % n_head:
            raise BadInput(f"{n_head} heads do not divide d_model {d_model}: take {_nearest_divisor(n_head, d_model)}")
        if n_kv < 1 or n_head % n_kv:
            raise BadInput(f"n_kv_head {n_kv} does not divide n_head {n_head}: take {_nearest_divisor(n_kv, n_head)}")
        d_head = d_model // n_head
        if not 0 <= config.dropout < 1:
            raise BadInput(f"dropout is {config.dropout}: it must be at least 0 and below 1")
        self.config = config
        self.n_head, self.n_kv, self.d_head = n_head, n_kv, d_head
        self.rotation = _rotation(config.position, d_head)
        if isinstance(config.position, T5Bias):
            self.distance_bias = nn.Parameter(torch.zeros(config.position.buckets, n_head))
        self.Wqkv = nn.Linear(d_model, (n_head + 2 * n_kv) * d_head)
        self.out_proj = nn.Linear(d_model, d_model)
        self.causal = config.pattern.causal

    def init_weights(self) -> None:
        if self.config.init == "xavier":
            sizes = [n * self.d_head for n in (self.n_head, self.n_kv, self.n_kv)]
            for weight in (*self.Wqkv.weight.split(sizes), self.out_proj.weight):
                nn.init.xavier_uniform_(weight)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        length = x.shape[1]
        sizes = [n * self.d_head for n in (self.n_head, self.n_kv, self.n_kv)]
        q, k, v = (t.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for t in self.Wqkv(x).split(sizes, -1))
        at = torch.arange(length, device=x.device)[None]
        position = at if state is None else at + state.position[:, None]
        if self.rotation is not None:
            q, k = (rotate(t, position, *self.rotation) for t in (q, k))
        if state is None:
            # In a causal pattern no real token sees the padding on its right, so only others need to hide it.
            padded = None if self.causal else lengths
            y = self._attend(q, k, v, k_lengths=padded, pattern=self.config.pattern.sized(length, self.n_head))
        else:
            y, state = self._continue(q, k, v, position, state, lengths)
        return self.out_proj(y.transpose(1, 2).flatten(2)), state

    def init_state(self, batch: int, max_len: int | None = None) -> AttentionState:
        if not self.causal:
            raise BadInput(f"attention under {self.config.pattern} sees the future: it has no state and cannot generate")
        weight, reach = self.Wqkv.weight, self.config.pattern.reach
        size = 0 if max_len is None else max_len if reach is None else min(max_len, reach)
        k, v = (weight.new_zeros(batch, self.n_kv, size, self.d_head) for _ in range(2))
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return AttentionState(k, v, position, reach, max_len is not None)

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[AttentionState]:
        # The op's slots hold all that these two patterns show to a query, and nothing that they hide.
        seen_whole = type(self.config.pattern) in (Causal, Window)
        # It adds nothing to the scores.
        plain = self.config.position is None or isinstance(self.config.position, Rotary)
        return _AttentionStepper(self) if seen_whole and plain else super().stepper(state_dtype)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_position: Tensor | None = None,
        k_position: Tensor | None = None,
        k_lengths: Tensor | None = None,
        pattern: Pattern | None = None,
    ) -> Tensor:
        position, dropout = self.config.position, self.config.dropout if self.training else 0.0
        pattern = self.config.pattern if pattern is None else pattern
        places = {"q_position": q_position, "k_position": k_position, "k_lengths": k_lengths}
        if isinstance(position, T5Bias):
            return self._attend_biased(q, k, v, position, places, pattern, dropout)
        slopes = position.slopes(self.n_head, q.device) if isinstance(position, Alibi) else None
        return attention(q, k, v, pattern, **places, slopes=slopes, dropout=dropout)

    def _attend_biased(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: T5Bias,
        places: Mapping[str, Tensor | None],
        pattern: Pattern,
        dropout: float,
    ) -> Tensor:
        """With T5's table added to the scores: no backend takes biases of distances, so they are written out, in slices."""
        keys, before = k.shape[2], k.shape[2] - q.shape[2]
        q_position, k_position = places["q_position"], places["k_position"]
        by_offset = self._by_offset(position, keys) if q_position is None else None

        def some(start: int, stop: int) -> Tensor:
            seen, q_at = keys, None if q_position is None else q_position[:, start:stop]
            if by_offset is None:
                assert q_at is not None
                k_at = torch.arange(keys, device=q.device)[None] if k_position is None else k_position
                bias = self.distance_bias[position.bucket(q_at[:, :, None], k_at[:, None])].permute(0, 3, 1, 2)
            else:
                # Padding is hidden, and its bias of no consequence.
                seen = before + stop if pattern.causal and k_position is None else keys
                bias = by_distance(by_offset, before + start, before + stop, seen).transpose(0, 1)
                q_at = None if seen == before + stop else torch.arange(before + start, before + stop, device=q.device)[None]
            part = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
            return attention(*part, pattern, **{**places, "q_position": q_at}, bias=bias, dropout=dropout)

        return in_slices(some, q.shape[2], q.shape[0] * q.shape[1] * keys, dropout)

    def _by_offset(self, position: T5Bias, keys: int) -> Tensor:
        """Biases of keys that stand -(n - 1) ... n - 1 places behind a query (2 n - 1, H)."""
        at = torch.arange(1 - keys, keys, device=self.distance_bias.device)
        return self.distance_bias[position.bucket(torch.zeros_like(at), at)]

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, state: AttentionState, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """What the queries at `position` (B, L) take from the past and the chunk, and the state after the chunk."""
        length = k.shape[2]
        state = dataclasses.replace(state, k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        state, newest = state.with_room(length, lengths)
        if newest is not None and length > 1 and not int(state.position.max()):
            return self._attend(q, k, v), state.written(k, v, lengths)
        if length > 1 and state.reach is not None:
            # Writing the chunk drops keys that its first queries still need, so these look at old and new side by side.
            real = (
                position
                if lengths is None
                else torch.where(position - state.position[:, None] < lengths[:, None], position, -1)
            )
            keys, values = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            y = self._attend(q, keys, values, q_position=position, k_position=torch.cat([state.key_position, real], 1))
            return y, state.written(k, v, lengths)
        after = state.written(k, v, lengths)
        keys, values, at = after.k[:, :, :newest], after.v[:, :, :newest], after.key_position[:, :newest]
        return self._attend(q, keys, values, q_position=position, k_position=at), after


@dataclass(frozen=True)
class _AttentionStepState(State):
    """The fixed keys and values of an `AttentionState`; it counts no positions."""

    k: Tensor
    v: Tensor
    wraps: bool


class _AttentionStepper(Stepper[AttentionState]):
    """Keys and values of fixed room are written in place, and read as far as filled; a state that grows takes `step`."""

    mixer: Attention

    def __init__(self, mixer: Attention) -> None:
        super().__init__(mixer)
        self._frequency: Tensor | None = None
        if mixer.rotation is not None:
            dim, base, closed = mixer.rotation
            self._frequency = frequencies(dim, base, mixer.Wqkv.weight.device, closed)

    def begin(self, state: AttentionState, position: Tensor) -> State:
        return _AttentionStepState(state.k, state.v, state.wraps) if state.fixed else state

    def step(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        if not isinstance(state, _AttentionStepState):
            return super().step(x, state, position)
        if position.device.type == "cpu" and not torch.compiler.is_compiling() and not state.wraps:
            _check_room(int(position.max()) + 1, state.k.shape[2])
        mixer = self.mixer
        sizes = [n * mixer.d_head for n in (mixer.n_head, mixer.n_kv, mixer.n_kv)]
        q, k, v = (t.unflatten(-1, (-1, mixer.d_head)) for t in mixer.Wqkv(x).split(sizes, -1))
        y, keys, values = attention_step(q, k, v, state.k, state.v, position, self._frequency)
        return mixer.out_proj(y.flatten(1)), _AttentionStepState(keys, values, state.wraps)

    def end(self, state: State, position: Tensor) -> AttentionState:
        if isinstance(state, AttentionState):
            return state
        assert isinstance(state, _AttentionStepState)
        return AttentionState(state.k, state.v, position, self.mixer.config.pattern.reach, fixed=True)

    def traffic(self, state: State, position: Tensor) -> int:
        if not isinstance(state, _AttentionStepState):
            return super().traffic(state, position)
        slots = state.k.shape[2]
        filled = int(position.clamp(max=slots).sum())
        return (state.k.nbytes + state.v.nbytes) * filled // max(1, slots * len(position))


def _rotation(position: Position | None, d_head: int) -> tuple[int, float, bool] | None:
    """How many channels of a head turn, their base, and whether their table is closed; None: none turn."""
    if not isinstance(position, Rotary):
        return None
    dim = d_head if position.dim is None else position.dim
    if dim < 0 or dim % 2 or dim > d_head:
        raise BadInput(f"Rotary's dim is {dim}: it must be even, 0 or more and at most the head width {d_head}")
    return (dim, position.base, position.closed) if dim else None


def _check_room(tokens: int, slots: int) -> None:
    if tokens > slots:
        raise BadInput(f"{tokens} tokens do not fit the attention state's room for {slots}: ask for a larger max_len")


def _nearest_divisor(wanted: int, number: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
