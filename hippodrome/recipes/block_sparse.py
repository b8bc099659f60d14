"""Block-sparse attention (Dao et al., 2022) as a language model, by default under the flat butterfly."""

from __future__ import annotations

from hippodrome.mixers.attention import Attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, spelled
from hippodrome.positions import Rotary
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.run import RunConfig, TrainConfig


def block_sparse(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    pattern: str = "butterfly(tile=16)",
    dropout: float = 0.0,
    text: Text = SOTU,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Transformer language model under a pattern, of which it takes the past; rotary positions.

    Args:
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        pattern: What is seen, such as "window(size=64) | global(size=16)".
        dropout: Of the embeddings and of what each block adds.
    """
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    seen = spelled(pattern)
    seen = seen if seen.causal else seen & Causal()
    attention = Attention.Config(n_head=n_head, pattern=seen, position=Rotary())
    return language_model([attention] * n_layer, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)
