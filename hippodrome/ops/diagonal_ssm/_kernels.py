"""Triton programs of `diagonal_ssm`: a state passed between chunks of T tokens, in T x T tensor-core products.

A program owns one channel and R columns, each a chunk of T tokens, so that all tiles are (T, R) or (modes, R). The columns are Q rows
times J successive chunks of them. A row is a sequence or, where there are too few of those, one of `groups` pieces of `span` tokens:
then a first pass finds what each piece adds to the state, a scan over the pieces where each begins, and all pieces run at once. With
w = pre * FIR(u), z the state before a chunk and K the first T taps of the kernel, the skip in the first:

    y = post * (Toeplitz(K) w + lambda^(t+1) . weights z),      z' = lambda^T z + sum_s lambda^(T-1-s) w_s

The backward walks the chunks once forward, which leaves the states before them in scratch, and once backward with the adjoint g:

    dw = Toeplitz(K)^T dy' + conj(lambda^(T-1-s)) . g,      g' = conj(lambda^T) g + conj(weights) sum_t conj(lambda^(t+1)) dy'_t

Why columns: the products leave a thread with columns 0, 1, 8, 9, 16, ... of its rows (of half of the columns where W = 2 groups of
four warps share them). The J chunks are the high bits of the column and the real and imaginary part of a mode lie eight rows apart, so
the recurrence over them is arithmetic within a thread: no shuffle, no shared memory. Gradients of modes and weights are sums of
elementwise products of states and adjoints and stay in registers; only the taps within a chunk and those of the FIR need T x T
products, whose diagonals are summed at the end. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power(log_re, turns, exponent):
    """exp(exponent log), exponent an int32 of at most a few thousand. `turns` is the phase in units of 2^-32 turns: integers wrap
    like phases do, so that no digit is lost."""
    angle = (turns * exponent).to(tl.float32) * 1.4629180792671596e-09
    size = tl.exp(log_re * exponent.to(tl.float32))
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def _exact(log_re, log_im, exponent):
    """exp(exponent log) as float32 pairs high + low: a power that is applied thousands of times must not be rounded."""
    turns = log_im * exponent / 6.283185307179586
    angle = (turns - tl.floor(turns)) * 6.283185307179586
    size = tl.exp(log_re * exponent)
    re, im = size * tl.cos(angle), size * tl.sin(angle)
    re_high, im_high = re.to(tl.float32), im.to(tl.float32)
    return re_high, im_high, (re - re_high.to(tl.float64)).to(tl.float32), (im - im_high.to(tl.float64)).to(tl.float32)


@triton.jit
def _modes(log_modes, h, n, n_modes):
    """Of modes n of channel h: the logarithm's real part, its phase in units of 2^-32 turns, and both in float64."""
    real = n < n_modes
    re = tl.load(log_modes + 2 * (h * n_modes + n), mask=real, other=0.0)
    im = tl.load(log_modes + 2 * (h * n_modes + n) + 1, mask=real, other=0.0).to(tl.float64)
    turns = im / 6.283185307179586
    turns = ((turns - tl.floor(turns + 0.5)) * 4294967296.0).to(tl.int64).to(tl.int32)
    return re, turns, re.to(tl.float64), im


