"""Triton programs of `diagonal_ssm`: a state passed between chunks of T tokens, in T x T tensor-core products.

A program owns one channel and R rows and walks along them a chunk of T tokens at a time, the states in registers. A row is a
sequence or, where there are too few of those, one of `groups` pieces of `span` tokens: then a first pass finds what each
piece adds to the state, a scan over the pieces where each begins, and all pieces run at once. With w = pre * FIR(u), z the
state before a chunk and K the first T taps of the kernel, the skip in the first:

    y = post * (w Toeplitz(K) + (weights z) . lambda^(t+1)),      z' = lambda^T z + sum_s lambda^(T-1-s) w_s

The backward walks forward once, which leaves the states before the chunks in scratch, and back with the adjoint g:

    dw = dy' Toeplitz(K)^T + g . conj(lambda^(T-1-s)),      g' = conj(lambda^T) g + conj(weights) sum_t conj(lambda^(t+1)) dy'_t

Gradients of modes and weights are sums of elementwise products of states and adjoints, which stay in registers; those of the
taps within a chunk are the diagonals of one T x T product. The backward of the FIR, which knows no order, is a kernel of its
own. No atomics.

In the products with tables the moving operand is in registers and the table in shared memory, which so is written once and
needs no fence. The real and imaginary part of a mode lie eight columns apart: a thread has both at hand.

Two bugs of compilers shape this. Triton before 3.7.1 can miscompile a product whose first operand is a transposed
accumulator: here what is transposed was loaded. ptxas 12.8 spoiled a backward of one kernel, which needed more registers than
there are.
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
    """Of modes n of channel h: the logarithm's real part, its phase in units of 2^-32 turns, and its phase in float64."""
    real = n < n_modes
    re = tl.load(log_modes + 2 * (h * n_modes + n), mask=real, other=0.0)
    im = tl.load(log_modes + 2 * (h * n_modes + n) + 1, mask=real, other=0.0).to(tl.float64)
    turns = im * 0.15915494309189535
    turns = ((turns - tl.floor(turns + 0.5)) * 4294967296.0).to(tl.int64).to(tl.int32)
    return re, turns, im


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
    """The tables of a channel.

    first (H, T) fp32: the taps of the kernel within a chunk. decay (H, 2, 4, N) fp32: lambda^T and, if there are PIECES,
    lambda^span, as high and low pairs; the low pair of lambda^T only where it is EXACT. tables (H, 2 or 4, 2N, T), in the
    dtype of products, a mode's real parts eight rows before its imaginary ones: lambda^(T-1-s), conj(lambda^(t+1)), and for
    the backward the same times their exponents.
    """
    h = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    keep = (n < n_modes)[:, None]
    log_re, turns, log_im64 = _modes(log_modes, h, n, n_modes)
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
        re_high, im_high, re_low, im_low = _exact(log_re.to(tl.float64), log_im64, T + 0.0 * log_im64)
        _store_power(place, re_high, im_high, re_low, im_low, n < n_modes, N)
    else:
        re_high, im_high = _power(log_re, turns, T + 0 * turns)
        _store_power(place, re_high, im_high, 0.0 * re_high, 0.0 * im_high, n < n_modes, N)
    if PIECES:
        re_high, im_high, re_low, im_low = _exact(log_re.to(tl.float64), log_im64, span + 0.0 * log_im64)
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
def _paired(x, R: tl.constexpr, N: tl.constexpr):
    """x (R, N) -> (R / 2, N): rows eight apart summed, which one thread has at hand."""
    top, bottom = tl.split(tl.permute(tl.reshape(x, (R // 16, 2, 8, N)), (0, 2, 3, 1)))
    return tl.reshape(top + bottom, (R // 2, N))


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
    u, pre, post, past, y, first, taps, weights, tables, decay, state, carry, states,
    rows, groups, span, length, n_modes, n_taps, n_past, done,
    su_b, su_h, su_t, sv_b, sv_h, sv_t, sq_b, sq_h, sq_t, sp_b, sp_h, sy_b, sy_h, sy_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_PAST: tl.constexpr,
    HAS_STATE: tl.constexpr, CARRY: tl.constexpr, OUTPUT: tl.constexpr, TRACE: tl.constexpr, ALIKE: tl.constexpr,
    COUNT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUTPUT: y. CARRY: the state of every row after its `span` tokens, or with OUTPUT of every sequence before its token
    `done`, a multiple of T. TRACE: the state before every chunk, states (H, tiles, span / T, R, 2N) in the dtype of products,
    and FIR(u) as y."""
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    row_u, row_p = b * su_b, b * sp_b
    row_v, row_q, row_y = row_u, row_u, row_u
    if not ALIKE:
        row_v, row_q, row_y = b * sv_b, b * sq_b, b * sy_b
    u, pre, post, past, y = u + h * su_h, pre + h * sv_h, post + h * sq_h, past + h * sp_h, y + h * sy_h
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]

    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    tables += h * COUNT * 2 * N * T + tl.arange(0, 2 * N)[:, None] * T + s
    into = tl.trans(tl.load(tables))
    on = tl.load(tables + 2 * N * T)
    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)

    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_ok = ok & (n < n_modes)[None, :]
    z_re, z_im = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    if HAS_STATE:
        z_re, z_im = _pairs(state, place, z_ok)
    tile = h * tl.num_programs(1) + tl.program_id(1)
    states += tile * (span // T) * 2 * N * R + tl.arange(0, R)[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :]
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
        if TRACE:
            tl.store(states + c * 2 * N * R, _stacked(z_re, z_im, R, N).to(KIND))
            if HAS_FIR:
                tl.store(y + (row_y[:, None] + t * sy_t), x.to(y.dtype.element_ty), mask=here)
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
def adjoints(
    dy, post, weights, tables, decay, dcarry, out, rows, groups, span, length, n_modes, done,
    sd_b, sd_h, sd_t, sq_b, sq_h, sq_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_POST: tl.constexpr, HAS_CARRY: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of every row, and with HAS_CARRY the state before token `done`, ask of the state before the row."""
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]
    on = tl.trans(tl.load(tables + h * 8 * N * T + 2 * N * T + tl.arange(0, 2 * N)[:, None] * T + s))
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)
    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    whole = 2 * ((b * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_ok = ok & (n < n_modes)[None, :]
    g_re, g_im = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    for i in range(0, span // T):
        token = span - T - i * T
        t = start + token + s
        here = ok & (t < length)
        d = _read(dy + h * sd_h, b * sd_b, t, sd_t, here)
        if HAS_POST:
            d = d.to(tl.float32) * _read(post + h * sq_h, b * sq_b, t, sq_t, here).to(tl.float32)
        o_re, o_im = _parts(tl.dot(d.to(KIND), on, input_precision=PRECISION), R, N)
        o_re, o_im = _conj_times(w_re, w_im, o_re, o_im)
        g_re, g_im = _advance(re, -im, low_re, -low_im, g_re, g_im, o_re, o_im, KIND == tl.float32)  # noqa: SIM300
        if HAS_CARRY:
            more_re, more_im = _pairs(dcarry, whole, z_ok & (start + token == done))
            g_re, g_im = g_re + more_re, g_im + more_im
    _store_pairs(out, place, g_re, g_im, z_ok)


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


@triton.jit
def _sum_diagonals(x, scratch, T: tl.constexpr):
    """x (T, T), row s and column t -> (T,): the sums of x[s, t] over (t - s) mod T = 0 ... T-1, through scratch."""
    s, t = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    tl.debug_barrier()
    tl.store(scratch + s * T + (t - s + T) % T, x)
    tl.debug_barrier()
    return tl.sum(tl.load(scratch + s * T + t), 0)


@triton.jit
def backward(
    dy, x, pre, post, dx, dpre, dpost, first, weights, tables, decay, states, adjoint, dcarry, dstate, scratch, dfirst, dmodes,
    rows, groups, span, length, n_modes, done,
    sd_b, sd_h, sd_t, sx_b, sx_h, sx_t, sv_b, sv_h, sv_t, sq_b, sq_h, sq_t,
    sdx_b, sdx_h, sdx_t, sdv_b, sdv_h, sdv_t, sdq_b, sdq_h, sdq_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_ADJOINT: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_DSTATE: tl.constexpr,
    ALIKE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of x = FIR(u), pre, post and state, and one part of those of the parameters a program.

    states as `forward` traced them; adjoint (rows, H, N, 2) after every row. scratch (H, tiles, T, T) fp32 is this program's
    own. dfirst (H, tiles, T): the taps within a chunk. dmodes (H, tiles, 4, N): log_modes and weights but for what those taps
    give them.
    """
    h = tl.program_id(0).to(tl.int64)
    tile = h * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    n_chunks = span // T
    row_x = b * sx_b
    row_d, row_v, row_q, row_dx, row_dv, row_dq = row_x, row_x, row_x, row_x, row_x, row_x
    if not ALIKE:
        row_d, row_v, row_q, row_dx, row_dv, row_dq = b * sd_b, b * sv_b, b * sq_b, b * sdx_b, b * sdv_b, b * sdq_b
    dy, x, pre, post = dy + h * sd_h, x + h * sx_h, pre + h * sv_h, post + h * sq_h
    dx, dpre, dpost = dx + h * sdx_h, dpre + h * sdv_h, dpost + h * sdq_h
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]
    states += tile * n_chunks * 2 * N * R + tl.arange(0, R)[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :]

    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    tables += h * 8 * N * T + tl.arange(0, 2 * N)[:, None] * T + s
    into, on = tl.load(tables), tl.load(tables + 2 * N * T)
    into_by, on_by = tl.trans(tl.load(tables + 4 * N * T)), tl.trans(tl.load(tables + 6 * N * T))
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)

    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    whole = 2 * ((b * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_ok = ok & (n < n_modes)[None, :]
    log_re, log_im = tl.zeros([R // 2, N], tl.float32), tl.zeros([R // 2, N], tl.float32)
    dw_re, dw_im = tl.zeros([R // 2, N], tl.float32), tl.zeros([R // 2, N], tl.float32)
    d_kernel = tl.zeros([T, T], tl.float32)
    g_re, g_im = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    if HAS_ADJOINT:
        g_re, g_im = _pairs(adjoint, place, z_ok)
    for i in range(0, n_chunks):
        c = n_chunks - 1 - i
        t = start + c * T + s
        here = ok & (t < length)
        u = _read(x, row_x, t, sx_t, here)
        if HAS_PRE:
            v = _read(pre, row_v, t, sv_t, here)
            w = (u.to(tl.float32) * v.to(tl.float32)).to(KIND)
        else:
            w = u.to(KIND)
        s_re, s_im = _parts(tl.load(states + c * 2 * N * R).to(tl.float32), R, N)
        d = _read(dy, row_d, t, sd_t, here)
        if HAS_POST:
            p_re, p_im = _times(w_re, w_im, s_re, s_im)
            out = tl.dot(w, kernel, input_precision=PRECISION)
            out = tl.dot(_stacked(p_re, p_im, R, N).to(KIND), on, out, input_precision=PRECISION)
            out *= d.to(tl.float32)
            tl.store(dpost + (row_dq[:, None] + t * sdq_t), out.to(dpost.dtype.element_ty), mask=here)
            d = d.to(tl.float32) * _read(post, row_q, t, sq_t, here).to(tl.float32)
        d = d.to(KIND)
        # Row t, column s. What is transposed was loaded.
        d_kernel = tl.dot(tl.trans(d), w, d_kernel, input_precision=PRECISION)

        # What needs the adjoint after the chunk.
        m_re, m_im = _parts(tl.dot(w, into_by, input_precision=PRECISION), R, N)
        k_re, k_im = _times(re, im, s_re, s_im)
        m_re, m_im = _conj_times(m_re + T * k_re, m_im + T * k_im, g_re, g_im)
        log_re += _paired(m_re, R, N)
        log_im += _paired(m_im, R, N)
        out = tl.dot(d, tl.trans(kernel), input_precision=PRECISION)
        out = tl.dot(_stacked(g_re, g_im, R, N).to(KIND), into, out, input_precision=PRECISION)
        if HAS_PRE:
            tl.store(dpre + (row_dv[:, None] + t * sdv_t), (out * u.to(tl.float32)).to(dpre.dtype.element_ty), mask=here)
            out *= v.to(tl.float32)
        tl.store(dx + (row_dx[:, None] + t * sdx_t), out.to(dx.dtype.element_ty), mask=here)

        # What needs the state before it.
        m_re, m_im = _parts(tl.dot(d, on_by, input_precision=PRECISION), R, N)
        p_re, p_im = _times(w_re, w_im, s_re, s_im)
        m_re, m_im = _conj_times(p_re, p_im, m_re, m_im)
        log_re += _paired(m_re, R, N)
        log_im += _paired(m_im, R, N)
        o_re, o_im = _parts(tl.dot(d, tl.trans(on), input_precision=PRECISION), R, N)
        m_re, m_im = _conj_times(s_re, s_im, o_re, o_im)
        dw_re += _paired(m_re, R, N)
        dw_im += _paired(m_im, R, N)
        o_re, o_im = _conj_times(w_re, w_im, o_re, o_im)
        g_re, g_im = _advance(re, -im, low_re, -low_im, g_re, g_im, o_re, o_im, KIND == tl.float32)  # noqa: SIM300
        if HAS_CARRY:
            more_re, more_im = _pairs(dcarry, whole, z_ok & (start + c * T == done))
            g_re, g_im = g_re + more_re, g_im + more_im

    if HAS_DSTATE:
        _store_pairs(dstate, place, g_re, g_im, z_ok)
    out = dmodes + tile * 4 * N + n
    tl.store(out, tl.sum(log_re, 0))
    tl.store(out + N, tl.sum(log_im, 0))
    tl.store(out + 2 * N, tl.sum(dw_re, 0))
    tl.store(out + 3 * N, tl.sum(dw_im, 0))
    lower = tl.arange(0, T)[:, None] <= s
    taps = _sum_diagonals(tl.where(lower, tl.trans(d_kernel), 0.0), scratch + tile * T * T, T)
    tl.store(dfirst + tile * T + tl.arange(0, T), taps)


@triton.jit
def filter_backward(
    u, past, dx, du, taps, scratch, dtaps, batch, n_chunks, length, n_taps, n_past, n_tiles,
    su_b, su_h, su_t, sp_b, sp_h, sdx_b, sdx_h, sdx_t, sdu_b, sdu_h, sdu_t,
    R: tl.constexpr, T: tl.constexpr, HAS_PAST: tl.constexpr, ALIKE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du from the gradient dx of FIR(u), and one part a program of the gradient of the taps, dtaps (H, parts, T).

    A row is any chunk of any sequence. scratch (H, parts, T, T) fp32 is this program's own.
    """
    h = tl.program_id(0).to(tl.int64)
    part = h * tl.num_programs(1) + tl.program_id(1)
    u, past, dx, du = u + h * su_h, past + h * sp_h, dx + h * sdx_h, du + h * sdu_h
    s = tl.arange(0, T)[None, :]
    near = tl.trans(_toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND))
    far = tl.trans(_toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND))
    d_near, d_far = tl.zeros([T, T], tl.float32), tl.zeros([T, T], tl.float32)
    for i in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        row = i * R + tl.arange(0, R)
        b = (row // n_chunks).to(tl.int64)
        ok = (b < batch)[:, None]
        t = (row % n_chunks * T)[:, None] + s
        row_u = b * su_b
        row_dx, row_du = row_u, row_u
        if not ALIKE:
            row_dx, row_du = b * sdx_b, b * sdu_b
        here = ok & (t < length)
        now = _read(u, row_u, t, su_t, here).to(KIND)
        seen = _before(u, row_u, su_t, past, b * sp_b, n_past, t - T, ok, length, HAS_PAST).to(KIND)
        r = _read(dx, row_dx, t, sdx_t, here).to(KIND)
        later = _read(dx, row_dx, t + T, sdx_t, ok & (t + T < length)).to(KIND)
        out = tl.dot(r, near, input_precision=PRECISION)
        out = tl.dot(later, far, out, input_precision=PRECISION)
        d_near = tl.dot(tl.trans(now), r, d_near, input_precision=PRECISION)
        d_far = tl.dot(tl.trans(seen), r, d_far, input_precision=PRECISION)
        tl.store(du + (row_du[:, None] + t * sdu_t), out.to(du.dtype.element_ty), mask=here)
    lower = tl.arange(0, T)[:, None] <= s
    tl.store(dtaps + part * T + tl.arange(0, T), _sum_diagonals(tl.where(lower, d_near, d_far), scratch + part * T * T, T))


@triton.jit
def finish(
    log_modes, weights, dfirst, dtaps, dmodes, out_modes, out_weights, out_skip, out_taps, n_modes, n_taps, n_parts, n_tiles,
    T: tl.constexpr, N: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_FIR: tl.constexpr,
):  # fmt: skip
    """Gradients of a channel's parameters from the sums of its programs."""
    h = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    tap, fir = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
    log_re, log_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    dw_re, dw_im = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    if HAS_FIR:
        for i in range(0, n_parts):
            fir += tl.load(dtaps + (h * n_parts + i) * T + t)
    for i in range(0, n_tiles):
        tile = h * n_tiles + i
        tap += tl.load(dfirst + tile * T + t)
        place = dmodes + tile * 4 * N + n
        log_re += tl.load(place)
        log_im += tl.load(place + N)
        dw_re += tl.load(place + 2 * N)
        dw_im += tl.load(place + 3 * N)

    re, turns, _ = _modes(log_modes, h, n, n_modes)
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
