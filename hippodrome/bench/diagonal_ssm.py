"""diagonal_ssm: the state-passing op beside a copy, FFTs and FlashFFTConv.

On a CPU the peers are the usual way (a kernel from H x N x L complex powers, then torch's FFT) and the best FFT way (the kernel
from two short tables of powers, then torch's FFT, which is the reference); gradients are those of inputs, modes, weights, skip.
Convolutions with their "kernel given" are timed without its making, and give gradients of it and of the inputs only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import hippodrome.bench._peers as _peers
from hippodrome.bench._measure import BOTH, DTYPES, FORWARD, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_kernel
from hippodrome.ops.long_conv import fft_conv, long_conv

TWO_LEVEL, VANDERMONDE = "two-level kernel + torch FFT", "Vandermonde kernel + torch FFT"
FFT, FLASH, COPY = "torch FFT, kernel given", "FlashFFTConv, kernel given", "copy"
WAYS = (OURS, TWO_LEVEL, VANDERMONDE, FFT, FLASH, COPY)

TOKENS = 1 << 17
GPU_SIZES = (
    (64, 1024), (64, 2048), (32, 4096), (32, 8192), (16, 8192), (16, 16384), (4, 32768), (16, 65536), (1, 131072),
)  # fmt: skip
CPU_SIZES = ((8, 1024), (8, 4096), (8, 16384))


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int = TOKENS,
    batch: int | None = None,
    channels: int | None = None,
    modes: int = 32,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every way at every size."""
    checked("diagonal_ssm", bench.ways, WAYS)
    channels, dtype = channels or (768 if bench.on_gpu else 128), dtype or ("bf16" if bench.on_gpu else "fp32")
    if lengths is not None and batch is None and not bench.on_gpu:
        batch = CPU_SIZES[0][0]
    for count, length in grid(bench, lengths, batch, tokens, GPU_SIZES if bench.on_gpu else CPU_SIZES):
        yield from _at(bench, count, channels, length, modes, dtype)


def _at(bench: Bench, batch: int, channels: int, length: int, modes: int, dtype: str) -> Iterator[Row]:
    signal = bench.draw(batch, channels, length, dtype=DTYPES[dtype]).requires_grad_()
    dy = bench.draw(batch, channels, length, dtype=DTYPES[dtype])
    log_modes, weights, skip = parameters = s4d_parameters(bench, channels, modes)
    one, flops = signal.numel() * signal.element_size(), ssm_flops(modes) * signal.numel()
    passes = {FORWARD: 2, BOTH: 5}
    sizes = {"channels": channels, "modes": modes}
    rows_ = {
        task: Row(way="", task=task, length=length, batch=batch, sizes=sizes, dtype=dtype, bytes=n * one)
        for task, n in passes.items()
    }
    for task, row in rows_.items():
        if bench.wants(COPY):
            yield bench.measure(replace(row, way=COPY), bench.copy(passes[task] * one))

    ways = {OURS: _ssm, TWO_LEVEL: _plain} | ({} if bench.on_gpu else {VANDERMONDE: _vandermonde})
    inputs: tuple[Tensor, ...] = (signal, *parameters)
    if any(map(bench.wants, ways)):
        expected = Expected(_plain, inputs, dy, heads=channels)
    for way, function in ways.items():
        if not bench.wants(way):
            continue
        for task, call in calls(function, inputs, dy).items():
            row = replace(rows_[task], way=way)
            if way == OURS:
                row = replace(row, flops=flops * (1 if task == FORWARD else BACKWARD))
            chosen = functools.partial(diagonal_ssm.choose, signal, log_modes, weights, skip=skip)
            yield bench.measure(row, call, expected, backend=chosen if way == OURS else None)

    given = {FFT: long_conv.reference} | ({FLASH: _peers.flash_fft_conv} if _peers.installed("flashfftconv") else {})
    given = {way: function for way, function in given.items() if bench.on_gpu and bench.wants(way)}
    if given:
        kernel = mode_kernel(log_modes, weights, length).detach()
        kernel[:, 0] += skip.detach()
        inputs = (signal, kernel.requires_grad_())
        expected = Expected(long_conv.reference, inputs, dy, heads=channels)
    for way, function in given.items():
        for task, call in calls(function, inputs, dy).items():
            yield bench.measure(replace(rows_[task], way=way), call, expected)


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """What was to be reached, on a GPU and on a CPU of two cores."""

    def passes(row: Row) -> float | None:
        return None if not on_gpu else 1.5 if row.batch >= 16 else 2.2

    def flash(row: Row) -> float | None:
        return 18.0 if row.length >= 8192 else 10.0 if row.length >= 2048 else None

    yield from ratios(rows_, OURS, COPY, "times the copy", "at most", bound=passes, task=FORWARD)
    yield from ratios(rows_, OURS, COPY, "times the copies of what both passes move", "at most", task=BOTH)
    yield from ratios(rows_, FLASH, OURS, "times faster than FlashFFTConv", "at least", bound=flash, task=FORWARD)
    yield from ratios(rows_, FLASH, OURS, "times faster than FlashFFTConv", "at least", task=BOTH)
    yield from ratios(rows_, FFT, OURS, "times faster than torch FFT", "at least")

    def at(bounds: Mapping[int, float]) -> Callable[[Row], float | None]:
        return lambda row: bounds.get(row.length) if row.task == BOTH and not on_gpu else None

    for way, bounds in ((TWO_LEVEL, {4096: 2.0, 65536: 3.0}), (VANDERMONDE, {4096: 8.0})):
        yield from ratios(rows_, way, OURS, f"times faster than {way}", "at least", bound=at(bounds))


def s4d_parameters(bench: Bench, channels: int, modes: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_modes and weights (H, N) of S4D-Lin at time steps from 1e-3 to 1e-1, and a skip (H,); all want gradients."""
    dt = torch.logspace(-3, -1, channels, device=bench.device).unsqueeze(-1)
    turn = torch.pi * dt * torch.arange(modes, device=bench.device)
    log_modes = torch.complex((-0.5 * dt).expand(-1, modes), turn)
    weights = dt * torch.complex(bench.draw(channels, modes), bench.draw(channels, modes))
    return log_modes.requires_grad_(), weights.requires_grad_(), bench.draw(channels).requires_grad_()


def ssm_flops(modes: int, chunk: int = 64) -> int:
    """FLOPs a token and channel of state passing: a Toeplitz product within a chunk, its states read and advanced."""
    return 2 * chunk + 8 * modes


BACKWARD = 4
"""Forward and backward by the forward: states once more, gradients of the inputs, and those of the parameters."""


def _ssm(u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    return diagonal_ssm(u, log_modes, weights, skip=skip)[0]


def _plain(u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    return diagonal_ssm.reference(u, log_modes, weights, skip=skip)[0]


def _vandermonde(u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    steps = torch.arange(u.shape[-1], device=u.device)
    kernel = torch.einsum("hn,hnl->hl", weights, torch.exp(log_modes.unsqueeze(-1) * steps)).real
    return fft_conv(u, kernel) + skip.unsqueeze(-1) * u
