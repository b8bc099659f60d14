"""Block-recurrent attention: a window of tokens, and state vectors that step once a block (Hutchins et al., NeurIPS 2022).

    token:   y = W [attend(q; k, v of the W tokens before, bias), attend(q2; k, v of the states)]
    states:  after every W tokens the cell of `_recurrent_cell`, from the keys and values of these and of the W before them

Scores are |scale| (q . k + bias), q and k of unit length, the bias T5's; a token does not see itself. The tokens before the
first are zeros, and are seen. Tokens of a block see the states as they were before it. Without states the layer is a sliding
window. Shapes: x (B, L, D); q, k, v (B, H, L, K); states s (B, S, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.mixers._recurrent_cell import CellKind, GateKind, Projections, RecurrentCell, unit
from hippodrome.mixers._t5_bias import T5Bias
from hippodrome.mixers.attention import AttentionState
from hippodrome.model import Mixer, Stepper
from hippodrome.norms import Fp32Parameters
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Full, Window
from hippodrome.state import State


@dataclass(frozen=True)
class BlockRecurrentState(State):
    """memory: keys (of unit length) and values of the last two blocks, position p in slot p % 2W, zeros before the first
    token. vectors: the states before the block that is being filled, (B, S, D), at least float32."""

    memory: AttentionState
    vectors: Tensor


@dataclass(frozen=True)
class _Tokens:
    """Of a chunk, (B, H, L, K): keys, values, and queries to tokens and to states, times |scale|."""

    k: Tensor
    v: Tensor
    q: Tensor
    q2: Tensor


@dataclass(frozen=True)
class _Blocks:
    """Queries q, q2 (B, blocks, H, T, K), and what they may see: k, v (B, blocks, H, W + T, K), T <= W.

    inside (B,): where in the first block the chunk begins; None: at its start.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    q2: Tensor
    inside: Tensor | None


