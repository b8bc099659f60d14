"""Triton programs of `scan`: a program takes a chunk of one row's tokens and a block of channels, one token after another.

    ends:    what a chunk makes of rest, and the product of its coefficients
    carries: from chunk to chunk the state before each
    states:  the chunk again from that state, which is now known; outputs

The gradient h of the state before a token is a recurrence of the same kind that is read the other way round:

    d_b_t = d_x_t + h_(t+1),    h_t = conj(a_t) d_b_t,    d_a_t = d_b_t conj(x_(t-1))

so that the first two kernels serve both (ADJOINT). LEFTWARD kernels read from right to left. Gradients of coefficients that
tokens share are summed within a chunk in registers, and over chunks and rows after it: no atomics. Complex numbers are (re, im)
pairs side by side, loaded as they lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Channels of a program: a warp reads 256 bytes of complex numbers a token."""
SHORTEST = 32
"""Fewest tokens of a chunk."""
STAGES = 4
"""Tokens in flight, the one computed included."""


@triton.jit
def _place(width, N: tl.constexpr, COMPLEX: tl.constexpr):
    """The row (int64) of a program, and which of the row's `width` real numbers it takes."""
    lanes: tl.constexpr = 2 * N if COMPLEX else N
    blocks = tl.cdiv(width, lanes)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    return row, tl.program_id(0) % blocks * lanes + tl.arange(0, lanes)


@triton.jit
def _nth(i, count, LEFTWARD: tl.constexpr):
    """Which of `count` things is read as the i-th."""
    return count - 1 - i if LEFTWARD else i


@triton.jit
def _load(at, real, N: tl.constexpr, COMPLEX: tl.constexpr):
    """N numbers as re and im; of real numbers im is never used."""
    flat = tl.load(at, real, 0.0)
    if COMPLEX:
        re, im = tl.split(tl.reshape(flat, (N, 2)))
    else:
        re, im = flat, flat
    return re, im


