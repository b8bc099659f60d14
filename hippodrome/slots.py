"""The slots of a model: what a mixer, a channel mixer, an embedding and a readout promise. A part is a file in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from hippodrome.part import Part
from hippodrome.state import State
from hippodrome.stepper import Stepper
from hippodrome.task import Batch

S = TypeVar("S", bound=State)

Aux = Mapping[str, Tensor]
"""Extra results of a channel mixer by name: "loss/..." is added to the training loss, anything else is a gauge."""


class Mixer(Part, nn.Module, Generic[S], folder="mixers"):
    """Moves information along the sequence: (B, L, D) -> (B, L, D).

    Built as `config.build(d_model)`. `lengths` (B,) int64 counts each row's real tokens, the rest is right padding: the
    outputs of real tokens and the state returned are those of the row alone (outputs of padding are finite, no more).
    """

    causal: bool = True
    residual_out: ClassVar[tuple[str, ...]] = ()
    """Names of the linear maps that write into the residual stream: their init is divided by sqrt(2 n_layer)."""

    def forward(self, x: Tensor, state: S | None = None, *, lengths: Tensor | None = None) -> tuple[Tensor, S | None]:
        """Outputs (B, L, D), and the state after the last real token if a state was given (None otherwise)."""
        raise NotImplementedError

    def init_state(self, batch: int, max_len: int | None = None) -> S:
        """The state of `batch` rows that have seen nothing. `max_len`: room for so many tokens at once; None: grow.

        A mixer that is not causal has no state and raises `BadInput`.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: S) -> tuple[Tensor, S]:
        """One token (B, D) -> (B, D). Equal to `forward` on a sequence of one; override it for speed only."""
        y, after = self(x.unsqueeze(1), state)
        return y.squeeze(1), after

    def claim(self, norm: nn.Module, dropout: nn.Module) -> tuple[nn.Module, nn.Module]:
        """What is left to the block of the norm before the mixer and the dropout behind it: as a rule both.

        A mixer that weighs its output against the residual stream reads that stream itself: it keeps the two, applies them
        within, and leaves identities.
        """
        return norm, dropout

    def stepper(self, state_dtype: torch.dtype | None = None) -> Stepper[S]:
        """`step` for many tokens under weights that do not change. `state_dtype`: how a state that is rewritten every step
        is stored between steps; None: as it is computed.
        """
        return Stepper(self)


class ChannelMixer(Part, nn.Module, folder="channels"):
    """Moves information within a position: (B, L, D) -> (B, L, D). Built as `config.build(d_model)`."""

    residual_out: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor) -> tuple[Tensor, Aux]:
        """Outputs, and named extra losses and gauges."""
        raise NotImplementedError


class Embed(Part, nn.Module, folder="embeds"):
    """Inputs to vectors: ids (B, L) or signals (B, L, C) -> (B, L, D). Built as `config.build(d_model)`."""

    streams: ClassVar[bool] = True
    """Whether every token has a vector of its own, so that a sequence may come in chunks and be padded."""

    def forward(self, inputs: Tensor, position: Tensor | None = None) -> Tensor:
        """`position` (B,) int64: how many tokens each row has seen before; None means zero."""
        raise NotImplementedError


class Readout(Part, nn.Module, folder="readouts"):
    """Vectors to what the task asks for. Built as `config.build(d_model, embed)`, so that it may tie weights."""

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of hidden vectors (B, L, D), or the numbers of a regression."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum, count) of the cross entropy in nats, the logits of which need not exist all at once; or of squared errors."""
        raise NotImplementedError
