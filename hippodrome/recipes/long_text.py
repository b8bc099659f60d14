"""One long text read by full attention, sparse attention, linear attention and H3's hybrid, at any length of a row.

    hippodrome grid long_text+system=full long_text+system=window \
        long_text+system=bigbird long_text+system=linear long_text+system=h3 \
        --over length 2048 8192 32768 --text FILE --tokens 8388608 --step-tokens 32768 --precision bf16

gives quality, speed and memory of all at equal parameters and tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.linear_attention import LinearAttention
from hippodrome.model import Mixer
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Causal, Pattern, Window
from hippodrome.positions import Rotary
from hippodrome.recipes._lm import Text, language_model
from hippodrome.run import RunConfig, TrainConfig

BYTES = Text(tokenizer="bytes", length=2048)
BUDGET = TrainConfig(steps=256, batch_size=16, lr=1e-3, clip=1.0, warmup=0.05, log_every=5)
System = Literal["full", "window", "bigbird", "linear", "h3"]


def long_text(
    *,
    system: System = "full",
    n_layer: int = 6,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    window: int = 256,
    tile: int = 64,
    d_state: int = 64,
    tokens: int | None = None,
    step_tokens: int | None = None,
    text: Text = BYTES,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Language model of a long text, by bytes, with a budget in tokens that is the same at any length of a row.

    Attention has rotary positions; linear attention and H3 have none, as learned ones would be parameters of a length.

    Args:
        system: full attention, a window, causal BigBird, linear attention, or H3 with full attention in two blocks.
        n_layer: Blocks.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        window: Keys that a query of `window` sees.
        tile: Tokens of a side of the tiles of BigBird, of which a query sees its own, the one before, the first and three
            random ones.
        d_state: States of H3.
        tokens: Tokens that are trained on, instead of so many steps.
        step_tokens: Tokens of a step, instead of so many rows.
    """
    if n_head < 1 or d_model % (2 * n_head):
        raise BadInput(f"d_model is {d_model}: rotary positions of {n_head} heads need a multiple of {2 * n_head}")

    def attention(pattern: Pattern) -> Mixer.Config:
        return Attention.Config(n_head=n_head, pattern=pattern, position=Rotary())

    mixers: dict[str, Mixer.Config] = {
        "full": attention(Causal()),
        "window": attention(Window(size=window)),
        "bigbird": attention(BigBird(tile=tile)),
        "linear": LinearAttention.Config(n_head=n_head),
        "h3": H3.Config(d_state=d_state),
    }
    chosen = [mixers[system]] * n_layer
    if system == "h3":
        for layer in {1, 1 + n_layer // 2}:
            if layer < n_layer:
                chosen[layer] = Attention.Config(n_head=n_head)
    return language_model(
        chosen, text, _budget(train, text.length, tokens, step_tokens), d_model=d_model, d_ff=d_ff, dropout=0.0
    )


def _budget(train: TrainConfig, length: int, tokens: int | None, step_tokens: int | None) -> TrainConfig:
    """`train` with the rows that make `step_tokens` and the steps that make `tokens`, rounded down to whole steps."""
    if step_tokens is not None:
        if step_tokens < 1 or step_tokens % length:
            raise BadInput(f"step_tokens is {step_tokens}: it must be a multiple of length, {length}")
        train = replace(train, batch_size=step_tokens // length)
    if tokens is not None:
        step = train.batch_size * length
        if tokens < step:
            raise BadInput(f"tokens is {tokens}: it must be at least those of a step, {step}")
        train = replace(train, steps=tokens // step)
    return train
