"""Perceiver AR: the last N tokens, the latents, read the context once and go on among themselves (Hawthorne et al. 2022).

    z = P e_(T-N+1 .. T)                                   e the embedded tokens
    z = z + Attention(q = LN z, k = v = LN' e_(1 .. T))    causal: a latent sees its own token and those before
    z = z + MLP(LN z),    then ordinary causal blocks over the N latents, a norm, and the readout

A context of T tokens costs T N in a cross-attention and N^2 in a block. There may be more of the former, with weights of their
own, behind later blocks; and M latents a position, which see each other and whose readings are averaged.

What a position's logits are depends on how many latents come before it, so it is said by a protocol which positions one pass
scores, a function of the position t alone:

    pass 0 scores 0 .. N-1;  pass k >= 1 scores the S positions from N + (k-1) S on;  pass k has its latents from k S on

Evaluation, prefill and decoding all keep to it, so that they agree. A step adds one latent to the pass; where a new pass
begins, its first N - S + 1 latents read the context anew. With S = N / 2 + 1 these are the resets of the authors' sampler. With
S = 0 there is one pass for ever and the latents roll: in a block each sees itself and the N - 1 before it.

Shapes: x (B, T, E), z (B, N M, D); q, k, v (B, H, length, E / H).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers.attention import Attention, AttentionState, rotate
from hippodrome.model import Aux, Block, ChannelMixer, Loss, Mixer, ModelState, ModelStepper, WholeModel, _left_align
from hippodrome.norms import build_norm
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Butterfly, Causal, Pattern, Window
from hippodrome.state import State
from hippodrome.task import Batch, several


@dataclass(frozen=True)
class PerceiverState(ModelState):
    """cross: keys and values of every token seen, for each cross-attention. recent (B, N, E): the last N tokens embedded, the
    newest last.

    `blocks` are the states of the latents of the newest pass.
    """

    cross: tuple[AttentionState, ...]
    recent: Tensor


@dataclass(frozen=True)
class _Context:
    """What latents at `position` (B or 1, N) read: keys and values (B, H, T, K) for each cross-attention.

    key_position (B or 1, T); None: key j is of token j, and the latents are the last tokens.
    """

    position: Tensor
    keys: tuple[tuple[Tensor, Tensor], ...]
    key_position: Tensor | None = None


class PerceiverAR(WholeModel):
    """`latents` and `stride` are N and S of the protocol, and may be changed by `score_with`; training has its own N."""

    one_graph = False  # Where a pass begins, a step reads the context with many latents.

    @dataclass(frozen=True, kw_only=True)
    class Config(WholeModel.Config):
        init_std: float = 1.0
        """Of the embeddings. Linear maps begin with 1 / sqrt(inputs), truncated normals all."""
        latents: int = 1024
        """N in training: the last N tokens of a row are the targets."""
        latents_per_position: int = 1
        """M: the blocks, attention all, see N M latents, and count them where positions matter to them."""
        eval_latents: int | None = None
        """N elsewhere; None: as in training."""
        stride: int | None = None
        """S: new positions a pass; 0: the latents roll; None: half of the latents."""
        crop: int | None = 1
        """In training the rows of a batch end at a random place, after this many tokens and N at least; None: at their end."""
        d_input: int | None = None
        """Width E of the embeddings, keys and values; None: d_model."""
        n_head: int = 8
        """Heads of a cross-attention."""
        cross_after: tuple[int, ...] = ()
        """Blocks, counted from 0, behind which the context is read again."""
        rotary: float = 0.5
        """Share of each head's channels that rotate in the cross-attention; 0: none."""
        wavelength: float = 8192.0
        """Slowest rotation, in tokens a radian: at least the context."""
        query_offset: int = 0
        """Latents turn as if so many tokens later when they read the context; 1: as the token that they predict."""
        channel: ChannelMixer.Config = field(default_factory=lambda: Mlp.Config(activation="relu2"))
        """Behind the cross-attention."""
        dropout: float = 0.0
        """Of what the cross-attention and its channel mixer add."""

        @property
        def width(self) -> int:
            """E."""
            return self.d_model if self.d_input is None else self.d_input

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config)
        self.per_position = config.latents_per_position
        self.embed = config.embed.build(config.width)
        self.latent_proj = nn.Linear(config.width, config.d_model)
        if self.per_position > 1:
            self.latent_place = nn.Parameter(torch.empty(self.per_position, config.d_model))
        self.cross = _CrossAttention(config)
        self.more_cross = nn.ModuleDict({str(after): _CrossAttention(config) for after in config.cross_after})
        self.blocks = nn.ModuleList(Block(block, config.d_model) for block in config.blocks)
        last = config.blocks[-1]
        self.final_norm = build_norm(last.norm, config.d_model) if last.order == "pre" else nn.Identity()
        self.readout = config.readout.build(config.d_model, self.embed)
        self.latents = self.stride = 1
        self.score_with(config.eval_latents or config.latents, config.stride)
        self._init_weights()

    @property
    def protocol(self) -> str:
        n, s = self.latents, self.stride
        if self._rolls:
            return f"{n} latents that roll: in each block a position is read by its own and the {n - 1} before"
        return f"{n} latents, stride {s}: past the first {n} tokens a position is read by its own and {n - s} to {n - 1} before"

    def score_with(self, latents: int | None = None, stride: int | None = None) -> None:
        """Change the protocol: N None is left as it is, S None becomes half of N, S 0 lets the latents roll.

        States made before are of no use after.
        """
        latents = self.latents if latents is None else latents
        if latents < 1:
            raise BadInput(f"latents is {latents}: it must be at least 1")
        stride = max(1, latents // 2) if stride is None else stride
        if not 0 <= stride <= latents:
            raise BadInput(f"stride is {stride}: it must be from 1 to the {latents} latents, or 0 for latents that roll")
        if stride == 0:
            _check_plain(self.config, "stride is 0: latents that roll")
            if self.per_position > 1:
                raise BadInput(f"stride is 0 at {self.per_position} latents a position: only 1 can roll, else take at least 1")
        self.latents, self.stride = latents, stride
        self._set_patterns()

    def last(self, inputs: Tensor, latents: int | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of the last N tokens of each row from one pass; N None: of the protocol, at most the row.

        A row of fewer than N tokens, by `lengths` (B,), has them first and then padding.
        """
        hidden, _, _ = self._last(inputs, self.latents if latents is None else latents, lengths)
        return self.readout(hidden)

    def loss(self, batch: Batch, state: ModelState | None = None) -> Loss:
        """The mean loss over the targets at the last N tokens of the rows, which are cropped in training."""
        if state is not None:
            raise BadInput("carry_state is on: Perceiver AR reads all of its context in every batch and carries nothing")
        if several(batch.inputs):
            raise BadInput("rows of several sequences: Perceiver AR reads one sequence a row")
        inputs, targets, lengths = batch.inputs, batch.targets, batch.lengths
        if lengths is not None and lengths.dim() == 2:
            inputs, targets = _left_align(inputs, lengths)[0], _left_align(targets, lengths)[0]
            lengths = lengths[:, 1] - lengths[:, 0]
        end = self._crop(inputs.shape[1])
        inputs, targets, lengths = inputs[:, :end], targets[:, :end], None if lengths is None else lengths.clamp(max=end)
        hidden, start, aux = self._last(inputs, self.config.latents, lengths)
        asked = _rows(targets, start, hidden.shape[1])
        nats, count = self.readout.loss(hidden, Batch(_rows(inputs, start, hidden.shape[1]), asked))
        extra = sum((value for name, value in aux.items() if name.startswith("loss/")), torch.zeros_like(nats))
        one = torch.ones_like(nats)
        parts = {"loss": (nats.detach(), count)} | {name: (value.detach(), one) for name, value in aux.items()}
        return Loss(nats / count.clamp(min=1) + extra, parts, None)

    def init_state(self, batch: int, max_len: int | None = None) -> PerceiverState:
        weight = self.latent_proj.weight
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        shape = batch, self.cross.n_head, max_len or 0, self.cross.d_head
        cross = tuple(
            AttentionState(weight.new_zeros(shape), weight.new_zeros(shape), position, None, max_len is not None)
            for _ in self._crosses
        )
        recent = weight.new_zeros(batch, self.latents, self.config.width)
        return PerceiverState(position, self._fresh(batch), cross, recent)

    def prefill(self, inputs: Tensor, state: ModelState, *, lengths: Tensor | None = None) -> tuple[Tensor, ModelState]:
        if lengths is not None and lengths.dim() == 2:
            inputs, lengths = _left_align(inputs, lengths)[0], lengths[:, 1] - lengths[:, 0]
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs, before, lengths)
        newest = (grown.position - 1).clamp(min=0)
        if self._rolls:
            start = before.position
            hidden, blocks, _ = self._rolled(window, before, grown, lengths)
        else:
            start = self._start(newest)
            hidden, blocks, _ = self._pass(window, before.position - self.latents, start, grown.position, grown.cross)
        said = _rows(hidden, (newest - start).clamp(min=0), 1)
        return self.readout(said).squeeze(1), dataclasses.replace(grown, blocks=blocks)

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs.unsqueeze(1), before, None)
        begins = self._begins(before.position)
        groups = [rows for rows in (begins.nonzero()[:, 0], (~begins).nonzero()[:, 0]) if len(rows)]
        if len(groups) == 1:
            hidden, blocks = self._stepped(window, before.position, grown, bool(begins[0]))
        else:
            parts = [
                self._stepped(window[rows], before.position[rows], grown.reorder(rows), begin)
                for rows, begin in zip(groups, (True, False), strict=True)
            ]
            order = torch.cat(groups).argsort()
            hidden = torch.cat([part[0] for part in parts])[order]
            joined = zip(*(part[1] for part in parts), strict=True)
            blocks = tuple(type(one).join([one, other]).reorder(order) for one, other in joined)
        return self.readout(hidden).squeeze(1), dataclasses.replace(grown, blocks=blocks)

    def stepper(self, state_dtype: torch.dtype | None = None) -> ModelStepper:
        return _Stepper(self)

    def _stepped(
        self, window: Tensor, position: Tensor, grown: PerceiverState, begin: bool
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Final hidden vectors (B, 1, D) of the newest tokens, at `position`, which begin a pass or go on with theirs."""
        if begin:
            hidden, blocks, _ = self._pass(window, position - self.latents, self._start(position), position + 1, grown.cross)
            return hidden[:, -1:], blocks
        hidden, blocks, _ = self._latents(window[:, -1:], _context(position[:, None], grown.cross), grown.blocks, None)
        return hidden, blocks

    def _read(self, inputs: Tensor, state: ModelState | None, counts: Tensor | None) -> tuple[Tensor, ModelState | None, Aux]:
        if state is None:
            return self._strided(inputs, counts)
        before = cast(PerceiverState, state)
        window, grown = self._grown(inputs, before, counts)
        if self._rolls:
            hidden, rolled, extras = self._rolled(window, before, grown, counts)
            return hidden, dataclasses.replace(grown, blocks=rolled), extras
        at = before.position[:, None] + torch.arange(inputs.shape[1], device=inputs.device)
        start = self._start(at)
        first, last = start[:, 0], self._start((grown.position - 1).clamp(min=0))
        out: Tensor | None = None
        blocks = before.blocks
        aux: Aux = {}
        for number in range(1 + int((last - first).max().clamp(min=0)) // self.stride):
            begin = torch.minimum(first + number * self.stride, last)
            stop = torch.minimum(begin + self.latents, grown.position)
            hidden, blocks, aux = self._pass(window, before.position - self.latents, begin, stop, grown.cross)
            chosen = _rows(hidden, None, 0, (at - begin[:, None]).clamp(0, hidden.shape[1] - 1))
            out = chosen if out is None else torch.where((start == begin[:, None])[..., None], chosen, out)
        assert out is not None
        return out, dataclasses.replace(grown, blocks=blocks), aux

    def _strided(self, inputs: Tensor, counts: Tensor | None) -> tuple[Tensor, None, Aux]:
        """Pass after pass over rows from their start; right padding comes after all that is real, and is not seen by it."""
        x, length = self.embed(inputs), inputs.shape[1]
        keys = self._keys(x, torch.arange(length, device=x.device)[None])
        latents, stride = (max(1, length),) * 2 if self._rolls else (self.latents, self.stride)
        hidden: list[Tensor] = []
        aux: Aux = {}
        for start in range(0, max(1, length - latents + stride), stride):
            stop = min(start + latents, length)
            real = None if counts is None else (counts - start).clamp(0, stop - start)
            z, _, aux = self._aligned(x[:, start:stop], keys, stop, None, real)
            hidden.append(z if start == 0 else z[:, latents - stride :])
        return torch.cat(hidden, 1), None, aux

    def _last(self, inputs: Tensor, latents: int, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Aux]:
        """Final hidden vectors (B, N, D) of the last tokens, where they begin in a row (None: all end at the end), extras."""
        if latents < 1:
            raise BadInput(f"latents is {latents}: it must be at least 1")
        x, length = self.embed(inputs), inputs.shape[1]
        n = min(latents, length)
        at = torch.arange(length, device=x.device)[None]
        keys = self._keys(x, at)
        if lengths is None:
            hidden, _, aux = self._aligned(x[:, length - n :], keys, length, None, None)
            return hidden, None, aux
        start = (lengths - n).clamp(min=0)
        context = _Context(start[:, None] + at[:, :n], keys, at)
        hidden, _, aux = self._latents(_rows(x, start, n), context, None, lengths.clamp(max=n))
        return hidden, start, aux

    def _grown(self, inputs: Tensor, state: PerceiverState, counts: Tensor | None) -> tuple[Tensor, PerceiverState]:
        """The last N embedded tokens and the new ones (B, N + L, E), and the state with all but its blocks after them."""
        x, length = self.embed(inputs, state.position), inputs.shape[1]
        at = torch.arange(length, device=x.device)
        cross = []
        for old, (k, v) in zip(state.cross, self._keys(x, state.position[:, None] + at), strict=True):
            old = dataclasses.replace(old, k=old.k.to(k.dtype), v=old.v.to(v.dtype))
            cross.append(old.with_room(length, counts)[0].written(k, v, counts))
        window = torch.cat([state.recent.to(x.dtype), x], 1)
        recent = _rows(window, length if counts is None else counts, self.latents)
        return window, PerceiverState(cross[0].position, state.blocks, tuple(cross), recent)

    def _pass(
        self, window: Tensor, offset: Tensor, start: Tensor, stop: Tensor, cross: tuple[AttentionState, ...]
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """One pass with latents at start .. stop - 1 (B,): hidden (B, most of a row, D), the blocks' states, extras.

        window (B, W, E) are embedded tokens from position `offset` (B,) on.
        """
        counts = (stop - start).clamp(min=0)
        n = max(1, int(counts.max()))
        embedded = _rows(window, start - offset, n)
        fresh = self._fresh(len(window))
        position = start[:, None] + torch.arange(n, device=start.device)
        context = _context(position, cross)
        if bool((start == start[0]).all()) and bool((stop == stop[0]).all()) and n == int(counts[0]):
            return self._aligned(embedded, context.keys, int(stop[0]), fresh, None)
        return self._latents(embedded, context, fresh, counts)

    def _aligned(
        self,
        embedded: Tensor,
        keys: tuple[tuple[Tensor, Tensor], ...],
        stop: int,
        fresh: tuple[State, ...] | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """A pass whose latents are, in all rows, the last of the first `stop` tokens: no mask is written down."""
        position = torch.arange(stop - embedded.shape[1], stop, device=embedded.device)[None]
        context = _Context(position, tuple((k[:, :, :stop], v[:, :, :stop]) for k, v in keys))
        return self._latents(embedded, context, fresh, counts)

    def _rolled(
        self, window: Tensor, before: PerceiverState, grown: PerceiverState, counts: Tensor | None
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """The new tokens, behind the last N of the window, as latents that go on with those before them."""
        embedded = window[:, self.latents :]
        position = before.position[:, None] + torch.arange(embedded.shape[1], device=window.device)
        return self._latents(embedded, _context(position, grown.cross), before.blocks, counts)

    def _latents(
        self, embedded: Tensor, context: _Context, states: tuple[State, ...] | None, counts: Tensor | None
    ) -> tuple[Tensor, tuple[State, ...], Aux]:
        """Tokens (B, N, E), of which `counts` (B,) are real, as latents through all of the model.

        Final hidden vectors (B, N, D), the blocks' states after them, extras.
        """
        z = self.latent_proj(embedded)
        if self.per_position > 1:
            z = (z[:, :, None] + self.latent_place).flatten(1, 2)
            counts = None if counts is None else counts * self.per_position
        z = self.cross(z, context, 0)
        numbers = {after: number for number, after in enumerate(self.config.cross_after, start=1)}
        after: list[State] = []
        aux: dict[str, Tensor] = {}
        for i, block in enumerate(self._stack):
            z, state, extras = self._block(block, z, None if states is None else states[i], counts)
            if state is not None:
                after.append(state)
            for name, value in extras.items():
                aux[name] = aux[name] + value if name in aux else value
            if i in numbers:
                z = self._crosses[numbers[i]](z, context, numbers[i])
        z = self.final_norm(z)
        return z.unflatten(1, (-1, self.per_position)).mean(2) if self.per_position > 1 else z, tuple(after), aux

    def _keys(self, x: Tensor, position: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(cross.keys(x, position) for cross in self._crosses)

    @property
    def _crosses(self) -> list[_CrossAttention]:
        return [self.cross, *cast("list[_CrossAttention]", list(self.more_cross.values()))]

    @property
    def _rolls(self) -> bool:
        return self.stride == 0

    def _set_patterns(self) -> None:
        """What latents see in the blocks, which a config may leave to the protocol by saying no more than `Causal()`."""
        for block, given in zip(self._stack, self.config.blocks, strict=True):
            mixer = block.mixer
            if isinstance(mixer, Attention) and _plain(given.mixer):
                pattern: Pattern = Window(self.latents) if self._rolls else Causal()
                if self.per_position > 1:
                    pattern = Causal() | Butterfly(tile=self.per_position, n_factors=0)
                mixer.config = dataclasses.replace(mixer.config, pattern=pattern)
                # Between positions it is, and it is given no part of one.
                mixer.causal = True

    def _start(self, position: Tensor) -> Tensor:
        """The first latent of the pass that scores a position."""
        if self._rolls:
            return torch.zeros_like(position)
        passes = (position - self.latents).div(self.stride, rounding_mode="floor") + 1
        return passes.clamp(min=0) * self.stride

    def _begins(self, position: Tensor) -> Tensor:
        """Bool: whether a position is the first that its pass scores, the first of all excepted, which begins from nothing."""
        return (position > 0) & (self._start(position) != self._start(position - 1))

    def _fresh(self, batch: int) -> tuple[State, ...]:
        return tuple(block.mixer.init_state(batch, self.latents * self.per_position) for block in self._stack)

    def _crop(self, length: int) -> int:
        """How many tokens of a batch's rows are read."""
        if self.config.crop is None or not self.training:
            return length
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise BadInput(f"crop is {self.config.crop} and cuda_graph is on, which would crop always alike: set crop to none")
        least = min(length, max(self.config.crop, self.config.latents))
        return int(torch.randint(least, length + 1, ()))

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                _truncated(module.weight, self.config.init_std)
            if isinstance(module, nn.Linear):
                # A truncated normal is narrower than what it is cut from.
                _truncated(module.weight, module.in_features**-0.5 / 0.87962566)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.per_position > 1:
            _truncated(self.latent_place, 0.02)
        for module in self.readout.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)


class _CrossAttention(nn.Module):
    """Latents (B, N M, D) read keys and values: residual, with the channel mixer behind."""

    def __init__(self, config: PerceiverAR.Config) -> None:
        super().__init__()
        width = config.width
        self.n_head, self.d_head = config.n_head, width // config.n_head
        self.rotary_dim, self.wavelength = 2 * int(config.rotary * self.d_head / 2), config.wavelength
        self.per_position, self.query_offset = config.latents_per_position, config.query_offset
        self.query_norm, self.key_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(width)
        self.Wq, self.Wkv = nn.Linear(config.d_model, width), nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, config.d_model)
        self.channel_norm = nn.LayerNorm(config.d_model)
        self.channel: ChannelMixer = config.channel.build(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def keys(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, K) of embedded tokens (B, T, E)."""
        k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.Wkv(self.key_norm(x)).chunk(2, -1))
        return self._turned(k, position), v

    def forward(self, z: Tensor, context: _Context, number: int) -> Tensor:
        """What the latents become; the keys and values of the context are those of cross-attention `number`."""
        # The latents of a position are queries of as many heads that read the same keys: (B, H M, N, K).
        q = self.Wq(self.query_norm(z)).view(len(z), -1, self.per_position, self.n_head, self.d_head)
        q = self._turned(q.permute(0, 3, 2, 1, 4).flatten(1, 2), context.position + self.query_offset)
        # Queries that are the last of the keys are what the op expects: a backend need not build a mask for them.
        at = None if context.key_position is None else context.position
        y = attention(q, *context.keys[number], Causal(), q_position=at, k_position=context.key_position)
        y = y.unflatten(1, (self.n_head, self.per_position)).permute(0, 3, 2, 1, 4)
        z = z + self.dropout(self.out_proj(y.reshape(*z.shape[:2], -1)))
        return z + self.dropout(self.channel(self.channel_norm(z))[0])

    def _turned(self, x: Tensor, position: Tensor) -> Tensor:
        return rotate(x, position, self.rotary_dim, self.wavelength, closed=True) if self.rotary_dim else x


class _Stepper(ModelStepper):
    """The model's own steps: what a step needs beside the weights is in the state."""

    def __init__(self, model: PerceiverAR) -> None:
        super().__init__(model, [])

    def begin(self, state: ModelState) -> ModelState:
        return state

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self.model.step(inputs, state)

    def end(self, state: ModelState) -> ModelState:
        return state

    def traffic(self, state: ModelState) -> int:
        # Keys and values are read, and one token's are written.
        return state.nbytes


def _context(position: Tensor, cross: tuple[AttentionState, ...]) -> _Context:
    """The context that the states of the cross-attentions hold."""
    return _Context(position, tuple((each.k, each.v) for each in cross), cross[0].key_position)


def _plain(mixer: Mixer.Config) -> bool:
    return isinstance(mixer, Attention.Config) and mixer.pattern == Causal()


def _rows(x: Tensor, start: Tensor | int | None, n: int, index: Tensor | None = None) -> Tensor:
    """n places of each row of x (B, L, ...) from `start` on, (B,) or a number; None: the last n. Or those of `index`."""
    if index is None:
        if start is None or isinstance(start, int):
            first = x.shape[1] - n if start is None else start
            return x[:, first : first + n]
        index = (start[:, None] + torch.arange(n, device=x.device)).clamp(0, x.shape[1] - 1)
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)


def _truncated(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _check(config: PerceiverAR.Config) -> None:
    if config.d_model < 1 or not config.blocks:
        raise BadInput(f"a model needs d_model >= 1 and at least one block, not {config.d_model} and {len(config.blocks)}")
    if config.latents < 1:
        raise BadInput(f"latents is {config.latents}: it must be at least 1")
    if config.latents_per_position < 1:
        raise BadInput(f"latents_per_position is {config.latents_per_position}: it must be at least 1")
    if config.latents_per_position > 1:
        _check_plain(config, f"latents_per_position is {config.latents_per_position}: latents that see each other")
    last = len(config.blocks) - 1
    for after, before in zip(config.cross_after, (-1, *config.cross_after), strict=False):
        if not before < after <= last:
            raise BadInput(f"cross_after is {config.cross_after}: it must name blocks from 0 to {last}, each once, in order")
    if config.query_offset and not config.rotary:
        raise BadInput(f"query_offset is {config.query_offset} and rotary 0: there is no rotation to change, so leave it at 0")
    if config.n_head < 1 or config.width % config.n_head:
        raise BadInput(f"{config.n_head} heads do not divide the width {config.width} of the cross-attention")
    if not 0 <= config.rotary <= 1 or config.wavelength <= 1:
        raise BadInput(f"rotary {config.rotary} is a share, 0 to 1, and wavelength {config.wavelength} must be above 1")
    if config.crop is not None and config.crop < 1:
        raise BadInput(f"crop is {config.crop}: it must be at least 1, or none")
    if not 0 <= config.dropout < 1:
        raise BadInput(f"dropout is {config.dropout}: it must be at least 0 and below 1")


def _check_plain(config: PerceiverAR.Config, what: str) -> None:
    for number, block in enumerate(config.blocks):
        if not _plain(block.mixer):
            name = type(block.mixer).__qualname__.removesuffix(".Config")
            where = f" under {block.mixer.pattern}" if isinstance(block.mixer, Attention.Config) else ""
            raise BadInput(f"{what} need Attention under Causal() in every block, but block {number} has {name}{where}")
