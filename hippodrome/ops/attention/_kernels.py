"""attention in Triton: tiles of queries against tiles of keys, with an online softmax; the backward makes the weights again.

A program owns a tile of M queries (`forward`, `gradient_q`) or of N keys (`gradient_kv`) and walks over the tiles of the other
side that it meets. Which they are follows from a few integers (CODE: an interval, with the part of it that is wholly visible;
or a flat butterfly, XOR, whose tiles differ from a program's own in one bit of their number) or from a list (LIST: tiles of T,
kept once). Of a butterfly and of lists several small tiles are gathered into one step. Only tiles on an edge pay for a
predicate. Statistics and sums are float32 and exponentials base 2; every sum has one owner and one order, so that two runs give
the same bits. Where one row is much longer than the others it is cut, and `merge` or `total` joins the pieces in their order.

The loop over listed tiles that are partly visible is not pipelined. It is short, and with it pipelined causal BigBird in tiles
of 64 was wrong on an H100 (Triton 3.6.0) from lists that are right and in the interpreter give the right values.
"""

import triton
import triton.language as tl

FULL, CAUSAL, WINDOW, CHUNK, PREFIX, BUTTERFLY, CAUSAL_BUTTERFLY = range(7)
_CAUSAL, _WINDOW, _CHUNK, _PREFIX = (tl.constexpr(code) for code in (CAUSAL, WINDOW, CHUNK, PREFIX))
_BUTTERFLY, _CAUSAL_BUTTERFLY = tl.constexpr(BUTTERFLY), tl.constexpr(CAUSAL_BUTTERFLY)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sees(q, k, A, R, CODE: tl.constexpr):
    """Whether a query at position q sees a key at k, of a butterfly within the diagonal: `Pattern.visible` by its code."""
    if CODE == _CAUSAL or CODE == _CAUSAL_BUTTERFLY:  # noqa: SIM109 - Triton reads no `in`
        seen = k <= q
    elif CODE == _WINDOW:
        seen = (k <= q + R) & (q - k < A)
    elif CODE == _CHUNK:
        seen = (k <= q) & (q // A == k // A)
    elif CODE == _PREFIX:
        seen = (k <= q) | (k < A)
    else:
        seen = k == k
    return seen


@triton.jit
def keys_met(first, last, n_k, A, R, CODE: tl.constexpr):
    """Of queries at positions first..last the keys [lo, hi) that any sees and, within, [a, b) that all see."""
    lo = first * 0
    a = lo
    b = lo + n_k
    hi = b
    if CODE != 0:
        b = first + 1
        hi = last + 1
    if CODE == _WINDOW:
        lo = first - A + 1
        a = last - A + 1
        b += R
        hi += R
    if CODE == _CHUNK:
        lo = first // A * A
        a = last // A * A
    if CODE == _PREFIX:
        b = tl.maximum(b, A)
        hi = tl.maximum(hi, A)
    lo = tl.maximum(lo, 0)
    hi = tl.maximum(tl.minimum(hi, n_k), lo)
    return lo, tl.maximum(a, 0), tl.minimum(b, n_k), hi


@triton.jit
def queries_met(first, last, n_q, shift, A, R, CODE: tl.constexpr):
    """Of keys at positions first..last the queries [lo, hi) that see any and, within, [a, b) that see all: indices."""
    lo = first * 0
    a = lo
    b = lo + n_q
    hi = b
    if CODE != 0:
        lo = first - shift
        a = last - shift
    if CODE == _WINDOW:
        lo -= R
        a -= R
        b = first + A - shift
        hi = last + A - shift
    if CODE == _CHUNK:
        b = (first // A + 1) * A - shift
        hi = (last // A + 1) * A - shift
    if CODE == _PREFIX:
        lo = tl.where(first < A, 0, lo)
        a = tl.where(last < A, 0, a)
    lo = tl.maximum(lo, 0)
    hi = tl.maximum(tl.minimum(hi, n_q), lo)
    return lo, tl.maximum(a, 0), tl.minimum(b, n_q), hi


@triton.jit
def in_tiles(lo, a, b, hi, SIZE: tl.constexpr):
    """Intervals as tiles: the first, the first and last of whole ones, the last."""
    first = lo // SIZE
    last = tl.cdiv(hi, SIZE)
    whole = tl.minimum(tl.maximum(tl.cdiv(a, SIZE), first), last)
    end = tl.maximum(tl.minimum(b // SIZE, last), whole)
    return first, whole, end, last


@triton.jit
def smeared(x):
    """x with all bits below its highest."""
    x |= x >> 1
    x |= x >> 2
    x |= x >> 4
    x |= x >> 8
    return x | (x >> 16)


@triton.jit
def ones(x):
    """How many bits of x are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 63


@triton.jit
def partners(own, first, n, R, IS_KEY: tl.constexpr, CODE: tl.constexpr):
    """Tiles of first, ..., n - 1 that a flat butterfly wholly shows to tile `own`, or of keys, that see it: a set of bits.

    Bit 0 is the tile itself, bit s + 1 the tile own ^ 2^s; R holds the powers of two that count. Bits of `own` that are set
    lead down, others up. Under causality only one direction is left, and the tile itself is partly visible.
    """
    down = own & R & smeared(tl.maximum(own - first, 0))
    up = ~own & R & smeared(n - 1 - own) & ~smeared(tl.maximum(first - 1 - own, 0))
    itself = (own >= first).to(tl.int32)
    return (up if IS_KEY else down) << 1 if CODE == _CAUSAL_BUTTERFLY else ((down | up) << 1) | itself


@triton.jit
def steps(bits, A, T: tl.constexpr, SIZE: tl.constexpr):
    """Steps of SIZE that a walk over the tiles of A in `bits` takes."""
    return ones(bits) * (A // SIZE) if SIZE <= T else tl.cdiv(ones(bits) * T, SIZE)


@triton.jit
def capped(x, cap):
    """cap tanh(x / cap)."""
    return cap - 2 * cap / (1 + tl.exp2(x * (2 * LOG2E / cap)))


@triton.jit
def scores(
    x, q_at, k_at, here, q_pos, bias, slope, scale, cap, s_q, s_k, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Scores in bits of products x, and what softcap leaves of their derivative."""
    rest = 1.0
    if CAP:
        s = capped(x * scale, cap)
        rest = 1 - (s / cap) * (s / cap)
        s = s * LOG2E
    else:
        s = x * (scale * LOG2E)
    if BIAS:
        s += tl.load(bias + q_at.to(tl.int64) * s_q + k_at * s_k, mask=here, other=0.0).to(tl.float32) * LOG2E
    if SLOPES:
        s -= (slope * LOG2E) * tl.abs(q_pos - k_at).to(tl.float32)
    return s, rest


@triton.jit
def kept(seed, q_at, k_at, row, drop):
    """Whether dropout leaves a weight: a counter says, so that the backward and other backends find the same."""
    zero = (q_at + k_at) * 0
    bits, _, _, _ = tl.philox(seed, (zero + k_at).to(tl.uint32), (zero + q_at).to(tl.uint32), (zero + row).to(tl.uint32),
                              zero.to(tl.uint32))  # fmt: skip
    return tl.uint_to_uniform_float(bits) >= drop


@triton.jit
def met(
    i, cols, ids, end, bits, own, shift, A, T: tl.constexpr, SIZE: tl.constexpr, LIST: tl.constexpr, TABLE: tl.constexpr,
    XOR: tl.constexpr,
):  # fmt: skip
    """Step i of a walk: indices of its SIZE members, whether each is one, the number of its tile's mask (-1: none), and what of
    a butterfly's `bits` is left. `shift` is what positions are ahead of the indices."""
    lane = tl.arange(0, SIZE)
    mask = lane * 0 - 1
    if LIST:
        SHARE: tl.constexpr = T // SIZE if SIZE < T else 1
        entry = i // SHARE + lane // T
        there = entry < (end + SHARE - 1) // SHARE
        tile = tl.load(cols + entry, mask=there, other=0)
        if TABLE:
            mask = tl.load(ids + entry, mask=there, other=-1)
        at = tile * T + i % SHARE * SIZE + lane % T
    elif XOR:
        if SIZE <= T:
            share = A // SIZE
            there = lane >= 0
            at = (own ^ ((bits & -bits) >> 1)) * A + i % share * SIZE + lane - shift
            bits = tl.where(i % share == share - 1, bits & (bits - 1), bits)
        else:
            bit = lane * 0
            for nth in tl.static_range(SIZE // T):
                bit = tl.where(lane // T == nth, bits & -bits, bit)
                bits &= bits - 1
            there = bit > 0
            at = (own ^ (bit >> 1)) * T + lane % T - shift
    else:
        at = i * SIZE + lane
        there = at >= 0
    return at, there, mask, bits


@triton.jit
def place(
    plan, offsets, k_offsets, tile, n_q, n_k, SIZE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Where a tile lies: its first member within its document, where the document begins, its lengths. Packs: `plan` says."""
    at = tile * SIZE
    q_0 = at * 0
    k_0 = at * 0
    if PACKED:
        doc = tl.load(plan + 2 * tile)
        at = tl.load(plan + 2 * tile + 1)
        q_0 = tl.load(offsets + doc)
        n_q = tl.load(offsets + doc + 1) - q_0
        k_0 = tl.load(k_offsets + doc)
        n_k = tl.load(k_offsets + doc + 1) - k_0
    return at, q_0, k_0, n_q, n_k


@triton.jit
def shown(seen, mask, q_at, k_at, here, table, T: tl.constexpr):
    """`seen`, where the masks of partly visible tiles have a bit: words of 32 keys, those of a query side by side."""
    WORDS: tl.constexpr = (T + 31) // 32
    word = mask.to(tl.int64) * (T * WORDS) + (q_at % T) * WORDS + (k_at % T) // 32
    bits = tl.load(table + word, mask=here & (mask >= 0), other=-1)
    return seen & (((bits >> (k_at % T % 32)) & 1) != 0)


@triton.jit
def forward(
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, out, lse, part, part_lse,
    heads, group, n_q, n_k, lse_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, SPLIT: tl.constexpr, PER_HEAD: tl.constexpr, XOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps of a tile of queries, or of one piece of its keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    slot = tile * 0 - 1
    if LIST:
        item = plan + (tile + (h * n_plan if PER_HEAD else 0)) * 5
        tile = tl.load(item)
        begin = tl.load(item + 1)
        middle = tl.load(item + 2)
        finish = tl.load(item + 3)
        slot = tl.load(item + 4)
        if tile < 0:
            return
    at, q_0, k_0, n_q, n_k = place(plan, offsets, k_offsets, tile, n_q, n_k, M, PACKED)
    if at >= n_q:  # only in packs
        return
    shift = n_k - n_q
    k_end = n_k
    if PADDED:
        k_end = tl.maximum(tl.minimum(k_end, tl.load(k_lengths + b)), 0).to(tl.int32)
    q_at = at + tl.arange(0, M)
    q_in = q_at < n_q
    d_at = tl.arange(0, D)
    d_in = d_at < width
    q_pos = q_at + shift
    q += b * sq_b + h * sq_h + q_0.to(tl.int64) * sq_t
    k += b * sk_b + h // group * sk_h + k_0.to(tl.int64) * sk_t
    v += b * sv_b + h // group * sv_h + k_0.to(tl.int64) * sv_t
    x_q = tl.load(q + q_at[:, None] * sq_t + d_at[None, :], mask=q_in[:, None] & d_in[None, :], other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + h)
    key = 0
    q_n = q_0
    k_n = k_0
    if DROP:
        key = tl.load(seed)
        q_n += tl.load(seed + 1).to(tl.int32)
        k_n += tl.load(seed + 2).to(tl.int32)
    if BIAS:
        bias += b * sb_b + h * sb_h + q_0.to(tl.int64) * sb_q + k_0.to(tl.int64) * sb_k
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY else 2
    own = at * 0
    bits = own
    if LIST:
        # A step is several tiles, or a share of one.
        SHARES: tl.constexpr = T // N if N < T else 1
        step = N // T if N > T else 1
        first = begin * SHARES
        whole = begin * SHARES
        end = middle * SHARES
        last = finish * SHARES
    elif XOR:
        step = 1
        own = (at + shift) // A
        bits = partners(own, 0, tl.cdiv(n_k, A), R, False, CODE)
        first = at * 0
        whole = first
        end = steps(bits, A, T, N)
        last = end + (tl.cdiv((at + shift) % A + M, N) if N <= T else 1)
    else:
        step = 1
        lo, a, z, hi = keys_met(at + shift, tl.minimum(at + M, n_q) - 1 + shift, k_end, A, R, CODE)
        first, whole, end, last = in_tiles(lo, a, z, hi, N)
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
    for stage in tl.static_range(STAGES):
        # Stage 0: wholly visible tiles. Stage 1: those on edges, on both sides of these.
        if stage == 0:
            i_0 = whole
            i_1 = end
        else:
            i_0 = end if LIST else first
            i_1 = last if LIST else last - (end - whole)
        unmet = bits if stage == 0 else own * 0 + 1
        for i in tl.range(i_0, i_1, step, num_stages=1 if TILED and stage == 1 else None):
            j = i if TILED or stage == 0 else tl.where(i < whole, i, i + (end - whole))
            k_at, there, mask, unmet = met(j, cols, ids, i_1, unmet, own, 0, A, T, N, LIST, TABLE and stage == 1, XOR)
            k_in = there & (k_at < k_end)
            EDGE: tl.constexpr = TILED or stage == 1
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
                    seen = k_in[None, :]
                    if CODE != 0 and stage == 1:
                        seen = seen & sees(q_pos[:, None], k_at[None, :], A, R, CODE)
                    if TABLE and stage == 1:
                        seen = shown(seen, mask[None, :], q_at[:, None], k_at[None, :], here, table, T)
                    s = tl.where(seen, s, float("-inf"))
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
        out += b * so_b + h * so_h + q_0.to(tl.int64) * so_t
        tl.store(out + q_at[:, None] * so_t + d_at[None, :], y.to(out.dtype.element_ty), mask=q_in[:, None] & d_in[None, :])
        tl.store(lse + row.to(tl.int64) * lse_row + q_0 + q_at, total_mass, mask=q_in)
    else:
        lane = tl.arange(0, M)
        base = (row.to(tl.int64) * n_slots + slot) * M
        tl.store(part + (base + lane)[:, None] * D + d_at[None, :], y)
        tl.store(part_lse + base + lane, total_mass)


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
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, d_y, lse, delta, d_q, d_bias, part,
    heads, group, n_q, n_k, lse_row, bias_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sd_b, sd_h, sd_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, D_BIAS: tl.constexpr, PER_HEAD: tl.constexpr, XOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, or one piece of its sum; those of the bias on the way."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    slot = tile * 0 - 1
    if LIST:
        item = plan + (tile + (h * n_plan if PER_HEAD else 0)) * 5
        tile = tl.load(item)
        begin = tl.load(item + 1)
        middle = tl.load(item + 2)
        finish = tl.load(item + 3)
        slot = tl.load(item + 4)
        if tile < 0:
            return
    at, q_0, k_0, n_q, n_k = place(plan, offsets, k_offsets, tile, n_q, n_k, M, PACKED)
    if at >= n_q:  # only in packs
        return
    shift = n_k - n_q
    k_end = n_k
    if PADDED:
        k_end = tl.maximum(tl.minimum(k_end, tl.load(k_lengths + b)), 0).to(tl.int32)
    q_at = at + tl.arange(0, M)
    q_in = q_at < n_q
    d_at = tl.arange(0, D)
    d_in = d_at < width
    q_pos = q_at + shift
    q += b * sq_b + h * sq_h + q_0.to(tl.int64) * sq_t
    k += b * sk_b + h // group * sk_h + k_0.to(tl.int64) * sk_t
    v += b * sv_b + h // group * sv_h + k_0.to(tl.int64) * sv_t
    d_y += b * sd_b + h * sd_h + q_0.to(tl.int64) * sd_t
    within = q_in[:, None] & d_in[None, :]
    x_q = tl.load(q + q_at[:, None] * sq_t + d_at[None, :], mask=within, other=0.0)
    x_d = tl.load(d_y + q_at[:, None] * sd_t + d_at[None, :], mask=within, other=0.0)
    base = row.to(tl.int64) * lse_row + q_0
    level = tl.load(lse + base + q_at, mask=q_in, other=float("-inf"))
    level = tl.where(level == float("-inf"), 0.0, level) * LOG2E
    loss = tl.load(delta + base + q_at, mask=q_in, other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + h)
    key = 0
    q_n = q_0
    k_n = k_0
    if DROP:
        key = tl.load(seed)
        q_n += tl.load(seed + 1).to(tl.int32)
        k_n += tl.load(seed + 2).to(tl.int32)
    if BIAS:
        bias += b * sb_b + h * sb_h + q_0.to(tl.int64) * sb_q + k_0.to(tl.int64) * sb_k
    if D_BIAS:
        d_bias += (row.to(tl.int64) * lse_row + q_0) * bias_row + k_0
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY else 2
    own = at * 0
    bits = own
    if LIST:
        # A step is several tiles, or a share of one.
        SHARES: tl.constexpr = T // N if N < T else 1
        step = N // T if N > T else 1
        first = begin * SHARES
        whole = begin * SHARES
        end = middle * SHARES
        last = finish * SHARES
    elif XOR:
        step = 1
        own = (at + shift) // A
        bits = partners(own, 0, tl.cdiv(n_k, A), R, False, CODE)
        first = at * 0
        whole = first
        end = steps(bits, A, T, N)
        last = end + (tl.cdiv((at + shift) % A + M, N) if N <= T else 1)
    else:
        step = 1
        lo, a, z, hi = keys_met(at + shift, tl.minimum(at + M, n_q) - 1 + shift, k_end, A, R, CODE)
        first, whole, end, last = in_tiles(lo, a, z, hi, N)
    acc = tl.zeros((M, D), tl.float32)
    for stage in tl.static_range(STAGES):
        if stage == 0:
            i_0 = whole
            i_1 = end
        else:
            i_0 = end if LIST else first
            i_1 = last if LIST else last - (end - whole)
        unmet = bits if stage == 0 else own * 0 + 1
        for i in tl.range(i_0, i_1, step, num_stages=1 if TILED and stage == 1 else None):
            j = i if TILED or stage == 0 else tl.where(i < whole, i, i + (end - whole))
            k_at, there, mask, unmet = met(j, cols, ids, i_1, unmet, own, 0, A, T, N, LIST, TABLE and stage == 1, XOR)
            k_in = there & (k_at < k_end)
            EDGE: tl.constexpr = TILED or stage == 1
            load_in = k_in[:, None] & d_in[None, :] if EDGE else d_in[None, :]
            x_k = tl.load(k + k_at[:, None] * sk_t + d_at[None, :], mask=load_in, other=0.0)
            x_v = tl.load(v + k_at[:, None] * sv_t + d_at[None, :], mask=load_in, other=0.0)
            x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
            here = q_in[:, None] & k_in[None, :]
            s, rest = scores(x, q_at[:, None], k_at[None, :], here, q_pos[:, None], bias, slope, scale, cap, sb_q, sb_k, BIAS,
                             SLOPES, CAP)  # fmt: skip
            if EDGE:
                seen = k_in[None, :]
                if CODE != 0 and stage == 1:
                    seen = seen & sees(q_pos[:, None], k_at[None, :], A, R, CODE)
                if TABLE and stage == 1:
                    seen = shown(seen, mask[None, :], q_at[:, None], k_at[None, :], here, table, T)
                s = tl.where(seen, s, float("-inf"))
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
        d_q += b * so_b + h * so_h + q_0.to(tl.int64) * so_t
        tl.store(d_q + q_at[:, None] * so_t + d_at[None, :], acc.to(d_q.dtype.element_ty), mask=within)
    else:
        lane = tl.arange(0, M)
        tl.store(part + ((row.to(tl.int64) * n_slots + slot) * M + lane)[:, None] * D + d_at[None, :], acc)


@triton.jit
def gradient_kv(
    q, k, v, bias, slopes, seed, plan, cols, ids, table, offsets, k_offsets, k_lengths, d_y, lse, delta, d_k, d_v, part,
    heads, group, n_q, n_k, lse_row, bias_row, width, n_plan, n_slots, scale, cap, drop, A, R,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sd_b, sd_h, sd_t, so_b, so_h, so_t, sb_b, sb_h, sb_q, sb_k,
    T: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CODE: tl.constexpr, LIST: tl.constexpr,
    TABLE: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, PER_HEAD: tl.constexpr, GROUPED: tl.constexpr, XOR: tl.constexpr, PRECISION: tl.constexpr,
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
    g = h_0 // group
    slot = tile * 0 - 1
    if LIST:
        item = plan + (tile + (h_0 * n_plan if PER_HEAD else 0)) * 5
        tile = tl.load(item)
        begin = tl.load(item + 1)
        middle = tl.load(item + 2)
        finish = tl.load(item + 3)
        slot = tl.load(item + 4)
        if tile < 0:
            return
    at, q_0, k_0, n_q, n_k = place(plan, offsets, k_offsets, tile, n_q, n_k, N, PACKED)
    if at >= n_k:  # only in packs
        return
    shift = n_k - n_q
    members = group if GROUPED else 1
    k_end = n_k
    if PADDED:
        k_end = tl.maximum(tl.minimum(k_end, tl.load(k_lengths + b)), 0).to(tl.int32)
        members = tl.where(at < k_end, members, 0)
    k_at = at + tl.arange(0, N)
    k_in = k_at < k_end
    d_at = tl.arange(0, D)
    d_in = d_at < width
    within = (k_at < n_k)[:, None] & d_in[None, :]
    x_k = tl.load(
        k + b * sk_b + g * sk_h + k_0.to(tl.int64) * sk_t + k_at[:, None] * sk_t + d_at[None, :], mask=within, other=0.0
    )
    x_v = tl.load(
        v + b * sv_b + g * sv_h + k_0.to(tl.int64) * sv_t + k_at[:, None] * sv_t + d_at[None, :], mask=within, other=0.0
    )
    key = 0
    q_n = q_0
    k_n = k_0
    if DROP:
        key = tl.load(seed)
        q_n += tl.load(seed + 1).to(tl.int32)
        k_n += tl.load(seed + 2).to(tl.int32)
    TILED: tl.constexpr = LIST or XOR
    STAGES: tl.constexpr = 1 if CODE == _BUTTERFLY else 2
    own = at * 0
    bits = own
    if LIST:
        # A step is several tiles, or a share of one.
        SHARES: tl.constexpr = T // M if M < T else 1
        step = M // T if M > T else 1
        first = begin * SHARES
        whole = begin * SHARES
        end = middle * SHARES
        last = finish * SHARES
    elif XOR:
        step = 1
        own = at // A
        bits = partners(own, shift // A, tl.cdiv(n_k, A), R, True, CODE)
        end = steps(bits, A, T, M)
        whole = end * 0
        first = at % A // M if M <= T else whole
        last = end + tl.where(own >= shift // A, A // M if M <= T else 1, first)
    else:
        step = 1
        lo, a, z, hi = queries_met(at, tl.minimum(at + N, n_k) - 1, n_q, shift, A, R, CODE)
        first, whole, end, last = in_tiles(lo, a, z, hi, M)
    sum_k = tl.zeros((N, D), tl.float32)
    sum_v = tl.zeros((N, D), tl.float32)
    for member in range(0, members):
        h = h_0 + member
        line = b * heads + h
        q_h = q + b * sq_b + h * sq_h + q_0.to(tl.int64) * sq_t
        d_h = d_y + b * sd_b + h * sd_h + q_0.to(tl.int64) * sd_t
        base = line * lse_row + q_0
        slope = 0.0
        if SLOPES:
            slope = tl.load(slopes + h)
        bias_h = bias
        if BIAS:
            bias_h = bias + b * sb_b + h * sb_h + q_0.to(tl.int64) * sb_q + k_0.to(tl.int64) * sb_k
        for stage in tl.static_range(STAGES):
            if stage == 0:
                i_0 = whole
                i_1 = end
            else:
                i_0 = end if LIST else first
                i_1 = last if LIST else last - (end - whole)
            unmet = bits if stage == 0 else own * 0 + 1
            for i in tl.range(i_0, i_1, step, num_stages=1 if TILED and stage == 1 else None):
                j = i if TILED or stage == 0 else tl.where(i < whole, i, i + (end - whole))
                q_at, there, mask, unmet = met(j, cols, ids, i_1, unmet, own, shift, A, T, M, LIST, TABLE and stage == 1, XOR)
                q_in = there & (q_at < n_q)
                q_pos = q_at + shift
                EDGE: tl.constexpr = TILED or stage == 1
                load_in = q_in[:, None] & d_in[None, :] if EDGE else d_in[None, :]
                x_q = tl.load(q_h + q_at[:, None] * sq_t + d_at[None, :], mask=load_in, other=0.0)
                x_d = tl.load(d_h + q_at[:, None] * sd_t + d_at[None, :], mask=load_in, other=0.0)
                level = tl.load(lse + base + q_at, mask=q_in, other=float("-inf"))
                level = tl.where(level == float("-inf"), 0.0, level) * LOG2E
                loss = tl.load(delta + base + q_at, mask=q_in, other=0.0)
                x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
                here = k_in[:, None] & q_in[None, :]
                s, rest = scores(x, q_at[None, :], k_at[:, None], here, q_pos[None, :], bias_h, slope, scale, cap, sb_q, sb_k,
                                 BIAS, SLOPES, CAP)  # fmt: skip
                if stage == 1:  # before, what is beyond the last query or key is 0, or in rows that are not stored
                    seen = here
                    if CODE != 0:
                        seen = seen & sees(q_pos[None, :], k_at[:, None], A, R, CODE)
                    if TABLE:
                        seen = shown(seen, mask[None, :], q_at[None, :], k_at[:, None], here, table, T)
                    s = tl.where(seen, s, float("-inf"))
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
