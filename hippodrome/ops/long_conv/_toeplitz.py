"""Dense Toeplitz products on tensor cores: Triton programs for the convolution and for the gradient of its taps.

All of one channel's taps, of both directions and the skip, are one sequence c over lags -back .. ahead, and

    y_t = sum_s c[t-s] w_s,    w = pre u.

A product T_x (K inputs to N outputs, T_x[i, j] = c[j - x - i]) depends on the distance x alone, so that rows of a matrix
product can be sequences and chunks of time alike: row (b, chunk) reads its inputs at distance x from its own beginning. The
tile T_x never exists in device memory. It is read from a table that holds each channel's taps back to front, several times,
each copy one place further right than the last: then each column of a tile begins at a multiple of 16 bytes in one of the
copies, and loads go to shared memory in whole vectors.

The taps' gradient is the product over rows, D_x = W_x^T Z, summed along its diagonals within the program: no atomics.
"""

from __future__ import annotations

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


@triton.jit
def tap_table(
    kernel, kernel_rev, skip, table,
    ahead, back, center, width, kernel_stride, rev_stride,
    TRANSPOSE: tl.constexpr, HAS_REV: tl.constexpr, HAS_SKIP: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table[h, r, m] = c[center + r - m] (TRANSPOSE: c[m - r - center]), zero where there is no such lag."""
    channel = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for copy in tl.static_range(COPIES):
        lag = center + copy - at
        if TRANSPOSE:
            lag = -lag
        value = tl.load(kernel + channel * kernel_stride + lag, mask=(lag >= 0) & (lag < ahead), other=0.0).to(tl.float32)
        if HAS_REV:
            inside = (lag <= 0) & (lag > -back)
            value += tl.load(kernel_rev + channel * rev_stride - lag, mask=inside, other=0.0).to(tl.float32)
        if HAS_SKIP:
            value += tl.where(lag == 0, tl.load(skip + channel).to(tl.float32), 0.0)
        tl.store(table + (channel * COPIES + copy) * width + at, value.to(table.dtype.element_ty), mask=at < width)


@triton.jit
def place(tile, batch, chunks, M: tl.constexpr):
    """Chunk and sequence of a tile's rows (sequence, chunk), and the first and the last chunk among them."""
    row = tile * M + tl.arange(0, M)
    chunk = row // batch
    return chunk, (row - chunk * batch).to(tl.int64), tile * M // batch, tl.minimum((tile * M + M - 1) // batch, chunks - 1)


@triton.jit
def inputs(u, pre, row, pre_row, start, ahead, live, length, HAS_PRE: tl.constexpr, OPERAND: tl.constexpr):
    """pre u of each row, `ahead` from its start."""
    time = start[:, None] + ahead[None, :]
    inside = live[:, None] & (time >= 0) & (time < length)
    w = tl.load(u + row[:, None] + time, mask=inside, other=0.0)
    if HAS_PRE:
        w = w.to(tl.float32) * tl.load(pre + pre_row[:, None] + time, mask=inside, other=0.0).to(tl.float32)
    return w.to(OPERAND)


@triton.jit
def tile_of_taps(table, column, ahead, COPIES: tl.constexpr):
    """T_x; `ahead` x + i."""
    return tl.load(table + tl.max_contiguous(tl.multiple_of(column[None, :] + ahead[:, None], (COPIES, 1)), (COPIES, 1)))


@triton.jit
def write(y, out, row, post, post_row, time, inside, HAS_POST: tl.constexpr):
    if HAS_POST:
        y *= tl.load(post + post_row[:, None] + time, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] + time, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def toeplitz(
    u, pre, table, out, post, out2, post2,
    batch, length, out_length, first, last, center, width,
    u_b, u_h, pre_b, pre_h, out_b, out_h, post_b, post_h, out2_b, out2_h, post2_b, post2_h,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, COPIES: tl.constexpr, PAIR: tl.constexpr,
    HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = post y and, HAS_SECOND, out2 = post2 y, over M rows of N outputs of a channel; first, last: the extreme lags.

    Later chunks have more inputs to read, so a channel begins with them. PAIR: two tiles of rows, which share what they read
    of the taps; each goes alone where the other one's inputs have not begun or are over.
    """
    chunks = tl.cdiv(length, N)
    tiles = tl.cdiv(chunks * batch, M * 2 if PAIR else M)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles
    tile = tile * 2 if PAIR else tile
    chunk, sequence, earliest, latest = place(tile, batch, chunks, M)
    start = chunk * N
    live = chunk < chunks

    # The distances at which some row meets both an input and a tap, from a multiple of K.
    begin = -tl.cdiv(tl.minimum(last, latest * N), K) * K
    end = tl.minimum(N - first, length - earliest * N)

    i = tl.arange(0, K)
    j = tl.arange(0, N)
    u += channel * u_h
    pre += channel * pre_h
    table += channel * COPIES * width
    column = (j % COPIES) * width + (center - j + j % COPIES)
    operand: tl.constexpr = table.dtype.element_ty

    y = tl.zeros((M, N), dtype=tl.float32)
    apart = begin
    if PAIR:
        chunk_, sequence_, earliest_, latest_ = place(tile + 1, batch, chunks, M)
        start_ = chunk_ * N
        live_ = chunk_ < chunks
        y_ = tl.zeros((M, N), dtype=tl.float32)
        for x in tl.range(-tl.cdiv(tl.minimum(last, latest_ * N), K) * K, begin, K):
            w = inputs(u, pre, sequence_ * u_b, sequence_ * pre_b, start_, x + i, live_, length, HAS_PRE, operand)
            y_ = tl.dot(w, tile_of_taps(table, column, x + i, COPIES), y_, input_precision=PRECISION)
        apart += tl.cdiv(tl.maximum(tl.minimum(N - first, length - earliest_ * N) - begin, 0), K) * K
        for x in tl.range(begin, apart, K):
            taps = tile_of_taps(table, column, x + i, COPIES)
            w = inputs(u, pre, sequence * u_b, sequence * pre_b, start, x + i, live, length, HAS_PRE, operand)
            y = tl.dot(w, taps, y, input_precision=PRECISION)
            w = inputs(u, pre, sequence_ * u_b, sequence_ * pre_b, start_, x + i, live_, length, HAS_PRE, operand)
            y_ = tl.dot(w, taps, y_, input_precision=PRECISION)
    for x in tl.range(apart, end, K):
        w = inputs(u, pre, sequence * u_b, sequence * pre_b, start, x + i, live, length, HAS_PRE, operand)
        y = tl.dot(w, tile_of_taps(table, column, x + i, COPIES), y, input_precision=PRECISION)

    out += channel * out_h
    post += channel * post_h
    out2 += channel * out2_h
    post2 += channel * post2_h
    time = start[:, None] + j[None, :]
    inside = live[:, None] & (time < out_length)
    write(y, out, sequence * out_b, post, sequence * post_b, time, inside, HAS_POST)
    if HAS_SECOND:
        write(y, out2, sequence * out2_b, post2, sequence * post2_b, time, inside, True)
    if PAIR:
        time = start_[:, None] + j[None, :]
        inside = live_[:, None] & (time < out_length)
        write(y_, out, sequence_ * out_b, post, sequence_ * post_b, time, inside, HAS_POST)
        if HAS_SECOND:
            write(y_, out2, sequence_ * out2_b, post2, sequence_ * post2_b, time, inside, True)


@triton.jit
def diagonal_sums(x, T: tl.constexpr):
    """Sums of a T x T tile along its diagonals: over column - row = j, and over column - row = j - T, for j < T.

    First within tiles of one warp's width, where a row turns by one exchange among the warp; then over those tiles.
    """
    P: tl.constexpr = min(T, 32)
    N: tl.constexpr = T // P
    i = tl.arange(0, P)
    turned = tl.reshape(i[:, None] + i[None, :], (1, P, 1, P))
    x = tl.gather(tl.reshape(x, (N, P, N, P)), tl.broadcast_to(turned % P, (N, P, N, P)), axis=3)
    upper = tl.sum(tl.where(turned < P, x, 0.0), axis=1)
    lower = tl.sum(tl.where(turned < P, 0.0, x), axis=1)

    n = tl.arange(0, N)
    at = tl.reshape(n[:, None] + n[None, :], (N, N, 1))
    upper = tl.gather(upper, tl.broadcast_to(at % N, (N, N, P)), axis=1)
    lower = tl.gather(lower, tl.broadcast_to((at + 1) % N, (N, N, P)), axis=1)
    here = tl.sum(tl.where(at < N, upper, 0.0), axis=0) + tl.sum(tl.where(at + 1 < N, lower, 0.0), axis=0)
    before = tl.sum(tl.where(at < N, 0.0, upper), axis=0) + tl.sum(tl.where(at + 1 < N, 0.0, lower), axis=0)
    return tl.reshape(here, (T,)), tl.reshape(before, (T,))


@triton.jit
def taps_gradient(
    u, pre, dy, post, sums,
    batch, length, first_block, blocks, splits,
    u_b, u_h, pre_b, pre_h, dy_b, dy_h, post_b, post_h,
    T: tl.constexpr, R: tl.constexpr,
    HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[h, block, split, 0 | 1, j]: the part of the gradient of lag d T + j | (d - 1) T + j that blocks of T inputs owe to
    blocks of T outputs d blocks later, d = first_block + block, in one of `splits` parts of the rows (sequence, chunk)."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % blocks
    channel = (tl.program_id(0) // splits // blocks).to(tl.int64)
    d = first_block + block
    chunks = tl.cdiv(length, T)
    lowest = tl.maximum(d, 0)
    rows = tl.maximum(tl.minimum(chunks, chunks + d) - lowest, 0) * batch
    share = tl.cdiv(tl.cdiv(rows, splits), R) * R
    begin = split * share
    rows = tl.minimum(rows, begin + share)

    i = tl.arange(0, T)
    product = tl.zeros((T, T), dtype=tl.float32)
    for lead in tl.range(begin, rows, R):
        row = lead + tl.arange(0, R)
        chunk = row // batch
        sequence = (row - chunk * batch).to(tl.int64)
        now = (chunk + lowest) * T
        live = row < rows

        time = (now - d * T)[None, :] + i[:, None]
        inside = live[None, :] & (time < length)
        w = tl.load(u + (channel * u_h + sequence * u_b)[None, :] + time, mask=inside, other=0.0)
        if HAS_PRE:
            gate = tl.load(pre + (channel * pre_h + sequence * pre_b)[None, :] + time, mask=inside, other=0.0)
            w = w.to(tl.float32) * gate.to(tl.float32)

        time = now[:, None] + i[None, :]
        inside = live[:, None] & (time < length)
        z = tl.load(dy + (channel * dy_h + sequence * dy_b)[:, None] + time, mask=inside, other=0.0)
        if HAS_POST:
            gate = tl.load(post + (channel * post_h + sequence * post_b)[:, None] + time, mask=inside, other=0.0)
            z = z.to(tl.float32) * gate.to(tl.float32)
        product = tl.dot(w.to(OPERAND), z.to(OPERAND), product, input_precision=PRECISION)

    from_here, from_before = diagonal_sums(product, T)
    to = sums + ((channel * blocks + block) * splits + split) * 2 * T + i
    tl.store(to, from_here)
    tl.store(to + T, from_before)


def convolve(
    u: Tensor,
    taps: Taps,
    pre: Tensor | None,
    posts: tuple[Tensor | None, ...] = (None,),
    *,
    transposed: bool = False,
    tile: tuple[int, int, int, int, int, bool] | None = None,
) -> list[Tensor]:
    """For each of `posts` post y, y the convolution of pre u (B, H, L) with the taps, or with their mirror image.

    tile: M, N, K, warps, stages and PAIR of the program, to measure them.
    """
    batch, channels, out_length = u.shape
    length = up(out_length, VECTOR)
    dtype, precision = operand(u.dtype)
    first, last = taps.lags(transposed)
    m, n, k, warps, stages, pair = tile or _tile(batch, length, dtype, precision, pre is not None)
    # A tile of outputs meets inputs from its own beginning back to the first of all, and ahead to the last of all.
    center = up(min(last, length), k) + n
    width = up(center + min(n - first, length) + k, VECTOR)
    copies = 16 // dtype.itemsize
    table = torch.empty(channels, copies, width, dtype=dtype, device=u.device)
    kernel, rev, skip = taps.kernel, taps.kernel_rev, taps.skip
    tap_table[triton.cdiv(width, 512), channels](
        kernel, kernel if rev is None else rev, kernel if skip is None else skip, table,
        kernel.shape[1], 0 if rev is None else rev.shape[1], center, width,
        kernel.stride(0), 0 if rev is None else rev.stride(0),
        TRANSPOSE=transposed, HAS_REV=rev is not None, HAS_SKIP=skip is not None, COPIES=copies, BLOCK=512,
    )  # fmt: skip
    outs = [empty(u) for _ in posts]
    u, pre = vectors(u, length), None if pre is None else vectors(pre, length)
    gates = [along_time(post) for post in posts]
    some_pre, some_gates = u if pre is None else pre, [outs[0] if gate is None else gate for gate in gates]
    toeplitz[(triton.cdiv(triton.cdiv(length, n) * batch, 2 * m if pair else m) * channels,)](
        u, some_pre, table, outs[0], some_gates[0], outs[-1], some_gates[-1],
        batch, length, out_length, first, last, center, width,
        *row_strides(u, some_pre, outs[0], some_gates[0], outs[-1], some_gates[-1]),
        M=m, N=n, K=k, COPIES=copies, PAIR=pair, HAS_PRE=pre is not None, HAS_POST=gates[0] is not None,
        HAS_SECOND=len(posts) == 2, PRECISION=precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return outs


def _tile(batch: int, length: int, dtype: torch.dtype, precision: str, gated: bool) -> tuple[int, int, int, int, int, bool]:
    """Pairs pay where sums are long, and where both tiles' inputs fit beside each other three times: without a gate."""
    n = power(length, 16, 64 if precision == "tf32x3" else 128)
    rows = batch * -(-length // n)
    m = power(rows, 16, 128)
    pair = dtype == torch.bfloat16 and not gated and n == 128 and rows >= 1024
    return m, n, min(n, 128 // dtype.itemsize), 8 if m * n >= 1 << 13 else 4, 3, pair


def backward(dy: Tensor, u: Tensor, taps: Taps, pre: Tensor | None, post: Tensor | None, wanted: Wanted) -> Gradients:
    """Gradients from dy (B, H, L). The input's is a convolution with the mirror image of the taps."""
    du = dpre = dpost = lags = None
    if wanted.inputs and pre is None:
        (du,) = convolve(dy, taps, post, transposed=True)
    elif wanted.inputs:
        du, dpre = convolve(dy, taps, post, (pre, u), transposed=True)
    if wanted.post:
        (dpost,) = convolve(u, taps, pre, (dy,))
    if wanted.taps:
        lags = gradient_of_taps(u, dy, taps, pre, post)
    return Gradients(du, dpre, dpost, lags)


PARTS = 1024
"""Programs below which the taps' gradient divides its rows among several, whose sums are added afterwards."""


def gradient_of_taps(
    u: Tensor, dy: Tensor, taps: Taps, pre: Tensor | None, post: Tensor | None, *, tile: tuple[int, int, int, int] | None = None
) -> Tensor:
    """The sums over time and batch of (post dy)_t (pre u)_(t-l) for all lags l of the taps, (H, lags) in float32.

    tile: T, R, warps and stages of the program, to measure them.
    """
    batch, channels = u.shape[:2]
    length = up(u.shape[-1], VECTOR)
    dtype, precision = operand(u.dtype)
    first, last = taps.lags()
    t, r, warps, stages = tile or _gradient_tile(max(last, -first) + 1, length, dtype)
    first_block = first // t
    # A lag's pairs lie in two products: in the last block's, and in the one of the block after.
    blocks = last // t + 2 - first_block
    splits = max(1, min(PARTS // (blocks * channels), batch * -(-length // t) // (4 * r)))
    sums = torch.empty(channels, blocks, splits, 2, t, device=u.device)
    u, dy = vectors(u, length), vectors(dy, length)
    some_pre, some_post = u if pre is None else vectors(pre, length), dy if post is None else vectors(post, length)
    taps_gradient[(splits * blocks * channels,)](
        u, some_pre, dy, some_post, sums,
        batch, length, first_block, blocks, splits, *row_strides(u, some_pre, dy, some_post),
        T=t, R=r, HAS_PRE=pre is not None, HAS_POST=post is not None, OPERAND=getattr(tl, str(dtype)[6:]),
        PRECISION=precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    sums = sums.sum(2) if splits > 1 else sums[:, :, 0]
    lags = (sums[:, :-1, 0] + sums[:, 1:, 1]).reshape(channels, -1)
    return lags[:, first - first_block * t :][:, : last + 1 - first]


def _gradient_tile(taps: int, length: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    t = power(min(taps, length), 16, 128 if dtype == torch.bfloat16 else 64)
    return t, 128 // dtype.itemsize, 8 if t == 128 else 4, 3
