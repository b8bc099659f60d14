"""The whole model in one file: block and model, around the parts that fill the slots (`slots.py`).

A model is an embedding, a stack of residual blocks (a mixer moves information along the sequence, a channel mixer within
a position), a final norm where the blocks norm what they read, and a readout. One call does training, chunked prefill and
decoding: `model(inputs)` forgets, `model(inputs, state)` continues from `state` and returns the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hippodrome.norms import Norm, add_and_norm, build_norm
from hippodrome.part import BadInput, Part
from hippodrome.slots import Aux as Aux
from hippodrome.slots import ChannelMixer as ChannelMixer
from hippodrome.slots import Embed as Embed
from hippodrome.slots import Mixer as Mixer
from hippodrome.slots import Readout as Readout
from hippodrome.state import State
from hippodrome.stepper import ModelStepper, Stepper
from hippodrome.task import Batch, several


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One residual block: x + mixer(norm(x)), then x + channel(norm(x)).

    order "post": norm(x + mixer(x)), then norm(x + channel(x)); a model whose last block is one has no final norm. norm
    "scale": RMSNorm with one number for all channels. "batch": statistics of a channel over all positions of the batch, padding
    included, and of all GPUs'; those of training are what is used outside of it. "scalar": DLR's, see `norms.ScalarNorm`.
    """

    mixer: Mixer.Config
    channel: ChannelMixer.Config | None = None
    norm: Norm = "layer"
    order: Literal["pre", "post"] = "pre"
    dropout: float = 0.0
    norm_eps: float | None = None
    """What the norms add to the variance; None: as is usual for them."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model is its width, its blocks in order (a hybrid is just a tuple), what goes in and what comes out."""

    d_model: int
    blocks: tuple[BlockConfig, ...]
    embed: Embed.Config
    readout: Readout.Config
    init_std: float = 0.02

    def build(self) -> Model:
        """The model with fresh weights, drawn from torch's global generator."""
        if self.d_model < 1 or not self.blocks:
            raise BadInput(f"a model needs d_model >= 1 and at least one block, not {self.d_model} and {len(self.blocks)}")
        return Model(self)


class Block(nn.Module):
    """A residual unit: mixer, then channel mixer, with norms before them or behind the sums."""

    def __init__(self, config: BlockConfig, d_model: int) -> None:
        super().__init__()
        self.post = config.order == "post"
        mixer: Mixer[Any] = config.mixer.build(d_model)
        norm, dropout = build_norm(config.norm, d_model, config.norm_eps), nn.Dropout(config.dropout)
        left, self.mixer_dropout = mixer.claim(nn.Identity() if self.post else norm, dropout)
        self.mixer_norm = norm if self.post else left
        self.mixer = mixer
        self.channel_norm = build_norm(config.norm, d_model, config.norm_eps) if config.channel else None
        self.channel: ChannelMixer | None = config.channel.build(d_model) if config.channel else None
        self.dropout = dropout

    def forward(self, x: Tensor, state: State | None, lengths: Tensor | None) -> tuple[Tensor, State | None, Aux]:
        mixed, after = self.mixer(x if self.post else self.mixer_norm(x), state, lengths=lengths)
        x, aux = self._mix_channels(self._sum(x, self.mixer_dropout(mixed), self.mixer_norm))
        return x, after, aux

    def step(
        self, x: Tensor, delta: Tensor | None, state: State, position: Tensor, stepper: Stepper[Any]
    ) -> tuple[Tensor, Tensor | None, State]:
        """One token: x (B, D) and what is still to be added to it -> the same after the block, and the state."""
        if self.post:
            x = x if delta is None else x + delta
            mixed, after = stepper.step(x, state, position)
            return self._mix_channels(self._sum(x, self.mixer_dropout(mixed), self.mixer_norm))[0], None, after
        x, normed = add_and_norm(x, delta, self.mixer_norm)
        mixed, after = stepper.step(normed, state, position)
        delta = self.mixer_dropout(mixed)
        if self.channel is not None and self.channel_norm is not None:
            x, normed = add_and_norm(x, delta, self.channel_norm)
            delta = self.dropout(self.channel(normed)[0])
        return x, delta, after

    def _mix_channels(self, x: Tensor) -> tuple[Tensor, Aux]:
        if self.channel is None or self.channel_norm is None:
            return x, {}
        mixed, aux = self.channel(x if self.post else self.channel_norm(x))
        return self._sum(x, self.dropout(mixed), self.channel_norm), aux

    def _sum(self, x: Tensor, delta: Tensor, norm: nn.Module) -> Tensor:
        return norm(x + delta) if self.post else x + delta


