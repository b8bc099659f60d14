"""Transformers (Vaswani et al., 2017) of the same shape as the other recipes: what the others race against."""

from __future__ import annotations

from typing import Literal

from hippodrome.mixers.attention import Attention
from hippodrome.part import BadInput
from hippodrome.positions import Alibi, Position, Rotary, T5Bias
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, attention_pattern, language_model
from hippodrome.recipes._mirror_copy import COPY
from hippodrome.recipes._mirror_copy import mirror_copy as _mirror_copy
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def transformer(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    n_kv_head: int | None = None,
    positions: Literal["rotary", "learned", "alibi", "t5"] = "rotary",
    window: int | None = None,
    chunk: int | None = None,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Transformer language model.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        n_kv_head: Heads of keys and values; None: as many as n_head.
        positions: Rotary, ALiBi or T5's biases, good at any length, or one learned vector a position, good up to the length of
            training.
        window: Keys that attention looks back at, the token's own included; None: all.
        chunk: Attention stays within chunks of so many tokens; None: it does not.
        dropout: Of the embeddings and of what each block adds.
    """
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    known: dict[str, Position] = {"rotary": Rotary(), "alibi": Alibi(), "t5": T5Bias()}
    attention = Attention.Config(
        n_head=n_head,
        n_kv_head=n_kv_head,
        pattern=attention_pattern(window, chunk),
        position=known.get(positions),
    )
    learned = positions == "learned"
    return language_model(
        [attention] * n_layer, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout, learned_positions=learned
    )


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """Attention with one head and learned positions on a synthetic language (the H3 paper: 100 on both)."""
    return _synthetic(Attention.Config(n_head=1, dropout=0.1), language, learned_positions=True)


def atomic(*, n_head: int = 4, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """Attention on an atomic task, as DLR's paper trains it: rotary positions and no MLP.

    Args:
        n_head: Attention heads.
    """
    if n_head < 1 or exercise.d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {exercise.d_model}")
    attention = Attention.Config(n_head=n_head, position=Rotary())
    # The paper's rate for mips is DLR's.
    return _atomic(attention, exercise, lr=1e-4 if exercise.task == "mips" else 1e-3)


def mirror_copy(
    *,
    length: int = 32,
    n_layer: int = 2,
    d_model: int = 128,
    n_head: int = 4,
    positions: Literal["sines", "rotary"] = "sines",
    rows: int = 200,
    train: TrainConfig = COPY,
) -> RunConfig:
    """Attention on the mirror copy, a sequence backwards: the task of Perceiver AR without its latents.

    Args:
        length: Inputs of a row, twice what is copied.
        n_layer: Blocks; perceiver_ar.mirror_copy has one fewer behind its cross-attention.
        d_model: Width.
        n_head: Attention heads.
        positions: Fixed sines of the position, or rotary.
        rows: Of the test split, and of the valid split.
    """
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    rotary = positions == "rotary"
    attention = Attention.Config(n_head=n_head, position=Rotary() if rotary else None)
    sines = None if rotary else 10000.0
    return _mirror_copy(attention, length=length, n_layer=n_layer, d_model=d_model, rows=rows, train=train, sines=sines)
