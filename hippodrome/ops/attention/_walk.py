"""Which tiles a program of attention meets, and in what order."""

import triton
import triton.language as tl

FULL, CAUSAL, WINDOW, CHUNK, PREFIX, BUTTERFLY, CAUSAL_BUTTERFLY = range(7)
_CAUSAL, _WINDOW, _CHUNK, _PREFIX = (tl.constexpr(code) for code in (CAUSAL, WINDOW, CHUNK, PREFIX))
_BUTTERFLY, _CAUSAL_BUTTERFLY = tl.constexpr(BUTTERFLY), tl.constexpr(CAUSAL_BUTTERFLY)


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
def in_lists(begin, middle, finish, T: tl.constexpr, SIZE: tl.constexpr):
    """A list as steps, each a share of a tile or several tiles; those that do not fill one go with the partly visible."""
    SHARES: tl.constexpr = T // SIZE if SIZE < T else 1
    if SIZE > T:
        middle = begin + (middle - begin) // (SIZE // T) * (SIZE // T)
    first = begin * SHARES
    return first, first, middle * SHARES, finish * SHARES


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
    lead down, others up. Under causality only one direction is left.
    """
    down = own & R & smeared(tl.maximum(own - first, 0))
    up = ~own & R & smeared(n - 1 - own) & ~smeared(tl.maximum(first - 1 - own, 0))
    itself = (own >= first).to(tl.int32)
    found = (up if IS_KEY else down) if CODE == _CAUSAL_BUTTERFLY else down | up
    return (found << 1) | itself


@triton.jit
def whole_of(bits, CODE: tl.constexpr):
    """The tiles of `bits` that are wholly visible: under causality all but the tile itself."""
    return bits & -2 if CODE == _CAUSAL_BUTTERFLY else bits


@triton.jit
def steps(bits, of_itself, T: tl.constexpr, SIZE: tl.constexpr, CODE: tl.constexpr):
    """Steps of SIZE over a butterfly's wholly visible tiles, and all; `of_itself` are those of a partly visible tile itself.

    Of small tiles, those that do not fill a step go with the tile itself: only there a step asks which members it has.
    """
    n = ones(whole_of(bits, CODE))
    if SIZE <= T:
        end = n * (T // SIZE)
        last = end + (of_itself if CODE == _CAUSAL_BUTTERFLY else 0)
    else:
        end = n // (SIZE // T)
        last = tl.cdiv(ones(bits), SIZE // T)
    return end, last


@triton.jit
def listed(plan, tile, h, n_plan, LIST: tl.constexpr, PER_HEAD: tl.constexpr):
    """A program's tile (-1: none) and, in lists, where its members begin, the partly visible among them begin, and end; and its
    slot (-1: the sum is whole)."""
    begin = tile * 0
    middle = begin
    finish = begin
    slot = begin - 1
    if LIST:
        item = plan + (tile + (h * n_plan if PER_HEAD else 0)) * 5
        tile = tl.load(item)
        begin = tl.load(item + 1)
        middle = tl.load(item + 2)
        finish = tl.load(item + 3)
        slot = tl.load(item + 4)
    return tile, begin, middle, finish, slot


@triton.jit
def place(plan, offsets, k_offsets, tile, n_q, n_k, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Where a tile lies: its first member within its document, where the document begins, its lengths. Packs: `plan` says."""
    at = tile * SIZE
    q_0 = at * 0
    k_0 = at * 0
    if PACKED:
        doc = tl.load(plan + 2 * tile)
        at = tl.load(plan + 2 * tile + 1)
        q_0 = tl.load(offsets + doc).to(tl.int32)
        n_q = tl.load(offsets + doc + 1).to(tl.int32) - q_0
        k_0 = tl.load(k_offsets + doc).to(tl.int32)
        n_k = tl.load(k_offsets + doc + 1).to(tl.int32) - k_0
    return at, q_0, k_0, n_q, n_k


@triton.jit
def real_keys(k_lengths, b, n_k, PADDED: tl.constexpr):
    """How many keys of sequence b are no padding."""
    if PADDED:
        n_k = tl.maximum(tl.minimum(n_k, tl.load(k_lengths + b)), 0).to(tl.int32)
    return n_k


@triton.jit
def walk_keys(
    at, shift, n_q, n_k, k_end, begin, middle, finish, A, R, T: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CODE: tl.constexpr, LIST: tl.constexpr, XOR: tl.constexpr,
):  # fmt: skip
    """The walk of M queries over keys, in steps of N: the first step, the first and last over wholly visible tiles, the last;
    and a butterfly's own tile and partners."""
    own = at * 0
    bits = own
    if LIST:
        first, whole, end, last = in_lists(begin, middle, finish, T, N)
    elif XOR:
        own = (at + shift) // T
        bits = partners(own, 0, tl.cdiv(n_k, T), R, False, CODE)
        first = at * 0
        whole = first
        end, last = steps(bits, tl.cdiv((at + shift) % T + M, N), T, N, CODE)
    else:
        lo, a, z, hi = keys_met(at + shift, tl.minimum(at + M, n_q) - 1 + shift, k_end, A, R, CODE)
        first, whole, end, last = in_tiles(lo, a, z, hi, N)
    return first, whole, end, last, own, bits


