"""The fused block FFT convolution of H3 on tensor cores: sequences are transformed, multiplied and brought back on the chip.

A real sequence of up to n tokens is turned by exp(pi i t / 2n), so that n complex points do what 2 n do to a sequence padded by
zeros (_fft.py). With n = N1 N2, t = N2 a + s and k = f + N1 g, in a matrix of rows a and columns s (block_fft.py),

    X[f, g] = sum_s D2[s, g] twist[f, s] sum_a D1[f, a] x[a, s],        twist[f, s] = exp(-2 pi i s (f - 1/4) / n),

and the turn is part of the matrix D1 = exp(-2 pi i a (f - 1/4) / N1) and of the twist: the first product has a real operand.
The way back is the adjoint, for real parts the real part of D1^T ((conj(Z) D2) twist). One product is from the left, one from
the right, nothing is transposed, and frequencies stay in the order [f, g], in which the taps' spectrum is laid down.

Frequencies f do not meet between the first product and the last, so a program takes R of them at a time and adds up what they
owe to the output, which alone stays in registers. That is 4 N1 + 8 N2 multiply-adds a token, and no number but inputs, the
taps' spectrum, tables and outputs is read or written. Rows of a program are B sequences side by side, [a, (sequence, s)].

Precision. bfloat16 tables and spectra would cost twice what casting the inputs costs. Here half types are multiplied as float16
with 11 bits: each sequence is divided by a power of two, each channel's spectrum too, and the tables are unitary, so that no
number leaves the range of float16. float32 is multiplied as three products of tf32.

Sources: H3 (Dao, Fu et al., ICLR 2023), section 4.1; Nussbaumer (1981), right-angle convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hippodrome.ops.long_conv._fft import Spectra
from hippodrome.ops.long_conv._taps import (
    VECTOR,
    Gradients,
    Taps,
    Wanted,
    along_time,
    empty,
    row_strides,
    scratch,
    up,
    vectors,
)
from hippodrome.ops.long_conv._tiles import Tile, operand, tiles
from hippodrome.ops.long_conv.block_fft import steps


@triton.jit
def sequences(
    x, gate, first, batch, length, x_b, gate_b,
    N1: tl.constexpr, N2: tl.constexpr, B: tl.constexpr, HAS_GATE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """gate x of B sequences, token N2 a + s of sequence first + j at [a, j N2 + s]; HALF: in float16, and the power of two (B,)
    by which each sequence was divided."""
    column = tl.arange(0, B * N2)
    row = first + column // N2
    time = (tl.arange(0, N1) * N2)[:, None] + (column % N2)[None, :]
    inside = (row < batch)[None, :] & (time < length)
    w = tl.load(x + (row.to(tl.int64) * x_b)[None, :] + time, mask=inside, other=0.0)
    if HAS_GATE:
        g = tl.load(gate + (row.to(tl.int64) * gate_b)[None, :] + time, mask=inside, other=0.0)
        w = w.to(tl.float32) * g.to(tl.float32)
    w = w.to(tl.float32)
    scale = tl.full((B,), 1.0, tl.float32)
    if HALF:
        most = tl.max(tl.reshape(tl.max(tl.abs(w), axis=0), (B, N2)), axis=1)
        # The exponent alone, where both the power and its inverse are normal numbers.
        bits = tl.minimum(tl.maximum(most.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        scale = bits.to(tl.float32, bitcast=True)
        w = (w * columns(inverse, N2, B)[None, :]).to(tl.float16)
    return w, scale


@triton.jit
def columns(of_sequence, N2: tl.constexpr, B: tl.constexpr):
    """(B,) to the B N2 columns of `sequences`."""
    return tl.reshape(tl.broadcast_to(of_sequence[:, None], (B, N2)), (B * N2,))


@triton.jit
def twisted(x_re, x_im, twist_re, twist_im, OPERAND: tl.constexpr):
    re = x_re * twist_re - x_im * twist_im
    return re.to(OPERAND), (x_re * twist_im + x_im * twist_re).to(OPERAND)


@triton.jit
def from_the_right(x_re, x_im, m_re, m_im, PRECISION: tl.constexpr):
    re = tl.dot(x_re, m_re, input_precision=PRECISION)
    re = tl.dot(-x_im, m_im, re, input_precision=PRECISION)
    im = tl.dot(x_re, m_im, input_precision=PRECISION)
    return re, tl.dot(x_im, m_re, im, input_precision=PRECISION)


@triton.jit
def spectrum_of(
    w, into, twist_re, twist_im, second_re, second_im, f,
    N1: tl.constexpr, N2: tl.constexpr, B: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R B, N2) twice: real and imaginary part of R frequencies f of w, each of B sequences in a row."""
    at = f[:, None] * N1 + tl.arange(0, N1)[None, :]
    x_re = tl.dot(tl.load(into + at), w, input_precision=PRECISION)
    x_im = tl.dot(tl.load(into + N1 * N1 + at), w, input_precision=PRECISION)
    # Row-major [f, (sequence, s)] is [(f, sequence), s].
    x_re, x_im = tl.reshape(x_re, (R * B, N2)), tl.reshape(x_im, (R * B, N2))
    x_re, x_im = twisted(x_re, x_im, twist_re, twist_im, w.dtype)
    return from_the_right(x_re, x_im, second_re, second_im, PRECISION)


