"""H3 (Dao, Fu et al., ICLR 2023): language models with and without attention, and the paper's synthetic languages."""

from __future__ import annotations

from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.part import BadInput
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, attention_pattern, language_model
from hippodrome.recipes._mirror_copy import COPY
from hippodrome.recipes._mirror_copy import mirror_copy as _mirror_copy
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def h3(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    attention_layers: tuple[int, ...] | None = None,
    n_head: int = 4,
    window: int | None = None,
    chunk: int | None = None,
    d_state: int = 64,
    head_dim: int = 1,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Hybrid H3 language model: H3 blocks, two of them with attention instead.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        attention_layers: Blocks with attention, from 0; None: the paper's two, the second and the one half the depth after it.
        n_head: Attention heads.
        window: Keys that attention looks back at, the token's own included; None: all.
        chunk: Attention stays within chunks of so many tokens, which H3 crosses; None: it does not.
        d_state: States of both systems of H3.
        head_dim: Channels of an H3 head.
        dropout: Of the embeddings and of what each block adds.
    """
    chosen = _paper_placement(n_layer) if attention_layers is None else attention_layers
    for layer in chosen:
        if not 0 <= layer < n_layer:
            raise BadInput(f"attention_layers has {layer}: a model of {n_layer} blocks has blocks 0 to {n_layer - 1}")
    h3_mixer = H3.Config(d_state=d_state, head_dim=head_dim)
    attention = Attention.Config(n_head=n_head, pattern=attention_pattern(window, chunk))
    mixers = [attention if layer in chosen else h3_mixer for layer in range(n_layer)]
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def pure(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 64,
    head_dim: int = 8,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """H3 language model without attention.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: States of both systems of H3.
        head_dim: Channels of an H3 head; the paper takes 8 where there is no attention.
        dropout: Of the embeddings and of what each block adds.
    """
    mixers = [H3.Config(d_state=d_state, head_dim=head_dim)] * n_layer
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, shift: bool = True, language: Language = PAPER) -> RunConfig:
    """H3 on a synthetic language, with the paper's settings (table 1: induction 100.0, recall 99.8).

    Args:
        shift: With the shift system; without it is the recipe h3.no_shift.
    """
    return _synthetic(H3.Config(use_shift=shift), language)


def no_shift(*, language: Language = PAPER) -> RunConfig:
    """H3 without its shift system on a synthetic language: what the shift is for."""
    return synthetic(shift=False, language=language)


def _paper_placement(n_layer: int) -> tuple[int, ...]:
    return tuple(layer for layer in (1, 1 + n_layer // 2) if layer < n_layer)


def atomic(*, d_state: int = 64, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """H3 on an atomic task of DLR's paper.

    Args:
        d_state: States of both systems of H3.
    """
    return _atomic(H3.Config(d_state=d_state), exercise, lr=1e-3)


def mirror_copy(
    *,
    length: int = 32,
    n_layer: int = 2,
    d_model: int = 128,
    d_state: int = 64,
    head_dim: int = 1,
    rows: int = 200,
    train: TrainConfig = COPY,
) -> RunConfig:
    """H3 without attention on the mirror copy, a sequence backwards: the task of Perceiver AR.

    Args:
        length: Inputs of a row, twice what is copied.
        n_layer: Blocks; perceiver_ar.mirror_copy has one fewer behind its cross-attention.
        d_model: Width.
        d_state: States of both systems of H3.
        head_dim: Channels of an H3 head.
        rows: Of the test split, and of the valid split.
    """
    mixer = H3.Config(d_state=d_state, head_dim=head_dim)
    return _mirror_copy(mixer, length=length, n_layer=n_layer, d_model=d_model, rows=rows, train=train)
