"""attention in Triton: tiles of queries against tiles of keys, with an online softmax; the backward makes the weights again.

A program owns a tile of M queries (`forward`, `gradient_q`) or of N keys (`gradient_kv`) and walks over the tiles of the other
side that it meets. Which they are follows from a few integers (CODE: an interval, with the part of it that is wholly visible;
or a flat butterfly, XOR, whose tiles differ from a program's own in one bit of their number) or from a list (LIST: tiles of T,
kept once). Of a butterfly and of lists several small tiles are gathered into one step. Only tiles on an edge pay for a
predicate; of lists and butterflies, any tile may be one unless tiles divide the length (EVEN). Statistics and sums are float32
and exponentials base 2; every sum has one owner and one order, so that two runs give the same bits. Where one row is much
longer than the others it is cut, and `merge` or `total` joins the pieces in their order.

The loop over partly visible tiles of lists and butterflies is not pipelined. It is short, and with it pipelined causal BigBird
in tiles of 64 was wrong on an H100 (Triton 3.6.0) from lists that are right and in the interpreter give the right values.
"""

import triton
import triton.language as tl

from hippodrome.ops.attention._pairs import LN2, LOG2E, chance, hidden, kept, line_of, scores
from hippodrome.ops.attention._walk import _BUTTERFLY, ahead, listed, met, place, real_keys, stretch, walk_keys


@triton.jit
def forward(
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, out, lse, part, part_lse,
    heads, group, n_q, n_k, lse_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, SPLIT: tl.constexpr, PER_HEAD: tl.constexpr, XOR: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps of a tile of queries, or of one piece of its keys."""
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
    x_q = tl.load(q + q_at[:, None] * sq_t + d_at[None, :], mask=q_in[:, None] & d_in[None, :], other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + h)
    key, q_n, k_n = chance(seed, q_0, k_0, DROP)
    if BIAS:
        bias = line_of(bias, b, h, q_0, sb_b, sb_h, sb_q) + k_0.to(tl.int64) * sb_k
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY and N <= T else 2
    STEP: tl.constexpr = N // T if LIST and N > T else 1  # several listed tiles, or a share of one
    first, whole, end, last, own, bits = walk_keys(
        at, shift, n_q, n_k, k_end, begin, middle, finish, A, R, T, M, N, CODE, LIST, XOR
    )
    if SPLIT:
        split = tl.program_id(2)
        pieces = tl.num_programs(2)
        slot = tile * pieces + split
        size = tl.cdiv(last - first, pieces)
        left = first + split * size
        right = tl.minimum(left + size, last)
        first = left
        last = tl.maximum(right, left)
        whole = tl.minimum(tl.maximum(whole, first), last)
        end = tl.minimum(tl.maximum(end, whole), last)
    top = tl.full((M,), float("-inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
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
            PLAIN: tl.constexpr = not (BIAS or SLOPES or CAP or EDGE)
            if PLAIN:
                rise = tl.maximum(top, tl.max(x, 1) * (scale * LOG2E))
                p = tl.exp2(x * (scale * LOG2E) - rise[:, None])
                fade = tl.exp2(top - rise)
            else:
                s, _ = scores(x, q_at[:, None], k_at[None, :], here, q_pos[:, None], bias, slope, scale, cap, sb_q, sb_k,
                              BIAS, SLOPES, CAP)  # fmt: skip
                if EDGE:
                    s = hidden(s, k_in[None, :], mask[None, :], q_at[:, None], k_at[None, :], q_pos[:, None], here, table,
                               A, R, T, CODE if stage == 1 else 0, TABLE and stage == 1)  # fmt: skip
                rise = tl.maximum(top, tl.max(s, 1))
                level = tl.where(rise == float("-inf"), 0.0, rise)
                p = tl.exp2(s - level[:, None])
                fade = tl.exp2(top - level)
            mass = mass * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            if DROP:
                p = tl.where(kept(key, q_n + q_at[:, None], k_n + k_at[None, :], row, drop), p * (1 / (1 - drop)), 0.0)
            acc = tl.dot(p.to(x_v.dtype), x_v, acc, input_precision=PRECISION)
            top = rise
    y = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    total_mass = tl.where(mass == 0, float("-inf"), top * LN2 + tl.log(mass))
    if slot < 0:
        out = line_of(out, b, h, q_0, so_b, so_h, so_t)
        tl.store(out + q_at[:, None] * so_t + d_at[None, :], y.to(out.dtype.element_ty), mask=q_in[:, None] & d_in[None, :])
        tl.store(lse + row.to(tl.int64) * lse_row + q_0 + q_at, total_mass, mask=q_in)
    else:
        lane = tl.arange(0, M)
        base = (row.to(tl.int64) * n_slots + slot) * M
        tl.store(part + (base + lane)[:, None] * D + d_at[None, :], y)
        tl.store(part_lse + base + lane, total_mass)


@triton.jit
def merge(
    joins, part, part_lse, out, lse, heads, n_q, width, n_joins, n_slots, so_b, so_h, so_t,
    D: tl.constexpr, M: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Outputs of the tiles whose keys were cut into pieces: weights of the pieces follow from their log-sum-exps."""
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    join = joins + (tl.program_id(0) + (h * n_joins if PER_HEAD else 0)) * 3
    tile = tl.load(join)
    if tile < 0:
        return
    first = tl.load(join + 1)
    last = tl.load(join + 2)
    lane = tl.arange(0, M)
    d_at = tl.arange(0, D)
    top = tl.full((M,), float("-inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for slot in range(first, last):
        base = (row.to(tl.int64) * n_slots + slot) * M + lane
        s = tl.load(part_lse + base) * LOG2E
        y = tl.load(part + base[:, None] * D + d_at[None, :])
        rise = tl.maximum(top, s)
        level = tl.where(rise == float("-inf"), 0.0, rise)
        p = tl.exp2(s - level)
        fade = tl.exp2(top - level)
        mass = mass * fade + p
        acc = acc * fade[:, None] + y * p[:, None]
        top = rise
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    at = tile * M + lane
    here = (at < n_q)[:, None] & (d_at < width)[None, :]
    to = b * so_b + h * so_h + at.to(tl.int64)[:, None] * so_t + d_at[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=here)
    tl.store(lse + row.to(tl.int64) * n_q + at, tl.where(mass == 0, float("-inf"), top * LN2 + tl.log(mass)), mask=at < n_q)
