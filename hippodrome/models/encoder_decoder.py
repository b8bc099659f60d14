"""Encoder-decoder: a source is read both ways once, and what is written looks at all of it (Vaswani et al., 2017).

    h = encoder(source)                          blocks of any mixers: BigBird's encoder form, full attention, SSMs both ways
    z = z + mixer(LN z)                          causal, over the target
    z = z + Attention(q = LN z, k = v = h)       every key of the source and none of its padding
    z = z + channel(LN z)

A row is  source, `start`, target  in one: its first `start` parts the two and is the first token that the decoder reads. So it
is trained, scored and sampled from as a model of one sequence is, and any of these can learn the same rows. Logits at the
source are zero. Keys and values of the source are made once, when `start` comes; a source may come in pieces and is kept until
then. Source and target share the table of embeddings, and each counts its positions from 0. The encoder costs what its mixers
cost, T target tokens cost T S in the cross-attention: BigBird-Pegasus' (Zaheer et al., 2020) split of the work.
Shapes: source (B, S), h (B, S, D), z (B, T, D); q (B, H, T, K), k and v (B, H, S, K).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hippodrome.model import (
    Aux,
    Block,
    BlockConfig,
    Loss,
    ModelState,
    Output,
    WholeModel,
    _left_align,
)
from hippodrome.norms import build_norm
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Full
from hippodrome.state import State
from hippodrome.stepper import ModelStepper, Stepper
from hippodrome.task import IGNORE, Batch, several

Memory = tuple[Tensor, Tensor]
"""Keys and values (B, H, S, K) of the source for one decoder block."""


@dataclass(frozen=True)
class EncoderDecoderState(ModelState):
    """source (B, S): the ids before `start`, n_source (B,) of them real. memory: a pair for each block, none before a `start`.

    `position` counts all tokens of a row, so that it has `position - n_source` target tokens. `blocks` are the states of the
    decoder, none before a `start`. room: the most tokens of a row; None: any.
    """

    source: Tensor
    n_source: Tensor
    memory: tuple[Memory, ...]
    room: int | None

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        width = max(state.source.shape[1] for state in states)
        return super().join([state.padded(width) for state in states])

    def padded(self, width: int) -> Self:
        """The same rows with room for a source of `width` tokens."""
        more = width - self.source.shape[1]
        memory = tuple((F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))) for k, v in self.memory)
        return dataclasses.replace(self, source=F.pad(self.source, (0, more)), memory=memory) if more else self


class _Decoded(NamedTuple):
    """What the decoder made of a chunk: its hidden vectors (B, T, D), those of a row from column `skip` (B,) of the chunk on.

    `counts` (B,) of them are real.
    """

    hidden: Tensor
    skip: Tensor
    counts: Tensor
    state: EncoderDecoderState
    aux: Aux


class EncoderDecoder(WholeModel):
    """`blocks` are the decoder's."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WholeModel.Config):
        encoder: tuple[BlockConfig, ...]
        start: int
        """The id between a source and its target, which also ends the target."""
        n_head: int = 4
        """Heads of the cross-attention."""

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config)
        d_model, first, last = config.d_model, config.encoder[-1], config.blocks[-1]
        self.embed = config.embed.build(d_model)
        self.encoder = nn.ModuleList(Block(block, d_model) for block in config.encoder)
        self.encoder_norm = build_norm(first.norm, d_model, first.norm_eps) if first.order == "pre" else nn.Identity()
        self.blocks = nn.ModuleList(_DecoderBlock(block, d_model, config.n_head) for block in config.blocks)
        self.final_norm = build_norm(last.norm, d_model, last.norm_eps) if last.order == "pre" else nn.Identity()
        self.readout = config.readout.build(d_model, self.embed)
        table = getattr(self.embed, "weight", None)
        if isinstance(table, Tensor) and config.start >= len(table):
            raise BadInput(f"start is {config.start}: it must be an id, at most {len(table) - 1}")
        if not self.causal:
            raise BadInput("the decoder's mixers must be causal, its embedding one of tokens: what it writes must not be seen")
        self._init_weights()

    @property
    def prompt_end(self) -> int:
        return self.config.start

    def forward(self, inputs: Tensor, state: ModelState | None = None, *, lengths: Tensor | None = None) -> Output:
        if several(inputs):
            raise BadInput("rows of several sequences: an encoder-decoder reads source and target as one")
        counts, undo = lengths, None
        if lengths is not None and lengths.dim() == 2:
            inputs, undo = _left_align(inputs, lengths)
            counts = lengths[:, 1] - lengths[:, 0]
        done = self._decoded(inputs, state, counts)
        logits = _placed(self.readout(done.hidden), done, inputs.shape[1])
        return Output(logits if undo is None else undo(logits), None if state is None else done.state, done.aux)

    def loss(self, batch: Batch, state: ModelState | None = None) -> Loss:
        """The readout's mean loss over the targets, which lie from `start` on; the source costs no readout."""
        if state is not None:
            raise BadInput("carry_state is on: an encoder-decoder reads all of its source in every batch and carries nothing")
        if several(batch.inputs):
            raise BadInput("rows of several sequences: an encoder-decoder reads source and target as one")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise BadInput("cuda_graph is on, but sources of any length have no graph in common: turn it off")
        inputs, targets, lengths = batch.inputs, batch.targets, batch.lengths
        if lengths is not None and lengths.dim() == 2:
            inputs, targets = _left_align(inputs, lengths)[0], _left_align(targets, lengths)[0]
            lengths = lengths[:, 1] - lengths[:, 0]
        done = self._decoded(inputs, None, lengths)
        index = torch.arange(done.hidden.shape[1], device=inputs.device)
        asked = targets.gather(1, (done.skip[:, None] + index).clamp(max=inputs.shape[1] - 1))
        asked = asked.masked_fill(index >= done.counts[:, None], IGNORE)
        lost = (targets != IGNORE).sum() - (asked != IGNORE).sum()
        if lost:
            raise BadInput(f"{int(lost)} targets lie before the id {self.config.start}, in a source: nothing is said there")
        nats, count = self.readout.loss(done.hidden, Batch(inputs, asked))
        extra = sum((value for name, value in done.aux.items() if name.startswith("loss/")), torch.zeros_like(nats))
        one = torch.ones_like(nats)
        parts = {"loss": (nats.detach(), count)} | {name: (value.detach(), one) for name, value in done.aux.items()}
        return Loss(nats / count.clamp(min=1) + extra, parts)

    def init_state(self, batch: int, max_len: int | None = None) -> EncoderDecoderState:
        nothing = torch.zeros(batch, dtype=torch.int64, device=next(self.parameters()).device)
        return EncoderDecoderState(nothing, (), nothing.new_zeros(batch, 0), nothing, (), max_len)

    def prefill(self, inputs: Tensor, state: ModelState, *, lengths: Tensor | None = None) -> tuple[Tensor, ModelState]:
        if lengths is not None and lengths.dim() == 2:
            inputs, lengths = _left_align(inputs, lengths)[0], lengths[:, 1] - lengths[:, 0]
        done = self._decoded(inputs, state, lengths)
        hidden = done.hidden if done.hidden.shape[1] else done.hidden.new_zeros(len(inputs), 1, self.config.d_model)
        last = (done.counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
        logits = self.readout(hidden.gather(1, last)).squeeze(1)
        return logits.masked_fill((done.counts == 0)[:, None], 0), done.state

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self.prefill(inputs.unsqueeze(1), state)

    def stepper(self, state_dtype: torch.dtype | None = None) -> ModelStepper:
        return _Stepper(self, [block.mixer.stepper(state_dtype) for block in self._stack])

    def _decoded(self, inputs: Tensor, state: ModelState | None, counts: Tensor | None) -> _Decoded:
        """The chunk (B, L) after `state`: its sources are kept, encoded where a `start` ends them, its targets decoded."""
        batch, length = inputs.shape
        before = self.init_state(batch) if state is None else cast(EncoderDecoderState, state)
        real = torch.full_like(before.position, length) if counts is None else counts
        hit = (inputs == self.config.start) & (torch.arange(length, device=inputs.device) < real[:, None])
        first = torch.where(hit.any(1), hit.int().argmax(1), real)
        decoding = before.position > before.n_source
        skip = first.masked_fill(decoding, 0)
        n_source, new = before.n_source + skip, real - skip
        # What the host has to know, fetched at once.
        facts = torch.stack([n_source.min(), n_source.max(), new.min(), new.max()]).tolist()
        shortest, longest, least, most = facts
        grown = before.padded(max(longest, before.source.shape[1]))
        grown = dataclasses.replace(grown, source=_appended(grown.source, before.n_source, inputs, skip), n_source=n_source)
        if not most:
            grown = dataclasses.replace(grown, position=before.position + real)
            return _Decoded(self.embed(inputs[:, :0]), skip, new, grown, {})

        aux: dict[str, Tensor] = {}
        rows = (~decoding & (new > 0)).nonzero()[:, 0]
        memory = grown.memory if not len(rows) else self._remembered(grown, rows, shortest, aux)
        states: tuple[Any, ...] = before.blocks or (None,) * len(self.blocks)
        if state is not None and not before.blocks:
            room = None if before.room is None else before.room - shortest
            states = tuple(block.mixer.init_state(batch, room) for block in self._stack)
        index = (skip[:, None] + torch.arange(most, device=inputs.device)).clamp(max=length - 1)
        z = self.embed(inputs.gather(1, index), None if state is None else before.position - before.n_source)
        at = None if shortest == grown.source.shape[1] else _key_position(grown)
        after: list[Any] = []
        for block, one, keys in zip(self.blocks, states, memory, strict=True):
            z, one, extras = self._through(block, z, one, None if least == most else new, keys, at)
            after.append(one)
            _add(aux, extras)
        grown = dataclasses.replace(grown, position=before.position + real, memory=memory, blocks=tuple(after))
        return _Decoded(self.final_norm(z), skip, new, grown, aux)

    def _remembered(
        self, state: EncoderDecoderState, rows: Tensor, shortest: int, aux: dict[str, Tensor]
    ) -> tuple[Memory, ...]:
        """Keys and values of the sources of all rows, after those of `rows` have ended."""
        everyone = len(rows) == len(state.source)
        source = state.source if everyone else state.source[rows]
        h = self.embed(source)
        lengths = None if shortest == source.shape[1] else state.n_source if everyone else state.n_source[rows]
        for block in self.encoder if source.shape[1] else ():
            h, _, extras = self._through(block, h, None, lengths)
            _add(aux, extras)
        h = self.encoder_norm(h)
        new = tuple(cast(_DecoderBlock, block).cross.keys(h) for block in self.blocks)
        if everyone:
            return new
        held = state.memory or tuple((k.new_zeros(len(state.source), *k.shape[1:]),) * 2 for k, _ in new)
        pairs = zip(held, new, strict=True)
        return tuple((_put(k, rows, new_k), _put(v, rows, new_v)) for (k, v), (new_k, new_v) in pairs)

    def _through(self, block: nn.Module, *given: Any) -> tuple[Tensor, Any, Aux]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)


