"""Linear Transformer (Katharopoulos et al., ICML 2020): a Transformer whose attention is linear, and a language model of it."""

from __future__ import annotations

from typing import Literal

from hippodrome.mixers.linear_attention import Elu, Favor, Fourier, LinearAttention, Rectified
from hippodrome.part import BadInput
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER as PAPER_LANGUAGE
from hippodrome.recipes._synthetic import Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig

_FEATURES = {"elu": Elu(), "favor": Favor(), "fourier": Fourier(), "rectified": Rectified()}


def linear_transformer(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    features: Literal["elu", "favor", "fourier", "rectified"] = "elu",
    positions: Literal["learned", "none"] = "learned",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Linear Transformer language model: time and memory of a token do not depend on how many came before.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        features: Of queries and keys: elu(x) + 1, or random ones.
        positions: One learned vector a position, good up to the length of training, or none, good at any length.
        dropout: Of the embeddings and of what each block adds.
    """
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    mixers = [LinearAttention.Config(n_head=n_head, features=_FEATURES[features])] * n_layer
    learned = positions == "learned"
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout, learned_positions=learned)


def synthetic(*, language: Language = PAPER_LANGUAGE) -> RunConfig:
    """Linear attention with one head and learned positions on a synthetic language, in the blocks of the H3 paper."""
    return _synthetic(LinearAttention.Config(n_head=1), language, learned_positions=True)


def atomic(*, n_head: int = 4, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """Linear attention on an atomic task of DLR's paper, without positions but those of the task.

    Args:
        n_head: Attention heads.
    """
    return _atomic(LinearAttention.Config(n_head=n_head), exercise, lr=1e-3)
