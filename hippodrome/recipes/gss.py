"""GSS (Mehta, Gupta, Cutkosky, Neyshabur, 2022): language models of gated state spaces, with and without chunked attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hippodrome.mixers.attention import Attention
from hippodrome.mixers.gss import GSS
from hippodrome.model import Mixer
from hippodrome.part import BadInput
from hippodrome.patterns import Chunk
from hippodrome.positions import Rotary
from hippodrome.recipes._atomic import PAPER as PAPER_ATOMIC
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._atomic import atomic as _atomic
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._synthetic import PAPER, Language
from hippodrome.recipes._synthetic import synthetic as _synthetic
from hippodrome.run import RunConfig, TrainConfig


def gss(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_state: int = 512,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """GSS language model: gated state space layers and nothing else.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_state: Modes of a layer's system.
        dropout: Of the embeddings and of what each block adds.
    """
    return _without_mlps([GSS.Config(d_state=d_state)] * n_layer, text, train, d_model=d_model, d_ff=None, dropout=dropout)


def hybrid(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    d_state: int = 512,
    n_head: int = 4,
    chunk: int = 512,
    every: int = 4,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """GSS hybrid: every fourth block a Transformer's, whose attention stays within chunks of 512 tokens.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs of the Transformer blocks; None: 4 d_model.
        d_state: Modes of a GSS layer's system.
        n_head: Attention heads. Positions are rotary, where the paper has T5's biases.
        chunk: Tokens of a chunk of attention.
        every: One block in so many is a Transformer's, the last of each group.
        dropout: Of the embeddings and of what each block adds.
    """
    if every < 1:
        raise BadInput(f"every is {every}: it must be at least 1")
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    attention = Attention.Config(n_head=n_head, pattern=Chunk(size=chunk), position=Rotary(d_model // n_head // 2 * 2))
    mixers = [attention if layer % every == every - 1 else GSS.Config(d_state=d_state) for layer in range(n_layer)]
    return _without_mlps(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def synthetic(*, language: Language = PAPER) -> RunConfig:
    """GSS of 64 modes on a synthetic language, in the blocks that the H3 paper gives its systems."""
    return _synthetic(GSS.Config(d_state=64), language)


def _without_mlps(
    mixers: Sequence[Mixer.Config], text: Text, train: TrainConfig, *, d_model: int, d_ff: int | None, dropout: float
) -> RunConfig:
    """A language model in which GSS blocks have no MLP: the layer is one."""
    config = language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)
    blocks = config.model.blocks
    bare = tuple(replace(block, channel=None) if isinstance(block.mixer, GSS.Config) else block for block in blocks)
    return replace(config, model=replace(config.model, blocks=bare))


def atomic(*, d_state: int = 512, exercise: Exercise = PAPER_ATOMIC) -> RunConfig:
    """GSS on an atomic task of DLR's paper.

    Args:
        d_state: Modes of a layer's system.
    """
    return _atomic(GSS.Config(d_state=d_state), exercise, lr=1e-3)