class BlockRecurrent(Mixer[BlockRecurrentState], Fp32Parameters):
    """Sliding-window attention that reads and writes recurrent state vectors."""

    residual_out: ClassVar[tuple[str, ...]] = ("out_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """window: W, the tokens of a block and the tokens that each one sees. n_state: S; 0: a sliding window alone.

        cell, gate: see `_recurrent_cell`. d_ff: inner width of the cell's network, which "skip" has not; None: 4 D.
        state_ids: a learned vector for each state, without which all would do the same.
        reset_every: tokens after which the states, not the window, start anew; None: never. W: they remember nothing.
        dropout: of the tokens' weights of the window.
        """

        n_head: int = 4
        d_head: int | None = None
        window: int = 512
        n_state: int = 512
        cell: CellKind = "skip"
        gate: GateKind = "fixed"
        d_ff: int | None = None
        state_ids: bool = True
        reset_every: int | None = None
        dropout: float = 0.0

        def __post_init__(self) -> None:
            for name, least in {"n_head": 1, "d_head": 1, "window": 1, "n_state": 0, "d_ff": 1}.items():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise BadInput(f"{name} is {value}: it must be at least {least}")
            if self.reset_every is not None and (self.reset_every < 1 or self.reset_every % self.window):
                good = self.window * max(1, round(self.reset_every / self.window))
                raise BadInput(f"reset_every is {self.reset_every}: it must be a multiple of the window, take {good}")
            if not 0 <= self.dropout < 1:
                raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        if config.d_head is None and d_model % config.n_head:
            near = min((d for d in range(1, d_model + 1) if d_model % d == 0), key=lambda d: abs(d - config.n_head))
            raise BadInput(f"{config.n_head} heads do not divide d_model {d_model}: take {near}, or give d_head")
        self.config, self.n_head, self.window = config, config.n_head, config.window
        self.d_head = config.d_head or d_model // config.n_head
        inner, kinds = config.n_head * self.d_head, 2 if config.n_state else 1
        self.proj = nn.Linear(d_model, (2 + kinds) * inner, bias=False)
        self.out_proj = nn.Linear(kinds * inner, d_model, bias=False)
        self.bias = T5Bias(config.n_head)
        self.scale = nn.Parameter(torch.ones(kinds, config.n_head))
        self.cell: RecurrentCell | None = None
        if config.n_state:
            sizes = (d_model, config.n_state, config.n_head, self.d_head, config.d_ff or 4 * d_model)
            self.cell = RecurrentCell(*sizes, gate=config.gate, kind=config.cell, ids=config.state_ids)

    def forward(
        self, x: Tensor, state: BlockRecurrentState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, BlockRecurrentState | None]:
        memory = self._memory(len(x)) if state is None else state.memory
        vectors = self._initial(len(x)) if state is None else state.vectors
        tokens = self._project(x)
        memory = self._in_dtype(memory, tokens.k.dtype)
        blocks = self._fresh(tokens) if state is None else self._aligned(tokens, memory)
        after = None if state is None else memory.written(tokens.k, tokens.v, lengths)
        vectors, read, unread = self._run(vectors, blocks, memory.position, None if after is None else after.position)
        y = self._read(blocks, read)
        if blocks.inside is not None:
            at = blocks.inside[:, None] + torch.arange(x.shape[1], device=x.device)
            y = y.gather(1, at[..., None].expand(-1, -1, y.shape[2]))
        y = self.out_proj(y[:, : x.shape[1]])
        y = y if unread is None else y + unread.to(y.dtype)
        return y, None if after is None else BlockRecurrentState(after, vectors)

    def init_state(self, batch: int, max_len: int | None = None) -> BlockRecurrentState:
        return BlockRecurrentState(self._memory(batch), self._initial(batch))

    def step(self, x: Tensor, state: BlockRecurrentState) -> tuple[Tensor, BlockRecurrentState]:
        position = state.memory.position
        read = None if self.cell is None else self.cell.project(state.vectors)
        y, memory = self.step_tokens(x, state.memory, None if read is None else read[:2])
        vectors = state.vectors
        if read is not None and self.may_end(position):
            ends = (position + 1) % self.window == 0
            vectors = self.step_vectors(vectors, read, memory.k, memory.v, position // self.window, ends)
        return y, BlockRecurrentState(memory, vectors)

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[BlockRecurrentState]:
        return super().stepper(state_dtype) if self.cell is None else _BlockRecurrentStepper(self, self.cell)

    def may_end(self, position: Tensor) -> bool:
        """Whether a row's block may end with the token at `position` (B,). A device is not waited for: there it always may."""
        if position.device.type != "cpu" or torch.compiler.is_compiling():
            return True
        return bool(((position + 1) % self.window == 0).any())

    def step_tokens(
        self, x: Tensor, memory: AttentionState, read: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, AttentionState]:
        """One token (B, D) given keys and values of the states (B, H, S, K): its output, and the memory with it."""
        token = self._project(x.unsqueeze(1))
        memory = self._in_dtype(memory, token.k.dtype)
        distance = memory.position[:, None] - memory.key_position
        bias = self._bias(distance[:, None]).transpose(0, 1)
        mask = bias.masked_fill(((distance < 1) | (distance > self.window))[:, None, None], -math.inf).to(token.q.dtype)
        dropout = self.config.dropout if self.training else 0.0
        # Not by the op, which would build this mask from positions: 0.15 ms more a token on a CPU, where a step takes 0.5.
        y = F.scaled_dot_product_attention(token.q, memory.k, memory.v, mask, dropout, scale=1.0)
        if read is not None:
            k, v = (t.to(token.q2.dtype) for t in read)
            y = torch.cat([y, F.scaled_dot_product_attention(token.q2, k, v, scale=1.0)], 1)
        return self.out_proj(y.flatten(1)), memory.written(token.k, token.v, None)

    def step_vectors(
        self, vectors: Tensor, own: Projections, k: Tensor, v: Tensor, number: Tensor, ends: Tensor | None
    ) -> Tensor:
        """The states after block `number` (B,), whose keys and values and those before are k, v (B, H, 2W, K).

        own: what the cell projects the states to. ends (B,) bool: where this block is complete; None: everywhere.
        """
        assert self.cell is not None
        after = self.cell.advance(vectors, own, k, v)
        if self.config.reset_every is not None:
            anew = (number + 1) % (self.config.reset_every // self.window) == 0
            after = torch.where(anew[:, None, None], self.cell.initial, after)
        return after if ends is None else torch.where(ends[:, None, None], after, vectors)

    def _memory(self, batch: int) -> AttentionState:
        weight = self.proj.weight
        k, v = (weight.new_zeros(batch, self.n_head, 2 * self.window, self.d_head) for _ in range(2))
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return AttentionState(k, v, position, 2 * self.window, fixed=True)

    def _initial(self, batch: int) -> Tensor:
        if self.cell is None:
            return self.scale.new_zeros(batch, 0, self.proj.in_features)
        return self.cell.initial.repeat(batch, 1, 1)

    @staticmethod
    def _in_dtype(memory: AttentionState, dtype: torch.dtype) -> AttentionState:
        return replace(memory, k=memory.k.to(dtype), v=memory.v.to(dtype))

    def _project(self, x: Tensor) -> _Tokens:
        parts = [part.transpose(1, 2) for part in self.proj(x).unflatten(-1, (-1, self.n_head, self.d_head)).unbind(-3)]
        k, v, *queries = parts
        scales = self.scale.abs()[..., None, None]
        queries = [unit(q) * scale.to(q.dtype) for q, scale in zip(queries, scales, strict=True)]
        return _Tokens(unit(k), v, queries[0], queries[-1])

    def _fresh(self, tokens: _Tokens) -> _Blocks:
        """Tokens from the first of their rows on: before them lie zeros."""
        length = tokens.k.shape[2]
        width, count = (length, 1) if length <= self.window else (self.window, -(-length // self.window))
        more = count * width - length
        k, v = (F.pad(t, (0, 0, self.window, more)) for t in (tokens.k, tokens.v))
        q, q2 = (F.pad(t, (0, 0, 0, more)) for t in (tokens.q, tokens.q2))
        return self._cut(k, v, q, q2, count, None)

    def _aligned(self, tokens: _Tokens, memory: AttentionState) -> _Blocks:
        """Tokens that continue the block which each row is in, after what the memory holds of it and of the block before."""
        window, length = self.window, tokens.k.shape[2]
        inside = memory.position % window
        # The blocks of the row that is furthest in its own, without asking a device that a compiled graph runs on.
        end = length + (window - 1 if torch.compiler.is_compiling() else int(inside.max()))
        width, count = (end, 1) if end <= window else (window, -(-end // window))
        at = torch.arange(-window, count * width, device=inside.device) - inside[:, None]
        newest = (at.clamp(max=length - 1) + 2 * window)[:, None, :, None]
        slot = ((memory.position[:, None] + at) % (2 * window))[:, None, :, None]
        index = torch.where(at[:, None, :, None] < 0, slot, newest)

        def placed(old: Tensor, new: Tensor) -> Tensor:
            return _take(torch.cat([old, new], 2), index)

        k, v = placed(memory.k, tokens.k), placed(memory.v, tokens.v)
        q, q2 = (_take(t, at[:, None, window:, None].clamp(0, length - 1)) for t in (tokens.q, tokens.q2))
        return self._cut(k, v, q, q2, count, inside)

    def _cut(self, k: Tensor, v: Tensor, q: Tensor, q2: Tensor, count: int, inside: Tensor | None) -> _Blocks:
        reach = self.window + q.shape[2] // count
        k, v = (t.unfold(2, reach, self.window).permute(0, 2, 1, 4, 3) for t in (k, v))
        q, q2 = (t.unflatten(2, (count, -1)).transpose(1, 2) for t in (q, q2))
        return _Blocks(k, v, q, q2, inside)

    def _run(
        self, vectors: Tensor, blocks: _Blocks, position: Tensor, end: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
        """The states after the blocks; keys and values (B, blocks, H, S, K) of those before each; and a zero, or None.

        position, end (B,): tokens of each row before and after the blocks; end None: nobody asks for the states after them.
        """
        if self.cell is None:
            return vectors, None, None
        read: list[Projections] = []
        count = blocks.k.shape[1]
        steps = count - 1 if end is None else count if blocks.k.shape[3] == 2 * self.window else 0
        number = position // self.window
        for i in range(count):
            read.append(self.cell.project(vectors))
            if i < steps:
                ends = None if end is None else end >= (number + i + 1) * self.window
                vectors = self.step_vectors(vectors, read[-1], blocks.k[:, i], blocks.v[:, i], number + i, ends)
        unread = None
        if not steps and torch.is_grad_enabled():
            # Data-parallel training waits for the gradient of every parameter, also where no row is longer than a block.
            unread = 0 * self.cell.advance(vectors, read[-1], blocks.k[:, -1], blocks.v[:, -1]).sum()
        k, v = (torch.stack([own[part] for own in read], 1) for part in range(2))
        return vectors, (k, v), unread

    def _read(self, blocks: _Blocks, read: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the tokens take from each other and from the states before their block: (B, T, inner)."""
        queries = blocks.q.shape[3]
        # Without the last key, which none of them sees, the queries stand one place before themselves: at the newest they see.
        q, k, v = (t.flatten(0, 1) for t in (blocks.q, blocks.k[..., :-1, :], blocks.v[..., :-1, :]))
        at = torch.arange(k.shape[2], device=q.device)
        bias = self._bias(self.window + at[:queries, None] - at)
        dropout = self.config.dropout if self.training else 0.0
        y = attention(q, k, v, Window(self.window), bias=bias, scale=1.0, dropout=dropout)
        if read is not None:
            q2, k, v = (t.flatten(0, 1).to(q.dtype) for t in (blocks.q2, *read))
            y = torch.cat([y, attention(q2, k, v, Full(), scale=1.0)], 1)
        return y.unflatten(0, blocks.q.shape[:2]).transpose(2, 3).flatten(3).flatten(1, 2)

    def _bias(self, distance: Tensor) -> Tensor:
        """What is added to the scores of keys at `distance` (...) before their queries: (H, ...)."""
        biases = self.bias(distance.clamp(0, self.window))
        return self.scale[0].abs().view(-1, *[1] * distance.ndim) * biases


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Positions `index` (B, 1, n, 1) of x (B, H, L, K)."""
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


@dataclass(frozen=True)
class _StepState(State):
    """A `BlockRecurrentState`, and keys and values (B, H, S, K) of the states, which change once a block."""

    memory: AttentionState
    vectors: Tensor
    k: Tensor
    v: Tensor


class _BlockRecurrentStepper(Stepper[BlockRecurrentState]):
    """The states are projected when they change. On a device, which is not asked, they are stepped with every token."""

    mixer: BlockRecurrent

    def __init__(self, mixer: BlockRecurrent, cell: RecurrentCell) -> None:
        super().__init__(mixer)
        self.cell = cell

    def begin(self, state: BlockRecurrentState, position: Tensor) -> _StepState:
        k, v, _, _ = self.cell.project(state.vectors)
        return _StepState(state.memory, state.vectors, k.contiguous(), v.contiguous())

    def step(self, x: Tensor, state: _StepState, position: Tensor) -> tuple[Tensor, _StepState]:
        mixer, cell = self.mixer, self.cell
        before = state.memory.position
        y, memory = mixer.step_tokens(x, state.memory, (state.k, state.v))
        if not mixer.may_end(before):
            return y, _StepState(memory, state.vectors, state.k, state.v)
        ends = (before + 1) % mixer.window == 0
        own = cell.project(state.vectors)
        vectors = mixer.step_vectors(state.vectors, own, memory.k, memory.v, before // mixer.window, ends)
        return y, _StepState(memory, vectors, *(t.contiguous() for t in cell.project(vectors)[:2]))

    def end(self, state: _StepState, position: Tensor) -> BlockRecurrentState:
        return BlockRecurrentState(state.memory, state.vectors)

    def traffic(self, state: _StepState, position: Tensor) -> int:
        return sum(t.nbytes for t in (state.memory.k, state.memory.v, state.k, state.v))
