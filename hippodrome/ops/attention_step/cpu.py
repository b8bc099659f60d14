"""attention_step on the CPU: keys and values in place, and only the slots that some row has filled are read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops.attention_step import attention_step, slot_positions, turn


def _why_not(q: Tensor, *_: object, **__: object) -> str | None:
    return None if q.device.type == "cpu" else f"the tensors are on {q.device.type}"


@attention_step.backend("cpu", why_not=_why_not)
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequency: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if frequency is not None:
        q, k = (turn(x, position[:, None, None] * frequency) for x in (q, k))
    slots = keys.shape[2]
    slot = (position % slots)[:, None, None, None].expand(*k.shape[:2], 1, k.shape[2])
    put = torch.Tensor.scatter if torch.is_grad_enabled() else torch.Tensor.scatter_
    keys = put(keys, 2, slot, k.to(keys.dtype)[:, :, None])
    values = put(values, 2, slot, v.to(values.dtype)[:, :, None])
    filled = slots if torch.compiler.is_compiling() else min(slots, int(position.max()) + 1)
    # The token itself is in its slot, so that no row sees nothing.
    mask = (slot_positions(position, slots)[:, :filled] >= 0)[:, None, None]
    grouped: dict[str, Any] = {"scale": scale, "enable_gqa": k.shape[1] != q.shape[1]}
    query = q[:, :, None].to(keys.dtype)
    y = F.scaled_dot_product_attention(query, keys[:, :, :filled], values[:, :, :filled], attn_mask=mask, **grouped)
    return y.squeeze(2).to(q.dtype), keys, values
