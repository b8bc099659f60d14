"""DSS (Gupta, Gu, Berant, NeurIPS 2022): a language model, the synthetic languages, and the atomic tasks of DLR's paper."""

from __future__ import annotations

from typing import Literal

from hippodrome.lti.dss import DSS
from hippodrome.mixers.ssm import SSM
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def dss(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 64,
    version: Literal["exp", "softmax"] = "exp",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """DSS language model: blocks of a diagonal state space with a GLU output, and MLPs.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: Modes, shared by the channels.
        version: What bounds the kernel: a negative real part of every mode, or a softmax over the length.
        dropout: Of the embeddings and of what each block adds.
    """
    system = DSS.Config(d_state=d_state, version=version, length=text.length)
    return language_model([SSM.Config(system=system)] * n_layer, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """DSS-EXP of 64 modes on a synthetic language, in the blocks that the H3 paper gives its systems."""
    return _synthetic(SSM.Config(system=DSS.Config(), glu=False), language)


def atomic(*, d_state: int = 4096, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """DSS-EXP on an atomic task, as DLR's paper trains it.

    Args:
        d_state: Modes, shared by the channels.
    """
    system = DSS.Config(d_state=d_state, init="lin", dt_min=1e-4, dt_max=1e-2)
    return _atomic(SSM.Config(system=system, glu=False), exercise, lr=1e-3)
