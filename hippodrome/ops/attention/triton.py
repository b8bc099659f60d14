"""attention on the GPU: tiles, an online softmax, and a backward that makes the weights again. See `_forward.py`."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, capability, on_its_device
from hippodrome.ops.attention import _tiles, attention
from hippodrome.ops.attention._check import numbers as read
from hippodrome.patterns import And, Butterfly, Causal, Chunk, Full, Pattern, Prefix, Window

HAS_TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = (8, 0)
"""Least compute capability: bf16 products and asynchronous copies."""
WIDEST = 256
WIDEST_FLOAT32 = 128
"""Wider ones need more shared memory than there is."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODES: dict[type[Pattern], int] = {Full: 0, Causal: 1, Window: 2, Chunk: 3, Prefix: 4}
"""The patterns that the kernels compute as intervals: `_walk.FULL`, ..."""
BUTTERFLY, CAUSAL_BUTTERFLY = 5, 6
"""Those that they compute from the numbers of tiles; any other is a list of tiles."""
PROGRAMS = 264
"""Programs from which on a GPU is busy: below, the keys of few queries are cut into pieces."""
PIECE = 512
"""Fewest keys of a piece."""
FEW = 16
"""Queries up to which that is done."""
NARROW = 256
"""Windows and chunks up to this are walked in tiles of 64, which waste less on their edges."""
BLOCKS = {64: ((128, 64, 4, 3), (64, 128, 4, 2), (32, 128, 4, 2)), 128: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
          256: ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 8, 1))}  # fmt: skip
"""Padded width -> queries, keys, warps and stages of the forward and of the gradients of q and of k, v, in half precision."""

TILES = {
    64: {16: ((32, 2, 3, 128), (32, 2, 3, 128), (32, 2, 3, 128)), 32: ((32, 2, 3, 128), (32, 2, 3, 128), (32, 2, 3, 168)),
         64: ((64, 4, 3, 128), (64, 4, 2, 128), (32, 4, 3, 128)), 128: ((64, 8, 3, 128), (64, 8, 3, 128), (32, 8, 3, 128))},
    128: {16: ((32, 2, 3, 168), (32, 2, 3, 168), (32, 2, 3, 255)), 32: ((32, 2, 3, 255), (32, 2, 3, 255), (32, 2, 3, 255)),
          64: ((64, 4, 2, 168), (32, 4, 2, 168), (32, 4, 2, 255)), 128: ((64, 8, 2, 128), (64, 8, 3, 255), (64, 8, 2, 255))},
}  # fmt: skip
"""Padded width -> the side of the tiles that are met -> of the other side, warps, stages and registers, of the same, in half
precision. Left alone, the compiler takes a few registers more than let one program more be at work."""


@dataclass(frozen=True)
class Call:
    """What of a call is neither a tensor nor a shape."""

    code: int
    a: int
    r: int
    tile: int
    """The side of a program's own tiles, of a butterfly or in lists; 0: an interval."""
    slots_q: int
    slots_k: int
    scale: float
    cap: float
    drop: float

    @property
    def side(self) -> int:
        """The side of the tiles that are met, as the pattern has them: 16 where there are none."""
        return self.a if self.code in (BUTTERFLY, CAUSAL_BUTTERFLY) else self.tile or 16

    def even(self, n: int, offsets: Tensor | None, k_lengths: Tensor | None) -> bool:
        """Whether every tile over n keys (or queries) has all of them: then wholly visible ones need no mask."""
        return bool(self.tile) and n % self.side == 0 and offsets is None and k_lengths is None

    def numbers(self) -> tuple[int, int, int, int, int, int, float, float, float]:
        return (self.code, self.a, self.r, self.tile, self.slots_q, self.slots_k, self.scale, self.cap, self.drop)


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    **_: object,
) -> str | None:
    if q.device.type != "cuda":
        return f"the tensor is on {q.device.type}"
    if not HAS_TRITON:
        return "triton is not installed"
    if capability(q.device) < CAPABILITY:
        return f"compute capability {capability(q.device)} is under {CAPABILITY}"
    return unfit(q, k, v, pattern, q_position is not None or k_position is not None, offsets, k_offsets, bias, slopes)


