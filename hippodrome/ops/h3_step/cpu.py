"""h3_step on the CPU: one pass that turns the modes in place and one that reads them out."""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops.h3_step import ages, h3_step


def _why_not(q: Tensor, *rest: Tensor) -> str | None:
    state = rest[-1]
    if state.device.type != "cpu":
        return f"the tensors are on {state.device.type}"
    if state.dtype not in (torch.float32, torch.float64):
        return f"the state is stored in {state.dtype}"
    return None


@h3_step.backend("cpu", why_not=_why_not)
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor,
    modes: Tensor,
    weights: Tensor,
    skip: Tensor | None,
    ring: Tensor,
    position: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    real, in_place = state.dtype, not torch.is_grad_enabled()
    slot = (position % ring.shape[1])[:, None, None].expand(-1, 1, ring.shape[2])
    new = k.to(ring.dtype)[:, None]
    ring = ring.scatter_(1, slot, new) if in_place else ring.scatter(1, slot, new)
    filtered = (taps[ages(position, ring.shape[1])] * ring).sum(1)
    heads = modes.shape[0]
    queries, keys, values = (x.to(real).unflatten(1, (heads, -1)).transpose(1, 2) for x in (q, filtered, v))
    driven = keys[:, :, None] * values[:, None]
    before = torch.view_as_complex(state)
    z = torch.view_as_real(before.mul_(modes) if in_place else before * modes)
    z[..., 0] += driven.unsqueeze(-1)
    # Re(weights z), pair by pair: the conjugate carries the sign of the imaginary product.
    s = (z * torch.view_as_real(weights.conj().resolve_conj())).sum((-2, -1))
    if skip is not None:
        s = s + skip * driven
    y = (queries[:, :, None] * s).sum(1).transpose(1, 2).flatten(1)
    return y.to(q.dtype), ring, z
