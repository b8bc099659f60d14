"""h3: the token mixing of H3, from queries, keys and values to the gated output, beside attention and linear attention.

Signals lie as the projections write them, (3 D, B L). `copy` moves as many bytes as a perfect implementation: four tensors
forward (q, k, v, y), eleven with backward (q, k, v and dy read again, dq, dk, dv written). Attention and linear attention
compute something else on as many tokens, in heads of 64; they are checked against their definition at the last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import hippodrome.bench._peers as _peers
from hippodrome.bench._measure import (
    BOTH,
    DTYPES,
    FORWARD,
    OURS,
    Bench,
    Expected,
    Row,
    calls,
    checked,
    difference,
    grid,
)
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.bench.diagonal_ssm import BACKWARD, s4d_parameters, ssm_flops
from hippodrome.ops.h3 import h3
from hippodrome.part import BadInput

REFERENCE, COPY, LINEAR = "reference (torch FFT)", "copy", "fla linear attention"
ATTENTION = ("SDPA cuDNN", "SDPA flash", "flash-attn", "SDPA")
WAYS = (OURS, COPY, *ATTENTION, LINEAR, REFERENCE)
PASSES = {FORWARD: 4, BOTH: 11}

GPU_TOKENS, CPU_TOKENS = 1 << 17, 1 << 12
GPU_LENGTHS = tuple(1 << n for n in range(8, 18))
CPU_LENGTHS = (256, 1024, 4096)
HEAD_WIDTH = 64


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    head_dim: int = 1,
    modes: int = 32,
    taps: int = 64,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every way at every length, with the number of tokens kept."""
    checked("h3", bench.ways, WAYS)
    channels, dtype = channels or (768 if bench.on_gpu else 128), dtype or ("bf16" if bench.on_gpu else "fp32")
    if head_dim < 1 or channels % head_dim:
        raise BadInput(f"head_dim {head_dim} does not divide {channels} channels")
    chosen = lengths or (GPU_LENGTHS if bench.on_gpu else CPU_LENGTHS)
    for count, length in grid(bench, chosen, batch, tokens or (GPU_TOKENS if bench.on_gpu else CPU_TOKENS), ()):
        yield from _at(bench, count, channels, head_dim, length, modes, taps, dtype)


def _at(
    bench: Bench, batch: int, channels: int, head_dim: int, length: int, modes: int, taps: int, dtype: str
) -> Iterator[Row]:
    one = batch * channels * length * DTYPES[dtype].itemsize
    sizes = {"channels": channels, "head_dim": head_dim, "modes": modes, "taps": taps}
    rows_ = {
        task: Row(way="", task=task, length=length, batch=batch, sizes=sizes, dtype=dtype, bytes=passes * one)
        for task, passes in PASSES.items()
    }
    if bench.wants(COPY):
        for row in rows_.values():
            assert row.bytes is not None
            yield bench.measure(replace(row, way=COPY), bench.copy(row.bytes))
    yield from _h3_rows(bench, rows_, channels // head_dim, head_dim)
    if channels % HEAD_WIDTH == 0:
        yield from attention_rows(bench, rows_, channels // HEAD_WIDTH, HEAD_WIDTH)


def _h3_rows(bench: Bench, rows_: dict[str, Row], heads: int, head_dim: int) -> Iterator[Row]:
    ways = {OURS: _ours, REFERENCE: _reference}
    ways = {way: function for way, function in ways.items() if bench.wants(way)}
    if not ways:
        return
    row = rows_[FORWARD]
    channels, modes, taps = (row.sizes[name] for name in ("channels", "modes", "taps"))
    projected = bench.draw(3 * channels, row.batch * row.length, dtype=DTYPES[row.dtype])
    q, k, v = (t.requires_grad_() for t in projected.view(3, channels, row.batch, row.length).transpose(1, 2).unbind())
    dy = bench.draw(channels, row.batch, row.length, dtype=q.dtype).transpose(0, 1)
    shift = (bench.draw(channels, taps) / taps**0.5).requires_grad_()
    log_modes, weights, skip = s4d_parameters(bench, heads, modes)
    inputs = (q, k, v, shift, log_modes, weights, skip)
    flops = (2 * 2 * min(taps, row.length) + head_dim * ssm_flops(modes)) * q.numel()
    expected = Expected(_reference, inputs, dy, heads=heads)
    for way, function in ways.items():
        for task, call in calls(function, inputs, dy).items():
            found = replace(rows_[task], way=way)
            if way == OURS:
                found = replace(found, flops=flops * (1 if task == FORWARD else BACKWARD))
            chosen = functools.partial(h3.choose, q, k, v, shift, log_modes, weights, skip=skip)
            yield bench.measure(found, call, expected, backend=chosen if way == OURS else None)


def attention_rows(bench: Bench, rows_: dict[str, Row], heads: int, width: int) -> Iterator[Row]:
    """Softmax attention of every kind that is here, and fla's linear attention, not normalised, in heads of `width`."""
    row = rows_[FORWARD]
    # A query sees half of the keys: two products forward, five backward.
    flops = {FORWARD: 2, BOTH: 7}
    per_product = row.batch * row.length * row.length * heads * width
    for way, function in _peers.attention_ways(bench).items():
        if bench.wants(way):
            shape = (row.batch, heads, row.length, width)
            counted = {task: replace(r, flops=flops[task] * per_product) for task, r in rows_.items()}
            yield from _peer_rows(bench, counted, way, function, shape, _peers.last_token_attention, (0, 0, -1))
    if bench.on_gpu and _peers.installed("fla") and bench.wants(LINEAR):
        shape = (row.batch, row.length, heads, width)
        yield from _peer_rows(bench, rows_, LINEAR, _peers.linear_attention, shape, _peers.last_token_linear, (0, -1, 0))


def _peer_rows(
    bench: Bench,
    rows_: dict[str, Row],
    way: str,
    function: Callable[..., Tensor],
    shape: tuple[int, ...],
    definition: Callable[..., Tensor],
    at: tuple[int, int, int],
) -> Iterator[Row]:
    dtype = DTYPES[rows_[FORWARD].dtype]
    inputs = [bench.draw(*shape, dtype=dtype).requires_grad_() for _ in range(3)]
    dy = bench.draw(*shape, dtype=dtype)
    with torch.no_grad():
        expected = definition(*inputs)
    for task, call in calls(function, inputs, dy).items():
        yield bench.measure(replace(rows_[task], way=way), call, lambda found: difference(found[0][at], expected))


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """What was to be reached on a GPU, and how far attention is."""

    def passes(row: Row) -> float | None:
        if not on_gpu or row.length < 1024:
            return None
        return 2.0 if row.task == BOTH else 1.5 if row.length <= 8192 else 2.2

    yield from ratios(rows_, OURS, COPY, "times a copy of what must be moved", "at most", bound=passes)
    yield from ratios(rows_, LINEAR, OURS, "times faster than fla's linear attention", "at least", bound=lambda _: 1.0)
    for way in (*ATTENTION, REFERENCE):
        yield from ratios(rows_, way, OURS, f"times faster than {way}", "at least")


def _ours(q: Tensor, k: Tensor, v: Tensor, taps: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    return h3(q, k, v, taps, log_modes, weights, skip=skip)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor, taps: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    return h3.reference(q, k, v, taps, log_modes, weights, skip=skip)[0]
