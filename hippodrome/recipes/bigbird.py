"""BigBird (Zaheer et al., 2020): a language model in its causal form, and encoder-decoders in its encoder form.

The encoder form also trains on Long Range Arena: `hippodrome train lra.text --mixer bigbird`.
"""

from __future__ import annotations

from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.mixers.attention import Attention
from hippodrome.model import BlockConfig, Mixer
from hippodrome.models.encoder_decoder import EncoderDecoder
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Full
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm as LmReadout
from hippodrome.recipes._lm import BUDGET, SOTU, Text, language_model
from hippodrome.recipes._systems import mixer_named
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.extract import Extract
from hippodrome.tasks.seq2seq import Seq2Seq
from hippodrome.tokenizer import Kind

EXTRACT = TrainConfig(steps=2000, batch_size=32, lr=1e-3, weight_decay=0.01, log_every=50, eval_every=250, eval_batches=4)
"""How every encoder learns it."""
SUMMARIES = TrainConfig(
    steps=20_000, batch_size=16, lr=5e-4, weight_decay=0.01, eval_every=1000, eval_batches=8, save_every=1000
)
"""To begin with; no paper's setting."""

Encoder = Literal["bigbird", "full", "s4d", "s5", "mega"]


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
    _check_heads(n_head, d_model)
    patterns = [BigBird(tile=tile, n_random=n_random, seed=layer) for layer in range(n_layer)]
    mixers = [Attention.Config(n_head=n_head, pattern=pattern, position=Rotary()) for pattern in patterns]
    return language_model(mixers, text, train, d_model=d_model, d_ff=d_ff, dropout=dropout)


def encoder_decoder(
    *,
    encoder: Encoder = "bigbird",
    length: int = 256,
    min_length: int | None = None,
    lines: int = 4,
    width: int = 3,
    order: Literal["number", "place"] = "number",
    rows: int = 500,
    n_layer: int = 2,
    n_decoder: int = 2,
    d_model: int = 128,
    n_head: int = 4,
    tile: int = 16,
    n_random: int = 3,
    dropout: float = 0.0,
    train: TrainConfig = EXTRACT,
) -> RunConfig:
    """Encoder-decoder that extracts the marked lines of a long source: BigBird in the encoder, or full attention, or an SSM.

    Args:
        encoder: How the source is read: bigbird, full attention, or s4d, s5, mega both ways.
        length: Tokens of the longest source.
        min_length: Tokens of the shortest; None: half of the longest.
        lines: Marked lines of a source.
        width: Symbols of a line.
        order: Of the answer: by the marks' numbers, or as the lines come, all marks alike.
        rows: Of the test split, and of the valid split.
        n_layer: Blocks of the encoder; each BigBird draws its own random tiles.
        n_decoder: Blocks of the decoder: causal attention, cross-attention and an MLP each.
        d_model: Width.
        n_head: Attention heads.
        tile: Tokens of a tile; the paper has 64 for rows of 4096.
        n_random: Random tiles of a row of tiles.
        dropout: Of the embeddings and of what each block adds.
    """
    task = Extract.Config(
        length=length, min_length=min_length, lines=lines, width=width, order=order, test_rows=rows, seed=train.seed
    )
    mixers = [_reader(encoder, length, d_model, n_head, tile, n_random, layer) for layer in range(n_layer)]
    model = _model(mixers, n_decoder, task.start + 1, max(length, lines * width + 1), task.start, d_model, n_head, dropout)
    return RunConfig(model=model, task=task, train=train)


