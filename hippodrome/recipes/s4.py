"""S4 (Gu, Goel, Ré, ICLR 2022): a language model, the synthetic languages, and the atomic tasks of DLR's paper."""

from __future__ import annotations

from typing import Literal

from hippodrome.lti.s4 import S4
from hippodrome.mixers.ssm import SSM
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def s4(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 64,
    init: Literal["legs", "legt", "fout", "mixed"] = "legs",
    n_ssm: int | None = None,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """S4 language model: blocks of a diagonal plus low-rank state space with a GLU output, and MLPs.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: States of a channel's system.
        init: HiPPO matrix that the systems start from; mixed: LegS and FouT, half the copies each.
        n_ssm: Copies of the state matrix shared by the channels; None: each its own.
        dropout: Of the embeddings and of what each block adds.
    """
    system = S4.Config(d_state=d_state, init=init, length=text.length, n_ssm=n_ssm)
    return language_model([SSM.Config(system=system)] * n_layer, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """S4, one matrix for all channels, on a synthetic language, in the blocks that the H3 paper gives its systems."""
    return _synthetic(SSM.Config(system=S4.Config(n_ssm=1, length=32), glu=False), language)


def atomic(*, d_state: int = 64, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """S4 on an atomic task of DLR's paper.

    Args:
        d_state: States of a channel's system, which a dense matrix of HiPPO starts.
    """
    return _atomic(SSM.Config(system=S4.Config(d_state=d_state, length=exercise.length), glu=False), exercise, lr=1e-3)
