"""torch's scaled_dot_product_attention: without a mask where the pattern and the positions allow it, else with one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops.attention import Places, attention
from hippodrome.patterns import Causal, Full, Pattern

_MASK = 1 << 31
"""Bytes of the largest mask that is written down: above, the reference works in slices."""


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    **places: Any,
) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    if return_lse:
        return "it does not return the lse"
    if softcap is not None:
        return "it has no softcap"
    if dropout and seed is not None:
        return "its dropout takes no seed"
    given = {"bias": bias is not None and bias.dtype != q.dtype, "slopes": slopes is not None}
    given["counts of keys"] = pattern.count_tile is not None
    for name in (name for name, wide in given.items() if wide and q.dtype not in (torch.float32, torch.float64)):
        return f"{name} would be rounded to {q.dtype}"
    size = _mask_bytes(q, k, pattern, bias, slopes, given["counts of keys"], **places)
    return f"a mask of {size / 2**30:.1f} GiB does not fit memory" if size > _MASK else None


@attention.backend("sdpa", why_not=_why_not)
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    **places: Any,
) -> Tensor:
    grouped: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
    if scale is not None and scale <= 0:
        # torch's causal kernels hide scores before they scale them: NaN where the scale is negative or 0.
        q, grouped["scale"] = q * (-1 if scale < 0 else 0), -scale or 1.0
    plain = bias is None and slopes is None and pattern.count_tile is None
    if plain and not _needs_mask(q, k, pattern, **places):
        # No positions are made here: on a GPU each would be a kernel. A single query is the last: it sees every key.
        square = type(pattern) is Causal and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, **grouped)
    at = Places.of(q, k, **places)
    added = _added(q, at, pattern, bias, slopes)
    mask = at.visible(pattern, q.shape[1])
    if bias is not None:
        mask = mask & (bias > -torch.inf)
    # Rows that see nothing would be NaN: they look at everything here and are zeroed after.
    blind = ~mask.any(-1, keepdim=True)
    if added is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | blind, **grouped)
    else:
        added = torch.where(blind, 0, added.masked_fill(~mask, -torch.inf)).expand(*q.shape[:3], k.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=added, **grouped)
    return y.masked_fill(blind, 0)


def _needs_mask(q: Tensor, k: Tensor, pattern: Pattern, **places: Tensor | None) -> bool:
    if any(t is not None for t in places.values()):
        return True
    # torch's causal flag aligns the first query with the first key, ours the last with the last.
    return type(pattern) is not Full and not (type(pattern) is Causal and q.shape[2] in (1, k.shape[2]))


def _mask_bytes(
    q: Tensor, k: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counts: bool, **places: Tensor | None
) -> int:
    """Bytes of the mask that a call needs; 0: none."""
    added = bias is not None or slopes is not None or counts
    if not added and not _needs_mask(q, k, pattern, **places):
        return 0
    of_batch = any(t is not None for t in places.values()) or (bias is not None and bias.ndim == 4 and bias.shape[0] > 1)
    of_heads = pattern.by_head or slopes is not None or (bias is not None and bias.ndim > 2 and bias.shape[-3] > 1)
    rows = (q.shape[0] if of_batch else 1) * (q.shape[1] if of_heads else 1)
    return rows * q.shape[2] * k.shape[2] * (q.element_size() if added else 1)


def _added(q: Tensor, at: Places, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None) -> Tensor | None:
    """What is added to the scores, in q's dtype; None: nothing."""
    heads, q_at, k_at = at.pairs(q.shape[1])
    terms = [] if bias is None else [bias.to(q.dtype)]
    if slopes is not None:
        terms.append(-slopes.to(q.dtype)[:, None, None] * (q_at - k_at).abs())
    count = pattern.count(heads, q_at, k_at)
    if count is not None:
        terms.append(count.to(q.dtype).log())
    return sum(terms[1:], terms[0]) if terms else None