class _CrossAttention(nn.Module):
    """z (B, T, D) reads keys and values of a source (B, S, D); neither is told positions."""

    residual_out: ClassVar[tuple[str, ...]] = ("out_proj",)

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.Wq, self.Wkv = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def keys(self, source: Tensor) -> Memory:
        k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.Wkv(source).chunk(2, -1))
        return k, v

    def forward(self, z: Tensor, memory: Memory, at: Tensor | None) -> Tensor:
        q = self.Wq(z).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k, v = (t.to(q.dtype) for t in memory)
        y = cast(Tensor, attention(q, k, v, Full(), k_position=at))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _DecoderBlock(Block):
    """A block that looks at a source between its mixer and its channel mixer, normed as these are."""

    def __init__(self, config: BlockConfig, d_model: int, n_head: int) -> None:
        super().__init__(config, d_model)
        self.cross_norm = build_norm(config.norm, d_model, config.norm_eps)
        self.cross = _CrossAttention(d_model, n_head)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State | None, lengths: Tensor | None, memory: Memory, at: Tensor | None
    ) -> tuple[Tensor, State | None, Aux]:
        mixed, after = self.mixer(x if self.post else self.mixer_norm(x), state, lengths=lengths)
        x, aux = self._look(x, mixed, memory, at)
        return x, after, aux

    def step(  # type: ignore[override]
        self, x: Tensor, state: State, position: Tensor, stepper: Stepper[Any], memory: Memory, at: Tensor
    ) -> tuple[Tensor, State]:
        """One token: x (B, D) -> (B, D), and the mixer's state."""
        mixed, after = stepper.step(x if self.post else self.mixer_norm(x), state, position)
        return self._look(x.unsqueeze(1), mixed.unsqueeze(1), memory, at)[0].squeeze(1), after

    def _look(self, x: Tensor, mixed: Tensor, memory: Memory, at: Tensor | None) -> tuple[Tensor, Aux]:
        x = self._sum(x, self.mixer_dropout(mixed), self.mixer_norm)
        seen = self.cross(x if self.post else self.cross_norm(x), memory, at)
        return self._mix_channels(self._sum(x, self.dropout(seen), self.cross_norm))