def unfit(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, placed: bool, offsets: Tensor | None, k_offsets: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take a call, whatever the device."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: it takes one of {', '.join(map(str, DTYPES))} for all"
    if q.shape[3] > WIDEST:
        return f"heads are {q.shape[3]} wide: it takes up to {WIDEST}"
    if q.dtype == torch.float32 and q.shape[3] > WIDEST_FLOAT32:
        return f"float32 heads are {q.shape[3]} wide: it takes up to {WIDEST_FLOAT32}"
    if placed:
        return "positions are given: it computes them"
    if not q.numel() or not k.numel():
        return "there is no query or no key"
    if q.shape[0] * q.shape[1] > 65535:
        return f"{q.shape[0]} x {q.shape[1]} heads are more than a grid has rows"
    if bias is not None and bias.dtype == torch.float64:
        return "the bias is torch.float64, and scores are float32"
    if slopes is not None and slopes.requires_grad:
        return "slopes want a gradient"
    if _at_once(q, k, pattern, k_offsets):
        return None
    if offsets is not None and (torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing())):
        return f"a pack under {pattern}, of which it walks one document after another: a graph cannot know their lengths"
    if bias is not None and bias.requires_grad and pattern.count_tile is not None:
        return "a key that counts twice gives the bias two gradients"
    if offsets is not None and k_offsets is not None and pattern.count_tile is not None:
        return f"a pack with k_offsets under {pattern}, in which keys count unevenly"
    return _no_list(pattern, k.shape[2] - q.shape[2])


def _at_once(q: Tensor, k: Tensor, pattern: Pattern, k_offsets: Tensor | None) -> bool:
    """Whether the kernels compute a pattern's tiles, of all documents of a pack too."""
    return type(pattern) in CODES or (k_offsets is None and _butterfly(pattern, k.shape[2] - q.shape[2]) is not None)


def _butterfly(pattern: Pattern, ahead: int) -> tuple[int, int, int] | None:
    """Code, tile and powers of two of a flat butterfly whose tiles are those of queries `ahead` of their indices; else None."""
    parts = pattern.parts if isinstance(pattern, And) else (pattern,)
    flat = [part for part in parts if isinstance(part, Butterfly)]
    if len(flat) != 1 or any(not isinstance(part, Butterfly | Causal) for part in parts):
        return None
    tile, most = flat[0].tile, 30 if flat[0].n_factors is None else min(flat[0].n_factors, 30)
    if tile < _tiles.SIDES[-1] or tile & (tile - 1) or ahead < 0 or ahead % tile:
        return None
    return CAUSAL_BUTTERFLY if len(parts) > 1 else BUTTERFLY, tile, 2**most - 1


def _no_list(pattern: Pattern, q_start: int) -> str | None:
    side = pattern.count_tile
    if side is not None and (side % _tiles.side(pattern) or q_start % _tiles.side(pattern)):
        return f"keys count unevenly within tiles of {_tiles.side(pattern)}"
    return None


def _yields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    offsets: Tensor | None = None,
    k_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    **_: object,
) -> str | None:
    """Calls that torch's kernels take without a mask: those are faster, as docs/performance.md has it."""
    wants = [bias, slopes, softcap, offsets, k_lengths, seed if dropout else None]
    plain = all(want is None for want in wants) and not return_lse and not torch.are_deterministic_algorithms_enabled()
    square = isinstance(pattern, Causal) and q.shape[2] == k.shape[2]
    if plain and (isinstance(pattern, Full) or square):
        return "dense and causal calls that need nothing more are left to torch's kernels"
    return None


