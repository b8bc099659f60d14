"""BigBird (Zaheer et al., 2020) as a language model: its causal form, whose random tiles lie in the past.

Its encoder form trains on Long Range Arena: `hippodrome train lra.text --mixer bigbird`.
"""

from __future__ import annotations

from hippodrome.mixers.attention import Attention
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird
from hippodrome.positions import Rotary
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.run import RunConfig, TrainConfig


def bigbird(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    tile: int = 16,
    n_random: int = 3,
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Transformer language model that sees the first tile, its own, the one before and some drawn ones; rotary positions.

    Args:
        n_layer: Blocks; each draws its own random tiles.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        tile: Tokens of a tile; the paper has 64 for rows of 4096.
        n_random: Random tiles of a row of tiles.
        dropout: Of the embeddings and of what each block adds.
    """
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    patterns = [BigBird(tile=tile, n_random=n_random, seed=layer) for layer in range(n_layer)]
    mixers = [Attention.Config(n_head=n_head, pattern=pattern, position=Rotary()) for pattern in patterns]
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)
