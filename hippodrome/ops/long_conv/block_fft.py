"""The block FFT of H3: a discrete Fourier transform as matrix products with small dense matrices.

With N = N1 N2 points in a matrix of N1 rows and N2 columns, x[N2 a + b] at [a, b],

    X[f + N1 g] = sum_b exp(-2 pi i b g / N2) exp(-2 pi i b f / N) sum_a exp(-2 pi i a f / N1) x[N2 a + b],

a product with the matrix of N1 points, a twist, and a transform of N2 points, which goes on in the same way until every factor
is at most `radix`: O(N radix log N / log radix) operations, all of them such as tensor cores do.

`block_fft` is the plain form, for reading and for tests. The partitioned path (_partitioned.py) does the first of these steps
alone, with the dense `matrices` below: blocks of T real numbers to T of the 4 T bins of the block padded by zeros. In place of
the second step it has Toeplitz products across the blocks: for as few blocks as there are, they cost less than transforms,
and need neither twist nor padding. The fused path (_block_fft.py) does two steps on the chip, with the tables of `steps`.
Source: H3 (Dao, Fu et al., ICLR 2023), section 4.1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

RADIX = 16
"""Points of the largest matrix: a tile of the tensor cores."""


def block_fft(x: Tensor, n: int | None = None, *, radix: int = RADIX) -> Tensor:
    """torch.fft.fft(x, n) of real or complex x (..., L) padded by zeros or cut to n points, by default L; (..., n) complex.

    n may be any number; a prime factor above radix costs one dense product. Twists and matrices are made in float64.
    """
    n = x.shape[-1] if n is None else n
    x = x[..., :n].to(torch.promote_types(x.dtype, torch.complex64))
    x = torch.nn.functional.pad(x, (0, n - x.shape[-1]))
    first = _factor(n, radix)
    rows = _dft(first, x) @ x.unflatten(-1, (first, n // first))
    if first == n:
        return rows.flatten(-2)
    f, b = torch.arange(first, device=x.device).unsqueeze(1), torch.arange(n // first, device=x.device)
    columns = block_fft(rows * _root(f * b, n, x), radix=radix)
    return columns.transpose(-1, -2).flatten(-2)


def _factor(n: int, radix: int) -> int:
    """n itself if it is small, else its greatest factor up to radix, else its least prime factor."""
    if n <= radix:
        return n
    small = next((r for r in range(radix, 1, -1) if n % r == 0), None)
    return small or next((p for p in range(radix + 1, math.isqrt(n) + 1) if n % p == 0), n)


def _dft(n: int, like: Tensor) -> Tensor:
    f = torch.arange(n, device=like.device)
    return _root(f.unsqueeze(1) * f, n, like)


def _root(power: Tensor, n: int, like: Tensor) -> Tensor:
    """exp(-2 pi i power / n) in like's dtype."""
    angle = (power % n).double() * (-2 * math.pi / n)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)


@functools.lru_cache(maxsize=16)
def matrices(t: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(2 t, t) twice: exp(-pi i (f + 1/2) s / t) as rows re, im of each frequency; and rows that make the block again."""
    f, s = torch.arange(t, device=device).unsqueeze(1), torch.arange(t, device=device)
    angle = ((2 * f + 1) * s % (4 * t)).double() * (math.pi / (2 * t))
    both = torch.stack([angle.cos(), -angle.sin()], 1).view(2 * t, t)
    return both.to(dtype), (both / t).to(dtype)


@functools.lru_cache(maxsize=16)
def steps(n1: int, n2: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tables of a transform of n1 n2 real points, point t turned by exp(pi i t / 2 n1 n2); re, im; unitary (_block_fft).

    (2, n1, n1): from rows a to frequencies f; (2, n1, n1): its way back to real numbers; (2, n1, n2): the twist; (2, n2, n2):
    from columns s to frequencies g.
    """
    f, a = torch.arange(n1).unsqueeze(1), torch.arange(n1)
    s, g = torch.arange(n2).unsqueeze(1), torch.arange(n2)

    def both(quarters: Tensor, n: int, scale: float) -> Tensor:
        angle = (quarters % (4 * n)).double() * (-math.pi / (2 * n))
        return torch.stack([angle.cos(), angle.sin()]) * scale

    into = both((4 * f - 1) * a, n1, n1**-0.5)
    back = torch.stack([into[0].T, -into[1].T])
    twist, second = both((4 * f - 1) * g, n1 * n2, 1), both(4 * s * g, n2, n2**-0.5)
    into, back, twist, second = (t.to(device, dtype).contiguous() for t in (into, back, twist, second))
    return into, back, twist, second
