"""cross_entropy: the loss of a language model straight from hidden vectors, so that all logits need never exist at once.

sum over t of  logsumexp_v(w_v . h_t) - w_(target_t) . h_t
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hippodrome.ops._op import Op

IGNORE = -100
CHUNK_LOGITS = 1 << 24
"""Logits held at once by the chunked backend: 64 MiB in fp32."""
COMPILED_LOGITS = 1 << 32
"""Logits that a compiled model holds at once: 8 GiB in bf16, and as much for their gradient."""


@Op
def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of nats, count of targets counted), a scalar fp32 and a scalar int64.

    hidden (..., D); weight (V, D); targets (...) int64, `IGNORE` where nothing is asked. The product runs in the dtype of
    autocast, softmax statistics in fp32.
    """
    logits = F.linear(hidden, weight).flatten(0, -2)
    nats = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return nats, (targets != IGNORE).sum()


def walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of nats, and its gradients of hidden (N, D) and, fp32, of weight (V, D); those not needed are empty.

    Walks over tokens a slice of `rows` at a time and makes the gradients while the slice's logits are at hand.
    """
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=torch.float32, device=weight.device)
    nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        log_p = torch.log_softmax((hidden[part] @ weight.T).float(), -1)
        asked = targets[part] != IGNORE
        index = targets[part].clamp(min=0).unsqueeze(-1)
        nats -= torch.where(asked, log_p.gather(-1, index).squeeze(-1), 0).sum()
        if not (need_hidden or need_weight):
            continue
        d_logits = log_p.exp_().scatter_add_(-1, index, torch.full_like(log_p[:, :1], -1.0))
        d_logits = (d_logits * asked.unsqueeze(-1)).to(hidden.dtype)
        if need_hidden:
            d_hidden[part] = d_logits @ weight
        if need_weight:
            d_weight += (d_logits.T @ hidden[part]).float()
    return nats, d_hidden, d_weight


_walk = torch.library.custom_op("hippodrome::chunked_nats", walk, mutates_args=())


@_walk.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), d_hidden, d_weight


class _Chunked(torch.autograd.Function):
    """A leaf of a compiled graph, with gradients that are there after the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        ctx.needs = ctx.needs_input_grad[:2]
        nats, d_hidden, d_weight = torch.ops.hippodrome.chunked_nats(hidden, weight, targets, rows, *ctx.needs)
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        dx = d_hidden * scale.to(d_hidden.dtype) if ctx.needs[0] else None
        return dx, d_weight * scale if ctx.needs[1] else None, None, None


def _why_not(hidden: Tensor, weight: Tensor, targets: Tensor) -> str | None:
    if targets.numel() * weight.shape[0] <= CHUNK_LOGITS:
        return f"all {targets.numel()} x {weight.shape[0]} logits fit at once"
    if hidden.dtype == torch.float64:
        return "float64 runs in the reference"
    if torch.compiler.is_compiling() and targets.numel() * weight.shape[0] <= COMPILED_LOGITS:
        return f"compiled, up to {COMPILED_LOGITS} logits are faster at once"
    return None


@cross_entropy.backend("chunked", why_not=_why_not)
def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = max(1, CHUNK_LOGITS // weight.shape[0])
    if not torch.is_grad_enabled():
        # A Function is told what requires a gradient, not whether one is wanted.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device, enabled=False):
        nats = _Chunked.apply(hidden.flatten(0, -2).to(dtype), weight.to(dtype), targets.flatten(), rows)
    return nats, (targets != IGNORE).sum()