@triton.jit
def block_fft_conv(
    u, pre, spectrum, size, out, post, out2, post2, into, back, twist, second,
    batch, length, out_length, u_b, u_h, pre_b, pre_h, out_b, out_h, post_b, post_h, out2_b, out2_h, post2_b, post2_h,
    N1: tl.constexpr, N2: tl.constexpr, B: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = post y and, HAS_SECOND, out2 = post2 y, y the convolution of pre u with the taps of this (conjugate) spectrum."""
    tiles = tl.cdiv(batch, B)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * B
    operand: tl.constexpr = into.dtype.element_ty
    N: tl.constexpr = N1 * N2
    u, pre, spectrum = u + channel * u_h, pre + channel * pre_h, spectrum + channel * 2 * N
    w, scale = sequences(u, pre, first, batch, length, u_b, pre_b, N1, N2, B, HAS_PRE, operand == tl.float16)

    g = tl.arange(0, N2)
    at = g[:, None] * N2 + g[None, :]
    second_re, second_im = tl.load(second + at), tl.load(second + N2 * N2 + at)
    y = tl.zeros((N1, B * N2), dtype=tl.float32)
    for part in tl.range(0, N1, R):
        f = part + tl.arange(0, R)
        bins = (part + tl.arange(0, R * B) // B)[:, None] * N2 + g[None, :]
        twist_re, twist_im = tl.load(twist + bins).to(tl.float32), tl.load(twist + N + bins).to(tl.float32)
        x_re, x_im = spectrum_of(w, into, twist_re, twist_im, second_re, second_im, f, N1, N2, B, R, PRECISION)

        # From here on conjugates: so the way back has the matrices of the way there.
        k_re, k_im = tl.load(spectrum + bins).to(tl.float32), tl.load(spectrum + N + bins).to(tl.float32)
        if TRANSPOSED:
            k_im = -k_im
        z_re, z_im = (x_re * k_re - x_im * k_im).to(operand), (-x_re * k_im - x_im * k_re).to(operand)
        z_re, z_im = from_the_right(z_re, z_im, second_re, second_im, PRECISION)
        twist_re = tl.load(twist + bins, cache_modifier=".ca").to(tl.float32)
        twist_im = tl.load(twist + N + bins, cache_modifier=".ca").to(tl.float32)
        z_re, z_im = twisted(z_re, z_im, twist_re, twist_im, operand)
        home = tl.arange(0, N1)[:, None] * N1 + f[None, :]
        y = tl.dot(tl.load(back + home), tl.reshape(z_re, (R, B * N2)), y, input_precision=PRECISION)
        y = tl.dot(tl.load(back + N1 * N1 + home), tl.reshape(z_im, (R, B * N2)), y, input_precision=PRECISION)

    y *= columns(scale * tl.load(size + channel), N2, B)[None, :]
    column = tl.arange(0, B * N2)
    row = first + column // N2
    time = (tl.arange(0, N1) * N2)[:, None] + (column % N2)[None, :]
    inside = (row < batch)[None, :] & (time < out_length)
    row = row.to(tl.int64)[None, :]
    out, post, out2, post2 = out + channel * out_h, post + channel * post_h, out2 + channel * out2_h, post2 + channel * post2_h
    store(y, out + row * out_b + time, post + row * post_b + time, inside, HAS_POST)
    if HAS_SECOND:
        store(y, out2 + row * out2_b + time, post2 + row * post2_b + time, inside, True)


@triton.jit
def store(y, out, post, inside, HAS_POST: tl.constexpr):
    if HAS_POST:
        y *= tl.load(post, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def block_fft_gradient(
    u, pre, dy, post, sums, into, twist, second,
    batch, length, splits, u_b, u_h, pre_b, pre_h, dy_b, dy_h, post_b, post_h,
    N1: tl.constexpr, N2: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
    HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[h, split, re | im, f, g]: conj(W) Z at R frequencies f, W of pre u and Z of post dy, summed over one of `splits`
    parts of the batch, B sequences at a time."""
    split = tl.program_id(0) % splits
    part = tl.program_id(0) // splits % (N1 // R) * R
    channel = (tl.program_id(0) // splits // (N1 // R)).to(tl.int64)
    operand: tl.constexpr = into.dtype.element_ty
    half: tl.constexpr = operand == tl.float16
    N: tl.constexpr = N1 * N2
    u, pre, dy, post = u + channel * u_h, pre + channel * pre_h, dy + channel * dy_h, post + channel * post_h

    g = tl.arange(0, N2)
    at = g[:, None] * N2 + g[None, :]
    second_re, second_im = tl.load(second + at), tl.load(second + N2 * N2 + at)
    f = part + tl.arange(0, R)
    bins = (part + tl.arange(0, R * B) // B)[:, None] * N2 + g[None, :]
    twist_re, twist_im = tl.load(twist + bins).to(tl.float32), tl.load(twist + N + bins).to(tl.float32)
    of_re = tl.zeros((R * B, N2), dtype=tl.float32)
    of_im = tl.zeros((R * B, N2), dtype=tl.float32)
    for first in tl.range(split * B, batch, splits * B):
        w, scale = sequences(u, pre, first, batch, length, u_b, pre_b, N1, N2, B, HAS_PRE, half)
        w_re, w_im = spectrum_of(w, into, twist_re, twist_im, second_re, second_im, f, N1, N2, B, R, PRECISION)
        w_re, w_im = w_re.to(operand).to(tl.float32), w_im.to(operand).to(tl.float32)
        z, of_z = sequences(dy, post, first, batch, length, dy_b, post_b, N1, N2, B, HAS_POST, half)
        z_re, z_im = spectrum_of(z, into, twist_re, twist_im, second_re, second_im, f, N1, N2, B, R, PRECISION)
        weight = tl.reshape(tl.broadcast_to((scale * of_z)[None, :], (R, B)), (R * B,))[:, None]
        of_re += weight * (w_re * z_re + w_im * z_im)
        of_im += weight * (w_re * z_im - w_im * z_re)

    to = sums + (channel * splits + split) * 2 * N + f[:, None] * N2 + g[None, :]
    tl.store(to, tl.sum(tl.reshape(of_re, (R, B, N2)), axis=1))
    tl.store(to + N, tl.sum(tl.reshape(of_im, (R, B, N2)), axis=1))


class _Spectrum:
    """The taps of a call by groups of channels: their transforms in float32, laid down as the programs read them."""

    def __init__(self, u: Tensor, taps: Taps, tile: Tile) -> None:
        self.tile, self.operand, self.channels = tile, operand(u.dtype), u.shape[1]
        n = tile.n1 * tile.n2
        self.spectra = Spectra(u, taps, n)
        # Of a channel two complex sequences and their cuFFT, the planes made of them, and the sums of a gradient.
        self.group = max(1, scratch(u) // (48 * n))

    def groups(self) -> Iterator[slice]:
        return (slice(at, at + self.group) for at in range(0, self.channels, self.group))

    def of(self, some: slice) -> tuple[Tensor, Tensor]:
        """(h, 2, n1, n2), re and im at [f, g]; and the power of two (h,) by which each channel was divided for float16."""
        k = self.spectra.of_taps(some)
        planes = torch.view_as_real(k).unflatten(1, (self.tile.n2, self.tile.n1)).permute(0, 3, 2, 1)
        if self.operand == torch.float32:
            return planes.contiguous(), torch.ones(planes.shape[0], device=k.device)
        most = torch.linalg.vector_norm(planes, math.inf, (1, 2, 3))
        powers = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent.clamp(-126, 126))
        divided = torch.empty(planes.shape, dtype=self.operand, device=k.device)
        # Rounded where it is laid down: one pass.
        return torch.mul(planes, powers.reciprocal()[:, None, None, None], out=divided), powers

    def lags(self, sums: Tensor) -> Tensor:
        """The taps' gradient (h, lags) in float32 from conj(W) Z (h, 2, n1, n2), of unitary transforms."""
        product = torch.view_as_complex(sums.permute(0, 3, 2, 1).flatten(1, 2).contiguous())
        return self.spectra.lags(product.mul_(self.spectra.n))


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float16 else "tf32x3"


def _convolve(
    u: Tensor, pre: Tensor | None, spectrum: tuple[Tensor, Tensor], outs: list[Tensor], gates: list[Tensor | None], tile: Tile,
    transposed: bool,
) -> None:  # fmt: skip
    """One launch: outs (B, h, L), each times its gate; u and pre in whole vectors."""
    batch, channels, length = u.shape
    planes, size = spectrum
    some_pre, some = u if pre is None else pre, [out if gate is None else gate for out, gate in zip(outs, gates, strict=True)]
    block_fft_conv[(triton.cdiv(batch, tile.sequences) * channels,)](
        u, some_pre, planes, size, outs[0], some[0], outs[-1], some[-1], *steps(tile.n1, tile.n2, planes.dtype, u.device),
        batch, length, outs[0].shape[-1], *row_strides(u, some_pre, outs[0], some[0], outs[-1], some[-1]),
        N1=tile.n1, N2=tile.n2, B=tile.sequences, R=tile.frequencies, TRANSPOSED=transposed,
        HAS_PRE=pre is not None, HAS_POST=gates[0] is not None, HAS_SECOND=len(outs) == 2,
        PRECISION=_precision(planes.dtype), num_warps=tile.warps, num_stages=1,
    )  # fmt: skip


PARTS = 1024
"""Programs below which the taps' gradient divides the batch among several, whose sums are added afterwards."""


def _gradient(u: Tensor, pre: Tensor | None, dy: Tensor, post: Tensor | None, tile: Tile) -> Tensor:
    """conj(W) Z (h, 2, n1, n2) summed over the batch, in float32; all in whole vectors."""
    batch, channels, length = u.shape
    programs = channels * tile.n1 // tile.frequencies
    splits = max(1, min(PARTS // programs, triton.cdiv(batch, tile.sequences)))
    sums = torch.empty(channels, splits, 2, tile.n1, tile.n2, device=u.device)
    some_pre, some_post, kind = u if pre is None else pre, dy if post is None else post, operand(u.dtype)
    into, _, twist, second = steps(tile.n1, tile.n2, kind, u.device)
    block_fft_gradient[(programs * splits,)](
        u, some_pre, dy, some_post, sums, into, twist, second,
        batch, length, splits, *row_strides(u, some_pre, dy, some_post),
        N1=tile.n1, N2=tile.n2, B=tile.sequences, R=tile.frequencies, HAS_PRE=pre is not None, HAS_POST=post is not None,
        PRECISION=_precision(kind), num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return sums.sum(1) if splits > 1 else sums[:, 0]


def _at(t: Tensor | None, some: slice) -> Tensor | None:
    return t if t is None else t[:, some]


def convolve(
    u: Tensor,
    taps: Taps,
    pre: Tensor | None,
    posts: tuple[Tensor | None, ...] = (None,),
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> list[Tensor]:
    """For each of `posts` post y, y the convolution of pre u (B, H, L) with the taps, or with their mirror image.

    tile: how the programs are divided, to measure it.
    """
    tile = tile or tiles(u.shape[-1], u.dtype, u.shape[0])[0]
    length = up(u.shape[-1], VECTOR)
    outs, gates = [empty(u) for _ in posts], [along_time(post) for post in posts]
    spectrum = _Spectrum(u, taps, tile)
    u, pre = vectors(u, length), None if pre is None else vectors(pre, length)
    for some in spectrum.groups():
        of_some, to = [_at(gate, some) for gate in gates], [out[:, some] for out in outs]
        _convolve(u[:, some], _at(pre, some), spectrum.of(some), to, of_some, tile, transposed)
    return outs


def backward(
    dy: Tensor,
    u: Tensor,
    taps: Taps,
    pre: Tensor | None,
    post: Tensor | None,
    wanted: Wanted,
    *,
    tile: Tile | None = None,
) -> Gradients:
    """Gradients from dy (B, H, L). The input's is a convolution with the conjugate spectrum.

    tile: how the programs of the taps' gradient are divided, to measure it; n1 and n2 are those of `tiles`.
    """
    of_conv, of_taps = tiles(u.shape[-1], u.dtype, u.shape[0])
    length, (first, last) = up(u.shape[-1], VECTOR), taps.lags()
    du, dpre = (empty(dy) if wanted.inputs else None), (empty(dy) if wanted.inputs and pre is not None else None)
    dpost = empty(u) if wanted.post else None
    lags = torch.empty(u.shape[1], last + 1 - first, device=u.device) if wanted.taps else None
    w, z = vectors(u, length), vectors(dy, length)
    pre_, post_ = (gate if gate is None else vectors(gate, length) for gate in (pre, post))
    outs = [out for out in (du, dpre) if out is not None]
    gates, behind = [along_time(pre), along_time(u)][: len(outs)], along_time(dy)
    spectrum = _Spectrum(u, taps, of_conv)
    for some in spectrum.groups():
        k = spectrum.of(some) if wanted.inputs or wanted.post else None
        if k is not None and outs:
            to, of_some = [out[:, some] for out in outs], [_at(gate, some) for gate in gates]
            _convolve(z[:, some], _at(post_, some), k, to, of_some, of_conv, True)
        if k is not None and dpost is not None:
            _convolve(w[:, some], _at(pre_, some), k, [dpost[:, some]], [_at(behind, some)], of_conv, False)
        if lags is not None:
            sums = _gradient(w[:, some], _at(pre_, some), z[:, some], _at(post_, some), tile or of_taps)
            lags[some] = spectrum.lags(sums)
    return Gradients(du, dpre, dpost, lags)
