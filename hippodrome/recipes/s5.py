"""S5 (Smith, Warrington, Linderman, ICLR 2023): a language model, and S5 on the H3 paper's synthetic languages."""

from __future__ import annotations

from typing import Literal

from hippodrome.mixers.s5 import S5
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def s5(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 256,
    hippo_blocks: int = 8,
    activation: Literal["half_glu1", "half_glu2", "full_glu", "gelu"] = "half_glu1",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """S5 language model: S5 blocks, and MLPs.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: States of a layer's one system, half of them kept.
        hippo_blocks: HiPPO matrices that a system starts from, side by side.
        activation: What follows the system.
        dropout: Of the embeddings and of what each block adds.
    """
    mixers = [S5.Config(d_state=d_state, blocks=hippo_blocks, activation=activation)] * n_layer
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """S5 of 64 states on a synthetic language, in the blocks that the H3 paper gives its systems; that paper has no S5."""
    return _synthetic(S5.Config(d_state=64), language)


def atomic(*, d_state: int = 256, hippo_blocks: int = 8, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """S5 on an atomic task of DLR's paper.

    Args:
        d_state: States of a layer's one system, half of them kept.
        hippo_blocks: HiPPO matrices that the system starts from, side by side.
    """
    return _atomic(S5.Config(d_state=d_state, blocks=hippo_blocks), exercise, lr=1e-3)
