"""How the kernels are launched: tiles, warps, grids, and the arguments that are made of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippodrome.ops.attention._call import BUTTERFLY, CAUSAL_BUTTERFLY, CODES, Call
from hippodrome.patterns import Chunk, Window

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
    64: {16: ((16, 1, 4, 128), (16, 1, 4, 128), (16, 1, 4, 128)), 32: ((64, 2, 2, 168), (32, 2, 3, 128), (32, 2, 3, 168)),
         64: ((64, 4, 3, 128), (64, 4, 2, 128), (32, 4, 3, 128)), 128: ((64, 8, 3, 128), (64, 8, 3, 128), (32, 8, 3, 128))},
    128: {16: ((32, 2, 3, 168), (32, 2, 3, 168), (32, 2, 3, 255)), 32: ((32, 2, 3, 255), (32, 2, 3, 255), (32, 2, 3, 255)),
          64: ((32, 4, 3, 168), (32, 4, 2, 168), (32, 4, 3, 255)), 128: ((64, 8, 2, 128), (64, 8, 3, 255), (64, 8, 2, 255))},
}  # fmt: skip
"""Padded width -> the side of the tiles that are met -> of the other side, warps, stages and registers, of the same, in half
precision. Left alone, the compiler takes a few registers more than let one program more be at work."""


def layout(role: int, q: Tensor, biased: bool, call: Call) -> tuple[int, int, int, dict[str, Any]]:
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


def pieces(
    q: Tensor, k: Tensor, M: int, call: Call, slots: int, lists: list[Tensor], offsets: Tensor | None
) -> tuple[int, int, Tensor]:  # fmt: skip
    """Pieces of the keys, slots for them, and which of them make a tile."""
    if call.tile:
        return 1, slots, lists[3] if lists else q
    n_q, rows, tiles = q.shape[2], q.shape[0] * q.shape[1], -(-q.shape[2] // M)
    pieces = 1 if n_q > FEW or offsets is not None else min(PROGRAMS // (rows * tiles), k.shape[2] // PIECE)
    if pieces < 2:
        return 1, 0, q
    at = torch.arange(tiles, device=q.device, dtype=torch.int32)
    return pieces, tiles * pieces, torch.stack((at, at * pieces, (at + 1) * pieces), 1)[None]


def programs(role: int, size: int, q: Tensor, n: int, offsets: Tensor | None, lists: list[Tensor]) -> tuple[Tensor, int]:
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


def members(role: int, lists: list[Tensor], other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not lists:
        return other, other, other
    first = 4 if role == 2 else 0
    return lists[first + 1], lists[first + 2], lists[8]


def asides(q: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None) -> tuple[Tensor, ...]:
    """Absent tensors as q, which no kernel reads in their place."""
    return tuple(q if t is None else t for t in (bias, slopes, seed))


def ends(other: Tensor, *ends: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(other if t is None else t for t in ends)


def bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if bias is None else tuple(bias.stride())


def switches(
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


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of each: of a sequence, of a head, of a token."""
    return tuple(size for t in tensors for size in t.stride()[:3])
