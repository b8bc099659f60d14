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

import functools
import math
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
    up,
    vectors,
)
from hippodrome.ops.long_conv._toeplitz import diagonal_sums


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
    taps, table, lags, first, center, width, T,
    MIRROR: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table[h, f, re | im, r, m] = C_d(f), d = center + r - m; MIRROR: the conjugate of C_(-d)(f). Zero outside.

    taps (H, 2 T, lags + 1): spectra P_d of T taps from lag d T on, d = first - 1 ..., and C_d = P_d + i (-1)^f P_(d-1).
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
        re_at = taps + channel * 2 * (lags + 1) + (lag - first + 1)
        im_at = re_at + (lags + 1)
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
    """_toeplitz.taps_gradient for complex x, z (channels, 2, batch, length): sums (channels, 2, blocks, 2, T) of conj(x) z."""
    block = tl.program_id(0) % blocks
    channel = (tl.program_id(0) // blocks).to(tl.int64)
    d = first_block + block
    chunks = tl.cdiv(length, T)
    lowest = tl.maximum(d, 0)
    rows = tl.maximum(tl.minimum(chunks, chunks + d) - lowest, 0) * batch
    i = tl.arange(0, T)
    part = batch * length
    x += channel * 2 * part
    z += channel * 2 * part
    re = tl.zeros((T, T), dtype=tl.float32)
    re_im = tl.zeros((T, T), dtype=tl.float32)
    im_re = tl.zeros((T, T), dtype=tl.float32)
    for lead in tl.range(0, rows, R):
        row = lead + tl.arange(0, R)
        chunk = row // batch
        sequence = (row - chunk * batch) * length
        now = (chunk + lowest) * T
        live = row < rows
        time = (now - d * T)[None, :] + i[:, None]
        inside = live[None, :] & (time < length)
        x_re = tl.load(x + sequence[None, :] + time, mask=inside, other=0.0)
        x_im = tl.load(x + part + sequence[None, :] + time, mask=inside, other=0.0)
        time = now[:, None] + i[None, :]
        inside = live[:, None] & (time < length)
        z_re = tl.load(z + sequence[:, None] + time, mask=inside, other=0.0)
        z_im = tl.load(z + part + sequence[:, None] + time, mask=inside, other=0.0)
        re = tl.dot(x_re, z_re, re, input_precision=PRECISION)
        re = tl.dot(x_im, z_im, re, input_precision=PRECISION)
        re_im = tl.dot(x_re, z_im, re_im, input_precision=PRECISION)
        im_re = tl.dot(x_im, z_re, im_re, input_precision=PRECISION)

    to = sums + (channel * 2 * blocks + block) * 2 * T + i
    from_here, from_before = diagonal_sums(re, T)
    tl.store(to, from_here)
    tl.store(to + T, from_before)
    from_here, from_before = diagonal_sums(re_im - im_re, T)
    tl.store(to + blocks * 2 * T, from_here)
    tl.store(to + blocks * 2 * T + T, from_before)


@functools.lru_cache(maxsize=16)
def _matrices(t: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(2 T, T) twice: exp(-pi i (f + 1/2) s / T) as rows re, im of each frequency; and rows that make the outputs again."""
    f, s = torch.arange(t, device=device).unsqueeze(1), torch.arange(t, device=device)
    angle = ((2 * f + 1) * s % (4 * t)).double() * (math.pi / (2 * t))
    both = torch.stack([angle.cos(), -angle.sin()], 1).view(2 * t, t)
    return both.to(dtype), (both / t).to(dtype)


SCRATCH = 1 << 26
"""Bytes of spectra that a group of channels may always have."""


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
    def of(cls, u: Tensor, taps: Taps, t: int | None, buffers: int) -> Plan:
        batch, _, length = u.shape
        t = t or block_length(length)
        blocks = up(-(-length // t), VECTOR)
        dtype, precision = operand(u.dtype)
        first, last = taps.lags()
        # Spectra together no larger than half the inputs, if that is more than a trifle.
        room = max(SCRATCH, u.numel() * u.element_size() // 2)
        group = max(1, room // (buffers * 2 * batch * blocks * t * dtype.itemsize))
        return cls(
            t, blocks, up(length, VECTOR), max(first // t, 1 - blocks), min(-(-last // t), blocks - 1), dtype, precision, group
        )

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
        x, some, _matrices(t, dtype, x.device)[0], out, length, blocks, columns, *row_strides(x, some),
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
        spectra, _matrices(t, spectra.dtype, spectra.device)[1], outs[0], some[0], outs[-1], some[-1],
        length, blocks, columns, *row_strides(outs[0], some[0], outs[-1], some[-1]),
        T=t, R=r, N=n, K=k, HAS_POST=gates[0] is not None, HAS_SECOND=len(outs) == 2, PRECISION=precision,
        num_warps=8 if r * n >= 1 << 13 else 4, num_stages=3,
    )  # fmt: skip


def _tap_spectra(taps: Taps, plan: Plan) -> Tensor:
    """P_d (H, 2 T, block lags + 1) in float32, of T taps from lag d T on each, d = first - 1, ..., last."""
    t = plan.t
    sequence = taps.sequence((plan.first - 1) * t, (plan.last + 1) * t - 1)
    return _analyse(sequence.unsqueeze(0), None, t, plan.last + 2 - plan.first, torch.float32, plan.precision)


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
        tap_spectra, table, plan.last + 1 - plan.first, plan.first, center, width, plan.t,
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
    return m, n, min(n, 128 // plan.dtype.itemsize), 4 // plan.dtype.itemsize, 4, 2


def _lags_of(w: Tensor, z: Tensor, batch: int, plan: Plan) -> Tensor:
    """The gradient of taps (H, (block lags + 1) T) in float32, from lag (first - 1) T on, from inputs' and outputs' spectra."""
    channels = w.shape[0] * plan.t
    t = power(plan.blocks, 16, 32 if plan.precision == "tf32x3" else 64)
    first_block = plan.first // t
    blocks = plan.last // t + 2 - first_block
    sums = torch.empty(channels, 2, blocks, 2, t, device=w.device)
    r = power(batch * -(-plan.blocks // t), 16, 128 // plan.dtype.itemsize // 2)
    complex_taps_gradient[(blocks * channels,)](
        w, z, sums, batch, plan.blocks, first_block, blocks, T=t, R=r, PRECISION=plan.precision, num_warps=4, num_stages=2
    )
    lags = (sums[:, :, :-1, 0] + sums[:, :, 1:, 1]).view(-1, plan.t, 2, (blocks - 1) * t)
    lags = lags[..., plan.first - first_block * t :][..., : plan.last + 1 - plan.first]
    # The adjoint of C_d = P_d + i (-1)^f P_(d-1).
    sign = 1 - 2 * (torch.arange(plan.t, device=w.device) % 2).unsqueeze(1)
    spectra = torch.zeros(*lags.shape[:3], lags.shape[3] + 1, device=w.device)
    spectra[..., 1:] = lags
    spectra[:, :, 0, :-1] += sign * lags[:, :, 1]
    spectra[:, :, 1, :-1] -= sign * lags[:, :, 0]
    out = torch.empty(1, w.shape[0], spectra.shape[-1] * plan.t, device=w.device)
    _synthesise(spectra, [out], [None], plan.t, spectra.shape[-1], plan.precision)
    return out[0]


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
    plan = Plan.of(u, taps, t, 2)
    outs = [empty(u) for _ in posts]
    u, pre = vectors(u, plan.length), None if pre is None else vectors(pre, plan.length)
    gates = [along_time(post) for post in posts]
    for some in plan.groups(u.shape[1]):
        spectra = _analyse(u[:, some], None if pre is None else pre[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        product = _multiply(spectra, _tap_spectra(taps.channels(some), plan), u.shape[0], plan, transposed)
        del spectra
        _write(product, outs, gates, some, plan)
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
    plan = Plan.of(u, taps, t, 3)
    batch, channels = u.shape[:2]
    du, dpre = (empty(dy) if wanted.inputs else None), (empty(dy) if wanted.inputs and pre is not None else None)
    dpost = empty(u) if wanted.post else None
    first, last = taps.lags()
    lags = torch.empty(channels, last + 1 - first, device=u.device) if wanted.taps else None
    u_, dy_ = vectors(u, plan.length), vectors(dy, plan.length)
    pre_, post_ = (g if g is None else vectors(g, plan.length) for g in (pre, post))
    outs = [out for out in (du, dpre) if out is not None]
    gates = [along_time(pre), along_time(u)][: len(outs)]
    for some in plan.groups(channels):
        z = _analyse(dy_[:, some], None if post_ is None else post_[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        tap_spectra = _tap_spectra(taps.channels(some), plan)
        if wanted.inputs:
            _write(_multiply(z, tap_spectra, batch, plan, True), outs, gates, some, plan)
        if not (wanted.taps or wanted.post):
            continue
        w = _analyse(u_[:, some], None if pre_ is None else pre_[:, some], plan.t, plan.blocks, plan.dtype, plan.precision)
        if lags is not None:
            lags[some] = _lags_of(w, z, batch, plan)[:, first - (plan.first - 1) * plan.t :][:, : last + 1 - first]
        del z
        if dpost is not None:
            _write(_multiply(w, tap_spectra, batch, plan, False), [dpost], [along_time(dy)], some, plan)
    return Gradients(du, dpre, dpost, lags)
