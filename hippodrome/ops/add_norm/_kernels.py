"""The kernel of add_norm: a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x,
    delta,
    weight,
    bias,
    total,
    normed,
    width,
    eps,
    D_BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * width
    d = tl.arange(0, D_BLOCK)
    real = d < width
    summed = tl.load(x + at + d, real, 0.0).to(tl.float32) + tl.load(delta + at + d, real, 0.0).to(tl.float32)
    # The norm is of what the stream holds, rounded.
    kept = summed.to(total.dtype.element_ty)
    tl.store(total + at + d, kept, real)
    row = kept.to(tl.float32)
    if CENTRED:
        row = tl.where(real, row - tl.sum(row, 0) / width, 0.0)
    out = row * tl.rsqrt(tl.sum(row * row, 0) / width + eps) * tl.load(weight + d, real, 0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + d, real, 0.0).to(tl.float32)
    tl.store(normed + at + d, out.to(normed.dtype.element_ty), real)


def launch(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """x, delta (B, D) -> their sum and its norm."""
    x, delta = x.contiguous(), delta.contiguous()
    batch, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _kernel[(batch,)](
        x,
        delta,
        weight,
        weight if bias is None else bias,
        total,
        normed,
        width,
        eps,
        D_BLOCK=block,
        CENTRED=centred,
        HAS_BIAS=bias is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return total, normed
