"""add_norm on the GPU: one kernel, without gradients. It is in `_kernels`, imported when the first CUDA tensor arrives."""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import announced
from hippodrome.ops.add_norm import add_norm

MOST_WIDTH = 16384
"""Widest row that one program holds in registers."""


def _why_not(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool = True) -> str | None:
    if not x.is_cuda:
        return f"the tensors are on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.dtype == delta.dtype == weight.dtype:
        return f"x, delta and weight must be of one dtype of at most 32 bits, not {x.dtype}, {delta.dtype}, {weight.dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast computes norms in float32"
    if x.dim() != 2 or x.shape != delta.shape:
        return f"x and delta must be (B, D), not {tuple(x.shape)} and {tuple(delta.shape)}"
    if x.shape[1] > MOST_WIDTH:
        return f"rows are {x.shape[1]} wide, and at most {MOST_WIDTH} fit"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, delta, weight, bias)):
        return "a gradient is wanted"
    return None


@add_norm.backend("triton", why_not=_why_not)
def _triton(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool = True
) -> tuple[Tensor, Tensor]:
    return torch.ops.hippodrome.add_norm(x, delta, weight, bias, eps, centred)


@torch.library.custom_op("hippodrome::add_norm", mutates_args=())
@announced("add_norm")
def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    from hippodrome.ops.add_norm import _kernels

    with torch.cuda.device_of(x):
        return _kernels.launch(x, delta, weight, bias, eps, centred)


@_add_norm.register_fake
def _(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