@triton.jit
def _store(at, re, im, real, N: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(at, tl.reshape(tl.join(re, im), (2 * N,)), real)
    else:
        tl.store(at, re, real)


@triton.jit
def _times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        re, im = a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    else:
        re, im = a_re * b_re, a_im
    return re, im


@triton.jit
def ends(
    a, b, product, end, length, width, chunk, a_row, a_time, b_row, b_time,
    N: tl.constexpr, COMPLEX: tl.constexpr, SAME: tl.constexpr, LEFTWARD: tl.constexpr, ADJOINT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """product and end (B, C, width) of every chunk; ADJOINT with h for the state and conj(a) for a."""
    row, lane = _place(width, N, COMPLEX)
    real, c = lane < width, tl.program_id(1)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    a += row * a_row + lane
    b += row * b_row + lane
    x_re = tl.zeros((N,), b.dtype.element_ty)
    x_im, p_re, p_im = x_re, x_re + 1.0, x_re
    same_re, same_im = _load(a, real, N, COMPLEX)
    for i in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + _nth(i, count, LEFTWARD), tl.int64)
        b_re, b_im = _load(b + t * b_time, real, N, COMPLEX)
        if SAME:
            a_re, a_im = same_re, same_im
        else:
            a_re, a_im = _load(a + t * a_time, real, N, COMPLEX)
        if ADJOINT:
            a_im = -a_im
            x_re, x_im = _times(a_re, a_im, x_re + b_re, x_im + b_im, COMPLEX)
        else:
            x_re, x_im = _times(a_re, a_im, x_re, x_im, COMPLEX)
            x_re += b_re
            x_im += b_im
        p_re, p_im = _times(a_re, a_im, p_re, p_im, COMPLEX)
    at = (row * tl.num_programs(1) + c) * width + lane
    _store(product + at, p_re, p_im, real, N, COMPLEX)
    _store(end + at, x_re, x_im, real, N, COMPLEX)


@triton.jit
def carries(
    product, end, before, begin, chunks, width,
    N: tl.constexpr, COMPLEX: tl.constexpr, LEFTWARD: tl.constexpr, HAS_BEFORE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """begin (B, C, width): the state with which the reading of every chunk begins."""
    row, lane = _place(width, N, COMPLEX)
    real = lane < width
    x_re = tl.zeros((N,), begin.dtype.element_ty)
    x_im = x_re
    if HAS_BEFORE:
        x_re, x_im = _load(before + row * width + lane, real, N, COMPLEX)
    for i in tl.range(0, chunks, num_stages=STAGES):
        at = (row * chunks + _nth(i, chunks, LEFTWARD)) * width + lane
        p_re, p_im = _load(product + at, real, N, COMPLEX)
        e_re, e_im = _load(end + at, real, N, COMPLEX)
        _store(begin + at, x_re, x_im, real, N, COMPLEX)
        x_re, x_im = _times(p_re, p_im, x_re, x_im, COMPLEX)
        x_re += e_re
        x_im += e_im


@triton.jit
def states(
    a, b, begin, x, length, width, chunk, a_row, a_time, b_row, b_time,
    N: tl.constexpr, COMPLEX: tl.constexpr, SAME: tl.constexpr, LEFTWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x (B, L, width), contiguous, of every chunk from its `begin`."""
    row, lane = _place(width, N, COMPLEX)
    real, c = lane < width, tl.program_id(1)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    x_re, x_im = _load(begin + (row * tl.num_programs(1) + c) * width + lane, real, N, COMPLEX)
    a += row * a_row + lane
    b += row * b_row + lane
    x += row * length * width + lane
    same_re, same_im = _load(a, real, N, COMPLEX)
    for i in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + _nth(i, count, LEFTWARD), tl.int64)
        b_re, b_im = _load(b + t * b_time, real, N, COMPLEX)
        if SAME:
            a_re, a_im = same_re, same_im
        else:
            a_re, a_im = _load(a + t * a_time, real, N, COMPLEX)
        x_re, x_im = _times(a_re, a_im, x_re, x_im, COMPLEX)
        x_re += b_re
        x_im += b_im
        _store(x + t * width, x_re, x_im, real, N, COMPLEX)


@triton.jit
def gradients(
    a, d_x, x, before, begin, d_a, d_b, d_before, length, width, chunk, a_row, a_time, d_row, d_time,
    N: tl.constexpr, COMPLEX: tl.constexpr, SAME: tl.constexpr, LEFTWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_b and d_a (B, L, width); with SAME coefficients d_a (B, C, width) is summed over the chunk."""
    row, lane = _place(width, N, COMPLEX)
    real, c = lane < width, tl.program_id(1)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    at_chunk = (row * tl.num_programs(1) + c) * width + lane
    h_re, h_im = _load(begin + at_chunk, real, N, COMPLEX)
    start_re, start_im = _load(before + row * width + lane, real, N, COMPLEX)
    a += row * a_row + lane
    d_x += row * d_row + lane
    whole = row * length * width + lane
    same_re, same_im = _load(a, real, N, COMPLEX)
    sum_re = tl.zeros((N,), d_b.dtype.element_ty)
    sum_im = sum_re
    for i in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + _nth(i, count, LEFTWARD), tl.int64)
        d_re, d_im = _load(d_x + t * d_time, real, N, COMPLEX)
        # The state before this token is to the left of it where the gradient is read leftward.
        past = t - 1 if LEFTWARD else t + 1
        inside = (past >= 0) & (past < length)
        past_re, past_im = _load(x + whole + past * width, real & inside, N, COMPLEX)
        if SAME:
            a_re, a_im = same_re, same_im
        else:
            a_re, a_im = _load(a + t * a_time, real, N, COMPLEX)
        d_re += h_re
        d_im += h_im
        _store(d_b + whole + t * width, d_re, d_im, real, N, COMPLEX)
        past_re, past_im = tl.where(inside, past_re, start_re), tl.where(inside, past_im, start_im)
        g_re, g_im = _times(past_re, -past_im, d_re, d_im, COMPLEX)
        if SAME:
            sum_re += g_re
            sum_im += g_im
        else:
            _store(d_a + whole + t * width, g_re, g_im, real, N, COMPLEX)
        h_re, h_im = _times(a_re, -a_im, d_re, d_im, COMPLEX)
    if SAME:
        _store(d_a + at_chunk, sum_re, sum_im, real, N, COMPLEX)
    final = c == _nth(tl.num_programs(1) - 1, tl.num_programs(1), LEFTWARD)
    _store(d_before + row * width + lane, h_re, h_im, real & final, N, COMPLEX)


def chunk_length(length: int) -> int:
    """Tokens of a chunk: about the root of the length, so that chunks and the carries between them take as long."""
    return max(SHORTEST, 1 << ((length - 1).bit_length() + 1) // 2)


def forward(a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
    """See `triton._fused`."""
    x = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if b.numel() == 0:
        return x
    grid, layout = _layout(a, b, reverse)
    a_flat, b_flat, x_flat, before_flat = _flat(a), _flat(b), _flat(x), _flat(before.contiguous())
    begin = _begin(a_flat, b_flat, before_flat, grid, layout, adjoint=False)
    states[grid](
        a_flat,
        b_flat,
        begin,
        x_flat,
        *_sizes(b_flat),
        *_strides(a_flat),
        *_strides(b_flat),
        **layout,
        STAGES=STAGES,
        num_warps=1,
    )
    return x


def backward(d_x: Tensor, a: Tensor, before: Tensor, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton._fused_backward`."""
    d_b, d_before = torch.empty_like(x), torch.empty(before.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return torch.zeros(a.shape, dtype=x.dtype, device=x.device), d_b, d_before
    grid, layout = _layout(a, x, not reverse)
    parts = x.new_empty(x.shape[0], grid[1] if layout["SAME"] else x.shape[1], x.shape[2])
    a_flat, d_flat, x_flat = _flat(a), _flat(d_x), _flat(x)
    begin = _begin(a_flat, d_flat, None, grid, layout, adjoint=True)
    gradients[grid](
        a_flat, d_flat, x_flat, _flat(before.contiguous()), begin, _flat(parts), _flat(d_b), _flat(d_before), *_sizes(x_flat),
        *_strides(a_flat), *_strides(d_flat), **layout, STAGES=STAGES, num_warps=1,
    )  # fmt: skip
    return parts.sum_to_size(a.shape), d_b, d_before


def _begin(
    a: Tensor, b: Tensor, before: Tensor | None, grid: tuple[int, int], layout: dict[str, object], *, adjoint: bool
) -> Tensor:
    """The states (B, C, width) that chunks begin with; of one chunk, that before all."""
    (programs, chunks), rows = grid, len(b)
    if chunks == 1:
        return b.new_zeros(rows, b.shape[2]) if before is None else before
    product, end, begin = (b.new_empty(rows, chunks, b.shape[2]) for _ in range(3))
    ends[grid](
        a, b, product, end, *_sizes(b), *_strides(a), *_strides(b), **layout, ADJOINT=adjoint, STAGES=STAGES, num_warps=1
    )
    carries[programs,](
        product, end, end if before is None else before, begin, chunks, b.shape[2], N=layout["N"], COMPLEX=layout["COMPLEX"],
        LEFTWARD=layout["LEFTWARD"], HAS_BEFORE=before is not None, STAGES=STAGES, num_warps=1,
    )  # fmt: skip
    return begin


def _layout(a: Tensor, b: Tensor, leftward: bool) -> tuple[tuple[int, int], dict[str, object]]:
    """The grid (blocks of channels of all rows, chunks), and what the kernels are specialised on."""
    rows, length, width = b.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = rows * triton.cdiv(width, block), triton.cdiv(length, chunk_length(length))
    return grid, {"N": block, "COMPLEX": b.is_complex(), "SAME": a.shape[1] == 1, "LEFTWARD": leftward}


def _flat(t: Tensor) -> Tensor:
    """(..., N) with its numbers side by side, complex ones as pairs (..., 2 N)."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return torch.view_as_real(t.resolve_conj()).flatten(-2) if t.is_complex() else t


def _sizes(t: Tensor) -> tuple[int, int, int]:
    return t.shape[1], t.shape[2], chunk_length(t.shape[1])


def _strides(t: Tensor) -> tuple[int, int]:
    """Of a row and a token; of what is shared, zero."""
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True))  # type: ignore[return-value]
