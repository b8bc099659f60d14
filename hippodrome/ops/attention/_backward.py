"""The gradients of attention in Triton; see `_forward.py`."""

import triton
import triton.language as tl

from hippodrome.ops.attention._pairs import LOG2E, chance, hidden, kept, line_of, scores
from hippodrome.ops.attention._walk import _BUTTERFLY, ahead, listed, met, place, real_keys, stretch, walk_keys, walk_queries


@triton.jit
def dot_products(
    y, d_y, d_lse, delta, heads, n_q, width, sy_b, sy_h, sy_t, sd_b, sd_h, sd_t,
    D: tl.constexpr, M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """What every row's weights lose in the backward, sum of d_y y less the gradient of its log-sum-exp."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    at = tl.program_id(0) * M + tl.arange(0, M)
    d_at = tl.arange(0, D)
    here = (at < n_q)[:, None] & (d_at < width)[None, :]
    line = at.to(tl.int64)[:, None]
    x_y = tl.load(y + b * sy_b + h * sy_h + line * sy_t + d_at[None, :], mask=here, other=0.0).to(tl.float32)
    x_d = tl.load(d_y + b * sd_b + h * sd_h + line * sd_t + d_at[None, :], mask=here, other=0.0).to(tl.float32)
    x = tl.sum(x_y * x_d, 1)
    base = row.to(tl.int64) * n_q
    if HAS_LSE:
        x -= tl.load(d_lse + base + at, mask=at < n_q, other=0.0)
    tl.store(delta + base + at, x, mask=at < n_q)


@triton.jit
def gradient_q(
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, d_y, y, lse, delta, d_q, d_bias, part,
    heads, group, n_q, n_k, lse_row, bias_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sd_b, sd_h, sd_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, D_BIAS: tl.constexpr, PER_HEAD: tl.constexpr, XOR: tl.constexpr, EVEN: tl.constexpr,
    DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, or one piece of its sum; on the way those of the bias and, with DELTA, `dot_products`'s:
    y then lies in memory as d_q."""
    tile = tl.program_id(0) if LIST else tl.num_programs(0) - 1 - tl.program_id(0)  # those that meet most come first
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    tile, begin, middle, finish, slot = listed(plan, tile, h, n_plan, LIST, PER_HEAD)
    if tile < 0:  # only in lists
        return
    at, q_0, k_0, n_q, n_k = place(plan, offsets, k_offsets, tile, n_q, n_k, M, PACKED)
    if at >= n_q:  # only in packs
        return
    shift = n_k - n_q
    k_end = real_keys(k_lengths, b, n_k, PADDED)
    q_at = at + tl.arange(0, M)
    q_in = q_at < n_q
    d_at = tl.arange(0, D)
    d_in = d_at < width
    q_pos = q_at + shift
    q = line_of(q, b, h, q_0, sq_b, sq_h, sq_t)
    k = line_of(k, b, h // group, k_0, sk_b, sk_h, sk_t)
    v = line_of(v, b, h // group, k_0, sv_b, sv_h, sv_t)
    d_y = line_of(d_y, b, h, q_0, sd_b, sd_h, sd_t)
    within = q_in[:, None] & d_in[None, :]
    x_q = tl.load(q + q_at[:, None] * sq_t + d_at[None, :], mask=within, other=0.0)
    x_d = tl.load(d_y + q_at[:, None] * sd_t + d_at[None, :], mask=within, other=0.0)
    base = row.to(tl.int64) * lse_row + q_0
    level = tl.load(lse + base + q_at, mask=q_in, other=float("-inf"))
    level = tl.where(level == float("-inf"), 0.0, level) * LOG2E
    if DELTA:
        y = line_of(y, b, h, q_0, so_b, so_h, so_t)
        x_y = tl.load(y + q_at[:, None] * so_t + d_at[None, :], mask=within, other=0.0)
        loss = tl.sum(x_y.to(tl.float32) * x_d.to(tl.float32), 1)
        tl.store(delta + base + q_at, loss, mask=q_in)
    else:
        loss = tl.load(delta + base + q_at, mask=q_in, other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + h)
    key, q_n, k_n = chance(seed, q_0, k_0, DROP)
    if BIAS:
        bias = line_of(bias, b, h, q_0, sb_b, sb_h, sb_q) + k_0.to(tl.int64) * sb_k
    if D_BIAS:
        d_bias += (row.to(tl.int64) * lse_row + q_0) * bias_row + k_0
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY and N <= T else 2
    STEP: tl.constexpr = N // T if LIST and N > T else 1  # several listed tiles, or a share of one
    first, whole, end, last, own, bits = walk_keys(
        at, shift, n_q, n_k, k_end, begin, middle, finish, A, R, T, M, N, CODE, LIST, XOR
    )
    acc = tl.zeros((M, D), tl.float32)
    unmet = bits
    for stage in tl.static_range(STAGES):
        unmet = ahead(unmet, bits, cols, first, last, T, N, CODE, stage, LIST, XOR)
        i_0, i_1 = stretch(first, whole, end, last, stage, LIST)
        for i in tl.range(i_0, i_1, STEP, num_stages=1 if TILED and stage == 1 else None):
            j = i if TILED or stage == 0 else tl.where(i < whole, i, i + (end - whole))
            k_at, there, mask, unmet = met(j, cols, ids, last, unmet, own, 0, T, N, LIST, TABLE and stage == 1, XOR)
            k_in = there & (k_at < k_end)
            EDGE: tl.constexpr = stage == 1 or (TILED and not EVEN)
            load_in = k_in[:, None] & d_in[None, :] if EDGE else d_in[None, :]
            x_k = tl.load(k + k_at[:, None] * sk_t + d_at[None, :], mask=load_in, other=0.0)
            x_v = tl.load(v + k_at[:, None] * sv_t + d_at[None, :], mask=load_in, other=0.0)
            x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
            here = q_in[:, None] & k_in[None, :]
            s, rest = scores(x, q_at[:, None], k_at[None, :], here, q_pos[:, None], bias, slope, scale, cap, sb_q, sb_k, BIAS,
                             SLOPES, CAP)  # fmt: skip
            if EDGE:
                s = hidden(s, k_in[None, :], mask[None, :], q_at[:, None], k_at[None, :], q_pos[:, None], here, table, A, R, T,
                           CODE if stage == 1 else 0, TABLE and stage == 1)  # fmt: skip
            p = tl.exp2(s - level[:, None])
            d_p = tl.dot(x_d, tl.trans(x_v), input_precision=PRECISION)
            if DROP:
                d_p = tl.where(kept(key, q_n + q_at[:, None], k_n + k_at[None, :], row, drop), d_p * (1 / (1 - drop)), 0.0)
            d_s = p * (d_p - loss[:, None])
            if D_BIAS:
                to = d_bias + q_at.to(tl.int64)[:, None] * bias_row + k_at[None, :]
                tl.store(to, d_s, mask=here)
            d_s *= rest
            acc = tl.dot(d_s.to(x_k.dtype), x_k, acc, input_precision=PRECISION)
    acc *= scale
    if slot < 0:
        d_q = line_of(d_q, b, h, q_0, so_b, so_h, so_t)
        tl.store(d_q + q_at[:, None] * so_t + d_at[None, :], acc.to(d_q.dtype.element_ty), mask=within)
    else:
        lane = tl.arange(0, M)
        tl.store(part + ((row.to(tl.int64) * n_slots + slot) * M + lane)[:, None] * D + d_at[None, :], acc)


@triton.jit
def statistics(lse, delta, base, at, there, MASKED: tl.constexpr):
    """Of rows the log-sum-exps in bits, 0 where a row sees nothing, and what their weights lose."""
    level = tl.load(lse + base + at, mask=there, other=float("-inf")) if MASKED else tl.load(lse + base + at)
    level = tl.where(level == float("-inf"), 0.0, level) * LOG2E
    loss = tl.load(delta + base + at, mask=there, other=0.0) if MASKED else tl.load(delta + base + at)
    return level, loss


@triton.jit
def gradient_kv(
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, d_y, lse, delta, d_k, d_v, part,
    heads, group, n_q, n_k, lse_row, bias_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sd_b, sd_h, sd_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, PER_HEAD: tl.constexpr, GROUPED: tl.constexpr, XOR: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, summed over the heads that read them, or one piece of the sum.

    Everything is transposed, keys by queries, since products of transposed accumulators are not to be trusted on this chip.
    With lists that differ between heads, or a sum in pieces, a program takes one head (GROUPED is False).
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    many = heads // group if GROUPED else heads
    b = (row // many).to(tl.int64)
    h_0 = (row % many * (group if GROUPED else 1)).to(tl.int64)
    tile, begin, middle, finish, slot = listed(plan, tile, h_0, n_plan, LIST, PER_HEAD)
    if tile < 0:  # only in lists
        return
    at, q_0, k_0, n_q, n_k = place(plan, offsets, k_offsets, tile, n_q, n_k, N, PACKED)
    if at >= n_k:  # only in packs
        return
    shift = n_k - n_q
    members = group if GROUPED else 1
    k_end = real_keys(k_lengths, b, n_k, PADDED)
    if PADDED:
        members = tl.where(at < k_end, members, 0)
    k_at = at + tl.arange(0, N)
    k_in = k_at < k_end
    d_at = tl.arange(0, D)
    d_in = d_at < width
    within = (k_at < n_k)[:, None] & d_in[None, :]
    k = line_of(k, b, h_0 // group, k_0, sk_b, sk_h, sk_t)
    v = line_of(v, b, h_0 // group, k_0, sv_b, sv_h, sv_t)
    x_k = tl.load(k + k_at[:, None] * sk_t + d_at[None, :], mask=within, other=0.0)
    x_v = tl.load(v + k_at[:, None] * sv_t + d_at[None, :], mask=within, other=0.0)
    key, q_n, k_n = chance(seed, q_0, k_0, DROP)
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY and M <= T else 2
    STEP: tl.constexpr = M // T if LIST and M > T else 1  # several listed tiles, or a share of one
    first, whole, end, last, own, bits = walk_queries(
        at, shift, n_q, n_k, begin, middle, finish, A, R, T, N, M, CODE, LIST, XOR
    )
    sum_k = tl.zeros((N, D), tl.float32)
    sum_v = tl.zeros((N, D), tl.float32)
    for member in range(0, members):
        h = h_0 + member
        line = b * heads + h
        q_h = line_of(q, b, h, q_0, sq_b, sq_h, sq_t)
        d_h = line_of(d_y, b, h, q_0, sd_b, sd_h, sd_t)
        base = line * lse_row + q_0
        slope = 0.0
        if SLOPES:
            slope = tl.load(slopes + h)
        bias_h = bias
        if BIAS:
            bias_h = line_of(bias, b, h, q_0, sb_b, sb_h, sb_q) + k_0.to(tl.int64) * sb_k
        unmet = bits
        for stage in tl.static_range(STAGES):
            unmet = ahead(unmet, bits, cols, first, last, T, M, CODE, stage, LIST, XOR)
            i_0, i_1 = stretch(first, whole, end, last, stage, LIST)
            for i in tl.range(i_0, i_1, STEP, num_stages=1 if TILED and stage == 1 else None):
                j = i if TILED or stage == 0 else tl.where(i < whole, i, i + (end - whole))
                q_at, there, mask, unmet = met(j, cols, ids, last, unmet, own, shift, T, M, LIST, TABLE and stage == 1, XOR)
                q_in = there & (q_at < n_q)
                q_pos = q_at + shift
                EDGE: tl.constexpr = stage == 1 or (TILED and not EVEN)
                load_in = q_in[:, None] & d_in[None, :] if EDGE else d_in[None, :]
                x_q = tl.load(q_h + q_at[:, None] * sq_t + d_at[None, :], mask=load_in, other=0.0)
                x_d = tl.load(d_h + q_at[:, None] * sd_t + d_at[None, :], mask=load_in, other=0.0)
                level, loss = statistics(lse, delta, base, q_at, q_in, EDGE or not TILED)
                x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
                here = k_in[:, None] & q_in[None, :]
                s, rest = scores(x, q_at[None, :], k_at[:, None], here, q_pos[None, :], bias_h, slope, scale, cap, sb_q, sb_k,
                                 BIAS, SLOPES, CAP)  # fmt: skip
                if stage == 1:  # before, what is beyond the last query or key is 0, or in rows that are not stored
                    s = hidden(
                        s, here, mask[None, :], q_at[None, :], k_at[:, None], q_pos[None, :], here, table, A, R, T, CODE, TABLE
                    )
                p = tl.exp2(s - level[None, :])
                d_p = tl.dot(x_v, tl.trans(x_d), input_precision=PRECISION)
                dropped = p
                if DROP:
                    keep = kept(key, q_n + q_at[None, :], k_n + k_at[:, None], line.to(tl.int32), drop)
                    dropped = tl.where(keep, p * (1 / (1 - drop)), 0.0)
                    d_p = tl.where(keep, d_p * (1 / (1 - drop)), 0.0)
                sum_v = tl.dot(dropped.to(x_d.dtype), x_d, sum_v, input_precision=PRECISION)
                d_s = p * (d_p - loss[None, :]) * rest
                sum_k = tl.dot(d_s.to(x_q.dtype), x_q, sum_k, input_precision=PRECISION)
    sum_k *= scale
    if PADDED:
        sum_k = tl.where(k_in[:, None], sum_k, 0.0)
        sum_v = tl.where(k_in[:, None], sum_v, 0.0)
    if slot < 0:
        to = b * so_b + (row % many).to(tl.int64) * so_h + (k_0 + k_at.to(tl.int64))[:, None] * so_t + d_at[None, :]
        tl.store(d_k + to, sum_k.to(d_k.dtype.element_ty), mask=within)
        tl.store(d_v + to, sum_v.to(d_v.dtype.element_ty), mask=within)
    else:
        lane = tl.arange(0, N)
        to = (((row.to(tl.int64) * n_slots + slot) * 2) * N + lane)[:, None] * D + d_at[None, :]
        tl.store(part + to, sum_k)
        tl.store(part + to + N * D, sum_v)


@triton.jit
def total(
    joins, part, out, heads, n, width, n_joins, n_slots, stride, offset, so_b, so_h, so_t,
    D: tl.constexpr, M: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Sums of the pieces of gradients, in the order of the pieces. A slot is `stride` rows long and ours begin at `offset`."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    join = joins + (tl.program_id(0) + (h * n_joins if PER_HEAD else 0)) * 3
    tile = tl.load(join)
    if tile < 0:
        return
    lane = tl.arange(0, M)
    d_at = tl.arange(0, D)
    acc = tl.zeros((M, D), tl.float32)
    for slot in range(tl.load(join + 1), tl.load(join + 2)):
        base = (row.to(tl.int64) * n_slots + slot) * stride + offset + lane
        acc += tl.load(part + base[:, None] * D + d_at[None, :])
    at = tile * M + lane
    here = (at < n)[:, None] & (d_at < width)[None, :]
    to = b * so_b + h * so_h + at.to(tl.int64)[:, None] * so_t + d_at[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=here)
