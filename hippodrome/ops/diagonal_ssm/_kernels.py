"""Triton programs of `diagonal_ssm`: a state passed between chunks of T tokens, in T x T tensor-core products.

A program owns one channel and R rows and walks along them a chunk of T tokens at a time, the states in registers. A row is a
sequence or, where there are too few of those, one of `groups` pieces of `span` tokens: then a first pass finds what each
piece adds to the state, a scan over the pieces where each begins, and all pieces run at once. With w = pre * FIR(u), z the
state before a chunk and K the first T taps of the kernel, the skip in the first:

    y = post * (w Toeplitz(K) + (weights z) . lambda^(t+1)),      z' = lambda^T z + sum_s lambda^(T-1-s) w_s

The backward is in `_gradients.py`.

In the products with tables the moving operand is in registers and the table in shared memory, which so is written once and
needs no fence. The real and imaginary part of a mode lie eight columns apart: a thread has both at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power(log_re, turns, exponent):
    """exp(exponent log), exponent an int32 of at most a few thousand. `turns` is the phase in units of 2^-32 turns: integers
    wrap like phases do, so that no digit is lost, and give the octant for the series of sine and cosine to 1e-8."""
    phase = turns * exponent
    quarter = (phase + (1 << 29)) >> 30
    x = (phase - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09
    y = x * x
    sine = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cosine = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 - y * (1 / 3628800)))))
    swapped = (quarter & 1) == 1
    re, im = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    re = tl.where(((quarter + 1) & 2) == 2, -re, re)
    im = tl.where((quarter & 2) == 2, -im, im)
    size = tl.exp(log_re * exponent.to(tl.float32))
    return size * re, size * im


@triton.jit
def _exact(log_re, log_im, exponent):
    """exp(exponent log) in float64, as float32 pairs high + low: a power that is applied thousands of times must not be
    rounded."""
    turns = log_im * exponent * 0.15915494309189535
    angle = (turns - tl.floor(turns)) * 6.283185307179586
    size = tl.exp(log_re * exponent)
    re, im = size * tl.cos(angle), size * tl.sin(angle)
    re_high, im_high = re.to(tl.float32), im.to(tl.float32)
    return re_high, im_high, (re - re_high.to(tl.float64)).to(tl.float32), (im - im_high.to(tl.float64)).to(tl.float32)


@triton.jit
def _modes(log_modes, h, n, n_modes):
    """Of modes n of channel h: the logarithm's real and imaginary part in float64, and the latter in units of 2^-32 turns."""
    real = n < n_modes
    re = tl.load(log_modes + 2 * (h * n_modes + n), mask=real, other=0.0).to(tl.float64)
    im = tl.load(log_modes + 2 * (h * n_modes + n) + 1, mask=real, other=0.0).to(tl.float64)
    turns = im * 0.15915494309189535
    turns = ((turns - tl.floor(turns + 0.5)) * 4294967296.0).to(tl.int64).to(tl.int32)
    return re, im, turns


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _conj_times(a_re, a_im, b_re, b_im):
    """conj(a) b"""
    return a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re