@attention.backend("triton", why_not=_why_not, yields=_yields)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    k_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # the running maximum is taken before scaling
        q, scale = -q, -scale
    counters = None
    if dropout:
        seed = torch.randint(2**62, (), device=q.device) if seed is None else torch.as_tensor(seed, device=q.device)
        counters = F.pad(seed.view(1), (0, 2))
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    slopes = None if slopes is None else slopes.float()
    numbers = scale, softcap or 0.0, dropout
    ends = offsets if k_offsets is None else k_offsets
    if offsets is None or ends is None or _at_once(q, k, pattern, k_offsets):
        y, lse = _launched(q, k, v, pattern, bias, slopes, counters, offsets, ends, k_lengths, numbers)
    else:
        y, lse = _each_document(q, k, v, pattern, bias, slopes, counters, offsets, ends, numbers)
    return (y, lse) if return_lse else y


def _launched(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counters: Tensor | None,
    offsets: Tensor | None, k_offsets: Tensor | None, k_lengths: Tensor | None, numbers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`counters`: of dropout, the seed and the numbers of the first query and key. `numbers`: scale, softcap and dropout."""
    call, lists = _walks(q, k, pattern, numbers)
    q, k, v = (_lines(t) for t in (q, k, v))
    given = q, k, v, bias, slopes, counters, offsets, k_offsets, k_lengths, lists
    return torch.ops.hippodrome.attention_fused(*given, *call.numbers())


def _each_document(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counters: Tensor | None,
    offsets: Tensor, k_offsets: Tensor, numbers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A pack whose documents have lists of their own, one after another."""
    at, k_at = read(offsets), read(k_offsets)
    sizes, k_sizes = ([b - a for a, b in itertools.pairwise(ends)] for ends in (at, k_at))
    # Pieces of one split: their gradients are put together once.
    keys, values = k.split(k_sizes, 2), v.split(k_sizes, 2)
    biases = None if bias is None else bias.split(sizes, 2)
    found = []
    for i, some in enumerate(q.split(sizes, 2)):
        if not sizes[i] or not k_sizes[i]:
            found.append((torch.zeros_like(some), some.new_full(some.shape[:3], -torch.inf, dtype=torch.float32)))
            continue
        own_bias = None if biases is None else biases[i][..., k_at[i] : k_at[i + 1]]
        own = None if counters is None else torch.stack((counters[0], offsets[i].long(), k_offsets[i].long()))
        found.append(_launched(some, keys[i], values[i], pattern, own_bias, slopes, own, None, None, None, numbers))
    return torch.cat([y for y, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def _walks(q: Tensor, k: Tensor, pattern: Pattern, numbers: tuple[float, float, float]) -> tuple[Call, list[Tensor]]:
    """How the kernels find their tiles: as an interval, as a butterfly, or by lists."""
    code = CODES.get(type(pattern))
    if code is not None:
        size, right = getattr(pattern, "size", 0), getattr(pattern, "right", 0)
        return Call(code, size, right, 0, 0, 0, *numbers), []
    tile = _tiles.side(pattern, 64 if q.dtype == torch.float32 else 128)
    found = _butterfly(pattern, k.shape[2] - q.shape[2])
    if found is not None:
        return Call(*found, tile, 0, 0, *numbers), []
    # Not a decorator there: that imports the compiler.
    listed = torch.compiler.disable(_tiles.lists) if torch.compiler.is_compiling() else _tiles.lists
    of_q, of_k, table, triangular = listed(pattern, q.shape[2], k.shape[2], q.shape[1], tile, q.device)
    return Call(CODES[Causal] if triangular else 0, 0, 0, tile, of_q.slots, of_k.slots, *numbers), [
        *of_q.tensors(),
        *of_k.tensors(),
        table,
    ]


def _lines(t: Tensor) -> Tensor:
    """t with a token's numbers of a head side by side and within 32 bits of its first."""
    near = t.stride(2) * t.shape[2] < 2**31
    return t if near and (t.stride(-1) == 1 or t.shape[-1] == 1) else t.contiguous()


@torch.library.custom_op("hippodrome::attention_fused", mutates_args=(), device_types="cuda")
@announced("attention")
@on_its_device
def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None, offsets: Tensor | None,
    k_offsets: Tensor | None, k_lengths: Tensor | None, lists: list[Tensor], code: int, a: int, r: int, tile: int, slots_q: int,
    slots_k: int, scale: float, cap: float, drop: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs like q and log-sum-exps (B, H, Lq)."""
    from hippodrome.ops.attention import _forward as kernels

    call = Call(code, a, r, tile, slots_q, slots_k, scale, cap, drop)
    y, lse = _outputs(q)
    batch, heads, n_q, width = q.shape
    D, M, N, ways = _layout(0, q, bias is not None, call)
    split, slots, joins = _split(q, k, M, call, lists, offsets)
    part = q.new_empty(batch * heads * slots, M, D, dtype=torch.float32)
    part_lse = q.new_empty(batch * heads * slots, M, dtype=torch.float32)
    plan, grid = _plan(0, M, q, n_q, offsets, lists)
    kernels.forward[grid, batch * heads, split](
        q, k, v, *_asides(q, bias, slopes, seed), plan, *_members(0, lists, plan), *_ends(plan, offsets, k_offsets, k_lengths),
        y, lse, part, part_lse, heads, heads // k.shape[1], n_q, k.shape[2], n_q, width, grid, slots, scale, cap, drop, a, r,
        *_strides(q, k, v, y), *_bias_strides(bias), T=call.side, D=D, M=M, N=N, SPLIT=split > 1,
        EVEN=call.even(k.shape[2], offsets, k_lengths), **_flags(call, bias, slopes, offsets, k_lengths, lists), **ways,
    )  # fmt: skip
    if slots:
        kernels.merge[joins.shape[1], batch * heads](
            joins, part, part_lse, y, lse, heads, n_q, width, joins.shape[1], slots, *_strides(y), D=D, M=M,
            PER_HEAD=joins.shape[0] > 1,
        )  # fmt: skip
    return y, lse


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    # Contiguous whatever q is: the fake must know the layout.
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_fused.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def _layout(role: int, q: Tensor, biased: bool, call: Call) -> tuple[int, int, int, dict[str, Any]]:
    """Padded width, queries and keys of a tile, and what else a kernel is compiled with."""
    D = max(16, 1 << (q.shape[3] - 1).bit_length())
    M, N, warps, stages = BLOCKS[max(64, D)][role]
    wide, registers = q.dtype == torch.float32, 255
    if wide:
        M, N, warps, stages = min(M, 64), min(N, 32), 4, 1
    if call.code in (CODES[Window], CODES[Chunk]) and call.a <= NARROW:
        M, N, warps = min(M, 64), min(N, 64), 4
    if call.tile:
        M, N, warps, stages, registers = _list_layout(role, call.tile, D, wide)
    elif q.shape[2] <= 64:
        M = min(M, max(16, 1 << (q.shape[2] - 1).bit_length()))
    if biased:  # a tile of it in float32, and as many as there are stages, lie in shared memory too
        M, N = (min(side, max(64, call.tile if own else 0)) for side, own in ((M, role < 2), (N, role == 2)))
        stages = min(stages, 2 if D <= 128 else 1)
        if role == 2 and not call.tile and not wide and D <= 128:
            M, warps = (min(M, 64), 4) if D <= 64 else (min(M, 32), 8)
    ways = {"num_warps": warps, "num_stages": stages, "PRECISION": "tf32x3" if wide else "tf32"}
    if registers < 255 and not (biased or call.cap or call.drop):  # those need more
        ways["maxnreg"] = registers
    return D, M, N, ways


def _list_layout(role: int, T: int, D: int, wide: bool) -> tuple[int, int, int, int, int]:
    """Queries, keys, warps, stages and registers where tiles of T are met: T of a program's own side, some of the other."""
    if wide or D > 128:
        other, warps, stages, registers = 32 if wide or role else 64, 8 if T == 128 else 4, 1 if wide else 2, 255
    else:
        other, warps, stages, registers = TILES[max(64, D)][T][role]
    return (other, T, warps, stages, registers) if role == 2 else (T, other, warps, stages, registers)


def _split(
    q: Tensor, k: Tensor, M: int, call: Call, lists: list[Tensor], offsets: Tensor | None
) -> tuple[int, int, Tensor]:  # fmt: skip
    """Pieces of the keys, slots for them, and which of them make a tile."""
    if call.tile:
        return 1, call.slots_q, lists[3] if lists else q
    n_q, rows, tiles = q.shape[2], q.shape[0] * q.shape[1], -(-q.shape[2] // M)
    pieces = 1 if n_q > FEW or offsets is not None else min(PROGRAMS // (rows * tiles), k.shape[2] // PIECE)
    if pieces < 2:
        return 1, 0, q
    at = torch.arange(tiles, device=q.device, dtype=torch.int32)
    return pieces, tiles * pieces, torch.stack((at, at * pieces, (at + 1) * pieces), 1)[None]


def _plan(role: int, size: int, q: Tensor, n: int, offsets: Tensor | None, lists: list[Tensor]) -> tuple[Tensor, int]:
    """What tells programs where they are, and how many there are."""
    if lists:
        plan = lists[4 if role == 2 else 0]
        return plan, plan.shape[1]
    if offsets is None:
        return q, -(-n // size)
    grid = n // size + len(offsets) - 1
    tiles = (offsets.diff() + size - 1) // size
    ends = tiles.cumsum(0)
    program = torch.arange(grid, device=offsets.device)
    document = torch.searchsorted(ends, program, right=True)
    there = document < len(tiles)
    document = document.clamp(max=len(tiles) - 1)
    first = torch.where(there, (program - ends[document] + tiles[document]) * size, 2**30)
    return torch.stack((document, first), 1).int().contiguous(), grid


def _members(role: int, lists: list[Tensor], other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not lists:
        return other, other, other
    first = 4 if role == 2 else 0
    return lists[first + 1], lists[first + 2], lists[8]


def _asides(q: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None) -> tuple[Tensor, ...]:
    """Absent tensors as q, which no kernel reads in their place."""
    return tuple(q if t is None else t for t in (bias, slopes, seed))


def _ends(other: Tensor, *ends: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(other if t is None else t for t in ends)


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if bias is None else tuple(bias.stride())


def _flags(
    call: Call,
    bias: Tensor | None,
    slopes: Tensor | None,
    offsets: Tensor | None,
    k_lengths: Tensor | None,
    lists: list[Tensor],
) -> dict[str, Any]:
    return {
        "CODE": call.code,
        "LIST": bool(lists),
        "XOR": call.code in (BUTTERFLY, CAUSAL_BUTTERFLY),
        "TABLE": bool(lists) and len(lists[8]) > 0,
        "BIAS": bias is not None,
        "SLOPES": slopes is not None,
        "CAP": call.cap > 0,
        "DROP": call.drop > 0,
        "PACKED": offsets is not None,
        "PADDED": k_lengths is not None,
        "PER_HEAD": bool(lists) and lists[0].shape[0] > 1,
    }


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of each: of a sequence, of a head, of a token."""
    return tuple(size for t in tensors for size in t.stride()[:3])


@torch.library.custom_op("hippodrome::attention_fused_backward", mutates_args=(), device_types="cuda")
@announced("attention's backward")
@on_its_device
def _fused_backward(
    d_y: Tensor, d_lse: Tensor | None, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, offsets: Tensor | None, k_offsets: Tensor | None, k_lengths: Tensor | None,
    lists: list[Tensor], code: int, a: int, r: int, tile: int, slots_q: int, slots_k: int,
    scale: float, cap: float, drop: float, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the bias (B, H, Lq, Lk), empty if none is asked for."""
    from hippodrome.ops.attention import _backward as kernels

    call = Call(code, a, r, tile, slots_q, slots_k, scale, cap, drop)
    batch, heads, n_q, width = q.shape
    group, n_k, rows = heads // k.shape[1], k.shape[2], batch * heads
    d_q, d_k, d_v, d_bias = _gradients(q, k, bias, of_bias)
    d_bias.zero_()
    delta = torch.empty_like(lse)
    flags = _flags(call, bias, slopes, offsets, k_lengths, lists)
    D, M, N, ways = _layout(1, q, bias is not None, call)
    # Where a program meets few tiles, a pass over y and d_y more is felt.
    with_delta = tile > 0 and not slots_q and d_lse is None and y.stride() == d_q.stride()
    if not with_delta:
        kernels.dot_products[-(-n_q // 64), rows](
            y, d_y, q if d_lse is None else d_lse, delta, heads, n_q, width, *_strides(y, d_y), D=D, M=64,
            HAS_LSE=d_lse is not None,
        )  # fmt: skip
    part = q.new_empty(rows * slots_q, M, D, dtype=torch.float32)
    plan, grid = _plan(1, M, q, n_q, offsets, lists)
    kernels.gradient_q[grid, rows](
        q, k, v, *_asides(q, bias, slopes, seed), plan, *_members(1, lists, plan), *_ends(plan, offsets, k_offsets, k_lengths),
        d_y, y, lse, delta, d_q, d_bias, part, heads, group, n_q, n_k, n_q, n_k, width, grid, slots_q, scale, cap, drop, a, r,
        *_strides(q, k, v, d_y, d_q), *_bias_strides(bias), T=call.side, D=D, M=M, N=N, D_BIAS=of_bias,
        EVEN=call.even(n_k, offsets, k_lengths), DELTA=with_delta, **flags, **ways,
    )  # fmt: skip
    if slots_q:
        _total(lists[3], part, d_q, heads, n_q, slots_q, M, 0, D, M)
    D, M, N, ways = _layout(2, q, bias is not None, call)
    together = group == 1 or not (slots_k or flags["PER_HEAD"])
    many = k.shape[1] if together else heads
    to_k, to_v = (d_k, d_v) if together else (k.new_empty(batch, heads, n_k, width, dtype=torch.float32) for _ in "kv")
    part = q.new_empty(batch * many * slots_k * 2, N, D, dtype=torch.float32)
    plan, grid = _plan(2, N, q, n_k, k_offsets, lists)
    kernels.gradient_kv[grid, batch * many](
        q, k, v, *_asides(q, bias, slopes, seed), plan, *_members(2, lists, plan), *_ends(plan, offsets, k_offsets, k_lengths),
        d_y, lse, delta, to_k, to_v, part, heads, group, n_q, n_k, n_q, n_k, width, grid, slots_k, scale, cap, drop, a, r,
        *_strides(q, k, v, d_y, to_k), *_bias_strides(bias), T=call.side, D=D, M=M, N=N, GROUPED=together,
        EVEN=call.even(n_q, offsets, k_lengths), **flags, **ways,
    )  # fmt: skip
    if slots_k:
        _total(lists[7], part, to_k, many, n_k, slots_k, 2 * N, 0, D, N)
        _total(lists[7], part, to_v, many, n_k, slots_k, 2 * N, N, D, N)
    if not together:
        d_k, d_v = (t.view(batch, -1, group, n_k, width).sum(2).to(k.dtype) for t in (to_k, to_v))
    return d_q, d_k, d_v, d_bias


def _total(
    joins: Tensor, part: Tensor, out: Tensor, heads: int, n: int, slots: int, stride: int, offset: int, D: int, M: int
) -> None:
    from hippodrome.ops.attention import _backward as kernels

    kernels.total[joins.shape[1], out.shape[0] * heads](
        joins, part, out, heads, n, out.shape[3], joins.shape[1], slots, stride, offset, *_strides(out), D=D, M=M,
        PER_HEAD=joins.shape[0] > 1,
    )  # fmt: skip


def _gradients(q: Tensor, k: Tensor, bias: Tensor | None, of_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*q.shape[:3], k.shape[2]) if of_bias else (0,)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape), q.new_empty(shape, dtype=torch.float32)


@_fused_backward.register_fake
def _(d_y: Any, d_lse: Any, y: Any, lse: Any, q: Tensor, k: Tensor, v: Any, bias: Tensor | None, *rest: Any) -> Any:
    return _gradients(q, k, bias, rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, lists = inputs[:10]
    ctx.numbers = inputs[10:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors, *lists)


def _grad(ctx: Any, d_y: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    y, lse, *rest = ctx.saved_tensors
    tensors, lists = rest[:9], rest[9:]
    bias = tensors[3]
    of_bias = bias is not None and ctx.needs_input_grad[3]
    d_y = torch.zeros_like(y) if d_y is None else _lines(d_y)
    d_lse = None if d_lse is None else d_lse.contiguous()
    *grads, d_bias = torch.ops.hippodrome.attention_fused_backward(d_y, d_lse, y, lse, *tensors, lists, *ctx.numbers, of_bias)
    none = [None] * len(lists)
    return *grads, d_bias.to(bias.dtype) if of_bias else None, *[None] * 5, none, *[None] * len(ctx.numbers)


_fused.register_autograd(_grad, setup_context=_save)


def _pairs(q: Tensor, k: Tensor, lists: list[Any], code: int, a: int, r: int, tile: int) -> int:
    """Pairs of a query and a key that are worked on: those of kept tiles, or within an interval's triangle or band."""
    rows, n_q, n_k = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if code in (BUTTERFLY, CAUSAL_BUTTERFLY):
        return rows * a * a * _butterfly_tiles((n_k - n_q) // a, -(-n_k // a), r, code == CAUSAL_BUTTERFLY)
    if lists:
        heads = lists[0].shape[0]
        return q.shape[0] * lists[1].shape[0] * tile * tile * (1 if heads > 1 else q.shape[1])
    triangle = n_q * n_k - n_q * (n_q - 1) // 2 if n_k >= n_q else n_k * (n_k + 1) // 2
    if code == CODES[Full]:
        return rows * n_q * n_k
    bound = {CODES[Window]: n_q * (a + r), CODES[Chunk]: n_q * (a + 1) // 2}.get(code, triangle)
    return rows * min(bound, triangle if not r else n_q * n_k)


def _butterfly_tiles(first: int, n: int, powers: int, causal: bool) -> int:
    """Tiles that rows first, ..., n - 1 of a flat butterfly keep."""
    bits = [1 << s for s in range(n.bit_length()) if powers >> s & 1]
    return sum(1 + sum((i ^ bit) < (i if causal else n) for bit in bits) for i in range(first, n))


def _flops(q: Any, k: Any, v: Any, bias: Any, slopes: Any, seed: Any, offsets: Any, k_offsets: Any, k_lengths: Any, lists: Any, code: int, a: int, r: int, tile: int, *rest: Any, **out: Any) -> int:  # fmt: skip # noqa: E501
    """Two products, two a multiply-add. Packs are counted as if one document."""
    return 4 * q.shape[3] * _pairs(q, k, lists, code, a, r, tile)


def _flops_backward(d_y: Any, d_lse: Any, y: Any, lse: Any, *rest: Any, **out: Any) -> int:
    """Seven products: scores and the weights' gradients are made twice, so that no sum has two owners."""
    return 7 * _flops(*rest) // 2


count_flops({torch.ops.hippodrome.attention_fused: _flops, torch.ops.hippodrome.attention_fused_backward: _flops_backward})
