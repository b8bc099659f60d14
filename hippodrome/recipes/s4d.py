"""S4D (Gu, Gupta, Goel, Ré, NeurIPS 2022): a language model, and the H3 paper's baseline on its synthetic languages."""

from __future__ import annotations

from typing import Literal

from hippodrome.lti.s4d import S4D
from hippodrome.mixers.ssm import SSM
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def s4d(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 64,
    init: Literal["lin", "inv", "legs", "real", "quad"] = "lin",
    disc: Literal["zoh", "bilinear"] = "zoh",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """S4D language model: blocks of a diagonal state space with a GLU output, and MLPs.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: States of a channel's system.
        init: Where the modes start.
        disc: Zero-order hold or the bilinear rule.
        dropout: Of the embeddings and of what each block adds.
    """
    mixers = [SSM.Config(system=S4D.Config(d_state=d_state, init=init, disc=disc))] * n_layer
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """S4D on a synthetic language as the H3 paper's baseline (induction 35.6, recall 86.0).

    S4D-Inv, zero-order hold, one A for all channels, B folded into C, and a linear map without GLU after the system.
    """
    system = S4D.Config(init="inv", disc="zoh", n_ssm=1, train_B=False)
    return _synthetic(SSM.Config(system=system, glu=False), language)


def atomic(*, d_state: int = 4096, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """S4D-Lin on an atomic task of DLR's paper, with DLR's number of states.

    Args:
        d_state: States of a channel's system.
    """
    return _atomic(SSM.Config(system=S4D.Config(d_state=d_state), glu=False), exercise, lr=1e-3)
