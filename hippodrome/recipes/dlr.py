"""DLR (Gupta, Mehta, Berant, 2022): a language model of diagonal linear RNNs, and the synthetic languages of the H3 paper."""

from __future__ import annotations

from typing import Literal

from hippodrome.lti.dlr import DLR, Readout
from hippodrome.mixers.ssm import SSM
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def dlr(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 128,
    init: Literal["omega", "random"] = "omega",
    readout: Readout = "real",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """DLR language model: diagonal linear RNNs with a GLU output, and MLPs.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        d_state: Modes of a layer, shared by its channels.
        init: Frequencies of the Fourier transform, or random ones.
        readout: What of the complex answer is heard; product (DLR-prod) remembers all pairs of modes.
        dropout: Of the embeddings and of what each block adds.
    """
    mixers = [SSM.Config(system=DLR.Config(d_state=d_state, init=init, readout=readout))] * n_layer
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """DLR of 64 modes on a synthetic language, in the blocks that the H3 paper gives its systems."""
    return _synthetic(SSM.Config(system=DLR.Config(d_state=64), glu=False), language)


def atomic(*, d_state: int = 4096, readout: Readout = "real", exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """DLR on an atomic task, as its paper trains it.

    Args:
        d_state: Modes, shared by the channels.
        readout: What of the complex answer is heard; the paper has real and product (DLR-prod).
    """
    system = DLR.Config(d_state=d_state, readout=readout, dt_min=1e-5, dt_max=1e-5)
    return _atomic(SSM.Config(system=system, glu=False), exercise, lr=1e-4)