@triton.jit
def prepare(
    log_modes, weights, skip, first, tables, decay, n_modes, span,
    T: tl.constexpr, N: tl.constexpr, HAS_SKIP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The tables of a channel.

    first (H, T) fp32: the taps of the kernel within a chunk. decay (H, 2, 4, N) fp32: lambda^T and lambda^span, as high and low
    pairs. tables (H, 2 or 4, 2N, T), in the dtype of products, a mode's real parts eight rows before its
    imaginary ones: lambda^(T-1-s), conj(lambda^(t+1)), and for the backward the same times their exponents.
    """
    h = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    keep = (n < n_modes)[:, None]
    log_re, turns, log_re64, log_im64 = _modes(log_modes, h, n, n_modes)
    w_re = tl.load(weights + 2 * (h * n_modes + n), mask=n < n_modes, other=0.0)[:, None]
    w_im = tl.load(weights + 2 * (h * n_modes + n) + 1, mask=n < n_modes, other=0.0)[:, None]

    re, im = _power(log_re[:, None], turns[:, None], t[None, :])
    re, im = tl.where(keep, re, 0.0), tl.where(keep, im, 0.0)
    tap = tl.sum(w_re * re - w_im * im, 0)
    if HAS_SKIP:
        tap += tl.where(t == 0, tl.load(skip + h), 0.0)
    tl.store(first + h * T + t, tap)

    count: tl.constexpr = 4 if BACKWARD else 2
    kind = tables.dtype.element_ty
    size: tl.constexpr = 2 * N * T
    row = (n // 8 * 16 + n % 8)[:, None] * T
    tables += h * count * size
    place = tables + row + (T - 1 - t)[None, :]
    tl.store(place, re.to(kind))
    tl.store(place + 8 * T, im.to(kind))
    if BACKWARD:
        by = t[None, :].to(tl.float32)
        tl.store(place + 2 * size, (by * re).to(kind))
        tl.store(place + 2 * size + 8 * T, (by * im).to(kind))
    one_re, one_im = _power(log_re[:, None], turns[:, None], tl.full([N, 1], 1, tl.int32))
    re, im = re * one_re - im * one_im, re * one_im + im * one_re
    place = tables + size + row + t[None, :]
    tl.store(place, re.to(kind))
    tl.store(place + 8 * T, (-im).to(kind))
    if BACKWARD:
        by = (t[None, :] + 1).to(tl.float32)
        tl.store(place + 2 * size, (by * re).to(kind))
        tl.store(place + 2 * size + 8 * T, (-by * im).to(kind))

    for which in tl.static_range(2):
        exponent = (span if which else T) + tl.zeros([N], tl.float64)
        re_high, im_high, re_low, im_low = _exact(log_re64, log_im64, exponent)
        place = decay + (h * 2 + which) * 4 * N + n
        real = n < n_modes
        tl.store(place, tl.where(real, re_high, 0.0))
        tl.store(place + N, tl.where(real, im_high, 0.0))
        tl.store(place + 2 * N, tl.where(real, re_low, 0.0))
        tl.store(place + 3 * N, tl.where(real, im_low, 0.0))


@triton.jit
def _toeplitz(taps, n_taps, shift, T: tl.constexpr):
    """(T, T): row t meets column s by the tap shift + t - s, zero where there is none."""
    lag = shift + tl.arange(0, T)[:, None] - tl.arange(0, T)[None, :]
    return tl.load(taps + lag, mask=(lag >= 0) & (lag < n_taps), other=0.0)


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _conj_times(a_re, a_im, b_re, b_im):
    """conj(a) b"""
    return a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re


@triton.jit
def _halves(x, N: tl.constexpr, R: tl.constexpr):
    """The first and the second half of the columns of x (N, R)."""
    return tl.split(tl.permute(tl.reshape(x, (N, 2, R // 2)), (0, 2, 1)))


@triton.jit
def _beside(a, b, N: tl.constexpr, R: tl.constexpr):
    """The inverse of `_halves`."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (N, R))


@triton.jit
def _parts(x, N: tl.constexpr, R: tl.constexpr):
    """Real and imaginary parts (N, R) of x (2N, R), which has them in blocks of eight rows."""
    re, im = tl.split(tl.permute(tl.reshape(x, (N // 8, 2, 8, R)), (0, 2, 3, 1)))
    return tl.reshape(re, (N, R)), tl.reshape(im, (N, R))


@triton.jit
def _stacked(re, im, N: tl.constexpr, R: tl.constexpr):
    """The inverse of `_parts`."""
    pair = tl.join(tl.reshape(re, (N // 8, 8, R)), tl.reshape(im, (N // 8, 8, R)))
    return tl.reshape(tl.permute(pair, (0, 3, 1, 2)), (2 * N, R))


@triton.jit
def _chain(e_re, e_im, z_re, z_im, a_re, a_im, low_re, low_im, N: tl.constexpr, R: tl.constexpr, J: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """z -> (a + low) z + e_j along J chunks in the columns of e (N, R): the z before each, (N, R), and the z after all, (N, R / J)."""
    if J == 1:
        next_re, next_im = _times(a_re, a_im, z_re, z_im)
        more_re, more_im = _times(low_re, low_im, z_re, z_im)
        return z_re, z_im, next_re + (more_re + e_re), next_im + (more_im + e_im)
    else:
        H: tl.constexpr = R // 2
        re_0, re_1 = _halves(e_re, N, R)
        im_0, im_1 = _halves(e_im, N, R)
        if REVERSE:
            y_re, y_im, z_re, z_im = _chain(re_1, im_1, z_re, z_im, a_re, a_im, low_re, low_im, N, H, J // 2, True)
            x_re, x_im, z_re, z_im = _chain(re_0, im_0, z_re, z_im, a_re, a_im, low_re, low_im, N, H, J // 2, True)
        else:
            x_re, x_im, z_re, z_im = _chain(re_0, im_0, z_re, z_im, a_re, a_im, low_re, low_im, N, H, J // 2, False)
            y_re, y_im, z_re, z_im = _chain(re_1, im_1, z_re, z_im, a_re, a_im, low_re, low_im, N, H, J // 2, False)
        return _beside(x_re, y_re, N, R), _beside(x_im, y_im, N, R), z_re, z_im


@triton.jit
def _recur(
    e_re, e_im, z_re, z_im, decay, sign,
    N: tl.constexpr, R: tl.constexpr, J: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """z -> lambda^T z + e_j along the J chunks in the columns of e (N, R): the z before each, (N, R), and the z after all.

    z (N W, Q / W). REVERSE goes from the last chunk to the first; `sign` -1 takes conj(lambda).
    """
    n = tl.arange(0, N * W) // W
    a_re, a_im = tl.load(decay + n)[:, None], sign * tl.load(decay + N + n)[:, None]
    low_re, low_im = tl.load(decay + 2 * N + n)[:, None], sign * tl.load(decay + 3 * N + n)[:, None]
    e_re, e_im = tl.reshape(e_re, (N * W, R // W)), tl.reshape(e_im, (N * W, R // W))
    s_re, s_im, z_re, z_im = _chain(e_re, e_im, z_re, z_im, a_re, a_im, low_re, low_im, N * W, R // W, J, REVERSE)
    return tl.reshape(s_re, (N, R)), tl.reshape(s_im, (N, R)), z_re, z_im


@triton.jit
def _columns(R: tl.constexpr, J: tl.constexpr, W: tl.constexpr):
    """Of every column its row in the tile and its chunk among the J."""
    r = tl.arange(0, R)
    Q: tl.constexpr = R // J // W
    inner = r % (R // W)
    return r // (R // W) * Q + inner % Q, inner // Q


@triton.jit
def _read(base, column, t, stride, ok):
    """(T, R): the times t of the signals that begin at base + column; zeros where not ok."""
    return tl.load(base + column[None, :] + t * stride, mask=ok, other=0.0)


@triton.jit
def _before(u, column, stride, past, column_p, n_past, t, ok, length, HAS_PAST: tl.constexpr):
    """(T, R): the inputs at times t, which may be negative and are then the past's."""
    x = _read(u, column, t, stride, ok & (t >= 0) & (t < length))
    if HAS_PAST:
        x += _read(past, column_p, t + n_past, 1, ok & (t < 0) & (t + n_past >= 0)).to(x.dtype)
    return x


@triton.jit
def _state_places(h, first_row, n_modes, rows, N: tl.constexpr, Q: tl.constexpr, W: tl.constexpr):
    """Where the states (rows, H, modes, 2) of a tile lie, whether there are such, and their rows: (N W, Q / W)."""
    nw = tl.arange(0, N * W)[:, None]
    row = first_row + nw % W * (Q // W) + tl.arange(0, Q // W)[None, :]
    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h) * n_modes + nw // W)
    return place, (nw // W < n_modes) & (row < rows), row


@triton.jit
def forward(
    u, pre, post, past, y, first, taps, weights, tables, decay, state, carry,
    rows, groups, span, length, n_modes, n_taps, n_past, done,
    su_b, su_h, su_t, sv_b, sv_h, sv_t, sq_b, sq_h, sq_t, sp_b, sp_h, sy_b, sy_h, sy_t,
    R: tl.constexpr, J: tl.constexpr, W: tl.constexpr, T: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr,
    HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_STATE: tl.constexpr, CARRY: tl.constexpr, OUTPUT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y. CARRY: also the state (B, H, N, 2) of every sequence before its token `done`, a multiple of J T. Without OUTPUT no y,
    but the state of every row after its `span` tokens."""
    h = tl.program_id(0).to(tl.int64)
    Q: tl.constexpr = R // J
    at, j = _columns(R, J, W)
    row = tl.program_id(1) * Q + at
    ok = (row < rows)[None, :]
    b64 = (row // groups).to(tl.int64)
    start = row % groups * span + j * T
    col_u, col_v, col_q, col_p, col_y = b64 * su_b, b64 * sv_b, b64 * sq_b, b64 * sp_b, b64 * sy_b
    u, pre, post, past, y = u + h * su_h, pre + h * sv_h, post + h * sq_h, past + h * sp_h, y + h * sy_h
    n, s = tl.arange(0, N), tl.arange(0, T)
    n2 = tl.arange(0, 2 * N)

    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    tables += h * COUNT * 2 * N * T
    into = tl.load(tables + n2[:, None] * T + s[None, :])
    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    on = tl.load(tables + 2 * N * T + n2[None, :] * T + s[:, None])
    w_re = tl.load(weights + 2 * (h * n_modes + n), mask=n < n_modes, other=0.0)[:, None]
    w_im = tl.load(weights + 2 * (h * n_modes + n) + 1, mask=n < n_modes, other=0.0)[:, None]
    decay += h * 8 * N

    place, z_ok, z_row = _state_places(h, tl.program_id(1) * Q, n_modes, rows, N, Q, W)
    z_re, z_im = tl.zeros([N * W, Q // W], tl.float32), tl.zeros([N * W, Q // W], tl.float32)
    if HAS_STATE:
        z_re, z_im = tl.load(state + place, mask=z_ok, other=0.0), tl.load(state + place + 1, mask=z_ok, other=0.0)

    for c in range(0, span // (J * T)):
        if CARRY and OUTPUT:
            wanted = z_ok & (z_row % groups * span + c * J * T == done)
            out = (z_row // groups - z_row).to(tl.int64) * (2 * tl.num_programs(0) * n_modes)
            tl.store(carry + place + out, z_re, mask=wanted)
            tl.store(carry + place + out + 1, z_im, mask=wanted)
        t = (start + c * J * T)[None, :] + s[:, None]
        here = ok & (t < length)
        now = _read(u, col_u, t, su_t, here)
        if HAS_FIR:
            seen = _before(u, col_u, su_t, past, col_p, n_past, t - T, ok, length, HAS_PAST)
            x = tl.dot(near, now.to(KIND), input_precision=PRECISION)
            x = tl.dot(far, seen.to(KIND), x, input_precision=PRECISION)
        else:
            x = now.to(tl.float32)
        if HAS_PRE:
            x *= _read(pre, col_v, t, sv_t, here).to(tl.float32)
        w = x.to(KIND)
        e_re, e_im = _parts(tl.dot(into, w, input_precision=PRECISION), N, R)
        s_re, s_im, z_re, z_im = _recur(e_re, e_im, z_re, z_im, decay, 1.0, N, R, J, W, False)
        if OUTPUT:
            a_re, a_im = _times(w_re, w_im, s_re, s_im)
            out = tl.dot(kernel, w, input_precision=PRECISION)
            out = tl.dot(on, _stacked(a_re, a_im, N, R).to(KIND), out, input_precision=PRECISION)
            if HAS_POST:
                out *= _read(post, col_q, t, sq_t, here).to(tl.float32)
            tl.store(y + col_y[None, :] + t * sy_t, out.to(y.dtype.element_ty), mask=here)
    if not OUTPUT:
        tl.store(carry + place, z_re, mask=z_ok)
        tl.store(carry + place + 1, z_im, mask=z_ok)


@triton.jit
def adjoints(
    dy, post, weights, tables, decay, dcarry, out, rows, groups, span, length, n_modes, done,
    sd_b, sd_h, sd_t, sq_b, sq_h, sq_t,
    R: tl.constexpr, J: tl.constexpr, W: tl.constexpr, T: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr,
    HAS_POST: tl.constexpr, HAS_CARRY: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of every row, and with HAS_CARRY the state before token `done`, ask of the state before the row."""
    h = tl.program_id(0).to(tl.int64)
    Q: tl.constexpr = R // J
    at, j = _columns(R, J, W)
    row = tl.program_id(1) * Q + at
    b64 = (row // groups).to(tl.int64)
    start = row % groups * span + j * T
    col_d, col_q = b64 * sd_b, b64 * sq_b
    dy, post = dy + h * sd_h, post + h * sq_h
    n, s = tl.arange(0, N), tl.arange(0, T)
    on = tl.load(tables + h * COUNT * 2 * N * T + 2 * N * T + tl.arange(0, 2 * N)[:, None] * T + s[None, :])
    w_re = tl.load(weights + 2 * (h * n_modes + n), mask=n < n_modes, other=0.0)[:, None]
    w_im = tl.load(weights + 2 * (h * n_modes + n) + 1, mask=n < n_modes, other=0.0)[:, None]
    decay += h * 8 * N
    place, z_ok, z_row = _state_places(h, tl.program_id(1) * Q, n_modes, rows, N, Q, W)
    g_re, g_im = tl.zeros([N * W, Q // W], tl.float32), tl.zeros([N * W, Q // W], tl.float32)
    n_super = span // (J * T)
    for i in range(0, n_super):
        c = n_super - 1 - i
        t = (start + c * J * T)[None, :] + s[:, None]
        here = (row < rows)[None, :] & (t < length)
        d = _read(dy, col_d, t, sd_t, here)
        if HAS_POST:
            d = d.to(tl.float32) * _read(post, col_q, t, sq_t, here).to(tl.float32)
        o_re, o_im = _parts(tl.dot(on, d.to(KIND), input_precision=PRECISION), N, R)
        o_re, o_im = _conj_times(w_re, w_im, o_re, o_im)
        _, _, g_re, g_im = _recur(o_re, o_im, g_re, g_im, decay, -1.0, N, R, J, W, True)
        if HAS_CARRY:
            g_re, g_im = _injected(g_re, g_im, dcarry, place, z_ok, z_row, groups, span, c * J * T, done, n_modes)
    tl.store(out + place, g_re, mask=z_ok)
    tl.store(out + place + 1, g_im, mask=z_ok)


@triton.jit
def _injected(g_re, g_im, dcarry, place, z_ok, z_row, groups, span, token, done, n_modes):
    """The adjoints of the states before a row's token, with the gradient (B, H, N, 2) of the state handed out before `done`."""
    wanted = z_ok & (z_row % groups * span + token == done)
    place += (z_row // groups - z_row).to(tl.int64) * (2 * tl.num_programs(0) * n_modes)
    return (
        g_re + tl.load(dcarry + place, mask=wanted, other=0.0),
        g_im + tl.load(dcarry + place + 1, mask=wanted, other=0.0),
    )


@triton.jit
def scan_groups(
    local, begin, state, end, decay, groups, n_modes, sign,
    N: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """z -> lambda^span z + local_g over the pieces of a sequence, from `state`: the z before each, and the z after all."""
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    ok = n < n_modes
    decay += h * 8 * N + 4 * N + n
    a_re, a_im, low_re, low_im = tl.load(decay), sign * tl.load(decay + N), tl.load(decay + 2 * N), sign * tl.load(decay + 3 * N)
    z_re, z_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    whole = 2 * ((b * tl.num_programs(0) + h) * n_modes + n)
    if HAS_STATE:
        z_re, z_im = tl.load(state + whole, mask=ok, other=0.0), tl.load(state + whole + 1, mask=ok, other=0.0)
    for i in range(0, groups):
        g = groups - 1 - i if REVERSE else i
        place = 2 * (((b * groups + g) * tl.num_programs(0) + h) * n_modes + n)
        e_re, e_im = tl.load(local + place, mask=ok, other=0.0), tl.load(local + place + 1, mask=ok, other=0.0)
        tl.store(begin + place, z_re, mask=ok)
        tl.store(begin + place + 1, z_im, mask=ok)
        more_re, more_im = _times(low_re, low_im, z_re, z_im)
        z_re, z_im = _times(a_re, a_im, z_re, z_im)
        z_re, z_im = z_re + (more_re + e_re), z_im + (more_im + e_im)
    if HAS_END:
        tl.store(end + whole, z_re, mask=ok)
        tl.store(end + whole + 1, z_im, mask=ok)


@triton.jit
def _first_chunks(x, T: tl.constexpr, R: tl.constexpr, J: tl.constexpr):
    """The columns of j = 0, (T, Q)."""
    if J == 1:
        return x
    else:
        half, _ = _halves(x, T, R)
        return _first_chunks(half, T, R // 2, J // 2)


@triton.jit
def _shifted(x, after, T: tl.constexpr, R: tl.constexpr, J: tl.constexpr):
    """Column (j, q) of the result is column (j + 1, q) of x; the last j takes `after`."""
    if J == 1:
        return after
    else:
        left, right = _halves(x, T, R)
        middle = _first_chunks(right, T, R // 2, J // 2)
        return _beside(
            _shifted(left, middle, T, R // 2, J // 2), _shifted(right, after, T, R // 2, J // 2), T, R
        )


@triton.jit
def _folded(x, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """x (N, R) -> (N, W): the columns summed that a thread has at hand."""
    if R == W:
        return x
    else:
        left, right = _halves(x, N, R)
        return _folded(left + right, N, R // 2, W)


@triton.jit
def _sum_diagonals(x, scratch, T: tl.constexpr):
    """x (T, T), row t and column s -> (T,): the sums of x[t, s] over (t - s) mod T = 0 ... T-1, through scratch."""
    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    tl.debug_barrier()
    tl.store(scratch + t * T + (t - s + T) % T, x)
    tl.debug_barrier()
    return tl.sum(tl.load(scratch + t * T + s), 0)


@triton.jit
def backward(
    dy, u, pre, post, past, du, dpre, dpost, first, taps, weights, tables, decay, state, adjoint, dcarry, dstate,
    states, scratch, halo, dtaps, dfirst, dmodes,
    rows, groups, span, length, n_modes, n_taps, n_past, done,
    sd_b, sd_h, sd_t, su_b, su_h, su_t, sv_b, sv_h, sv_t, sq_b, sq_h, sq_t, sp_b, sp_h,
    sdu_b, sdu_h, sdu_t, sdv_b, sdv_h, sdv_t, sdq_b, sdq_h, sdq_t,
    R: tl.constexpr, J: tl.constexpr, W: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_ADJOINT: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_DSTATE: tl.constexpr,
    STAGES: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of `forward`. Those of the parameters are partial: one sum a program.

    state and adjoint (rows, H, N, 2): the states before and the adjoints after every row. states (H, tiles, supers, 2N, R), in the
    dtype of products, and scratch (H, tiles, T, T) fp32 are this program's own. halo (rows, H, T): the gradients of FIR(u) in the first
    chunk of every row, which `mend` brings to the end of the row before. dtaps, dfirst (H, tiles, T) and dmodes (H, tiles, 4, N): the
    gradients of log_modes and weights but for what `first` gives them.
    """
    h = tl.program_id(0).to(tl.int64)
    tile = h * tl.num_programs(1) + tl.program_id(1)
    Q: tl.constexpr = R // J
    at, j = _columns(R, J, W)
    row = tl.program_id(1) * Q + at
    ok = (row < rows)[None, :]
    b64 = (row // groups).to(tl.int64)
    start = row % groups * span + j * T
    n_super = span // (J * T)
    col_d, col_u, col_v, col_q, col_p = b64 * sd_b, b64 * su_b, b64 * sv_b, b64 * sq_b, b64 * sp_b
    col_du, col_dv, col_dq = b64 * sdu_b, b64 * sdv_b, b64 * sdq_b
    dy, u, pre, post, past = dy + h * sd_h, u + h * su_h, pre + h * sv_h, post + h * sq_h, past + h * sp_h
    du, dpre, dpost = du + h * sdu_h, dpre + h * sdv_h, dpost + h * sdq_h
    n, s = tl.arange(0, N), tl.arange(0, T)
    n2 = tl.arange(0, 2 * N)
    states += tile * n_super * 2 * N * R + n2[:, None] * R + tl.arange(0, R)[None, :]

    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    tables += h * 8 * N * T + n2[:, None] * T + s[None, :]
    into, on = tl.load(tables), tl.load(tables + 2 * N * T)
    into_by, on_by = tl.load(tables + 4 * N * T), tl.load(tables + 6 * N * T)
    w_re = tl.load(weights + 2 * (h * n_modes + n), mask=n < n_modes, other=0.0)[:, None]
    w_im = tl.load(weights + 2 * (h * n_modes + n) + 1, mask=n < n_modes, other=0.0)[:, None]
    decay += h * 8 * N
    a_re, a_im = tl.load(decay + n)[:, None], tl.load(decay + N + n)[:, None]

    place, z_ok, z_row = _state_places(h, tl.program_id(1) * Q, n_modes, rows, N, Q, W)
    z_re, z_im = tl.zeros([N * W, Q // W], tl.float32), tl.zeros([N * W, Q // W], tl.float32)
    if HAS_STATE:
        z_re, z_im = tl.load(state + place, mask=z_ok, other=0.0), tl.load(state + place + 1, mask=z_ok, other=0.0)
    for c in range(0, n_super):
        t = (start + c * J * T)[None, :] + s[:, None]
        here = ok & (t < length)
        now = _read(u, col_u, t, su_t, here)
        if HAS_FIR:
            seen = _before(u, col_u, su_t, past, col_p, n_past, t - T, ok, length, HAS_PAST)
            x = tl.dot(near, now.to(KIND), input_precision=PRECISION)
            x = tl.dot(far, seen.to(KIND), x, input_precision=PRECISION)
        else:
            x = now.to(tl.float32)
        if HAS_PRE:
            x *= _read(pre, col_v, t, sv_t, here).to(tl.float32)
        e_re, e_im = _parts(tl.dot(into, x.to(KIND), input_precision=PRECISION), N, R)
        s_re, s_im, z_re, z_im = _recur(e_re, e_im, z_re, z_im, decay, 1.0, N, R, J, W, False)
        tl.store(states + c * 2 * N * R, _stacked(s_re, s_im, N, R).to(KIND))
    # What one thread stored another will load.
    tl.debug_barrier()

    F: tl.constexpr = 8 if R // W >= 8 else R // W
    log_re, log_im = tl.zeros([N * W, F], tl.float32), tl.zeros([N * W, F], tl.float32)
    dw_re, dw_im = tl.zeros([N * W, F], tl.float32), tl.zeros([N * W, F], tl.float32)
    g_re, g_im = tl.zeros([N * W, Q // W], tl.float32), tl.zeros([N * W, Q // W], tl.float32)
    if HAS_ADJOINT:
        g_re, g_im = tl.load(adjoint + place, mask=z_ok, other=0.0), tl.load(adjoint + place + 1, mask=z_ok, other=0.0)
    d_kernel = tl.zeros([T, T], tl.float32)
    d_near, d_far = tl.zeros([T, T], tl.float32), tl.zeros([T, T], tl.float32)
    next_x = tl.zeros([T * W, Q // W], KIND)
    for i in tl.range(0, n_super, num_stages=STAGES):
        c = n_super - 1 - i
        t = (start + c * J * T)[None, :] + s[:, None]
        here = ok & (t < length)
        now = _read(u, col_u, t, su_t, here)
        seen = now
        if HAS_FIR:
            seen = _before(u, col_u, su_t, past, col_p, n_past, t - T, ok, length, HAS_PAST)
            x = tl.dot(near, now.to(KIND), input_precision=PRECISION)
            x = tl.dot(far, seen.to(KIND), x, input_precision=PRECISION)
        else:
            x = now.to(tl.float32)
        v = x
        if HAS_PRE:
            v = _read(pre, col_v, t, sv_t, here).to(tl.float32)
            w = (x * v).to(KIND)
        else:
            w = x.to(KIND)
        s_re, s_im = _parts(tl.load(states + c * 2 * N * R).to(tl.float32), N, R)
        p_re, p_im = _times(w_re, w_im, s_re, s_im)
        d = _read(dy, col_d, t, sd_t, here)
        if HAS_POST:
            out = tl.dot(kernel, w, input_precision=PRECISION)
            out = tl.dot(tl.trans(on), _stacked(p_re, p_im, N, R).to(KIND), out, input_precision=PRECISION)
            out *= d.to(tl.float32)
            tl.store(dpost + col_dq[None, :] + t * sdq_t, out.to(dpost.dtype.element_ty), mask=here)
            d = d.to(tl.float32) * _read(post, col_q, t, sq_t, here).to(tl.float32)
        d = d.to(KIND)

        o_re, o_im = _parts(tl.dot(on, d, input_precision=PRECISION), N, R)
        m_re, m_im = _conj_times(s_re, s_im, o_re, o_im)
        dw_re += _folded(tl.reshape(m_re, (N * W, R // W)), N * W, R // W, F)
        dw_im += _folded(tl.reshape(m_im, (N * W, R // W)), N * W, R // W, F)
        o_re, o_im = _conj_times(w_re, w_im, o_re, o_im)
        y_re, y_im, g_re, g_im = _recur(o_re, o_im, g_re, g_im, decay, -1.0, N, R, J, W, True)
        if HAS_CARRY:
            g_re, g_im = _injected(g_re, g_im, dcarry, place, z_ok, z_row, groups, span, c * J * T, done, n_modes)
        f_re, f_im = _parts(tl.dot(on_by, d, input_precision=PRECISION), N, R)
        m_re, m_im = _conj_times(p_re, p_im, f_re, f_im)
        f_re, f_im = _parts(tl.dot(into_by, w, input_precision=PRECISION), N, R)
        k_re, k_im = _times(a_re, a_im, s_re, s_im)
        f_re, f_im = _conj_times(f_re + T * k_re, f_im + T * k_im, y_re, y_im)
        log_re += _folded(tl.reshape(m_re + f_re, (N * W, R // W)), N * W, R // W, F)
        log_im += _folded(tl.reshape(m_im + f_im, (N * W, R // W)), N * W, R // W, F)

        dx = tl.dot(tl.trans(kernel), d, input_precision=PRECISION)
        dx = tl.dot(tl.trans(into), _stacked(y_re, y_im, N, R).to(KIND), dx, input_precision=PRECISION)
        # Row s, column t: transposed here is d, which was loaded.
        d_kernel = tl.dot(w, tl.trans(d), d_kernel, input_precision=PRECISION)
        if HAS_PRE:
            tl.store(dpre + col_dv[None, :] + t * sdv_t, (dx * x).to(dpre.dtype.element_ty), mask=here)
            dx *= v
        if HAS_FIR:
            # Beyond the end there are no outputs to answer for; x there is not zero, as its FIR still rings.
            k = tl.where(here, dx, 0.0).to(KIND)
            d_near = tl.dot(k, tl.trans(now.to(KIND)), d_near, input_precision=PRECISION)
            d_far = tl.dot(k, tl.trans(seen.to(KIND)), d_far, input_precision=PRECISION)
            dx = tl.dot(tl.trans(near), k, input_precision=PRECISION)
            k = tl.reshape(k, (T * W, R // W))
            later = tl.reshape(_shifted(k, next_x, T * W, R // W, J), (T, R))
            dx = tl.dot(tl.trans(far), later, dx, input_precision=PRECISION)
            next_x = _first_chunks(k, T * W, R // W, J)
        tl.store(du + col_du[None, :] + t * sdu_t, dx.to(du.dtype.element_ty), mask=here)

    if HAS_DSTATE:
        tl.store(dstate + place, g_re, mask=z_ok)
        tl.store(dstate + place + 1, g_im, mask=z_ok)
    if HAS_FIR:
        sw = tl.arange(0, T * W)[:, None]
        first_row = tl.program_id(1) * Q + sw % W * (Q // W) + tl.arange(0, Q // W)[None, :]
        out = halo + (first_row.to(tl.int64) * tl.num_programs(0) + h) * T + sw // W
        tl.store(out, next_x.to(halo.dtype.element_ty), mask=first_row < rows)
    out = dmodes + tile * 4 * N + n
    tl.store(out, tl.sum(tl.reshape(tl.sum(log_re, 1), (N, W)), 1))
    tl.store(out + N, tl.sum(tl.reshape(tl.sum(log_im, 1), (N, W)), 1))
    tl.store(out + 2 * N, tl.sum(tl.reshape(tl.sum(dw_re, 1), (N, W)), 1))
    tl.store(out + 3 * N, tl.sum(tl.reshape(tl.sum(dw_im, 1), (N, W)), 1))
    scratch += tile * T * T
    lower = s[:, None] >= s[None, :]
    tl.store(dfirst + tile * T + s, _sum_diagonals(tl.where(lower, tl.trans(d_kernel), 0.0), scratch, T))
    if HAS_FIR:
        tl.store(dtaps + tile * T + s, _sum_diagonals(tl.where(lower, d_near, d_far), scratch, T))


@triton.jit
def mend(
    halo, taps, du, groups, span, n_taps, sdu_b, sdu_h, sdu_t, T: tl.constexpr
):  # fmt: skip
    """Add to du at the end of every piece but a sequence's last what the first chunk of the next piece asks of it."""
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) // (groups - 1)
    g = tl.program_id(1) % (groups - 1)
    t = tl.arange(0, T)
    lag = T + t[:, None] - t[None, :]
    tap = tl.load(taps + h * n_taps + lag, mask=lag < n_taps, other=0.0)
    x = tl.load(halo + ((b * groups + g + 1).to(tl.int64) * tl.num_programs(0) + h) * T + t)
    place = du + h * sdu_h + b.to(tl.int64) * sdu_b + ((g + 1) * span - T + t) * sdu_t
    more = tl.sum(tap * x.to(tl.float32)[:, None], 0)
    tl.store(place, (tl.load(place).to(tl.float32) + more).to(du.dtype.element_ty))


@triton.jit
def finish(
    log_modes, weights, dfirst, dtaps, dmodes, out_modes, out_weights, out_skip, out_taps, n_modes, n_taps, n_tiles,
    T: tl.constexpr, N: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_FIR: tl.constexpr,
):  # fmt: skip
    """Gradients of a channel's parameters from the sums of its programs."""
    h = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    tap, fir = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
    log_re, log_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    dw_re, dw_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for i in range(0, n_tiles):
        tile = h * n_tiles + i
        tap += tl.load(dfirst + tile * T + t)
        if HAS_FIR:
            fir += tl.load(dtaps + tile * T + t)
        place = dmodes + tile * 4 * N + n
        log_re += tl.load(place)
        log_im += tl.load(place + N)
        dw_re += tl.load(place + 2 * N)
        dw_im += tl.load(place + 3 * N)

    re, turns, _, _ = _modes(log_modes, h, n, n_modes)
    p_re, p_im = _power(re[:, None], turns[:, None], t[None, :])
    real = n < n_modes
    w_re = tl.load(weights + 2 * (h * n_modes + n), mask=real, other=0.0)
    w_im = tl.load(weights + 2 * (h * n_modes + n) + 1, mask=real, other=0.0)
    by = t.to(tl.float32)
    dw_re += tl.sum(p_re * tap[None, :], 1)
    dw_im -= tl.sum(p_im * tap[None, :], 1)
    f_re, f_im = tl.sum(p_re * (by * tap)[None, :], 1), -tl.sum(p_im * (by * tap)[None, :], 1)
    f_re, f_im = _conj_times(w_re, w_im, f_re, f_im)
    place = 2 * (h * n_modes + n)
    tl.store(out_modes + place, log_re + f_re, mask=real)
    tl.store(out_modes + place + 1, log_im + f_im, mask=real)
    tl.store(out_weights + place, dw_re, mask=real)
    tl.store(out_weights + place + 1, dw_im, mask=real)
    if HAS_SKIP:
        tl.store(out_skip + h, tl.sum(tl.where(t == 0, tap, 0.0)))
    if HAS_FIR:
        tl.store(out_taps + h * n_taps + t, fir, mask=t < n_taps)
