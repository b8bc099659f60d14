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

import torch
from torch import Tensor, nn

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers.attention import Attention
from hippodrome.model import Aux, Block, ChannelMixer, Loss, Mixer, ModelState, WholeModel, _left_align
from hippodrome.models._perceiver_ar_latents import Context, CrossAttention, taken
from hippodrome.models._perceiver_ar_passes import Passes
from hippodrome.norms import build_norm
from hippodrome.part import BadInput
from hippodrome.patterns import Butterfly, Causal, Pattern, Window
from hippodrome.task import Batch, several


class PerceiverAR(Passes):
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
        self.cross = CrossAttention(config)
        self.more_cross = nn.ModuleDict({str(after): CrossAttention(config) for after in config.cross_after})
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
        asked = taken(targets, start, hidden.shape[1])
        nats, count = self.readout.loss(hidden, Batch(taken(inputs, start, hidden.shape[1]), asked))
        extra = sum((value for name, value in aux.items() if name.startswith("loss/")), torch.zeros_like(nats))
        one = torch.ones_like(nats)
        parts = {"loss": (nats.detach(), count)} | {name: (value.detach(), one) for name, value in aux.items()}
        return Loss(nats / count.clamp(min=1) + extra, parts, None)

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
        context = Context(start[:, None] + at[:, :n], keys, at)
        hidden, _, aux = self._latents(taken(x, start, n), context, None, lengths.clamp(max=n))
        return hidden, start, aux

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


def _plain(mixer: Mixer.Config) -> bool:
    return isinstance(mixer, Attention.Config) and mixer.pattern == Causal()


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
