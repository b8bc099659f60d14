"""attention_step: attention of one token to itself and to what a state of S slots remembers.

    o_h = sum_s p_s v_s,    p = softmax over the filled slots s of (scale q_h . k_s)

The key and value of the token at position p lie in slot p % S, where they replace those of position p - S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.ops.attention import attention
from hippodrome.patterns import Causal


@Op
def attention_step(
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
    """Outputs (B, H, K) in q's dtype, and keys and values with the token's own among them.

    q (B, H, K), k, v (B, G, K) of the token at `position` (B,) int64, H a multiple of G; keys, values (B, G, S, K), in any
    real dtype, are consumed: backends write them in place where no gradient is wanted. `frequency` (R,): q and k first turn by
    position times frequency, as in `turn`. `scale` is 1/sqrt(K) by default. Scores and softmax are at least float32.
    """
    if frequency is not None:
        q, k = (turn(x, position[:, None, None] * frequency) for x in (q, k))
    slot = (position % keys.shape[2])[:, None, None, None].expand(*k.shape[:2], 1, k.shape[2])
    keys = keys.scatter(2, slot, k.to(keys.dtype)[:, :, None])
    values = values.scatter(2, slot, v.to(values.dtype)[:, :, None])
    y = attention.reference(
        q[:, :, None],
        keys,
        values,
        Causal(),
        q_position=position[:, None],
        k_position=slot_positions(position, keys.shape[2]),
        scale=scale,
    )
    return y.squeeze(2), keys, values


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding: the first 2R channels of x (..., K), half-split pairs, turned by `angle` (..., R), at least float32.

    Channel j < R turns with j + R. Computed in at least float32, returned in x's dtype.
    """
    half = angle.shape[-1]
    cos, sin = angle.cos(), angle.sin()
    real = torch.promote_types(x.dtype, torch.float32)
    a, b = x[..., :half].to(real), x[..., half : 2 * half].to(real)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], -1)


def slot_positions(newest: Tensor, slots: int) -> Tensor:
    """(B, S): the position whose key a slot holds when `newest` (B,) was written last; negative in an empty slot."""
    newest = newest[:, None]
    return newest - (newest - torch.arange(slots, device=newest.device)) % slots


# Backends register themselves; the reference must exist first.
from hippodrome.ops.attention_step import cpu as _cpu  # noqa: E402, F401
from hippodrome.ops.attention_step import triton as _triton  # noqa: E402, F401
