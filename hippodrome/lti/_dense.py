"""Long products with real dense matrices A (H, N, N), one a channel, in log2(L) squarings of A and without L states.

The matrices are squared in their own dtype, best float64; what they multiply keeps its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def orbit(matrix: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[x, A x, ... A^(count-1) x] side by side, (H, N, count B) from x (H, N, B), and A^(2^k) for the first 2^k >= count."""
    width = x.shape[-1] * count
    while x.shape[-1] < width:
        x, matrix = torch.cat([x, matrix.to(x.dtype) @ x], -1), matrix @ matrix
    return x[..., :width], matrix


def answer(matrix: Tensor, row: Tensor, x: Tensor, length: int) -> Tensor:
    """row A^l x for l < length: (B, H, length) from row (H, N) and x (H, N, B)."""
    step = _step(length)
    fine, leap = orbit(matrix.mT, row.unsqueeze(-1), step)
    coarse, _ = orbit(leap.mT, x, -(-length // step))
    y = torch.einsum("hnib,hnj->bhij", coarse.unflatten(-1, (-1, x.shape[-1])), fine.to(x.dtype))
    return y.flatten(-2)[..., :length]


def driven(matrix: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """sum_l A^(L-1-l) b u_l: (H, N, B) from b (H, N) and u (B, H, L). The sums within chunks, then pairs of chunks joined."""
    step = _step(u.shape[-1])
    fine, matrix = orbit(matrix, b.unsqueeze(-1), step)
    backwards = F.pad(u.flip(-1), (0, -u.shape[-1] % step)).unflatten(-1, (-1, step))
    x = torch.einsum("bhij,hnj->hnib", backwards, fine.to(u.dtype))
    while x.shape[2] > 1:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2))
        x, matrix = x[:, :, ::2] + torch.einsum("hnm,hmib->hnib", matrix.to(x.dtype), x[:, :, 1::2]), matrix @ matrix
    return x.squeeze(2)


def power(matrix: Tensor, x: Tensor, count: Tensor, longest: int) -> Tensor:
    """A^count x for columns x (H, N, B) and int64 counts (B,) of at most `longest`, bit by bit."""
    for bit in range(longest.bit_length()):
        x = torch.where((count >> bit) & 1 == 1, matrix.to(x.dtype) @ x, x)
        matrix = matrix @ matrix
    return x


def _step(length: int) -> int:
    """The power of two nearest the square root of `length`."""
    return 1 << (length.bit_length() // 2)
