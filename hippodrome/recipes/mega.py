"""Mega (Ma, Zhou, Kong, He, Gui, Neubig, May, Zettlemoyer, ICLR 2023): language models, over all and in chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers.mega import Mega
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Inside a block."""

    d_key: int | None = None
    """Width of queries and keys; None: d_model / 4."""
    d_value: int | None = None
    """Width of values; None: 2 d_model."""
    d_state: int = 16
    """Averages of a channel."""
    function: Literal["softmax", "laplace", "relu2"] = "softmax"
    """What makes weights of scores."""
    inner_dropout: float = 0.0
    """Of attention weights, values and the MLPs' inner channels."""

    def mixer(self, chunk: int | None = None) -> Mega.Config:
        """Attention over all, or within chunks of so many tokens."""
        return Mega.Config(
            chunk=chunk,
            d_key=self.d_key,
            d_value=self.d_value,
            d_state=self.d_state,
            function=self.function,
            attention_dropout=self.inner_dropout,
            hidden_dropout=self.inner_dropout,
        )


UNIT = Unit()


def mega(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    dropout: float = 0.0,
    unit: Unit = UNIT,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Mega language model: every token attends to all before it, by queries and keys made of moving averages.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 2 d_model.
        dropout: Of the embeddings, the averages and what the blocks add.
    """
    return _language_model(unit.mixer(), text, train, n_layer=n_layer, d_model=d_model, d_ff=d_ff, dropout=dropout)


def chunked(
    *,
    chunk: int = 64,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    dropout: float = 0.0,
    unit: Unit = UNIT,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Mega-chunk language model: attention stays within chunks, and the averages alone cross them; the time is linear.

    Args:
        chunk: Tokens of a chunk.
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 2 d_model.
        dropout: Of the embeddings, the averages and what the blocks add.
    """
    return _language_model(unit.mixer(chunk), text, train, n_layer=n_layer, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """Mega on a synthetic language, in the blocks that the H3 paper gives its systems."""
    return _synthetic(Mega.Config(d_key=16), language)


def atomic(*, d_state: int = 16, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """Mega on an atomic task of DLR's paper, its attention over all.

    Args:
        d_state: Averages of a channel.
    """
    return _atomic(Mega.Config(d_state=d_state), exercise, lr=1e-3)


def _language_model(
    mixer: Mega.Config, text: Text, train: TrainConfig, *, n_layer: int, d_model: int, d_ff: int | None, dropout: float
) -> RunConfig:
    """Blocks of `mixer` and the feed-forward network that goes with it."""
    config = language_model([mixer] * n_layer, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)
    wide = 2 * d_model if d_ff is None else d_ff
    channel = Mlp.Config(d_ff=wide, activation="silu", dropout=mixer.hidden_dropout)
    blocks = tuple(replace(block, channel=channel) for block in config.model.blocks)
    return replace(config, model=replace(config.model, blocks=blocks))
