"""train: language models of one shape trained end to end, a Transformer beside H3 with one attention layer and with none.

GPT-125M's shape: 12 blocks of width 768, 12 heads, MLPs of 3,072, 50,257 ids padded to 50,304; bf16 autocast, fused AdamW,
clipping, random ids. The Transformer is the recipe's, with rotary positions, its attention on cuDNN. TFLOP/s counts the model's
own operations: recomputation does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from hippodrome.bench._measure import Bench, Row, checked, grid
from hippodrome.bench._steps import Mode, fast_attention, model_flops, step_row
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import ModelConfig
from hippodrome.part import BadInput
from hippodrome.recipes._lm import Text
from hippodrome.recipes.h3 import h3, pure
from hippodrome.recipes.transformer import transformer
from hippodrome.task import Batch

TRANSFORMER, HYBRID, PURE = "Transformer", "H3, one layer of attention", "H3 alone"
WAYS = (TRANSFORMER, HYBRID, PURE)
TASK = "training step"

GPU_LENGTHS, CPU_LENGTHS = (2048, 8192, 32768, 131072), (256, 1024)
GPU_TOKENS, CPU_TOKENS = 1 << 16, 1 << 10
VOCABULARY = 50257
HEAD_WIDTH = 64


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    head_dim: int = 1,
    vocabulary: int | None = None,
    dtype: str | None = None,
    mode: Mode | None = None,
    checkpointing: bool = False,
) -> Iterator[Row]:
    """A training step of every model at every length, with the number of tokens kept. On a CPU the models are small."""
    checked("train", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, layers = channels or (768 if gpu else 128), layers or (12 if gpu else 2)
    vocabulary, dtype = vocabulary or (VOCABULARY if gpu else 256), dtype or ("bf16" if gpu else "fp32")
    sizes = {"channels": channels, "layers": layers, "head_dim": head_dim, "vocabulary": vocabulary}
    chosen, mode = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS), mode or ("blocks" if gpu else "eager")
    models_ = models(channels, layers, head_dim, vocabulary)
    for count, length in grid(bench, chosen, batch, tokens or (GPU_TOKENS if gpu else CPU_TOKENS), ()):
        for way, config in models_.items():
            if not bench.wants(way):
                continue
            row = Row(way=way, task=TASK, length=length, batch=count, sizes=sizes, dtype=dtype)
            with fast_attention(bench):
                yield step_row(
                    bench,
                    row,
                    config,
                    lambda size, length=length: random_batch(bench, size, length, vocabulary),  # type: ignore[misc]
                    mode=mode,
                    checkpointing=checkpointing,
                    flops_per_token=lambda model, length=length: model_flops(model, length),  # type: ignore[misc]
                )


def models(channels: int, layers: int, head_dim: int, vocabulary: int) -> dict[str, ModelConfig]:
    """Way -> a language model of the shape, with bytes for a text that is never read."""
    if channels % HEAD_WIDTH:
        raise BadInput(f"channels is {channels}: it must be a multiple of {HEAD_WIDTH}, the width of an attention head")
    heads = channels // HEAD_WIDTH
    shape = {"n_layer": layers, "d_model": channels, "text": Text(tokenizer="bytes")}
    hybrid = h3(attention_layers=(layers // 2,), n_head=heads, head_dim=head_dim, **shape)  # type: ignore[arg-type]
    configs = {
        TRANSFORMER: transformer(n_head=heads, **shape),  # type: ignore[arg-type]
        HYBRID: hybrid,
        PURE: pure(head_dim=head_dim, **shape),  # type: ignore[arg-type]
    }
    embed = Tokens.Config(vocab_size=vocabulary, pad_to_multiple=64)
    return {way: dataclasses.replace(config.model, embed=embed) for way, config in configs.items()}


def random_batch(bench: Bench, size: int, length: int, vocabulary: int) -> Batch:
    """Random ids (size, length) and those that follow them."""
    ids = torch.randint(vocabulary, (size, length + 1), device=bench.device)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Tokens a second over the Transformer's."""
    bounds = {2048: 1.1, 8192: 1.5, 32768: 2.6, 131072: 5.0} if on_gpu else {}
    what = "tokens/s, over the Transformer's"
    yield from ratios(rows_, TRANSFORMER, HYBRID, f"{HYBRID}: {what}", "at least", bound=lambda row: bounds.get(row.length))
    yield from ratios(rows_, TRANSFORMER, PURE, f"{PURE}: {what}", "at least")