@triton.jit
def prepare(
    log_modes, weights, skip, first, tables, decay, n_modes, span,
    T: tl.constexpr, N: tl.constexpr, HAS_SKIP: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The tables of a channel, from log_modes (H, N, 2) in fp32 or fp64.

    first (H, T) fp32: the taps of the kernel within a chunk. decay (H, 2, 4, N) fp32: lambda^T and, if there are PIECES,
    lambda^span, as high and low pairs; the low pair of lambda^T only where it is EXACT. tables (H, 2 or 4, 2N, T), in the
    dtype of products, a mode's real parts eight rows before its imaginary ones: lambda^(T-1-s), conj(lambda^(t+1)), and for
    the backward the same times their exponents.
    """
    h = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    keep = (n < n_modes)[:, None]
    log_re64, log_im64, turns = _modes(log_modes, h, n, n_modes)
    log_re = log_re64.to(tl.float32)
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
    # In the order of memory: a reversed store is one of single numbers.
    re, im = _power(log_re[:, None], turns[:, None], T - 1 - t[None, :])
    re, im = tl.where(keep, re, 0.0), tl.where(keep, im, 0.0)
    place = tables + row + t[None, :]
    tl.store(place, re.to(kind))
    tl.store(place + 8 * T, im.to(kind))
    if BACKWARD:
        by = (T - 1 - t)[None, :].to(tl.float32)
        tl.store(place + 2 * size, (by * re).to(kind))
        tl.store(place + 2 * size + 8 * T, (by * im).to(kind))
    re, im = _power(log_re[:, None], turns[:, None], t[None, :] + 1)
    re, im = tl.where(keep, re, 0.0), tl.where(keep, im, 0.0)
    place += size
    tl.store(place, re.to(kind))
    tl.store(place + 8 * T, (-im).to(kind))
    if BACKWARD:
        by = (t[None, :] + 1).to(tl.float32)
        tl.store(place + 2 * size, (by * re).to(kind))
        tl.store(place + 2 * size + 8 * T, (-by * im).to(kind))

    place = decay + h * 8 * N + n
    if EXACT:
        re_high, im_high, re_low, im_low = _exact(log_re64, log_im64, T + 0.0 * log_im64)
        _store_power(place, re_high, im_high, re_low, im_low, n < n_modes, N)
    else:
        re_high, im_high = _power(log_re, turns, T + 0 * turns)
        _store_power(place, re_high, im_high, 0.0 * re_high, 0.0 * im_high, n < n_modes, N)
    if PIECES:
        re_high, im_high, re_low, im_low = _exact(log_re64, log_im64, span + 0.0 * log_im64)
        _store_power(place + 4 * N, re_high, im_high, re_low, im_low, n < n_modes, N)


@triton.jit
def _store_power(place, re_high, im_high, re_low, im_low, real, N: tl.constexpr):
    tl.store(place, tl.where(real, re_high, 0.0))
    tl.store(place + N, tl.where(real, im_high, 0.0))
    tl.store(place + 2 * N, tl.where(real, re_low, 0.0))
    tl.store(place + 3 * N, tl.where(real, im_low, 0.0))


@triton.jit
def _toeplitz(taps, n_taps, shift, T: tl.constexpr):
    """(T, T): row s meets column t by the tap shift + t - s, zero where there is none."""
    lag = shift + tl.arange(0, T)[None, :] - tl.arange(0, T)[:, None]
    return tl.load(taps + lag, mask=(lag >= 0) & (lag < n_taps), other=0.0)


@triton.jit
def _parts(x, R: tl.constexpr, N: tl.constexpr):
    """Real and imaginary parts (R, N) of x (R, 2N), which has them in blocks of eight columns."""
    re, im = tl.split(tl.permute(tl.reshape(x, (R, N // 8, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(re, (R, N)), tl.reshape(im, (R, N))


@triton.jit
def _stacked(re, im, R: tl.constexpr, N: tl.constexpr):
    """The inverse of `_parts`."""
    pair = tl.join(tl.reshape(re, (R, N // 8, 8)), tl.reshape(im, (R, N // 8, 8)))
    return tl.reshape(tl.permute(pair, (0, 1, 3, 2)), (R, 2 * N))


@triton.jit
def _decay(decay, n, N: tl.constexpr):
    """A power of lambda as high and low pairs, each (1, N)."""
    place = decay + n[None, :]
    return tl.load(place), tl.load(place + N), tl.load(place + 2 * N), tl.load(place + 3 * N)


@triton.jit
def _advance(re, im, low_re, low_im, z_re, z_im, e_re, e_im, EXACT: tl.constexpr):
    """(high + low) z + e. The low parts are worth their registers where products are as fine as they are."""
    next_re, next_im = _times(re, im, z_re, z_im)
    if EXACT:
        more_re, more_im = _times(low_re, low_im, z_re, z_im)
        e_re, e_im = more_re + e_re, more_im + e_im
    return next_re + e_re, next_im + e_im


@triton.jit
def _read(base, row, t, stride, ok):
    """(R, T): the times t of the signals that begin at base + row; zeros where not ok.

    The brackets matter: offsets are then shared by signals that lie alike, where addresses would fill the registers.
    """
    return tl.load(base + (row[:, None] + t * stride), mask=ok, other=0.0)


@triton.jit
def _before(u, row, stride, past, row_p, n_past, t, ok, length, HAS_PAST: tl.constexpr):
    """(R, T): the inputs at times t, which may be negative and are then the past's."""
    x = _read(u, row, t, stride, ok & (t >= 0) & (t < length))
    if HAS_PAST:
        x += _read(past, row_p, t + n_past, 1, ok & (t < 0) & (t + n_past >= 0)).to(x.dtype)
    return x


@triton.jit
def _pairs(base, place, ok):
    return tl.load(base + place, mask=ok, other=0.0), tl.load(base + place + 1, mask=ok, other=0.0)


@triton.jit
def _store_pairs(base, place, re, im, ok):
    tl.store(base + place, re, mask=ok)
    tl.store(base + place + 1, im, mask=ok)


@triton.jit
def _weights(weights, h, n, n_modes):
    place = 2 * (h * n_modes + n)[None, :]
    return _pairs(weights, place, (n < n_modes)[None, :])


@triton.jit
def forward(
    u, pre, post, past, y, first, taps, weights, tables, decay, state, carry,
    rows, groups, span, length, n_modes, n_taps, n_past, n_pre, done,
    su_b, su_h, su_t, sv_b, sv_h, sv_t, sq_b, sq_h, sq_t, sp_b, sp_h, sy_b, sy_h, sy_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_STATE: tl.constexpr, CARRY: tl.constexpr, OUTPUT: tl.constexpr, ALIKE: tl.constexpr, REPEAT: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUTPUT: y. CARRY: the state of every sequence before its token `done`, a multiple of T; without OUTPUT that of every row
    after its `span` tokens, but for the last piece of a sequence, which nobody asks for."""
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    if not OUTPUT:
        ok = ok & (row % groups != groups - 1)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    row_u, row_p = b * su_b, b * sp_b
    row_v, row_q, row_y = row_u, row_u, row_u
    if not ALIKE:
        row_v, row_q, row_y = b * sv_b, b * sq_b, b * sy_b
    if REPEAT:
        row_v = b % n_pre * sv_b
    u, pre, post, past, y = u + h * su_h, pre + h * sv_h, post + h * sq_h, past + h * sp_h, y + h * sy_h
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]

    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    tables += h * 4 * N * T + tl.arange(0, 2 * N)[:, None] * T + s
    into = tl.trans(tl.load(tables))
    on = tl.load(tables + 2 * N * T)
    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)

    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_ok = (row < rows)[:, None] & (n < n_modes)[None, :]
    z_re, z_im = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    if HAS_STATE:
        z_re, z_im = _pairs(state, place, z_ok)
    for c in range(0, span // T):
        if CARRY and OUTPUT:
            out = 2 * ((b * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
            _store_pairs(carry, out, z_re, z_im, z_ok & (start + c * T == done))
        t = start + c * T + s
        here = ok & (t < length)
        now = _read(u, row_u, t, su_t, here)
        if HAS_FIR:
            seen = _before(u, row_u, su_t, past, row_p, n_past, t - T, ok, length, HAS_PAST)
            x = tl.dot(now.to(KIND), near, input_precision=PRECISION)
            x = tl.dot(seen.to(KIND), far, x, input_precision=PRECISION)
        else:
            x = now.to(tl.float32)
        if HAS_PRE:
            x *= _read(pre, row_v, t, sv_t, here).to(tl.float32)
        w = x.to(KIND)
        e_re, e_im = _parts(tl.dot(w, into, input_precision=PRECISION), R, N)
        if OUTPUT:
            a_re, a_im = _times(w_re, w_im, z_re, z_im)
            out = tl.dot(w, kernel, input_precision=PRECISION)
            out = tl.dot(_stacked(a_re, a_im, R, N).to(KIND), on, out, input_precision=PRECISION)
            if HAS_POST:
                out *= _read(post, row_q, t, sq_t, here).to(tl.float32)
            tl.store(y + (row_y[:, None] + t * sy_t), out.to(y.dtype.element_ty), mask=here)
        z_re, z_im = _advance(re, im, low_re, low_im, z_re, z_im, e_re, e_im, KIND == tl.float32)  # noqa: SIM300
    if CARRY and not OUTPUT:
        _store_pairs(carry, place, z_re, z_im, z_ok)


@triton.jit
def scan_groups(
    local, begin, state, end, decay, groups, n_modes, sign,
    N: tl.constexpr, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """z -> lambda^span z + local_g over the pieces of a sequence, from `state`: the z before each, and the z after all.
    `sign` -1 takes conj(lambda), REVERSE goes from the last piece to the first."""
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    ok = n < n_modes
    decay += h * 8 * N + 4 * N + n
    re, im, low_re, low_im = tl.load(decay), sign * tl.load(decay + N), tl.load(decay + 2 * N), sign * tl.load(decay + 3 * N)
    z_re, z_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    whole = 2 * ((b * tl.num_programs(0) + h) * n_modes + n)
    if HAS_STATE:
        z_re, z_im = _pairs(state, whole, ok)
    for i in tl.range(0, groups, num_stages=4):
        g = groups - 1 - i if REVERSE else i
        place = 2 * (((b * groups + g) * tl.num_programs(0) + h) * n_modes + n)
        e_re, e_im = _pairs(local, place, ok)
        _store_pairs(begin, place, z_re, z_im, ok)
        z_re, z_im = _advance(re, im, low_re, low_im, z_re, z_im, e_re, e_im, True)
    if HAS_END:
        _store_pairs(end, whole, z_re, z_im, ok)
