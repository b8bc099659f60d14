"""Block-Recurrent Transformers (Hutchins, Schlag, Wu, Dyer, Neyshabur, NeurIPS 2022), and their twin without recurrence."""

from __future__ import annotations

from dataclasses import replace

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers._recurrent_cell import CellKind, GateKind
from hippodrome.mixers.block_recurrent import BlockRecurrent
from hippodrome.part import BadInput
from hippodrome.recipes._lm import BUDGET, Text, language_model
from hippodrome.run import RunConfig, TrainConfig

SEGMENT = Text(tokenizer="bytes", length=512)
"""A row is a segment of several blocks. With `carry_state` it continues the row of the batch before."""


def block_recurrent(
    *,
    window: int = 64,
    n_state: int = 64,
    recurrent_layer: int = -2,
    cell: CellKind = "skip",
    gate: GateKind = "fixed",
    state_ids: bool = True,
    reset_every: int | None = None,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    dropout: float = 0.0,
    text: Text = SEGMENT,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Block-Recurrent Transformer language model: sliding windows, and one layer with states that step once a block.

    Args:
        window: Tokens of a block, and tokens that each one sees.
        n_state: State vectors.
        recurrent_layer: Block that has them, from 0 on; negative: from the end.
        cell: How the states step: attention alone, with a network behind it, or with a network instead of its output map.
        gate: One learned share a channel, or shares that depend on what is written.
        state_ids: A learned vector for each state.
        reset_every: Ablation: tokens after which the states start anew, a multiple of window; None: never.
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs, the cell's too; None: 4 d_model.
        n_head: Attention heads.
        dropout: Of the embeddings and of what each block adds.
    """
    if not -n_layer <= recurrent_layer < n_layer:
        raise BadInput(f"recurrent_layer is {recurrent_layer}: {n_layer} blocks go from {-n_layer} to {n_layer - 1}")
    if n_state < 1:
        raise BadInput(f"n_state is {n_state}: it must be at least 1; without states it is the recipe block_recurrent.sliding")
    plain = BlockRecurrent.Config(n_head=n_head, window=window, n_state=0)
    recurrent = replace(plain, n_state=n_state, cell=cell, gate=gate, d_ff=d_ff, state_ids=state_ids, reset_every=reset_every)
    mixers = [plain] * n_layer
    mixers[recurrent_layer] = recurrent
    return _language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def sliding(
    *,
    window: int = 64,
    n_layer: int = 5,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    dropout: float = 0.0,
    text: Text = SEGMENT,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """The twin without recurrence, as Transformer-XL: sliding windows, and one block more for about the same cost.

    Args:
        window: Tokens that each one sees.
        n_layer: Blocks; the states of `block_recurrent` cost about one.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        dropout: Of the embeddings and of what each block adds.
    """
    mixers = [BlockRecurrent.Config(n_head=n_head, window=window, n_state=0)] * n_layer
    return _language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def _language_model(
    mixers: list[BlockRecurrent.Config], text: Text, train: TrainConfig, *, d_model: int, d_ff: int | None, dropout: float
) -> RunConfig:
    """The blocks of the paper's model: RMS norms, ReLU."""
    config = language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)
    channel = Mlp.Config(d_ff=d_ff, activation="relu")
    blocks = tuple(replace(block, channel=channel, norm="rms") for block in config.model.blocks)
    return replace(config, model=replace(config.model, blocks=blocks))
