"""Partitioned convolution on tensor cores: a short transform within blocks of time, Toeplitz products across them.

Time goes in n blocks of T. With c the taps over lags (see _toeplitz), an output block is a sum of Toeplitz products over the
input blocks before it, and each of these is a product at T complex frequencies:

    Y_c(f) = sum_d C_d(f) W_(c-d)(f),    C_d(f) = sum_(-T <= i < T) c[d T + i] exp(-pi i (f + 1/2) i / T).

The frequencies lie between those of the discrete Fourier transform of 2 T points (products wrap with a minus, and only where
nobody looks): T real numbers then have T complex values, with no real one among them at the ends, and outputs add no overlap.
At every frequency the sum over d is a convolution along blocks, done as a complex Toeplitz product. Transforms by matrix
product are 4 T multiply-adds a token, the products about 2 n, against L / 2 of one dense product, and nothing must fit on the
chip.

Channels go in groups, so that the spectra are small beside the inputs; the backward makes them again.
Sources: Gardner (1995), partitioned convolution; FlashConv in H3 (Dao, Fu et al., ICLR 2023), transforms as matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hippodrome.ops.long_conv._taps import (
    VECTOR,
    Gradients,
    Taps,
    Wanted,
    along_time,
    empty,
    operand,
    power,
    row_strides,
    scratch,
    up,
    vectors,
)
from hippodrome.ops.long_conv._toeplitz import diagonal_sums
from hippodrome.ops.long_conv.block_fft import matrices


@triton.jit
def analyse(
    x, gate, matrix, spectra,
    length, blocks, columns, x_b, x_h, gate_b, gate_h,
    T: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """spectra[h, q, (b, c)] = sum_s matrix[q, s] (gate x)[b, h, c T + s]."""
    tiles = tl.cdiv(columns, R)
    q = tl.program_id(0) % (2 * T // Q) * Q + tl.arange(0, Q)
    tile = tl.program_id(0) // (2 * T // Q) % tiles
    channel = (tl.program_id(0) // (2 * T // Q) // tiles).to(tl.int64)
    column = tile * R + tl.arange(0, R)
    sequence = (column // blocks).to(tl.int64)
    start = column % blocks * T
    k = tl.arange(0, K)
    total = tl.zeros((Q, R), dtype=tl.float32)
    for s in tl.range(0, T, K):
        time = start[None, :] + (s + k)[:, None]
        inside = (column < columns)[None, :] & (time < length)
        w = tl.load(x + (channel * x_h + sequence * x_b)[None, :] + time, mask=inside, other=0.0)
        if HAS_GATE:
            g = tl.load(gate + (channel * gate_h + sequence * gate_b)[None, :] + time, mask=inside, other=0.0)
            w = w.to(tl.float32) * g.to(tl.float32)
        m = tl.load(matrix + q[:, None] * T + (s + k)[None, :])
        total = tl.dot(m, w.to(m.dtype), total, input_precision=PRECISION)
    to = spectra + (channel * 2 * T + q.to(tl.int64))[:, None] * columns + column[None, :]
    tl.store(to, total.to(spectra.dtype.element_ty), mask=(column < columns)[None, :])


@triton.jit
def synthesise(
    spectra, matrix, out, post, out2, post2,
    out_length, blocks, columns, out_b, out_h, post_b, post_h, out2_b, out2_h, post2_b, post2_h,
    T: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    HAS_POST: tl.constexpr, HAS_SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, h, c T + t] = post sum_q matrix[q, t] spectra[h, q, (b, c)], and out2 likewise with post2."""
    tiles = tl.cdiv(columns, R)
    t = tl.program_id(0) % (T // N) * N + tl.arange(0, N)
    tile = tl.program_id(0) // (T // N) % tiles
    channel = (tl.program_id(0) // (T // N) // tiles).to(tl.int64)
    column = tile * R + tl.arange(0, R)
    k = tl.arange(0, K)
    spectra += channel * 2 * T * columns
    y = tl.zeros((R, N), dtype=tl.float32)
    for q in tl.range(0, 2 * T, K):
        at = (q + k).to(tl.int64)[None, :] * columns + column[:, None]
        a = tl.load(spectra + at, mask=(column < columns)[:, None], other=0.0)
        y = tl.dot(a, tl.load(matrix + (q + k)[:, None] * T + t[None, :]), y, input_precision=PRECISION)

    sequence = (column // blocks).to(tl.int64)
    time = (column % blocks * T)[:, None] + t[None, :]
    inside = (column < columns)[:, None] & (time < out_length)
    value = y
    if HAS_POST:
        gate = tl.load(post + (sequence * post_b + channel * post_h)[:, None] + time, mask=inside, other=0.0)
        value = y * gate.to(tl.float32)
    tl.store(out + (sequence * out_b + channel * out_h)[:, None] + time, value.to(out.dtype.element_ty), mask=inside)
    if HAS_SECOND:
        gate = tl.load(post2 + (sequence * post2_b + channel * post2_h)[:, None] + time, mask=inside, other=0.0)
        value = y * gate.to(tl.float32)
        tl.store(out2 + (sequence * out2_b + channel * out2_h)[:, None] + time, value.to(out2.dtype.element_ty), mask=inside)


@triton.jit
def spectrum_table(
    taps, table, columns, lags, first, center, width, T,
    MIRROR: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table[h, f, re | im, r, m] = C_d(f), d = center + r - m; MIRROR: the conjugate of C_(-d)(f). Zero outside.

    taps (H, 2 T, columns): spectra P_d of T taps from lag d T on, d = first - 1 ..., and C_d = P_d + i (-1)^f P_(d-1).
    """
    channel = tl.program_id(1).to(tl.int64)
    f = channel % T
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sign = 1.0 - 2.0 * (f % 2).to(tl.float32)
    for copy in tl.static_range(COPIES):
        lag = center + copy - at
        if MIRROR:
            lag = -lag
        inside = (lag >= first) & (lag < first + lags)
        re_at = taps + channel * 2 * columns + (lag - first + 1)
        im_at = re_at + columns
        re = tl.load(re_at, mask=inside, other=0.0) - sign * tl.load(im_at - 1, mask=inside, other=0.0)
        im = tl.load(im_at, mask=inside, other=0.0) + sign * tl.load(re_at - 1, mask=inside, other=0.0)
        if MIRROR:
            im = -im
        to = table + (channel * 2 * COPIES + copy) * width + at
        tl.store(to, re.to(table.dtype.element_ty), mask=at < width)
        tl.store(to + COPIES * width, im.to(table.dtype.element_ty), mask=at < width)


@triton.jit
def complex_toeplitz(
    x, table, out,
    batch, length, first, last, center, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, COPIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_toeplitz.toeplitz for complex x, out (channels, 2, batch, length) and taps, without gates."""
    chunks = tl.cdiv(length, N)
    tiles = tl.cdiv(chunks * batch, M)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tile * M + tl.arange(0, M)
    chunk = row // batch
    sequence = row - chunk * batch
    start = chunk * N
    live = row < chunks * batch
    earliest = tile * M // batch * N
    latest = tl.minimum((tile * M + M - 1) // batch, chunks - 1) * N
    begin = tl.maximum(-last, -latest)
    begin = -((-begin + K - 1) // K) * K
    end = tl.minimum(N - first, length - earliest)

    i = tl.arange(0, K)
    j = tl.arange(0, N)
    part = batch * length
    x += channel * 2 * part
    column = channel * 2 * COPIES * width + (j % COPIES) * width + (center - j + j % COPIES)
    re_re = tl.zeros((M, N), dtype=tl.float32)
    im_im = tl.zeros((M, N), dtype=tl.float32)
    im = tl.zeros((M, N), dtype=tl.float32)
    for d in tl.range(begin, end, K):
        time = start[:, None] + (d + i)[None, :]
        inside = live[:, None] & (time >= 0) & (time < length)
        x_re = tl.load(x + sequence[:, None] * length + time, mask=inside, other=0.0)
        x_im = tl.load(x + part + sequence[:, None] * length + time, mask=inside, other=0.0)
        at = tl.max_contiguous(tl.multiple_of(column[None, :] + (d + i)[:, None], (COPIES, 1)), (COPIES, 1))
        taps_re = tl.load(table + at)
        taps_im = tl.load(table + COPIES * width + at)
        re_re = tl.dot(x_re, taps_re, re_re, input_precision=PRECISION)
        im_im = tl.dot(x_im, taps_im, im_im, input_precision=PRECISION)
        im = tl.dot(x_re, taps_im, im, input_precision=PRECISION)
        im = tl.dot(x_im, taps_re, im, input_precision=PRECISION)

    time = start[:, None] + j[None, :]
    to = out + channel * 2 * part + sequence[:, None] * length + time
    inside = live[:, None] & (time < length)
    tl.store(to, (re_re - im_im).to(out.dtype.element_ty), mask=inside)
    tl.store(to + part, im.to(out.dtype.element_ty), mask=inside)


@triton.jit
def complex_taps_gradient(
    x, z, sums,
    batch, length, first_block, blocks,
    T: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_toeplitz.taps_gradient for complex x, z (channels, 2, batch, length): sums (channels, 2, blocks, 2, T) of conj(x) z.

    The real and the imaginary part are of two programs: more of them are at work at a time than of one with all the sums.
    """
    part = tl.program_id(0) % 2
    block = tl.program_id(0) // 2 % blocks
    channel = (tl.program_id(0) // 2 // blocks).to(tl.int64)
    d = first_block + block
    chunks = tl.cdiv(length, T)
    lowest = tl.maximum(d, 0)
    rows = tl.maximum(tl.minimum(chunks, chunks + d) - lowest, 0) * batch
    i = tl.arange(0, T)
    size = batch * length
    x += channel * 2 * size
    z += channel * 2 * size
    of_re = tl.zeros((T, T), dtype=tl.float32)
    of_im = tl.zeros((T, T), dtype=tl.float32)
    for lead in tl.range(0, rows, R):
        row = lead + tl.arange(0, R)
        chunk = row // batch
        sequence = (row - chunk * batch) * length
        now = (chunk + lowest) * T
        live = row < rows
        time = (now - d * T)[None, :] + i[:, None]
        inside = live[None, :] & (time < length)
        x_re = tl.load(x + sequence[None, :] + time, mask=inside, other=0.0)
        x_im = tl.load(x + size + sequence[None, :] + time, mask=inside, other=0.0)
        time = now[:, None] + i[None, :]
        inside = live[:, None] & (time < length)
        with_re = tl.load(z + part * size + sequence[:, None] + time, mask=inside, other=0.0)
        with_im = tl.load(z + (1 - part) * size + sequence[:, None] + time, mask=inside, other=0.0)
        of_re = tl.dot(x_re, with_re, of_re, input_precision=PRECISION)
        of_im = tl.dot(x_im, with_im, of_im, input_precision=PRECISION)

    to = sums + ((channel * 2 + part) * blocks + block) * 2 * T + i
    from_here, from_before = diagonal_sums(of_re + of_im * (1 - 2 * part).to(tl.float32), T)
    tl.store(to, from_here)
    tl.store(to + T, from_before)


@triton.jit
def tap_spectra_gradient(
    sums, out, first, last, first_block, blocks, width, F,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (H, 2 F, width): the gradient of P_d, d = first - 1, ..., last, from complex_taps_gradient's sums for the C_d.

    The adjoint of C_d = P_d + i (-1)^f P_(d-1).
    """
    channel = tl.program_id(1).to(tl.int64)
    sign = 1.0 - 2.0 * (channel % F % 2).to(tl.float32)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums += channel * 2 * blocks * 2 * T
    re, im = of_lag(sums, first - 1 + at, first, last, first_block, blocks, T)
    next_re, next_im = of_lag(sums, first + at, first, last, first_block, blocks, T)
    to = out + channel * 2 * width + at
    tl.store(to, re + sign * next_im, mask=at < width)
    tl.store(to + width, im - sign * next_re, mask=at < width)


@triton.jit
def of_lag(sums, lag, first, last, first_block, blocks, T: tl.constexpr):
    """Real and imaginary part at a lag: of the block where it begins, and of the next one, which also meets it."""
    inside = (lag >= first) & (lag <= last)
    # From the block before the first one on, so that no number is negative.
    place = lag - (first_block - 1) * T
    block = place // T
    here = sums + (block - 1) * 2 * T + place % T
    is_here = inside & (block >= 1) & (block <= blocks)
    before = sums + block * 2 * T + T + place % T
    is_before = inside & (block < blocks)
    re = tl.load(here, mask=is_here, other=0.0) + tl.load(before, mask=is_before, other=0.0)
    here += blocks * 2 * T
    before += blocks * 2 * T
    return re, tl.load(here, mask=is_here, other=0.0) + tl.load(before, mask=is_before, other=0.0)


@triton.jit
def inner_products(
    u, pre, dy, post, out,
    batch, length, u_b, u_h, pre_b, pre_h, dy_b, dy_h, post_b, post_h,
    BLOCK: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr,
):  # fmt: skip
    """out[h, b] = sum_t (pre u)_t (post dy)_t: lag 0 of the taps' gradient, without the rounding of spectra."""
    sequence = (tl.program_id(0) % batch).to(tl.int64)
    channel = (tl.program_id(0) // batch).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in tl.range(0, length, BLOCK):
        time = begin + tl.arange(0, BLOCK)
        inside = time < length
        x = tl.load(u + sequence * u_b + channel * u_h + time, mask=inside, other=0.0).to(tl.float32)
        x *= tl.load(dy + sequence * dy_b + channel * dy_h + time, mask=inside, other=0.0).to(tl.float32)
        if HAS_PRE:
            x *= tl.load(pre + sequence * pre_b + channel * pre_h + time, mask=inside, other=0.0).to(tl.float32)
        if HAS_POST:
            x *= tl.load(post + sequence * post_b + channel * post_h + time, mask=inside, other=0.0).to(tl.float32)
        total += x
    tl.store(out + channel * batch + sequence, tl.sum(total, axis=0))


@dataclass(frozen=True)
class Plan:
    """How a call is divided: `blocks` of `t` in (padded) time, taps over block lags first to last, channels in groups."""

    t: int
    blocks: int
    length: int
    first: int
    last: int
    dtype: torch.dtype
    precision: str
    group: int

    @classmethod
    def of(cls, u: Tensor, taps: Taps, t: int | None) -> Plan:
        batch, _, length = u.shape
        t = t or block_length(length)
        blocks = up(-(-length // t), VECTOR)
        dtype, precision = operand(u.dtype)
        if u.dtype == torch.float16:
            # Three products in a row, each with its rounding, are too rough for float16 in plain tf32.
            precision = "tf32x3"
        first, last = taps.lags()
        # Two spectra of a group's rows at a time, and the taps in several forms.
        group = max(1, scratch(u) // (blocks * t * (2 * 2 * batch * dtype.itemsize + 24)))
        return cls(
            t, blocks, up(length, VECTOR), max(first // t, 1 - blocks), min(-(-last // t), blocks - 1), dtype, precision, group
        )

    @property
    def columns(self) -> int:
        """Block lags first - 1 to last, and some more for whole vectors."""
        return up(self.last + 2 - self.first, VECTOR)

    def groups(self, channels: int) -> list[slice]:
        count = -(-channels // self.group)
        size = -(-channels // count)
        return [slice(at, at + size) for at in range(0, channels, size)]


def block_length(length: int) -> int:
    """The power of two that balances 4 T multiply-adds of the transforms with 2 L / T of the products, at least 64."""
    return max(64, 1 << round(math.log2(max(1, length) / 2) / 2))


def _analyse(x: Tensor, gate: Tensor | None, t: int, blocks: int, dtype: torch.dtype, precision: str) -> Tensor:
    """Spectra (H, 2 T, B blocks) of gate x (B, H, L)."""
    batch, channels, length = x.shape
    columns = batch * blocks
    out = torch.empty(channels, 2 * t, columns, dtype=dtype, device=x.device)
    some = x if gate is None else gate
    k = min(t, 128 // dtype.itemsize)
    q, r = min(2 * t, 128), power(columns, 16, 128)
    analyse[(2 * t // q * triton.cdiv(columns, r) * channels,)](
        x, some, matrices(t, dtype, x.device)[0], out, length, blocks, columns, *row_strides(x, some),
        T=t, Q=q, R=r, K=k, HAS_GATE=gate is not None, PRECISION=precision,
        num_warps=8 if q * r >= 1 << 14 else 4, num_stages=3,
    )  # fmt: skip
    return out


def _synthesise(spectra: Tensor, outs: list[Tensor], gates: list[Tensor | None], t: int, blocks: int, precision: str) -> None:
    """outs (B, H, L): the sequences of the spectra, each times its gate."""
    batch, channels, length = outs[0].shape
    columns = batch * blocks
    some = [outs[0] if gate is None else gate for gate in gates]
    k = min(2 * t, 128 // spectra.dtype.itemsize)
    r, n = power(columns, 16, 128), min(t, 128)
    synthesise[(t // n * triton.cdiv(columns, r) * channels,)](
        spectra, matrices(t, spectra.dtype, spectra.device)[1], outs[0], some[0], outs[-1], some[-1],
        length, blocks, columns, *row_strides(outs[0], some[0], outs[-1], some[-1]),
        T=t, R=r, N=n, K=k, HAS_POST=gates[0] is not None, HAS_SECOND=len(outs) == 2, PRECISION=precision,
        num_warps=8 if r * n >= 1 << 13 else 4, num_stages=3,
    )  # fmt: skip


def _tap_spectra(taps: Taps, plan: Plan) -> Tensor:
    """P_d (H, 2 T, block lags + 1 and zeros) in float32, of T taps from lag d T on each, d = first - 1, ..., last."""
    t, columns = plan.t, plan.columns
    sequence = taps.sequence((plan.first - 1) * t, (plan.first - 1 + columns) * t - 1)
    return _analyse(sequence.unsqueeze(0), None, t, columns, torch.float32, plan.precision)


def _tap_spectra_by_group(taps: Taps, plan: Plan, batch: int) -> Callable[[slice], Tensor]:
    """Beside many sequences the taps are small: of all channels at once."""
    if batch < 16:
        return lambda some: _tap_spectra(taps.channels(some), plan)
    return _tap_spectra(taps, plan).__getitem__


def _multiply(
    spectra: Tensor,
    tap_spectra: Tensor,
    batch: int,
    plan: Plan,
    mirror: bool,
    *,
    tile: tuple[int, int, int, int, int, int] | None = None,
) -> Tensor:
    """Spectra of the outputs: at each frequency the convolution along blocks, mirror: with the mirror image of the taps.

    tile: M, N, K, copies of the taps, warps and stages, to measure them.
    """
    channels = spectra.shape[0] * plan.t
    m, n, k, copies, warps, stages = tile or _tile(batch, plan)
    chunks = -(-plan.blocks // n)
    first, last = (-plan.last, -plan.first) if mirror else (plan.first, plan.last)
    center = up(min(last, (chunks - 1) * n), k) + n
    width = up(center + min(n - first, plan.blocks) + k, VECTOR)
    table = torch.empty(channels, 2, copies, width, dtype=plan.dtype, device=spectra.device)
    spectrum_table[(triton.cdiv(width, 256), channels)](
        tap_spectra, table, tap_spectra.shape[2], plan.last + 1 - plan.first, plan.first, center, width, plan.t,
        MIRROR=mirror, COPIES=copies, BLOCK=256, num_warps=2,
    )  # fmt: skip
    out = torch.empty_like(spectra)
    complex_toeplitz[(triton.cdiv(chunks * batch, m) * channels,)](
        spectra, table, out, batch, plan.blocks, first, last, center, width,
        M=m, N=n, K=k, COPIES=copies, PRECISION=plan.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _tile(batch: int, plan: Plan) -> tuple[int, int, int, int, int, int]:
    n = power(plan.blocks, 16, 32 if plan.precision == "tf32x3" else 64)
    while n > 16 and batch * -(-plan.blocks // n) < 64:
        n //= 2
    m = power(batch * -(-plan.blocks // n), 16, 64)
    if plan.dtype == torch.bfloat16:
        return m, n, min(n, 32), 8 if n == 64 and batch >= 16 else 2, 4, 3
    return m, n, min(n, 32), 1, 4, 2


def _lags_of(w: Tensor, z: Tensor, batch: int, plan: Plan) -> Tensor:
    """The gradient of taps (H, columns T) in float32, from lag (first - 1) T on, from inputs' and outputs' spectra."""
    channels = w.shape[0] * plan.t
    t = power(plan.blocks, 16, 32 if plan.precision == "tf32x3" else 64)
    chunks = -(-plan.blocks // t)
    # Products at a distance in chunks where both have any.
    first_block = max(plan.first // t, 1 - chunks)
    blocks = min(plan.last // t + 1, chunks - 1) + 1 - first_block
    sums = torch.empty(channels, 2, blocks, 2, t, device=w.device)
    r = power(batch * chunks, 16, 128 // plan.dtype.itemsize // 2)
    complex_taps_gradient[(2 * blocks * channels,)](
        w, z, sums, batch, plan.blocks, first_block, blocks, T=t, R=r, PRECISION=plan.precision, num_warps=4, num_stages=2
    )
    spectra = torch.empty(w.shape[0], 2 * plan.t, plan.columns, device=w.device)
    tap_spectra_gradient[(triton.cdiv(plan.columns, 256), channels)](
        sums, spectra, plan.first, plan.last, first_block, blocks, plan.columns, plan.t, T=t, BLOCK=256, num_warps=2
    )
    out = torch.empty(1, w.shape[0], plan.columns * plan.t, device=w.device)
    _synthesise(spectra, [out], [None], plan.t, plan.columns, plan.precision)
    return out[0]


def _lag_0(u: Tensor, dy: Tensor, pre: Tensor | None, post: Tensor | None) -> Tensor:
    batch, channels, length = u.shape
    out = torch.empty(channels, batch, device=u.device)
    some_pre, some_post = u if pre is None else pre, dy if post is None else post
    inner_products[(channels * batch,)](
        u, some_pre, dy, some_post, out, batch, length, *row_strides(u, some_pre, dy, some_post),
        BLOCK=power(length, 16, 2048), HAS_PRE=pre is not None, HAS_POST=post is not None,
    )  # fmt: skip
    return out.sum(1)


def convolve(
    u: Tensor,
    taps: Taps,
    pre: Tensor | None,
    posts: tuple[Tensor | None, ...] = (None,),
    *,
    transposed: bool = False,
    t: int | None = None,
) -> list[Tensor]:
    """For each of `posts` post y, y the convolution of pre u (B, H, L) with the taps, or with their mirror image.

    t: the length of blocks, to measure it.
    """
    plan = Plan.of(u, taps, t)
    outs = [empty(u) for _ in posts]
    u, pre = vectors(u, plan.length), None if pre is None else vectors(pre, plan.length)
    gates = [along_time(post) for post in posts]
    tap_spectra = _tap_spectra_by_group(taps, plan, u.shape[0])
    for some in plan.groups(u.shape[1]):
        spectra = _analyse(u[:, some], None if pre is None else pre[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        product = _multiply(spectra, tap_spectra(some), u.shape[0], plan, transposed)
        del spectra
        _write(product, outs, gates, some, plan)
        del product
    return outs


def _write(spectra: Tensor, outs: list[Tensor], gates: list[Tensor | None], some: slice, plan: Plan) -> None:
    gates = [gate if gate is None else gate[:, some] for gate in gates]
    _synthesise(spectra, [out[:, some] for out in outs], gates, plan.t, plan.blocks, plan.precision)


def backward(
    dy: Tensor,
    u: Tensor,
    taps: Taps,
    pre: Tensor | None,
    post: Tensor | None,
    wanted: Wanted,
    *,
    t: int | None = None,
) -> Gradients:
    """Gradients from dy (B, H, L). Both spectra are made once and serve all of them."""
    plan = Plan.of(u, taps, t)
    batch, channels = u.shape[:2]
    du, dpre = (empty(dy) if wanted.inputs else None), (empty(dy) if wanted.inputs and pre is not None else None)
    dpost = empty(u) if wanted.post else None
    first, last = taps.lags()
    lags = torch.empty(channels, last + 1 - first, device=u.device) if wanted.taps else None
    u_, dy_ = vectors(u, plan.length), vectors(dy, plan.length)
    pre_, post_ = (g if g is None else vectors(g, plan.length) for g in (pre, post))
    outs = [out for out in (du, dpre) if out is not None]
    gates = [along_time(pre), along_time(u)][: len(outs)]
    tap_spectra = _tap_spectra_by_group(taps, plan, batch)
    for some in plan.groups(channels):
        z = _analyse(dy_[:, some], None if post_ is None else post_[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        if wanted.inputs:
            _write(_multiply(z, tap_spectra(some), batch, plan, True), outs, gates, some, plan)
        if not (wanted.taps or wanted.post):
            del z
            continue
        w = _analyse(u_[:, some], None if pre_ is None else pre_[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        if lags is not None:
            lags[some] = _lags_of(w, z, batch, plan)[:, first - (plan.first - 1) * plan.t :][:, : last + 1 - first]
        del z
        if dpost is not None:
            _write(_multiply(w, tap_spectra(some), batch, plan, False), [dpost], [along_time(dy)], some, plan)
        del w
    if lags is not None and taps.skip is not None:
        lags[:, -first] = _lag_0(u_, dy_, pre_, post_)
    return Gradients(du, dpre, dpost, lags)
