"""generate: tokens a second after prompts, a Transformer beside H3 and linear attention, all of 1.3B's shape, and beside
transformers' `generate`.

24 blocks of width 2048, heads of 128, half precision, random weights and prompts (neither changes the work). The H3 hybrid has
attention in two blocks, as published; transformers generates with a GPT-2 of the same shape. The prefill of the whole batch and
its greedy steps are timed apart; tokens_per_s counts the new tokens over both. step_share_of_copy: the rate at which a step
reads and writes weights and states, as a share of a copy's. Where memory is short the batch is halved.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import hippodrome.bench._peers as _peers
from hippodrome.bench._measure import DTYPES, Bench, Row, checked, grid
from hippodrome.bench._steps import fast_attention
from hippodrome.bench._targets import Ratio, cost, ratios
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import ModelConfig
from hippodrome.part import BadInput
from hippodrome.recipes._lm import Text
from hippodrome.recipes.h3 import h3, pure
from hippodrome.recipes.linear_transformer import linear_transformer
from hippodrome.recipes.transformer import transformer
from hippodrome.timing import time_generation

TRANSFORMER, HYBRID, PURE, PEER = "Transformer", "H3, two layers of attention", "H3 alone", "transformers' generate, GPT-2"
LINEAR = "linear attention"
WAYS = (TRANSFORMER, HYBRID, PURE, LINEAR, PEER)
TASK = "generation"

GPU_LENGTHS, CPU_LENGTHS = (512, 1024, 2048, 8192, 32768), (64, 256)
VOCABULARY = 50257
HEAD_WIDTH = 128
PEER_LONGEST = 2048
"""Prompts beyond are not given to transformers: at this one it takes ten seconds already."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    head_dim: int = 1,
    vocabulary: int | None = None,
    new_tokens: int | None = None,
    dtype: str | None = None,
    state_dtype: str | None = None,
) -> Iterator[Row]:
    """Generation after prompts of every length, by every model. Models are built once; on a CPU they are small."""
    checked("generate", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, layers = channels or (2048 if gpu else 128), layers or (24 if gpu else 2)
    vocabulary, dtype = vocabulary or (VOCABULARY if gpu else 256), dtype or ("bf16" if gpu else "fp32")
    batch, new_tokens = batch or (64 if gpu else 1), new_tokens or (128 if gpu else 8)
    if new_tokens < 1:
        raise BadInput(f"new_tokens is {new_tokens}: it must be at least 1")
    models = _models(channels, layers, head_dim, vocabulary)
    sizes = {"channels": channels, "layers": layers, "head_dim": head_dim, "vocabulary": vocabulary, "new_tokens": new_tokens}
    chosen = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    empty = [
        Row(way="", task=TASK, length=length, batch=count, sizes=sizes, dtype=dtype)
        for count, length in grid(bench, chosen, batch, 0, ())
    ]
    for way, config in models.items():
        if bench.wants(way):
            kept = None if state_dtype is None else DTYPES[state_dtype]
            yield from _ours(bench, [replace(row, way=way) for row in empty], config, kept)
            bench.free()
    if _peers.installed("transformers") and bench.wants(PEER):
        yield from _transformers(bench, [replace(row, way=PEER) for row in empty if row.length <= PEER_LONGEST])
        bench.free()


def _models(channels: int, layers: int, head_dim: int, vocabulary: int) -> dict[str, ModelConfig]:
    if channels % HEAD_WIDTH:
        raise BadInput(f"channels is {channels}: it must be a multiple of {HEAD_WIDTH}, the width of an attention head")
    heads = channels // HEAD_WIDTH
    shape = {"n_layer": layers, "d_model": channels, "text": Text(tokenizer="bytes")}
    configs = {
        TRANSFORMER: transformer(n_head=heads, **shape),  # type: ignore[arg-type]
        HYBRID: h3(n_head=heads, head_dim=head_dim, **shape),  # type: ignore[arg-type]
        PURE: pure(head_dim=head_dim, **shape),  # type: ignore[arg-type]
        LINEAR: linear_transformer(n_head=heads, positions="none", **shape),  # type: ignore[arg-type]
    }
    embed = Tokens.Config(vocab_size=vocabulary, pad_to_multiple=64)
    return {way: dataclasses.replace(config.model, embed=embed) for way, config in configs.items()}


def _ours(bench: Bench, empty: Sequence[Row], config: ModelConfig, state: torch.dtype | None) -> Iterator[Row]:
    bench.reseed()
    with torch.device(bench.device):
        model = config.build().to(DTYPES[empty[0].dtype]).eval()
    for row in empty:

        def measured(row: Row) -> Row:
            facts: dict[str, float] = {}

            def call() -> None:
                new = row.sizes["new_tokens"]
                facts.update(time_generation(model, row.length, new, row.batch, state_dtype=state))

            with fast_attention(bench):
                peak = bench.peak(call)
            new = row.sizes["new_tokens"]
            seconds = facts["prefill_s"] + new * facts["step_s"]
            more = {name: facts[name] for name in ("prefill_s", "begin_s", "step_s", "state_bytes", "step_bytes")}
            more["step_share_of_copy"] = facts["step_bytes"] / facts["step_s"] / bench.ceilings.copy_bytes_per_s
            more["tokens_per_s"] = row.batch * new / seconds
            return replace(row, ms=1e3 * seconds, peak_bytes=peak, more=more)

        yield bench.fit(row, measured)


def _transformers(bench: Bench, empty: Sequence[Row]) -> Iterator[Row]:
    if not empty:
        return
    from transformers import GPT2Config, GPT2LMHeadModel  # type: ignore[import-not-found]

    sizes = empty[0].sizes
    room = max(row.length for row in empty) + sizes["new_tokens"]
    shape = {"n_embd": sizes["channels"], "n_layer": sizes["layers"], "n_head": sizes["channels"] // HEAD_WIDTH}
    config = GPT2Config(vocab_size=sizes["vocabulary"], n_positions=room, **shape)
    with torch.device(bench.device):
        model = GPT2LMHeadModel(config).to(DTYPES[empty[0].dtype]).eval()
    for row in empty:

        def measured(row: Row) -> Row:
            prompts = torch.randint(sizes["vocabulary"], (row.batch, row.length), device=bench.device)
            new = sizes["new_tokens"]

            def seconds(count: int) -> float:
                begin = time.perf_counter()
                model.generate(
                    prompts, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0, use_cache=True
                )
                if bench.on_gpu:
                    torch.cuda.synchronize(bench.device)
                return time.perf_counter() - begin

            seconds(2)
            first, whole = seconds(1), seconds(new)
            more = {"prefill_s": first, "step_s": (whole - first) / max(1, new - 1), "tokens_per_s": row.batch * new / whole}
            return replace(row, ms=1e3 * whole, more=more)

        yield bench.fit(row, measured)


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Tokens a second over the Transformer's and transformers', with and without the prefill; how flat the steps are."""

    def paper(row: Row) -> float | None:
        return 1.6 if on_gpu and row.length >= 1024 else None

    def peer(row: Row) -> float | None:
        return 10.0 if on_gpu and row.length == 1024 else None

    for of, what in ((cost, "tokens/s"), (_step, "tokens/s of the steps alone")):
        over = f"{what}, over the Transformer's"
        yield from ratios(rows_, TRANSFORMER, HYBRID, f"{HYBRID}: {over}", "at least", of=of, bound=paper)
        for way in (PURE, LINEAR):
            yield from ratios(rows_, TRANSFORMER, way, f"{way}: {over}", "at least", of=of)
    over = "tokens/s, over transformers' generate"
    yield from ratios(rows_, PEER, HYBRID, f"{HYBRID}: {over}", "at least", bound=peer)
    for way in (PURE, LINEAR):
        steps = {row.length: seconds for row in rows_ if row.way == way and (seconds := _step(row))}
        if len(steps) > 1:
            flat = steps[max(steps)] / steps[min(steps)]
            what = f"{way}: a step after the longest prompt over one after the shortest"
            yield Ratio(what=what, task=TASK, length=0, batch=0, value=flat, kind="at most", bound=1.1 if on_gpu else None)


def _step(row: Row) -> float | None:
    """Seconds of a step for a row of the batch."""
    return row.more["step_s"] / row.batch if "step_s" in row.more else None