class _Stepper(ModelStepper):
    """Rows that are all past their `start` need the decoder alone; others take the model's own step."""

    model: EncoderDecoder
    fast = False

    def begin(self, state: ModelState) -> ModelState:
        before = cast(EncoderDecoderState, state)
        self.fast = bool((before.position > before.n_source).all())
        return self._each("begin", before) if self.fast else before

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        if not self.fast:
            return self.model.step(inputs, state)
        before, after, model = cast(EncoderDecoderState, state), [], self.model
        position, at = before.position - before.n_source, _key_position(before)
        x = model.embed(inputs.unsqueeze(1), position).squeeze(1)
        for block, mixer, one, memory in zip(model.blocks, self.mixers, before.blocks, before.memory, strict=True):
            x, one = cast(_DecoderBlock, block).step(x, one, position, mixer, memory, at)
            after.append(one)
        logits = model.readout(model.final_norm(x).unsqueeze(1)).squeeze(1)
        return logits, dataclasses.replace(before, position=before.position + 1, blocks=tuple(after))

    def end(self, state: ModelState) -> ModelState:
        return self._each("end", cast(EncoderDecoderState, state)) if self.fast else state

    def traffic(self, state: ModelState) -> int:
        """Keys and values of the source are read, and what the mixers say."""
        now = cast(EncoderDecoderState, state)
        read = sum(t.nbytes for pair in now.memory for t in pair)
        pairs = zip(self.mixers, now.blocks, strict=True) if self.fast else ()
        return read + sum(mixer.traffic(one, now.position - now.n_source) for mixer, one in pairs)

    def _each(self, what: str, state: EncoderDecoderState) -> EncoderDecoderState:
        position = state.position - state.n_source
        pairs = zip(self.mixers, state.blocks, strict=True)
        return dataclasses.replace(state, blocks=tuple(getattr(mixer, what)(one, position) for mixer, one in pairs))


