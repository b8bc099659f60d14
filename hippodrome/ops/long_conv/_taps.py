"""What all paths on a GPU share: taps as one sequence over lags, the layouts they read and write, what they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VECTOR = 16
"""Elements to which lengths and strides are rounded, so that loads are whole vectors (and Triton knows it)."""


@dataclass(frozen=True)
class Taps:
    """kernel (H, K), kernel_rev (H, K') or None, skip (H,) or None; neither kernel longer than the sequences.

    Lag l > 0 has tap kernel[l], lag l < 0 has kernel_rev[-l], and lag 0 the sum of both and the skip.
    """

    kernel: Tensor
    kernel_rev: Tensor | None = None
    skip: Tensor | None = None

    def lags(self, transposed: bool = False) -> tuple[int, int]:
        """The least and the greatest lag; transposed: of the mirror image."""
        ahead = self.kernel.shape[1] - 1
        back = 0 if self.kernel_rev is None else self.kernel_rev.shape[1] - 1
        return (-ahead, back) if transposed else (-back, ahead)

    def channels(self, which: slice) -> Taps:
        """The taps of some channels."""
        rev, skip = self.kernel_rev, self.skip
        return Taps(self.kernel[which], None if rev is None else rev[which], None if skip is None else skip[which])

    def sequence(self, first: int, last: int) -> Tensor:
        """The taps of lags first to last, (H, lags) in float32; zero where there is none."""
        taps = torch.zeros(self.kernel.shape[0], last + 1 - first, device=self.kernel.device)
        taps[:, -first : self.kernel.shape[1] - first] = self.kernel
        if self.kernel_rev is not None:
            taps[:, 1 - self.kernel_rev.shape[1] - first : 1 - first] += self.kernel_rev.flip(1)
        if self.skip is not None:
            taps[:, -first] += self.skip
        return taps


class Wanted(NamedTuple):
    """Which gradients a backward is to make: of u and the gate in front, of all taps, of the gate behind."""

    inputs: bool
    taps: bool
    post: bool


class Gradients(NamedTuple):
    """du, dpre, dpost; lags (H, lags) in float32, the gradient of the taps over lags. None where not wanted."""

    u: Tensor | None
    pre: Tensor | None
    post: Tensor | None
    lags: Tensor | None


def operand(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """What the tensor cores multiply, and how. float16 goes as tf32, of equal mantissa: gated inputs and taps may overflow."""
    return {
        torch.bfloat16: (torch.bfloat16, "tf32"),
        torch.float16: (torch.float32, "tf32"),
        torch.float32: (torch.float32, "tf32x3"),
    }[dtype]


SCRATCH = 1 << 26
"""Bytes of intermediate results that a call may always have at a time."""


def scratch(u: Tensor) -> int:
    """Bytes of intermediate results at a time: the peak stays at a fifth of what transforms of all rows at once need, in
    float32 at a quarter."""
    return max(SCRATCH, u.numel() * (3 if u.element_size() == 2 else 2))


def vectors(t: Tensor, length: int) -> Tensor:
    """t (B, H, L) with time contiguous and rows of whole vectors up to `length`: itself, or a copy padded by zeros."""
    whole = t.shape[-1] == length and t.stride(-1) == 1 and all(s % VECTOR == 0 for s in t.stride()[:2])
    return t if whole and t.data_ptr() % VECTOR == 0 else F.pad(t, (0, length - t.shape[-1])).contiguous()


def along_time(t: Tensor | None) -> Tensor | None:
    """t with time contiguous."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def empty(like: Tensor) -> Tensor:
    """An output in the layout of `like`, or contiguous if time is not contiguous there."""
    out = torch.empty_like(like)
    return out if out.stride(-1) == 1 else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def row_strides(*tensors: Tensor) -> list[int]:
    """Strides over batch and channels."""
    return [s for t in tensors for s in t.stride()[:2]]


def up(n: int, unit: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // unit) * unit


def power(n: int, least: int, most: int) -> int:
    """The power of two from n on, within bounds."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))