@dataclass(frozen=True)
class ModelState(State):
    """What a model remembers: tokens seen by each row (B,) int64, and the state of each block's mixer."""

    position: Tensor
    blocks: tuple[State, ...]


@dataclass(frozen=True)
class Output:
    """logits: what the readout says, (B, L, V), (B, classes) or (B, L, C). state: after the last token, if one was given."""

    logits: Tensor
    state: ModelState | None = None
    aux: Aux = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """total: the loss a target plus extra losses, a scalar to differentiate. parts: (sum, count) by name, detached."""

    total: Tensor
    parts: Mapping[str, tuple[Tensor, Tensor]]
    state: ModelState | None = None


class Model(nn.Module):
    """Embedding, blocks, final norm, readout."""

    one_graph: ClassVar[bool] = True
    """Whether a step is the same launches every time, so that one CUDA graph can replay it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed: Embed = config.embed.build(config.d_model)
        self.blocks = nn.ModuleList(Block(block, config.d_model) for block in config.blocks)
        last = config.blocks[-1]
        final = last.order == "pre"
        self.final_norm = build_norm(last.norm, config.d_model, last.norm_eps) if final else nn.Identity()
        self.readout: Readout = config.readout.build(config.d_model, self.embed)
        self._init_weights()

    @property
    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    @property
    def causal(self) -> bool:
        """Whether every mixer is causal and the embedding takes chunks, that is whether the model can remember and generate."""
        return self.embed.streams and all(block.mixer.causal for block in self._stack)

    @property
    def protocol(self) -> str | None:
        """What a score must be told with, where the logits depend on more than the tokens before; None: on nothing else."""
        return None

    @property
    def prompt_end(self) -> int | None:
        """The id that ends a prompt and, said by the model, its answer; None: a prompt is continued."""
        return None

    def score_with(self, latents: int | None = None, stride: int | None = None) -> None:
        """Change the protocol, as `models/perceiver_ar.py` says. Raises `BadInput` where there is none."""
        raise BadInput(f"latents and stride are Perceiver AR's: the logits of a {type(self).__name__} depend on neither")

    def forward(self, inputs: Tensor, state: ModelState | None = None, *, lengths: Tensor | None = None) -> Output:
        """Logits of ids (B, L) or signals (B, L, C), continuing from `state` if one is given.

        Rows of several sequences, ids (B, G, L) with `lengths` (B, G), are read as B G rows; the readout joins them again.
        `lengths` is (B,) for right padding, or (B, 2) start and stop of each row's real tokens for left and mixed padding;
        padding changes no real token's output and leaves no trace in the state.
        """
        hidden, state, aux, lengths = self._hidden(inputs, state, lengths)
        return Output(self.readout(hidden, lengths), state, aux)

    def loss(self, batch: Batch, state: ModelState | None = None) -> Loss:
        """The readout's mean loss over the batch's targets, without ever holding all logits of a large vocabulary."""
        hidden, state, aux, lengths = self._hidden(batch.inputs, state, batch.lengths)
        nats, count = self.readout.loss(hidden, Batch(batch.inputs, batch.targets, lengths))
        extra = sum((value for name, value in aux.items() if name.startswith("loss/")), torch.zeros_like(nats))
        one = torch.ones_like(nats)
        parts = {"loss": (nats.detach(), count)} | {name: (value.detach(), one) for name, value in aux.items()}
        return Loss(nats / count.clamp(min=1) + extra, parts, state)

    def init_state(self, batch: int, max_len: int | None = None) -> ModelState:
        """The state of `batch` rows that have seen nothing. `max_len`: room for so many tokens at once; None: grow."""
        device = next(self.parameters()).device
        blocks = tuple(block.mixer.init_state(batch, max_len) for block in self._stack)
        return ModelState(torch.zeros(batch, dtype=torch.int64, device=device), blocks)

    def prefill(self, inputs: Tensor, state: ModelState, *, lengths: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """Logits (B, V) of each row's last real token and the next state: a prompt, without the logits of all of it."""
        hidden, after, _, _ = self._hidden(inputs, state, lengths)
        assert after is not None
        if lengths is None:
            return self.readout(hidden[:, -1:]).squeeze(1), after
        stop = lengths if lengths.dim() == 1 else lengths[:, 1]
        last = (stop - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
        return self.readout(hidden.gather(1, last)).squeeze(1), after

    def step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token a row: ids (B,) or signals (B, C) -> logits (B, V) and the next state."""
        return ModelStepper(self, [Stepper(block.mixer) for block in self._stack]).step(inputs, state)

    def stepper(self, state_dtype: torch.dtype | None = None) -> ModelStepper:
        """`step` for many tokens under weights that do not change; see `Mixer.stepper`."""
        return ModelStepper(self, [block.mixer.stepper(state_dtype) for block in self._stack])

    def _hidden(
        self, inputs: Tensor, state: ModelState | None, lengths: Tensor | None
    ) -> tuple[Tensor, ModelState | None, Aux, Tensor | None]:
        """Final hidden vectors, state, extras, and lengths in the form that readouts take."""
        if lengths is not None and not self.embed.streams:
            raise BadInput(f"{type(self.embed).__name__} reads whole rows: leave lengths out")
        if several(inputs):
            inputs, lengths = inputs.flatten(0, 1), None if lengths is None else lengths.flatten()
        aligned, undo, counts = inputs, None, lengths
        if lengths is not None and lengths.dim() == 2:
            aligned, undo = _left_align(inputs, lengths)
            counts = lengths[:, 1] - lengths[:, 0]
        hidden, state, aux = self._read(aligned, state, counts)
        return hidden if undo is None else undo(hidden), state, aux, lengths

    def _read(self, inputs: Tensor, state: ModelState | None, counts: Tensor | None) -> tuple[Tensor, ModelState | None, Aux]:
        """Final hidden vectors, state and extras of inputs padded on the right, `counts` (B,) of a row real."""
        x = self.embed(inputs, None if state is None else state.position)
        x, after, aux = self._stacked(x, None if state is None else state.blocks, counts)
        if state is not None:
            seen = inputs.shape[1] if counts is None else counts
            state = ModelState(state.position + seen, after)
        return self.final_norm(x), state, aux

    def _stacked(
        self, x: Tensor, states: tuple[State, ...] | None, counts: Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...], Aux]:
        """Vectors through all blocks, the blocks' states after them, and extras."""
        after: list[Any] = []
        aux: dict[str, Tensor] = {}
        for i, block in enumerate(self._stack):
            x, block_state, extras = self._block(block, x, None if states is None else states[i], counts)
            after.append(block_state)
            for name, value in extras.items():
                aux[name] = aux[name] + value if name in aux else value
        return x, tuple(after), aux

    def _block(
        self, block: nn.Module, x: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State | None, Aux]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, state, lengths, use_reentrant=False)
        return block(x, state, lengths)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """GPT-2's: N(0, init_std) for linear maps and embeddings, smaller where a map writes into the residual stream.

        A part with a start of its own has a method `init_weights`, which comes last.
        """
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            for name in getattr(module, "residual_out", ()):
                linear = cast(nn.Linear, module.get_submodule(name))
                nn.init.normal_(linear.weight, std=std / math.sqrt(2 * len(self.blocks)))
        for module in self.modules():
            if (own := getattr(module, "init_weights", None)) is not None:
                own()


class WholeModel(Part, Model, folder="models"):
    """A system that is no stack of blocks. It keeps what `Model` promises, builds itself, and is trained, saved, scored and
    sampled from like any other. Built as `config.build()`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Part.Config, ModelConfig):
        """As of a stack: what is compared at equal parameters has the `d_ff` of its blocks changed."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.activation_checkpointing = False


def _left_align(inputs: Tensor, spans: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows rolled so that each real span begins at column 0, and the function that rolls hidden vectors back."""
    length = inputs.shape[1]
    columns = torch.arange(length, device=inputs.device)
    start = spans[:, :1]

    def take(rows: Tensor, index: Tensor) -> Tensor:
        index = index.reshape(*index.shape, *[1] * (rows.dim() - 2)).expand(*index.shape, *rows.shape[2:])
        return rows.gather(1, index)

    return take(inputs, (columns + start) % length), lambda hidden: take(hidden, (columns - start) % length)
