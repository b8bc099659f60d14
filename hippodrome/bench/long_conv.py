"""long_conv: the convolution with an arbitrary kernel beside a copy, torch's FFT and FlashFFTConv; gated and not, with memory.

Every channel has a kernel of as many taps as the sequence has tokens (or `taps`). Gradients are those of the inputs, the kernel
and the gates. torch's FFT is the reference: fp32 spectra of twice the length. A copy moves what must be moved at least. Single
paths of our own ("path block_fft" and so on) are timed where they are asked for, forward and backward by that path alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

import hippodrome.bench._peers as _peers
from hippodrome.bench._measure import BOTH, DTYPES, FORWARD, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._targets import Ratio, memory, ratios
from hippodrome.ops.long_conv import long_conv
from hippodrome.ops.long_conv._table import PATHS
from hippodrome.ops.long_conv.triton import use_path

FFT, FLASH, COPY = "torch FFT", "FlashFFTConv", "copy"
PATH = "path "
WAYS = (OURS, FFT, FLASH, COPY, *(PATH + name for name in PATHS))
GATED = "gated "

TOKENS = 1 << 17
GPU_SIZES = ((64, 1024), (64, 2048), (32, 4096), (32, 8192), (16, 16384), (16, 32768), (16, 65536))
LONG_SIZES = ((1, 1 << 17), (1, 1 << 18), (1, 1 << 20), (1, 1 << 22))
LONG_CHANNELS = 16
CPU_SIZES = ((8, 1024), (8, 4096), (8, 16384))


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int = TOKENS,
    batch: int | None = None,
    channels: int | None = None,
    taps: int | None = None,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every way at every size, without gates and with two."""
    checked("long_conv", bench.ways, WAYS)
    dtype, sizes = dtype or ("bf16" if bench.on_gpu else "fp32"), GPU_SIZES if bench.on_gpu else CPU_SIZES
    if lengths is not None and batch is None and not bench.on_gpu:
        batch = CPU_SIZES[0][0]
    for count, length in grid(bench, lengths, batch, tokens, sizes):
        yield from _at(bench, count, channels or (768 if bench.on_gpu else 128), length, taps or length, dtype)
    if bench.on_gpu and lengths is None and batch is None and channels is None:
        for count, length in grid(bench, None, None, tokens, LONG_SIZES):
            yield from _at(bench, count, LONG_CHANNELS, length, taps or length, dtype)


def _at(bench: Bench, batch: int, channels: int, length: int, taps: int, dtype: str) -> Iterator[Row]:
    signal, before, after = (bench.draw(batch, channels, length, dtype=DTYPES[dtype]).requires_grad_() for _ in range(3))
    dy = bench.draw(batch, channels, length, dtype=DTYPES[dtype])
    kernel = (bench.draw(channels, taps) / math.sqrt(taps)).requires_grad_()
    one = signal.numel() * signal.element_size()
    passes = {FORWARD: 2, BOTH: 5, GATED + FORWARD: 4, GATED + BOTH: 11}
    sizes = {"channels": channels, "taps": taps}
    for task, count in passes.items():
        gated = task.startswith(GATED)
        row = Row(way=COPY, task=task, length=length, batch=batch, sizes=sizes, dtype=dtype, bytes=count * one)
        if bench.wants(COPY):
            yield bench.measure(row, bench.copy(count * one))
        inputs = (signal, kernel, before, after) if gated else (signal, kernel)
        ways = _ways(bench, taps == length)
        if not ways:
            continue
        expected = Expected(_plain, inputs, dy, heads=channels)
        for way, function in ways.items():
            call = calls(function, inputs, dy)[task.removeprefix(GATED)]
            if way.startswith(PATH):
                call = functools.partial(_by, way.removeprefix(PATH), call)
            gates = {"pre_gate": before, "post_gate": after} if gated else {}
            chosen = functools.partial(long_conv.choose, signal, kernel, **gates)
            yield bench.measure(replace(row, way=way), call, expected, backend=chosen if way == OURS else None)


def _ways(bench: Bench, full: bool) -> dict[str, Callable[..., Tensor]]:
    ways: dict[str, Callable[..., Tensor]] = {OURS: _ours, FFT: _plain}
    if bench.on_gpu and full and _peers.installed("flashfftconv"):
        ways[FLASH] = _peers.flash_fft_conv
    if bench.on_gpu and bench.ways:
        ways |= {PATH + name: _ours for name in PATHS}
    return {way: function for way, function in ways.items() if bench.wants(way)}


def _by(path: str, call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    with use_path(path):
        return call()


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """What was to be reached on a GPU; by length, with and without gates."""

    def fft(row: Row) -> float | None:
        if not on_gpu or row.length < 1024:
            return None
        return 3.0 if row.length <= 4096 else 1.7 if row.length <= 8192 else 1.0

    def flash(row: Row) -> float | None:
        return None if row.length < 1024 else 2.0 if row.length <= 8192 else 1.0

    def fifth(row: Row) -> float | None:
        return 0.2 if on_gpu else None

    yield from ratios(rows_, FFT, OURS, "times faster than torch FFT", "at least", bound=fft)
    yield from ratios(rows_, FLASH, OURS, "times faster than FlashFFTConv", "at least", bound=flash)
    yield from ratios(rows_, OURS, FFT, "peak memory, of torch FFT's", "at most", bound=fifth, of=memory)


def _ours(u: Tensor, kernel: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None) -> Tensor:
    return long_conv(u, kernel, pre_gate=pre_gate, post_gate=post_gate)


def _plain(u: Tensor, kernel: Tensor, pre_gate: Tensor | None = None, post_gate: Tensor | None = None) -> Tensor:
    return long_conv.reference(u, kernel, pre_gate=pre_gate, post_gate=post_gate)
