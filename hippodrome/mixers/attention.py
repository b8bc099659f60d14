"""Attention: multi-head softmax attention (Vaswani et al., 2017), with rotary positions (Su et al., 2021) as an option.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s     over the keys s that the pattern shows to t

Shapes: x (B, L, D); q (B, H, L, K); k, v (B, G, L, K), G = H unless queries are grouped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.model import Mixer
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Pattern
from hippodrome.state import State


@dataclass(frozen=True)
class AttentionState(State):
    """Keys and values seen. k, v (B, G, S, K); key_position (B, S) int64, -1 in an empty slot; position (B,) int64: the next.

    With `slots` the buffers are fixed and written in place: slot p % slots holds position p, and one more slot, always
    empty, takes what must not be kept. Without, they grow. `seen` bounds every row's position from above.
    """

    k: Tensor
    v: Tensor
    key_position: Tensor
    position: Tensor
    slots: int | None = None
    seen: int = 0

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        size = max(state.k.shape[2] for state in states)
        if any(state.slots is not None and state.k.shape[2] != size for state in states):
            raise BadInput("states of fixed size join only when they have the same room")
        padded = [state._padded(size) for state in states]
        joined = super().join(padded)
        return dataclasses.replace(joined, seen=max(state.seen for state in states))

    def _padded(self, size: int) -> Self:
        more = size - self.k.shape[2]
        k, v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, key_position=F.pad(self.key_position, (0, more), value=-1))


def rotate(x: Tensor, position: Tensor, dim: int, base: float) -> Tensor:
    """Rotary embedding of the first `dim` channels of x (B, H, L, K), half-split pairs, at positions (B or 1, L)."""
    half = dim // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].float(), x[..., half:dim].float()
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    return torch.cat([turned, x[..., dim:]], -1)


class Attention(Mixer[AttentionState]):
    """Multi-head attention under a pattern."""

    residual_out: ClassVar[tuple[str, ...]] = ("out_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        n_head: int = 4
        n_kv_head: int | None = None
        """Heads of keys and values, a divisor of n_head; None: as many as queries."""
        pattern: Pattern = Causal()
        rotary_dim: int = 0
        """Channels of each head that rotate with position; 0: none."""
        rotary_base: float = 10000.0
        dropout: float = 0.0
        """Share of attention weights dropped in training."""

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        n_head, n_kv = config.n_head, config.n_head if config.n_kv_head is None else config.n_kv_head
        if n_head < 1 or d_model % n_head:
            good = [n for n in range(1, d_model + 1) if d_model % n == 0]
            best = min(good, key=lambda n: abs(n - n_head))
            raise BadInput(f"{n_head} heads do not divide d_model {d_model}: the nearest number that does is {best}")
        if n_kv < 1 or n_head % n_kv:
            raise BadInput(f"n_kv_head is {n_kv}: it must divide n_head {n_head}")
        d_head = d_model // n_head
        if config.rotary_dim < 0 or config.rotary_dim % 2 or config.rotary_dim > d_head:
            raise BadInput(f"rotary_dim is {config.rotary_dim}: it must be even and at most the head width {d_head}")
        self.config = config
        self.n_head, self.n_kv, self.d_head = n_head, n_kv, d_head
        self.Wqkv = nn.Linear(d_model, (n_head + 2 * n_kv) * d_head)
        self.out_proj = nn.Linear(d_model, d_model)
        self.causal = config.pattern.causal

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        batch, length, _ = x.shape
        sizes = [n * self.d_head for n in (self.n_head, self.n_kv, self.n_kv)]
        q, k, v = (t.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for t in self.Wqkv(x).split(sizes, -1))
        at = torch.arange(length, device=x.device)[None]
        position = at if state is None else at + state.position[:, None]
        if self.config.rotary_dim:
            q, k = (rotate(t, position, self.config.rotary_dim, self.config.rotary_base) for t in (q, k))
        dropout = self.config.dropout if self.training else 0.0
        if state is None:
            # In a causal pattern no real token sees the padding on its right, so only others need a mask.
            hidden = None if lengths is None or self.causal else torch.where(at < lengths[:, None], at, -1)
            y = attention(q, k, v, self.config.pattern, k_position=hidden, dropout=dropout)
            after = None
        else:
            real = position if lengths is None else torch.where(at < lengths[:, None], position, -1)
            keys, values, key_position, after = self._remember(state, k, v, real.expand(batch, -1), lengths)
            y = attention(
                q.to(keys.dtype), keys, values, self.config.pattern,
                q_position=position.expand(batch, -1), k_position=key_position, dropout=dropout,
            )  # fmt: skip
        y = y.transpose(1, 2).flatten(2)
        return self.out_proj(y.to(self.out_proj.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else y), after

    def init_state(self, batch: int, max_len: int | None = None) -> AttentionState:
        if not self.causal:
            raise BadInput(f"attention under {self.config.pattern} sees the future: it has no state and cannot generate")
        weight, reach = self.Wqkv.weight, self.config.pattern.reach
        slots = None
        if max_len is not None:
            slots = max_len if reach is None else min(max_len, reach)
        size = 0 if slots is None else slots + 1
        k, v = (weight.new_zeros(batch, self.n_kv, size, self.d_head) for _ in range(2))
        empty = torch.full((batch, size), -1, dtype=torch.int64, device=weight.device)
        return AttentionState(k, v, empty, torch.zeros(batch, dtype=torch.int64, device=weight.device), slots)

    def _remember(
        self, state: AttentionState, k: Tensor, v: Tensor, real: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, AttentionState]:
        """Keys, values and positions that the new queries look at, and the state with the new tokens in it."""
        length = k.shape[2]
        next_position = state.position + (length if lengths is None else lengths)
        seen = state.seen + length
        if state.slots is None:
            k, v = (torch.cat([old.to(new.dtype), new], 2) for old, new in ((state.k, k), (state.v, v)))
            key_position = torch.cat([state.key_position, real], 1)
            kept = self._cropped(k, v, key_position, lengths)
            return k, v, key_position, AttentionState(*kept, next_position, None, seen)
        if self.config.pattern.reach is None and seen > state.slots:
            raise BadInput(f"{seen} tokens do not fit the attention state's room for {state.slots}: ask for a larger max_len")
        if length > 1 and self.config.pattern.reach is not None:
            # A ring drops keys that the chunk's first queries still need, so these look at old and new side by side.
            looked = (torch.cat([state.k, k.to(state.k.dtype)], 2), torch.cat([state.v, v.to(state.v.dtype)], 2),
                      torch.cat([state.key_position, real], 1))  # fmt: skip
            return *looked, self._written(state, k, v, real, next_position, seen)
        after = self._written(state, k, v, real, next_position, seen)
        return after.k, after.v, after.key_position, after

    def _written(
        self, state: AttentionState, k: Tensor, v: Tensor, real: Tensor, next_position: Tensor, seen: int
    ) -> AttentionState:
        """The new tokens in their slots of the fixed buffers; padding and what the ring would overwrite go to the spare one."""
        slots = state.slots
        assert slots is not None
        kept = (real >= 0) & (real >= next_position[:, None] - slots)
        slot = torch.where(kept, real % slots, slots)
        index = slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        state.k.scatter_(2, index, k.to(state.k.dtype))
        state.v.scatter_(2, index, v.to(state.v.dtype))
        state.key_position.scatter_(1, slot, torch.where(kept, real, -1))
        return AttentionState(state.k, state.v, state.key_position, next_position, slots, seen)

    def _cropped(self, k: Tensor, v: Tensor, key_position: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a growing state keeps: everything, or the keys a window can still see."""
        reach = self.config.pattern.reach
        if reach is None or k.shape[2] <= reach:
            return k, v, key_position
        if lengths is None:
            return k[:, :, -reach:], v[:, :, -reach:], key_position[:, -reach:]
        order = key_position.argsort(dim=1, stable=True)[:, -reach:]
        index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index), key_position.gather(1, order)
