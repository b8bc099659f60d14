"""What attention does with a pair of a query and a key: its score, whether it is seen, whether dropout leaves it."""

import triton
import triton.language as tl

from hippodrome.ops.attention._walk import _CAUSAL, _CAUSAL_BUTTERFLY, _CHUNK, _PREFIX, _WINDOW

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
def hidden(
    s, seen, mask, q_at, k_at, q_pos, here, table, A, R, T: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr
):  # fmt: skip
    """Scores, -inf where a key is not `seen` or a partly visible tile's pattern (CODE) or mask (TABLE) hides it."""
    if CODE != 0:
        seen = seen & sees(q_pos, k_at, A, R, CODE)
    if TABLE:
        WORDS: tl.constexpr = (T + 31) // 32  # of 32 keys, those of a query side by side
        word = mask.to(tl.int64) * (T * WORDS) + (q_at % T) * WORDS + (k_at % T) // 32
        bits = tl.load(table + word, mask=here & (mask >= 0), other=-1)
        seen = seen & (((bits >> (k_at % T % 32)) & 1) != 0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def chance(seed, q_0, k_0, DROP: tl.constexpr):
    """Dropout's key, and the numbers of the first query and key of what is at hand: `seed` says where a document begins."""
    key = 0
    if DROP:
        key = tl.load(seed)
        q_0 += tl.load(seed + 1).to(tl.int32)
        k_0 += tl.load(seed + 2).to(tl.int32)
    return key, q_0, k_0


@triton.jit
def kept(seed, q_at, k_at, row, drop):
    """Whether dropout leaves a weight: a counter says, so that the backward and other backends find the same."""
    zero = (q_at + k_at) * 0
    bits, _, _, _ = tl.philox(seed, (zero + k_at).to(tl.uint32), (zero + q_at).to(tl.uint32), (zero + row).to(tl.uint32),
                              zero.to(tl.uint32))  # fmt: skip
    return tl.uint_to_uniform_float(bits) >= drop


@triton.jit
def line_of(t, b, h, token, s_b, s_h, s_t):
    """Where a token of a head of a sequence lies."""
    return t + b * s_b + h * s_h + token.to(tl.int64) * s_t
