"""The norms of blocks, and what keeps parameters in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippodrome.ops.add_norm import add_norm
from hippodrome.part import BadInput

Norm = Literal["layer", "rms", "scale", "scalar", "batch"]


class Fp32Parameters(nn.Module):
    """A module whose own parameters and buffers stay fp32 when the model is cast to half precision.

    Decays and time steps near one lose their meaning in bf16, so `model.to(torch.bfloat16)` moves them but never rounds
    them. Submodules are left alone.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == torch.float32
            return tensor.to(moved.device) if narrowed else moved

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_precision, recurse=False)


class ScaleNorm(nn.Module):
    """x / rms(x) times one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, 1e-5) * self.weight


class ScalarNorm(nn.Module):
    """y = scale (x - mean + shift) / std over the last axis, scale and shift one number each.

    The statistics are fp32. Equal channels have no spread to divide by: the variance is kept above 1e-12.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        return (self.scale * (wide - mean + self.shift) * (variance + 1e-12).rsqrt()).to(x.dtype)


class _ContiguousGradient(torch.autograd.Function):
    """x, whose gradient is laid out as x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


class BatchNorm(Fp32Parameters, nn.SyncBatchNorm):
    """Batch norm of (..., D). In one process it is torch's BatchNorm1d."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)
        # Of a gradient that comes in channels first, as from a long convolution, torch's sums on a GPU take 15 times as long.
        return _ContiguousGradient.apply(y)


def build_norm(kind: Norm, d_model: int, eps: float | None = None) -> nn.Module:
    """A norm over the last axis of d_model channels. eps: what is added to the variance; None: as is usual for the norm."""
    if eps is not None and not eps > 0:
        raise BadInput(f"norm_eps is {eps}: it must be above 0, or none")
    if kind == "layer":
        return nn.LayerNorm(d_model, eps=1e-5 if eps is None else eps)
    if kind == "rms":
        return nn.RMSNorm(d_model, eps=1e-6 if eps is None else eps)
    if kind == "batch":
        return BatchNorm(d_model, eps=1e-5 if eps is None else eps)
    if eps is not None:
        raise BadInput(f"norm_eps is {eps}, but the {kind} norm has its own: take the layer, rms or batch norm, or none")
    return ScaleNorm() if kind == "scale" else ScalarNorm()


def add_and_norm(x: Tensor, delta: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta (B, D) and its norm, in one go where there is an op for it; delta None: nothing is added."""
    if delta is None:
        return x, norm(x)
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return (x := x + delta), norm(x)
    assert norm.eps is not None
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    return add_norm(x, delta, norm.weight, bias, norm.eps, centred=isinstance(norm, nn.LayerNorm))
