"""scan on the GPU: chunks side by side, forward and backward. The kernels are in `_kernels`, imported when first needed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops._op import announced, on_its_device
from hippodrome.ops.scan import arguments, in_one_dtype, scan
from hippodrome.ops.scan.chunked import scan_flops

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _why_not(a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> str | None:
    if b.device.type != "cuda":
        return f"the tensors are on {b.device.type}"
    return None if HAS_TRITON else "triton is not installed"


@scan.backend("triton", why_not=_why_not)
def _triton(a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    return torch.ops.hippodrome.scan_fused(*in_one_dtype(*arguments(a, b, state)), reverse).to(b.dtype)


@torch.library.custom_op("hippodrome::scan_fused", mutates_args=(), device_types="cuda")
@announced("scan")
@on_its_device
def _fused(a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
    """All x (B, L, N) of a (B or 1, L or 1, N), b (B, L, N) and before (B, N), all of one dtype."""
    from hippodrome.ops.scan import _kernels

    return _kernels.forward(a, b, before, reverse)


@_fused.register_fake
def _(a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@torch.library.custom_op("hippodrome::scan_fused_backward", mutates_args=(), device_types="cuda")
@announced("scan's backward")
@on_its_device
def _fused_backward(d_x: Tensor, a: Tensor, before: Tensor, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and before."""
    from hippodrome.ops.scan import _kernels

    return _kernels.backward(d_x, a, before, x, reverse)


@_fused_backward.register_fake
def _(d_x: Tensor, a: Tensor, before: Tensor, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), torch.empty_like(x), before.new_empty(before.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, before, ctx.reverse = inputs
    ctx.save_for_backward(a, before, output)


def _grad(ctx: Any, d_x: Tensor) -> Any:
    return *torch.ops.hippodrome.scan_fused_backward(d_x, *ctx.saved_tensors, ctx.reverse), None


_fused.register_autograd(_grad, setup_context=_save)
count_flops({torch.ops.hippodrome.scan_fused: scan_flops, torch.ops.hippodrome.scan_fused_backward: scan_flops})
