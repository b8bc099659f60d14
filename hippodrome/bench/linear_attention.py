"""linear_attention: causal, from features and values to outputs, beside fla's, torch's products and softmax attention.

Heads of 64; tokens lie as projections write them, (B, L, heads, width). Features are elu(x) + 1. `copy` moves as many bytes as
a perfect implementation: four tensors forward (q, k, v, y), eleven with backward. What computes the same is checked against
torch's products in float64, in outputs and gradients. fla's is timed without its denominators as well, which is less work;
that, and softmax attention, are checked against their definition at the last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

import hippodrome.bench._peers as _peers
from hippodrome.bench._measure import BOTH, DTYPES, FORWARD, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.bench.h3 import ATTENTION, COPY, HEAD_WIDTH, LINEAR, PASSES, attention_rows
from hippodrome.ops._op import use_backend
from hippodrome.ops.linear_attention import linear_attention
from hippodrome.ops.linear_attention.chunked import CHUNK
from hippodrome.ops.linear_attention.triton import tiling
from hippodrome.part import BadInput

CHUNKS, REFERENCE, NORMALISED = "torch, in chunks", "torch, all weights", "fla linear attention, normalised"
WAYS = (OURS, COPY, CHUNKS, REFERENCE, NORMALISED, LINEAR, *ATTENTION)

GPU_TOKENS, CPU_TOKENS = 1 << 17, 1 << 12
GPU_LENGTHS = tuple(1 << n for n in range(10, 18))
CPU_LENGTHS = (256, 1024, 4096)
MOST_WEIGHTS = 1 << 31
"""Numbers of the weights up to which they are written out: 8 GiB in fp32, and several times that with backward."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    head_dim: int = HEAD_WIDTH,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every way at every length, with the number of tokens kept."""
    checked("linear_attention", bench.ways, WAYS)
    channels, dtype = channels or (768 if bench.on_gpu else 128), dtype or ("bf16" if bench.on_gpu else "fp32")
    if channels % head_dim:
        raise BadInput(f"head_dim {head_dim} does not divide {channels} channels")
    chosen = lengths or (GPU_LENGTHS if bench.on_gpu else CPU_LENGTHS)
    for count, length in grid(bench, chosen, batch, tokens or (GPU_TOKENS if bench.on_gpu else CPU_TOKENS), ()):
        yield from _at(bench, count, channels, head_dim, length, dtype)


def _at(bench: Bench, batch: int, channels: int, width: int, length: int, dtype: str) -> Iterator[Row]:
    one = batch * channels * length * DTYPES[dtype].itemsize
    sizes = {"channels": channels, "head_dim": width}
    rows_ = {
        task: Row(way="", task=task, length=length, batch=batch, sizes=sizes, dtype=dtype, bytes=passes * one)
        for task, passes in PASSES.items()
    }
    if bench.wants(COPY):
        for row in rows_.values():
            assert row.bytes is not None
            yield bench.measure(replace(row, way=COPY), bench.copy(row.bytes))
    yield from _linear_rows(bench, rows_)
    yield from attention_rows(bench, rows_, channels // width, width)


def _linear_rows(bench: Bench, rows_: dict[str, Row]) -> Iterator[Row]:
    row = rows_[FORWARD]
    width = row.sizes["head_dim"]
    heads = row.sizes["channels"] // width
    ways = {way: function for way, function in _ways(bench, row.batch * heads * row.length**2).items() if bench.wants(way)}
    if not ways:
        return
    drawn = [bench.draw(row.batch, row.length, heads, width) for _ in range(4)]
    q, k = ((F.elu(t) + 1).to(DTYPES[row.dtype]).transpose(1, 2).requires_grad_() for t in drawn[:2])
    v, dy = (t.to(q.dtype).transpose(1, 2) for t in drawn[2:])
    inputs = (q, k, v.requires_grad_())
    del drawn
    chunk = tiling(*inputs).T if bench.on_gpu else CHUNK
    forward = 2 * q.numel() * 2 * (chunk + width)
    flops = {FORWARD: forward, BOTH: forward + 2 * q.numel() * (7 * chunk + 6 * width)}
    expected = Expected(_chunks, inputs, dy, heads=heads, picked=1)
    for way, function in ways.items():
        for task, call in calls(function, inputs, dy).items():
            found = replace(rows_[task], way=way, flops=flops[task] if way == OURS else None)
            chosen = functools.partial(linear_attention.choose, *inputs)
            yield bench.measure(found, call, expected, backend=chosen if way == OURS else None)


def _ways(bench: Bench, weights: int) -> dict[str, Callable[..., Tensor]]:
    """Those that compute the same. Off GPUs ours is made of torch's products."""
    ways: dict[str, Callable[..., Tensor]] = {OURS: _ours}
    if bench.on_gpu:
        ways[CHUNKS] = _chunks
    if weights <= MOST_WEIGHTS:
        ways[REFERENCE] = _reference
    if bench.on_gpu and _peers.installed("fla"):
        ways[NORMALISED] = _peers.normalised_linear_attention
    return ways


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Not slower than fla's with as much work or less; the rest is only stated."""
    yield from ratios(rows_, OURS, COPY, "times a copy of what must be moved", "at most")
    for way in (LINEAR, NORMALISED):
        yield from ratios(rows_, way, OURS, f"times faster than {way}", "at least", bound=lambda _: 1.0)
    for way in (CHUNKS, REFERENCE, *ATTENTION):
        yield from ratios(rows_, way, OURS, f"times faster than {way}", "at least")


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v)[0]


def _chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with use_backend("chunked"):
        return linear_attention(q, k, v)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention.reference(q, k, v)[0]