@triton.jit
def walk_queries(
    at, shift, n_q, n_k, begin, middle, finish, A, R, T: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    CODE: tl.constexpr, LIST: tl.constexpr, XOR: tl.constexpr,
):  # fmt: skip
    """The walk of N keys over queries, in steps of M: as `walk_keys`."""
    own = at * 0
    bits = own
    if LIST:
        first, whole, end, last = in_lists(begin, middle, finish, T, M)
    elif XOR:
        own = at // T
        bits = partners(own, shift // T, tl.cdiv(n_k, T), R, True, CODE)
        whole = at * 0
        first = at % T // M if M <= T else whole
        end, last = steps(bits, tl.where(bits & 1 != 0, T // M if M <= T else 1, first), T, M, CODE)
    else:
        lo, a, z, hi = queries_met(at, tl.minimum(at + N, n_k) - 1, n_q, shift, A, R, CODE)
        first, whole, end, last = in_tiles(lo, a, z, hi, M)
    return first, whole, end, last, own, bits


@triton.jit
def stretch(first, whole, end, last, STAGE: tl.constexpr, LIST: tl.constexpr):
    """Steps of a stage of a walk: 0, over wholly visible tiles; 1, over those on edges, which are in lists behind these and in
    intervals on both sides."""
    if STAGE == 0:
        i_0 = whole
        i_1 = end
    else:
        i_0 = end if LIST else first
        i_1 = last if LIST else last - (end - whole)
    return i_0, i_1


@triton.jit
def ahead(
    unmet, bits, cols, first, last, T: tl.constexpr, SIZE: tl.constexpr, CODE: tl.constexpr, STAGE: tl.constexpr,
    LIST: tl.constexpr, XOR: tl.constexpr,
):  # fmt: skip
    """What is not met when a stage begins: of a butterfly a set of bits, of a list the numbers of the first step's tiles."""
    if LIST and STAGE == 0:
        unmet = numbers(cols, first, last, T, SIZE)
    elif XOR and STAGE == 0:
        unmet = whole_of(bits, CODE)
    elif XOR:
        unmet |= bits - whole_of(bits, CODE)
    return unmet


@triton.jit
def numbers(cols, i, last, T: tl.constexpr, SIZE: tl.constexpr):
    """The numbers of the tiles of step i of a list: one, or of each of SIZE members."""
    if SIZE <= T:
        SHARES: tl.constexpr = T // SIZE
        found = tl.load(cols + i // SHARES, mask=i < last, other=0)
    else:
        entry = i + tl.arange(0, SIZE) // T
        found = tl.load(cols + entry, mask=entry < last, other=0)
    return found


@triton.jit
def met(
    i, cols, ids, last, unmet, own, shift, T: tl.constexpr, SIZE: tl.constexpr, LIST: tl.constexpr, TABLE: tl.constexpr,
    XOR: tl.constexpr,
):  # fmt: skip
    """Step i of a walk: indices of its SIZE members, whether each is one, the number of its tile's mask (-1: none), and what is
    left `unmet`: of a list the next step's numbers, so that no step waits for its own. `shift`: by what positions are ahead."""
    lane = tl.arange(0, SIZE)
    mask = lane * 0 - 1
    SHARES: tl.constexpr = T // SIZE if SIZE < T else 1
    if LIST:
        STEP: tl.constexpr = SIZE // T if SIZE > T else 1
        if SIZE <= T:  # one tile a step: its number is a scalar, and its members lie side by side
            there = lane >= 0
            if TABLE:
                mask += tl.load(ids + i // SHARES) + 1
            at = unmet * T + i % SHARES * SIZE + lane
        else:
            there = i + lane // T < last
            if TABLE:
                mask = tl.load(ids + i + lane // T, mask=there, other=-1)
            at = unmet * T + lane % T
        unmet = numbers(cols, i + STEP, last, T, SIZE)
    elif XOR:
        if SIZE <= T:
            there = lane >= 0
            at = (own ^ ((unmet & -unmet) >> 1)) * T + i % SHARES * SIZE + lane - shift
            unmet = tl.where(i % SHARES == SHARES - 1, unmet & (unmet - 1), unmet)
        else:
            bit = lane * 0
            for nth in tl.static_range(SIZE // T):
                bit = tl.where(lane // T == nth, unmet & -unmet, bit)
                unmet &= unmet - 1
            there = bit > 0
            at = (own ^ (bit >> 1)) * T + lane % T - shift
    else:
        at = i * SIZE + lane
        there = at >= 0
    return at, there, mask, unmet
