"""Triton programs of `linear_attention`: the sums passed between chunks of T tokens, in tensor-core products.

A program owns a row (a head of a sequence) and walks along it a chunk at a time, the sums in fp32 registers. Where there are
too few rows to fill a GPU, a row is cut into `groups` pieces of `span` tokens: `sums` finds what each piece adds,
`scan_pieces` what came before it, and all pieces run at once. With X = dY / below and the slopes x, the gradients of numerators
and denominators,

    Y  below = tril(Q K^T) V + Q S                 S += K^T V, z += sum K
    below    = rowsum tril(Q K^T) + Q z + eps
    dQ       = A + x (tril(1 1^T) K + 1 z^T),      A = tril(X V^T) K + X S^T,  x = -(Q . A) / below
    dV       = triu(K Q^T) X + K G                 G += Q^T X, g += Q^T x, walked backwards
    dK       = triu(V X^T + 1 x^T) Q + V G^T + 1 g^T

are all of one form, tri(A B^T) C + A S with S += B^T C, and so one kernel in four roles. Gradients need as much memory as the
inputs; no sums are kept but those where pieces begin. No atomics.

The slopes are -(dY . Y) / below as well; but the two terms of dQ cancel up to a part that falls with the length where values
have a mean, and against an A of rounded factors only slopes made of it do. (Y itself was rounded to the inputs' dtype.)

Compilers shape this. Triton before 3.7.1 can miscompile a product with a transposed accumulator: here what is transposed was
loaded. Tensor cores round their additions towards zero, an error that thousands of chunks would add up: the running sums are
added to outside of them, and the factor `one`, which no compiler knows to be 1, keeps the addition out of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(base, at, stride, length, n, width, T: tl.constexpr):
    """(T, N): the columns n of the T tokens from `at` on, zeros beyond both ends."""
    i = tl.arange(0, T)
    ok = (i < length - at)[:, None] & (n < width)[None, :]
    # Offsets in 32 bits: they are the same in every chunk, and addresses of 64 would take twice the registers.
    return tl.load(base + at * stride + (i[:, None] * stride + n[None, :]), mask=ok, other=0.0)


@triton.jit
def _store_tokens(base, at, stride, length, n, width, x, T: tl.constexpr):
    i = tl.arange(0, T)
    ok = (i < length - at)[:, None] & (n < width)[None, :]
    tl.store(base + at * stride + (i[:, None] * stride + n[None, :]), x.to(base.dtype.element_ty), mask=ok)


@triton.jit
def _numbers(base, row, at, length, other, T: tl.constexpr):
    """(T,): one number of each of the T tokens from `at` on, of a tensor (rows, length)."""
    i = tl.arange(0, T)
    return tl.load(base + row * length + at + i, mask=i < length - at, other=other)


@triton.jit
def _store_numbers(base, row, at, length, x, T: tl.constexpr):
    i = tl.arange(0, T)
    tl.store(base + row * length + at + i, x, mask=i < length - at)


@triton.jit
def sums(
    x, v, below, slope, out, heads, pieces, first, groups, span, length, features, width, one,
    sx_b, sx_h, sx_t, sv_b, sv_h, sv_t,
    T: tl.constexpr, F: tl.constexpr, M: tl.constexpr, ADJOINT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each of the pieces from `first` on adds to the sums (F, M + 1): x^T [v 1], with ADJOINT x^T [v / below, slope]."""
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = first + tl.program_id(0) % pieces
    x += row // heads * sx_b + row % heads * sx_h
    v += row // heads * sv_b + row % heads * sv_h
    f, m = tl.arange(0, F), tl.arange(0, M)
    s, z = tl.zeros([F, M], tl.float32), tl.zeros([F], tl.float32)
    for chunk in range(0, span // T):
        at = piece.to(tl.int64) * span + chunk * T
        keys = _tokens(x, at, sx_t, length, f, features, T).to(KIND)
        values = _tokens(v, at, sv_t, length, m, width, T)
        if ADJOINT:
            values = values.to(tl.float32) * (1.0 / _numbers(below, row, at, length, 1.0, T))[:, None]
            z += tl.sum(keys.to(tl.float32) * _numbers(slope, row, at, length, 0.0, T)[:, None], 0)
        else:
            z += tl.sum(keys.to(tl.float32), 0)
        s += tl.dot(tl.trans(keys), values.to(KIND), input_precision=PRECISION) * one
    line = out + ((row * groups + piece) * features + f) * (width + 1)
    tl.store(line[:, None] + m[None, :], s, mask=(f < features)[:, None] & (m < width)[None, :])
    tl.store(line + width, z, mask=f < features)


@triton.jit
def scan_pieces(
    pieces, state, groups, size, BLOCK: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """pieces (rows, groups, size): what each adds becomes, in place, what came before it. The last's is not read.

    With REVERSE, what comes after it, and the first's is not read.
    """
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = n < size
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        total = tl.load(state + row * size + n, mask=ok, other=0.0)
    for g in range(0, groups):
        piece = groups - 1 - g if REVERSE else g
        at = pieces + (row * groups + piece) * size + n
        added = tl.load(at, mask=ok & (g < groups - 1), other=0.0)
        tl.store(at, total, mask=ok)
        total += added


@triton.jit
def walk(
    a, b, c, asked, below, slope, begin, out, end, heads, groups, span, length, features, width, eps, one,
    sa_b, sa_h, sa_t, sb_b, sb_h, sb_t, sc_b, sc_h, sc_t, sq_b, sq_h, sq_t, so_b, so_h, so_t,
    T: tl.constexpr, N: tl.constexpr, W: tl.constexpr, ROLE: tl.constexpr, HAS_BEGIN: tl.constexpr, HAS_END: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = tri(a b^T) c + a S, of a and b all N columns, of c and out a program's W.

    ROLE "y" writes below (rows, L) too; "dq", whose W are all columns, reads q as `asked` and writes slope (rows, L), and "dk"
    reads that. begin: the sums before each piece, or after it for "dk" and "dv", which walk backwards. HAS_END: "y" writes the
    sums after each row to `end`, "dk" those before.
    """
    row = (tl.program_id(0) // groups).to(tl.int64)
    piece = tl.program_id(0) % groups
    batch, h = row // heads, row % heads
    a, b, c = a + batch * sa_b + h * sa_h, b + batch * sb_b + h * sb_h, c + batch * sc_b + h * sc_h
    asked, out = asked + batch * sq_b + h * sq_h, out + batch * so_b + h * so_h
    OF_KEYS: tl.constexpr = (ROLE == "y") or (ROLE == "dv")
    REVERSE: tl.constexpr = (ROLE == "dk") or (ROLE == "dv")
    i, n, o = tl.arange(0, T), tl.arange(0, N), tl.program_id(1) * W + tl.arange(0, W)
    # In sums (features, width + 1) the last column is z. S has a feature a row, or a column.
    if OF_KEYS:
        inner, outer = features, width
        at_s = n[:, None] * (width + 1) + o[None, :]
    else:
        inner, outer = width, features
        at_s = o[None, :] * (width + 1) + n[:, None]
    f = n if ROLE == "y" else o
    ok_s, at_z = (n < inner)[:, None] & (o < outer)[None, :], f * (width + 1) + width
    size = features * (width + 1)

    s, z = tl.zeros([N, W], tl.float32), 0.0 * f.to(tl.float32)
    if HAS_BEGIN:
        s = tl.load(begin + (row * groups + piece) * size + at_s, mask=ok_s, other=0.0)
        z = tl.load(begin + (row * groups + piece) * size + at_z, mask=f < features, other=0.0)
    start = piece.to(tl.int64) * span
    chunks = tl.cdiv(tl.minimum(span, length - start), T)
    for turn in range(0, chunks):
        at = start + (chunks - 1 - turn if REVERSE else turn) * T
        p = _tokens(a, at, sa_t, length, n, inner, T)
        q = _tokens(b, at, sb_t, length, n, inner, T)
        r = _tokens(c, at, sc_t, length, o, outer, T)
        if ROLE != "y":
            low = _numbers(below, row, at, length, 1.0, T)
            scale = (1.0 / low)[:, None]
        if ROLE == "dq":
            p = p.to(tl.float32) * scale
        if ROLE == "dk":
            q = q.to(tl.float32) * scale
            steep = _numbers(slope, row, at, length, 0.0, T)
        if ROLE == "dv":
            r = r.to(tl.float32) * scale
        p, q, r = p.to(KIND), q.to(KIND), r.to(KIND)

        weights = tl.dot(p, tl.trans(q), input_precision=PRECISION)
        if ROLE == "dk":
            weights += steep[None, :]
        weights = tl.where(i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :], weights, 0.0)
        found = tl.dot(weights.to(KIND), r, input_precision=PRECISION)
        near = s.to(KIND)
        if ROLE == "dq":
            # What is left when the slope's part is added may be small: the sums go in with twice the digits.
            if KIND == tl.float32:  # noqa: SIM300
                found = tl.dot(p, near, found, input_precision="tf32x3")
            else:
                found = tl.dot(p, near, found)
                found = tl.dot(p, (s - near.to(tl.float32)).to(KIND), found)
        else:
            found = tl.dot(p, near, found, input_precision=PRECISION)
        if ROLE == "y":
            low = tl.sum(weights, 1) + tl.sum(p.to(tl.float32) * z[None, :], 1) + eps
            if tl.program_id(1) == 0:
                _store_numbers(below, row, at, length, low, T)
            found /= low[:, None]
            z += tl.sum(q.to(tl.float32), 0)
        if ROLE == "dq":
            steep = -tl.sum(_tokens(asked, at, sq_t, length, o, outer, T).to(tl.float32) * found, 1) / low
            _store_numbers(slope, row, at, length, steep, T)
            ones = tl.where(i[:, None] >= i[None, :], 1.0, 0.0).to(KIND)
            found += steep[:, None] * (tl.dot(ones, r, input_precision=PRECISION) + z[None, :])
            z += tl.sum(r.to(tl.float32), 0)
        if ROLE == "dk":
            found += z[None, :]
            z += tl.sum(r.to(tl.float32) * steep[:, None], 0)
        _store_tokens(out, at, so_t, length, o, outer, found, T)
        s += tl.dot(tl.trans(q), r, input_precision=PRECISION) * one

    if HAS_END:
        last = piece == (0 if REVERSE else groups - 1)
        tl.store(end + row * size + at_s, s, mask=ok_s & last)
        tl.store(end + row * size + at_z, z, mask=(f < features) & last)
