"""attention: softmax attention over the keys that a pattern shows to each query.

    o_t = sum_s p_ts v_s,    p_ts = softmax over visible s of (scale q_t . k_s)

A query that sees no key gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._op import Op
from hippodrome.patterns import Causal, Full, Pattern


def visible(pattern: Pattern, q: Tensor, k: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
    """The bool mask (1 or B, H or 1, Lq, Lk) of a call; keys at a negative position are hidden from all."""
    n_q, n_k = q.shape[2], k.shape[2]
    q_at = torch.arange(n_q, device=q.device)[None] if q_position is None else q_position
    k_at = torch.arange(n_k, device=q.device)[None] if k_position is None else k_position
    heads = torch.arange(q.shape[1], device=q.device)[None, :, None, None]
    mask = pattern.visible(heads, q_at[:, None, :, None], k_at[:, None, None, :])
    return mask & (k_at >= 0)[:, None, None, :]


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Outputs (B, H, Lq, K) in q's dtype.

    q (B, H, Lq, K); k, v (B, G, Lk, K) with H a multiple of G (grouped queries); positions (B, L) int64, by default 0, 1, ...
    from the first query and key on; a key at a negative position is hidden. `scale` is 1/sqrt(K) by default; `dropout` is the
    share of weights dropped. Scores and softmax are at least float32.
    """
    real = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    keys, values = (t.to(real).repeat_interleave(repeat, 1) for t in (k, v))
    mask = visible(pattern, q, k, q_position, k_position)
    scores = q.to(real) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # A finite floor keeps rows that see nothing free of NaN, also in their gradients; their weights are then zeroed.
    p = torch.softmax(scores.masked_fill(~mask, torch.finfo(real).min), -1).masked_fill(~mask, 0)
    return (F.dropout(p, dropout) @ values).to(q.dtype)


def _why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **_: object) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    return None


@attention.backend("sdpa", why_not=_why_not)
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch's scaled_dot_product_attention: causal without a mask where positions allow it, else with one."""
    grouped: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
    plain = q_position is None and k_position is None
    if plain and isinstance(pattern, Full):
        return F.scaled_dot_product_attention(q, k, v, **grouped)
    if plain and isinstance(pattern, Causal) and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
    mask = visible(pattern, q, k, q_position, k_position)
    # Rows that see nothing would be NaN: they look at everything here and are zeroed after.
    blind = ~mask.any(-1, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, **grouped)
    return y.masked_fill(blind, 0)