def _key_position(state: EncoderDecoderState) -> Tensor:
    """(B, S): where the source's keys stand, -1 for padding."""
    at = torch.arange(state.source.shape[1], device=state.source.device)
    return torch.where(at < state.n_source[:, None], at, -1)


def _appended(source: Tensor, filled: Tensor, inputs: Tensor, new: Tensor) -> Tensor:
    """source (B, S), of which `filled` (B,) are taken, with the first `new` (B,) of the inputs behind."""
    index = torch.arange(source.shape[1], device=source.device) - filled[:, None]
    taken = inputs.gather(1, index.clamp(0, max(inputs.shape[1] - 1, 0)))
    return torch.where((index >= 0) & (index < new[:, None]), taken, source)


def _put(held: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return held.to(new.dtype).index_copy(0, rows, new)


def _placed(x: Tensor, done: _Decoded, length: int) -> Tensor:
    """x (B, T, V) in its columns of the chunk (B, length, V), zero elsewhere."""
    index = torch.arange(length, device=x.device) - done.skip[:, None]
    if not x.shape[1]:
        return x.new_zeros(*index.shape, x.shape[2])
    inside = (index >= 0) & (index < done.counts[:, None])
    found = x.gather(1, index.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))
    return found.masked_fill(~inside[..., None], 0)


def _add(aux: dict[str, Tensor], more: Aux) -> None:
    for name, value in more.items():
        aux[name] = aux[name] + value if name in aux else value


def _check(config: EncoderDecoder.Config) -> None:
    if config.d_model < 1 or not config.blocks or not config.encoder:
        sizes = f"{config.d_model}, {len(config.encoder)} and {len(config.blocks)}"
        raise BadInput(f"an encoder-decoder needs d_model, encoder and decoder blocks of at least 1, not {sizes}")
    if config.n_head < 1 or config.d_model % config.n_head:
        raise BadInput(f"{config.n_head} heads do not divide d_model {config.d_model} in the cross-attention")
    if config.start < 0:
        raise BadInput(f"start is {config.start}: it must be an id, 0 or more")
    for block in config.encoder:
        pattern = getattr(block.mixer, "pattern", None)
        # One that takes the length of the batch would let a row depend on how long its neighbours are.
        if pattern is not None and pattern.sized(1, 1) != pattern.sized(2, 1):
            raise BadInput(f"{pattern} depends on the longest source of a batch: give it length=..., the longest there can be")