def seq2seq(
    *,
    pairs: str = Seq2Seq.Config.pairs,
    source: str = Seq2Seq.Config.source,
    target: str = Seq2Seq.Config.target,
    tokenizer: Kind = Seq2Seq.Config.tokenizer,
    vocab_size: int = Seq2Seq.Config.vocab_size,
    length: int = Seq2Seq.Config.length,
    target_length: int = Seq2Seq.Config.target_length,
    holdout: float = Seq2Seq.Config.holdout,
    encoder: Encoder = "bigbird",
    n_layer: int = 6,
    n_decoder: int = 6,
    d_model: int = 512,
    n_head: int = 8,
    tile: int = 64,
    n_random: int = 3,
    dropout: float = 0.1,
    train: TrainConfig = SUMMARIES,
) -> RunConfig:
    """Encoder-decoder on pairs of texts in files, such as documents and their summaries; sizes and lengths for a GPU.

    Args:
        pairs: A .jsonl or .csv file, or a folder of train, valid and test files.
        source: Their field of what is read.
        target: Their field of what is to be written.
        tokenizer: Bytes, a BPE trained on the pairs, or GPT-2's vocabulary.
        vocab_size: Ids of a trained BPE.
        length: Tokens at which a source is cut.
        target_length: Tokens at which a target is cut.
        holdout: Share of the pairs that is tested on where the files have no splits, and again validated on.
        encoder: How the source is read: bigbird, full attention, or s4d, s5, mega both ways.
        n_layer: Blocks of the encoder; each BigBird draws its own random tiles.
        n_decoder: Blocks of the decoder: causal attention, cross-attention and an MLP each.
        d_model: Width.
        n_head: Attention heads.
        tile: Tokens of a tile.
        n_random: Random tiles of a row of tiles.
        dropout: Of the embeddings and of what each block adds.
    """
    task = Seq2Seq.Config(
        pairs=pairs,
        source=source,
        target=target,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        length=length,
        target_length=target_length,
        holdout=holdout,
        seed=train.seed,
    )
    mixers = [_reader(encoder, length, d_model, n_head, tile, n_random, layer) for layer in range(n_layer)]
    model = _model(mixers, n_decoder, task.ids, max(length, target_length + 1), task.end, d_model, n_head, dropout)
    return RunConfig(model=model, task=task, train=train)


def _reader(encoder: Encoder, length: int, d_model: int, n_head: int, tile: int, n_random: int, layer: int) -> Mixer.Config:
    """The mixer of a block of the encoder, over sources of at most `length` tokens."""
    _check_heads(n_head, d_model)
    if encoder not in ("bigbird", "full"):
        return mixer_named(encoder, d_model=d_model, length=length, bidirectional=True)
    sparse = BigBird(tile=tile, n_random=n_random, form="encoder", seed=layer, length=length)
    pattern = sparse if encoder == "bigbird" else Full()
    return Attention.Config(n_head=n_head, pattern=pattern, position=Rotary())


def _model(
    encoder: list[Mixer.Config], n_decoder: int, ids: int, positions: int, start: int, d_model: int, n_head: int, dropout: float
) -> EncoderDecoder.Config:
    """Blocks with an MLP each on both sides, learned positions and, in attention, rotary ones; one table of ids for all."""
    if not encoder or n_decoder < 1:
        raise BadInput(f"n_layer is {len(encoder)} and n_decoder {n_decoder}: both sides need at least one block")
    writer = Attention.Config(n_head=n_head, position=Rotary())
    return EncoderDecoder.Config(
        d_model=d_model,
        encoder=tuple(BlockConfig(mixer=mixer, channel=Mlp.Config(), dropout=dropout) for mixer in encoder),
        blocks=(BlockConfig(mixer=writer, channel=Mlp.Config(), dropout=dropout),) * n_decoder,
        embed=Tokens.Config(vocab_size=ids, positions=positions, dropout=dropout),
        readout=LmReadout.Config(),
        start=start,
        n_head=n_head,
        # GPT-2's 0.02 leaves scores of narrow heads near zero, and attention uniform for long.
        init_std=d_model**-0.5,
    )


def _check_heads(n_head: int, d_model: int) -> None:
    if n_head < 1 or d_model % (2 * n_head):
        raise BadInput(f"d_model is {d_model}: rotary positions of {n_head} heads need a multiple of {2 * max(n_head, 1)}")
