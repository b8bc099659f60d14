"""Triton programs of the gradients of `diagonal_ssm`. What rows, chunks and tables are says `_kernels.py`.

`trace` walks forward as `forward` does and leaves w and the state before every chunk; the gradient of post falls off on the
way. `sweep` walks back with the adjoint g of the state, where dy' = post * dy:

    dw = dy' Toeplitz(K)^T + g . conj(lambda^(T-1-s)),      g' = conj(lambda^T) g + conj(weights) sum_t conj(lambda^(t+1)) dy'_t

Gradients of modes and weights are sums of elementwise products of states and adjoints, which stay in registers; those of the
taps within a chunk are the diagonals of one T x T product. `spread` takes dw on through pre and the FIR, for which the order of
chunks does not matter. Sums over programs are made by `finish`: no atomics.

Why three passes: what fills the registers are T x T sums. With all of them in one program, or with post's gradient in `sweep`,
only one program fits on a multiprocessor and nothing hides the latency of its products.

Two bugs of compilers shape this. Triton before 3.7.1 can miscompile a product whose first operand is a transposed
accumulator: here what is transposed was loaded. ptxas 12.8 spoiled a backward of one kernel, which needed more registers than
there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippodrome.ops.diagonal_ssm._kernels import (
    _advance,
    _before,
    _conj_times,
    _decay,
    _modes,
    _pairs,
    _parts,
    _power,
    _read,
    _stacked,
    _store_pairs,
    _times,
    _toeplitz,
    _weights,
)


@triton.jit
def _paired(x, R: tl.constexpr, N: tl.constexpr):
    """x (R, N) -> (R / 2, N): rows eight apart summed, which one thread has at hand."""
    top, bottom = tl.split(tl.permute(tl.reshape(x, (R // 16, 2, 8, N)), (0, 2, 3, 1)))
    return tl.reshape(top + bottom, (R // 2, N))


@triton.jit
def adjoints(
    dy, post, weights, tables, decay, dcarry, out, rows, groups, span, length, n_modes, done,
    sd_b, sd_h, sd_t, sq_b, sq_h, sq_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_POST: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_STATE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of every row, and with HAS_CARRY the state before token `done`, ask of the state before the row. That of
    a sequence's first piece is asked for only if it HAS_STATE."""
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    if not HAS_STATE:
        ok = ok & (row % groups != 0)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]
    on = tl.trans(tl.load(tables + h * 8 * N * T + 2 * N * T + tl.arange(0, 2 * N)[:, None] * T + s))
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)
    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    whole = 2 * ((b * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_ok = (row < rows)[:, None] & (n < n_modes)[None, :]
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
def _sum_diagonals(x, scratch, T: tl.constexpr):
    """x (T, T), row s and column t -> (T,): the sums of x[s, t] over (t - s) mod T = 0 ... T-1, through scratch."""
    s, t = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    tl.debug_barrier()
    tl.store(scratch + s * T + (t - s + T) % T, x)
    tl.debug_barrier()
    return tl.sum(tl.load(scratch + s * T + t), 0)


@triton.jit
def trace(
    u, past, pre, dy, w, dpost, first, taps, weights, tables, decay, begin, states,
    rows, groups, span, length, n_modes, n_taps, n_past, n_pre,
    su_b, su_h, su_t, sp_b, sp_h, sv_b, sv_h, sv_t, sd_b, sd_h, sd_t, sw_b, sw_h, sw_t, sdq_b, sdq_h, sdq_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BEGIN: tl.constexpr,
    ALIKE: tl.constexpr, REPEAT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, states (H, tiles, span / T, R, 2N) in the dtype of products; w unless it is u; dpost."""
    h = tl.program_id(0).to(tl.int64)
    tile = h * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = (row < rows)[:, None]
    b = (row // groups).to(tl.int64)
    start = (row % groups * span)[:, None]
    row_u, row_p = b * su_b, b * sp_b
    row_v, row_d, row_w, row_dq = row_u, row_u, row_u, row_u
    if not ALIKE:
        row_v, row_d, row_w, row_dq = b * sv_b, b * sd_b, b * sw_b, b * sdq_b
    if REPEAT:
        row_v = b % n_pre * sv_b
    u, past, pre, dy = u + h * su_h, past + h * sp_h, pre + h * sv_h, dy + h * sd_h
    w, dpost = w + h * sw_h, dpost + h * sdq_h
    n, s = tl.arange(0, N), tl.arange(0, T)[None, :]

    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    tables += h * 8 * N * T + tl.arange(0, 2 * N)[:, None] * T + s
    into = tl.trans(tl.load(tables))
    on = tl.load(tables + 2 * N * T)
    kernel = _toeplitz(first + h * T, T, 0, T).to(KIND)
    w_re, w_im = _weights(weights, h, n, n_modes)
    re, im, low_re, low_im = _decay(decay + h * 8 * N, n, N)

    place = 2 * ((row.to(tl.int64) * tl.num_programs(0) + h)[:, None] * n_modes + n[None, :])
    z_re, z_im = tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32)
    if HAS_BEGIN:
        z_re, z_im = _pairs(begin, place, ok & (n < n_modes)[None, :])
    states += tile * (span // T) * 2 * N * R + tl.arange(0, R)[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :]
    for c in range(0, span // T):
        t = start + c * T + s
        here = ok & (t < length)
        now = _read(u, row_u, t, su_t, here)
        tl.store(states + c * 2 * N * R, _stacked(z_re, z_im, R, N).to(KIND))
        if HAS_FIR:
            seen = _before(u, row_u, su_t, past, row_p, n_past, t - T, ok, length, HAS_PAST)
            x = tl.dot(now.to(KIND), near, input_precision=PRECISION)
            x = tl.dot(seen.to(KIND), far, x, input_precision=PRECISION)
        else:
            x = now.to(tl.float32)
        if HAS_PRE:
            x *= _read(pre, row_v, t, sv_t, here).to(tl.float32)
        x = x.to(KIND)
        if HAS_FIR or HAS_PRE:
            tl.store(w + (row_w[:, None] + t * sw_t), x.to(w.dtype.element_ty), mask=here)
        if HAS_POST:
            a_re, a_im = _times(w_re, w_im, z_re, z_im)
            out = tl.dot(x, kernel, input_precision=PRECISION)
            out = tl.dot(_stacked(a_re, a_im, R, N).to(KIND), on, out, input_precision=PRECISION)
            out *= _read(dy, row_d, t, sd_t, here).to(tl.float32)
            tl.store(dpost + (row_dq[:, None] + t * sdq_t), out.to(dpost.dtype.element_ty), mask=here)
        e_re, e_im = _parts(tl.dot(x, into, input_precision=PRECISION), R, N)
        z_re, z_im = _advance(re, im, low_re, low_im, z_re, z_im, e_re, e_im, KIND == tl.float32)  # noqa: SIM300


@triton.jit
def sweep(
    dy, w, post, dw, first, weights, tables, decay, states, adjoint, dcarry, dstate, scratch, dfirst, dmodes,
    rows, groups, span, length, n_modes, done,
    sd_b, sd_h, sd_t, sw_b, sw_h, sw_t, sq_b, sq_h, sq_t, sdw_b, sdw_h, sdw_t,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
    HAS_POST: tl.constexpr, HAS_ADJOINT: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_DSTATE: tl.constexpr,
    ALIKE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of w and of the state, and one part of those of the parameters a program.

    w and states as `trace` left them; adjoint (rows, H, N, 2) after every row. scratch (H, tiles, T, T) fp32 is this program's
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
    row_w = b * sw_b
    row_d, row_q, row_dw = row_w, row_w, row_w
    if not ALIKE:
        row_d, row_q, row_dw = b * sd_b, b * sq_b, b * sdw_b
    dy, w, post, dw = dy + h * sd_h, w + h * sw_h, post + h * sq_h, dw + h * sdw_h
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
        x = _read(w, row_w, t, sw_t, here).to(KIND)
        d = _read(dy, row_d, t, sd_t, here)
        if HAS_POST:
            d = d.to(tl.float32) * _read(post, row_q, t, sq_t, here).to(tl.float32)
        d = d.to(KIND)
        # Row t, column s. What is transposed was loaded.
        d_kernel = tl.dot(tl.trans(d), x, d_kernel, input_precision=PRECISION)
        s_re, s_im = _parts(tl.load(states + c * 2 * N * R).to(tl.float32), R, N)

        # What needs the adjoint after the chunk.
        m_re, m_im = _parts(tl.dot(x, into_by, input_precision=PRECISION), R, N)
        k_re, k_im = _times(re, im, s_re, s_im)
        m_re, m_im = _conj_times(m_re + T * k_re, m_im + T * k_im, g_re, g_im)
        log_re += _paired(m_re, R, N)
        log_im += _paired(m_im, R, N)
        out = tl.dot(d, tl.trans(kernel), input_precision=PRECISION)
        out = tl.dot(_stacked(g_re, g_im, R, N).to(KIND), into, out, input_precision=PRECISION)
        tl.store(dw + (row_dw[:, None] + t * sdw_t), out.to(dw.dtype.element_ty), mask=here)

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
def spread(
    u, past, pre, dw, du, dpre, taps, scratch, dtaps, batch, n_chunks, length, n_taps, n_past, n_pre, n_tiles,
    su_b, su_h, su_t, sp_b, sp_h, sv_b, sv_h, sv_t, sdw_b, sdw_h, sdw_t, sdu_b, sdu_h, sdu_t, sdv_b, sdv_h, sdv_t,
    R: tl.constexpr, T: tl.constexpr, HAS_FIR: tl.constexpr, HAS_PRE: tl.constexpr, HAS_PAST: tl.constexpr,
    ALIKE: tl.constexpr, REPEAT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient dw of w = pre * FIR(u) those of pre and u, and of that of the taps one part a program, (H, parts, T).

    A row is any chunk of any sequence. scratch (H, parts, T, T) fp32 is this program's own.
    """
    h = tl.program_id(0).to(tl.int64)
    part = h * tl.num_programs(1) + tl.program_id(1)
    u, past, dw, du = u + h * su_h, past + h * sp_h, dw + h * sdw_h, du + h * sdu_h
    pre, dpre = pre + h * sv_h, dpre + h * sdv_h
    s = tl.arange(0, T)[None, :]
    near = tl.zeros([T, T], KIND)
    far = tl.zeros([T, T], KIND)
    if HAS_FIR:
        near = _toeplitz(taps + h * n_taps, n_taps, 0, T).to(KIND)
        far = _toeplitz(taps + h * n_taps, n_taps, T, T).to(KIND)
    d_near, d_far = tl.zeros([T, T], tl.float32), tl.zeros([T, T], tl.float32)
    for i in range(tl.program_id(1), n_tiles, tl.num_programs(1)):
        row = i * R + tl.arange(0, R)
        b = (row // n_chunks).to(tl.int64)
        ok = (b < batch)[:, None]
        t = (row % n_chunks * T)[:, None] + s
        here, next_here = ok & (t < length), ok & (t + T < length)
        row_u = b * su_b
        row_v, row_dw, row_du, row_dv = row_u, row_u, row_u, row_u
        if not ALIKE:
            row_v, row_dw, row_du, row_dv = b * sv_b, b * sdw_b, b * sdu_b, b * sdv_b
        if REPEAT:
            row_v = b % n_pre * sv_b
        x = _read(u, row_u, t, su_t, here)
        r = _read(dw, row_dw, t, sdw_t, here)
        if HAS_FIR:
            now = x.to(KIND)
            seen = _before(u, row_u, su_t, past, b * sp_b, n_past, t - T, ok, length, HAS_PAST).to(KIND)
            later = _read(dw, row_dw, t + T, sdw_t, next_here)
            if HAS_PRE:
                x = tl.dot(now, near, input_precision=PRECISION)
                x = tl.dot(seen, far, x, input_precision=PRECISION)
                later = later.to(tl.float32) * _read(pre, row_v, t + T, sv_t, next_here).to(tl.float32)
        if HAS_PRE:
            dv = x.to(tl.float32) * r.to(tl.float32)
            tl.store(dpre + (row_dv[:, None] + t * sdv_t), dv.to(dpre.dtype.element_ty), mask=here)
            r = r.to(tl.float32) * _read(pre, row_v, t, sv_t, here).to(tl.float32)
        out = r
        if HAS_FIR:
            r, later = r.to(KIND), later.to(KIND)
            out = tl.dot(r, tl.trans(near), input_precision=PRECISION)
            out = tl.dot(later, tl.trans(far), out, input_precision=PRECISION)
            d_near = tl.dot(tl.trans(now), r, d_near, input_precision=PRECISION)
            d_far = tl.dot(tl.trans(seen), r, d_far, input_precision=PRECISION)
        tl.store(du + (row_du[:, None] + t * sdu_t), out.to(du.dtype.element_ty), mask=here)
    if HAS_FIR:
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

    re, _, turns = _modes(log_modes, h, n, n_modes)
    p_re, p_im = _power(re.to(tl.float32)[:, None], turns[:, None], t[None, :])
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
