"""scan: complex states of a linear recurrence, beside a copy and an odd-even scan of torch operations.

The odd-even scan is what ports of S5 to torch do: pairs of tokens are joined, the half as long sequence is scanned, and the
tokens between are filled in (Blelloch, 1990). "per token" rows have coefficients (B, L, N), as irregular time steps make them;
the others N, which all tokens share. Expected values come from the chunked backend in double precision.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hippodrome.bench._measure import BOTH, FORWARD, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._targets import Ratio, memory, ratios
from hippodrome.ops._op import use_backend
from hippodrome.ops.scan import scan

CHUNKED, TREE, COPY = "chunked torch operations", "odd-even torch operations", "copy"
WAYS = (OURS, CHUNKED, TREE, COPY)

TOKENS = 1 << 17
GPU_SIZES = ((128, 1024), (32, 4096), (8, 16384), (1, 131072))
CPU_SIZES = ((4, 1024), (4, 4096))
MOVED = {FORWARD: (2, 3), BOTH: (5, 8)}
"""Arrays of B x L x N numbers that a perfect implementation reads or writes, with shared coefficients and with each token's."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int = TOKENS,
    batch: int | None = None,
    channels: int | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every way at every size, with coefficients shared and of each token."""
    checked("scan", bench.ways, WAYS)
    channels = channels or (192 if bench.on_gpu else 64)
    if lengths is not None and batch is None and not bench.on_gpu:
        batch = CPU_SIZES[0][0]
    for count, length in grid(bench, lengths, batch, tokens, GPU_SIZES if bench.on_gpu else CPU_SIZES):
        for per_token in (False, True):
            yield from _at(bench, count, length, channels, per_token)


def _at(bench: Bench, batch: int, length: int, channels: int, per_token: bool) -> Iterator[Row]:
    # Channels second, as the checks want them; in memory they are last, as the op does.
    b = _complex(bench, batch, length, channels).mT.requires_grad_()
    dy, a = _complex(bench, batch, length, channels).mT, _coefficients(bench, batch, length, channels, per_token)
    one = b.numel() * b.element_size()
    name = "per token " if per_token else ""
    rows_ = {
        task: Row(
            way="", task=name + task, length=length, batch=batch, sizes={"channels": channels}, bytes=moved[per_token] * one
        )
        for task, moved in MOVED.items()
    }
    for row in rows_.values():
        if bench.wants(COPY):
            yield bench.measure(replace(row, way=COPY), bench.copy(row.bytes or 0))
    ways = {OURS: _ours} | ({CHUNKED: _chunked} if bench.on_gpu else {}) | {TREE: _odd_even}
    if any(map(bench.wants, ways)):
        expected = Expected(_chunked, (a, b), dy, heads=channels)
    for way, function in ways.items():
        if not bench.wants(way):
            continue
        for task, call in calls(function, (a, b), dy).items():
            chosen = functools.partial(scan.choose, a.mT if per_token else a, b.mT)
            yield bench.measure(replace(rows_[task], way=way), call, expected, backend=chosen if way == OURS else None)
        bench.free()


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Ratios without a bound: none was set before the first measurement."""
    yield from ratios(rows_, OURS, COPY, "times the copies of what is moved", "at most")
    for way in (CHUNKED, TREE):
        yield from ratios(rows_, way, OURS, f"times faster than {way}", "at least")
    yield from ratios(rows_, TREE, OURS, "times the memory for the odd-even scan", "at least", of=memory)


def _complex(bench: Bench, *shape: int) -> Tensor:
    return torch.view_as_complex(bench.draw(*shape, 2))


def _coefficients(bench: Bench, batch: int, length: int, channels: int, per_token: bool) -> Tensor:
    """(N,) or (B, N, L): S4D-Lin's eigenvalues at time steps from 1e-3 to 1e-1, of each token stretched at random."""
    log = torch.complex(torch.full((channels,), -0.5), torch.pi * torch.arange(channels)) * torch.logspace(-3, -1, channels)
    log = log.to(bench.device)
    if not per_token:
        return log.exp().requires_grad_()
    stretch = torch.rand(batch, length, 1, device=bench.device) + 0.5
    return (log * stretch).exp().mT.requires_grad_()


def _ours(a: Tensor, b: Tensor) -> Tensor:
    return scan(a.mT if a.dim() == 3 else a, b.mT).mT


def _chunked(a: Tensor, b: Tensor) -> Tensor:
    with use_backend("chunked"):
        return _ours(a, b)


def _odd_even(a: Tensor, b: Tensor) -> Tensor:
    a = a.mT if a.dim() == 3 else a
    return _joined(a.expand(b.mT.shape), b.mT)[1].mT


def _joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Products of a, and states, up to every token (B, L, N)."""
    length = b.shape[1]
    if length == 1:
        return a, b
    first, second = slice(0, length - 1, 2), slice(1, None, 2)
    odd_a, odd_b = _joined(a[:, first] * a[:, second], torch.addcmul(b[:, second], a[:, second], b[:, first]))
    # Every even token but the first comes after an odd one.
    after = slice(2, None, 2)
    before = (length - 1) // 2
    even_a = torch.cat([a[:, :1], odd_a[:, :before] * a[:, after]], 1)
    even_b = torch.cat([b[:, :1], torch.addcmul(b[:, after], a[:, after], odd_b[:, :before])], 1)
    return _interleaved(even_a, odd_a), _interleaved(even_b, odd_b)


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    whole = even.new_empty(even.shape[0], even.shape[1] + odd.shape[1], even.shape[2])
    whole[:, ::2], whole[:, 1::2] = even, odd
    return whole
