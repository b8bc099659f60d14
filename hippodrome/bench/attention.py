"""attention: softmax attention over all keys and over those before, beside torch's, FlexAttention and flash-attn.

16,384 tokens x 2,048, in heads of 64 and of 128, tokens lying as projections write them; longer rows are one to a batch. With
B rows of L tokens and D channels a forward counts 4 B L^2 D FLOPs and, with backward, 3.5 times that; half where causal. The
bytes are those that must be moved: four tensors forward, twelve with backward. `hbm_bytes` adds, for standard attention, every
time that scores or weights are written or read. What is timed is checked against float64 in two heads, outputs and gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend

import hippodrome.bench._peers as _peers
from hippodrome.bench._attention import (
    AUTO,
    CUDNN,
    FLASH,
    FLASH_ATTN,
    FLEX,
    MOST_SCORES,
    STANDARD,
    Attention,
    automatic,
    chosen,
    exact,
    flex,
    ours,
    standard,
)
from hippodrome.bench._measure import BOTH, DTYPES, FORWARD, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._targets import Ratio, memory, ratios
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Full, Pattern

SDPA = "SDPA"
WAYS = (OURS, AUTO, CUDNN, FLASH, SDPA, FLASH_ATTN, FLEX, STANDARD)
PATTERNS: Mapping[str, Pattern] = {"dense": Full(), "causal": Causal()}
PASSES = {FORWARD: 4, BOTH: 12}
PRODUCTS = {FORWARD: 2, BOTH: 7}
SCORE_PASSES = {FORWARD: 4, BOTH: 11}
"""Times standard attention writes or reads a number a pair: scores and weights, and backward their gradients too."""

GPU_TOKENS, CPU_TOKENS = 1 << 14, 1 << 9
GPU_LENGTHS = tuple(1 << n for n in range(10, 18))
CPU_LENGTHS = (128, 512)
WIDTHS = (64, 128)
FASTEST, FORWARD_SHARE, BACKWARD_SHARE = 0.98, 0.75, 0.65
"""Speeds that were to be reached: of auto over the fastest, and of ours over cuDNN's."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    head_dim: int | None = None,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, dense and causal, in heads of both widths or of `head_dim`, by every way."""
    checked("attention", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, dtype = channels or (2048 if gpu else 128), dtype or ("bf16" if gpu else "fp32")
    widths = WIDTHS if head_dim is None else (head_dim,)
    for width in widths:
        if channels % width:
            raise BadInput(f"head_dim {width} does not divide {channels} channels")
    chosen_lengths = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    for count, length in grid(bench, chosen_lengths, batch, tokens or (GPU_TOKENS if gpu else CPU_TOKENS), ()):
        for width in widths:
            for name, pattern in PATTERNS.items():
                sizes = {"channels": channels, "head_dim": width}
                row = Row(way=name, task="", length=length, batch=count, sizes=sizes, dtype=dtype)
                yield from _at(bench, row, pattern)


def _at(bench: Bench, row: Row, pattern: Pattern) -> Iterator[Row]:
    width, kind = row.sizes["head_dim"], row.way
    heads = row.sizes["channels"] // width
    ways = {way: call for way, call in _ways(bench, row, pattern, heads).items() if bench.wants(way)}
    if not ways:
        return
    drawn = [bench.draw(row.batch, row.length, heads, width, dtype=DTYPES[row.dtype]).transpose(1, 2) for _ in range(4)]
    inputs, dy = [t.requires_grad_() for t in drawn[:3]], drawn[3]
    two = torch.tensor(sorted({0, heads - 1}))
    expected = Expected(exact(pattern, two), inputs, dy, heads=heads, picked=1)
    one = dy.numel() * dy.element_size()
    for way, function in ways.items():
        for task, call in calls(function, inputs, dy).items():
            flops = PRODUCTS[task] * 2 * dy.numel() * row.length // (2 if pattern.causal else 1)
            named = f"{kind}, heads of {width}, {task}"
            found = replace(row, way=way, task=named, bytes=PASSES[task] * one, flops=flops)
            backend = functools.partial(chosen, bench, way, pattern, *inputs) if way in (OURS, AUTO) else None
            found = bench.measure(found, call, expected, backend=backend)
            moved = PASSES[task] * one
            if way == STANDARD:
                moved += SCORE_PASSES[task] * row.batch * heads * row.length**2 * dy.element_size()
            more = {"hbm_bytes": float(moved)} | ({"tflop_per_s": 1e-9 * flops / found.ms} if found.ms else {})
            yield replace(found, more=more)
            bench.free()


def _ways(bench: Bench, row: Row, pattern: Pattern, heads: int) -> dict[str, Attention]:
    """What is timed on this device, with what is installed. Standard attention is left out where its scores would not fit."""
    causal = pattern.causal
    ways: dict[str, Attention] = {OURS: ours(bench, pattern), AUTO: automatic(pattern)}
    if bench.on_gpu:
        ways[CUDNN] = _peers.sdpa(SDPBackend.CUDNN_ATTENTION, causal=causal)
        ways[FLASH] = _peers.sdpa(SDPBackend.FLASH_ATTENTION, causal=causal)
        if _peers.installed("flash_attn"):
            ways[FLASH_ATTN] = functools.partial(_peers.flash_attention, causal=causal)
        ways[FLEX] = flex(bench, pattern, heads, row.length)
    else:
        ways[SDPA] = _peers.sdpa(causal=causal)
    if row.batch * heads * row.length**2 <= MOST_SCORES:
        ways[STANDARD] = lambda q, k, v: standard(q, k, v, pattern)
    return ways


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """auto over the fastest of all, ours over cuDNN forward and in the backward alone, and memory over standard attention's."""
    for row in rows_:
        others = [
            r.ms for r in rows_ if (r.task, r.length, r.batch) == (row.task, row.length, row.batch) and r.way != AUTO and r.ms
        ]
        if row.way == AUTO and row.ms and others:
            bound = FASTEST if on_gpu else None
            yield _ratio("auto: speed over the fastest's", row, min(others) / row.ms, bound)

    def forward(row: Row) -> float | None:
        return FORWARD_SHARE if row.task.endswith(f", {FORWARD}") else None

    yield from ratios(rows_, CUDNN, OURS, "ours: speed over cuDNN's", "at least", bound=forward)
    backward = {(row.way, row.task, row.length): ms for row, ms in _backward(rows_)}
    for row, ms in _backward(rows_):
        peer = backward.get((CUDNN, row.task, row.length))
        if row.way == OURS and peer is not None:
            yield _ratio("ours: speed over cuDNN's, backward alone", row, peer / ms, BACKWARD_SHARE)
    for way in (FLASH, FLASH_ATTN, FLEX, SDPA, STANDARD):
        yield from ratios(rows_, way, OURS, f"ours: times faster than {way}", "at least")
    yield from ratios(rows_, STANDARD, OURS, "ours: times less memory than standard", "at least", of=memory)


def _backward(rows_: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows with backward, and the milliseconds that it takes beyond the forward."""
    forward = {(row.way, row.task, row.length, row.batch): row.ms for row in rows_ if row.ms}
    found = []
    for row in rows_:
        before = forward.get((row.way, row.task.replace(BOTH, FORWARD), row.length, row.batch))
        if row.task.endswith(BOTH) and row.ms and before and row.ms > before:
            found.append((row, row.ms - before))
    return found


def _ratio(what: str, row: Row, value: float, bound: float | None) -> Ratio:
    return Ratio(what=what, task=row.task, length=row.length, batch=row.batch, value=value, kind="at least", bound=bound)
