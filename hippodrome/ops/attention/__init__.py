"""attention: softmax attention over the keys that a pattern shows to each query.

    o_i = sum_j p_ij v_j,    p_ij = c_ij e^(s_ij) / sum_j' c_ij' e^(s_ij')    over the keys j that i sees
    s_ij = t tanh(scale q_i . k_j / t) + bias_ij - slope_h |i - j|,           lse_i = ln sum_j c_ij e^(s_ij)

t is the softcap (none: the scores as they are), c how often the pattern counts a key (once). A query that sees no key gives
zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hippodrome.ops._op import Op
from hippodrome.ops.attention._check import check
from hippodrome.ops.attention._philox import kept
from hippodrome.patterns import Pattern

_SCORES = 1 << 25
"""Scores that the reference has in memory at a time: it takes as many queries as that allows, at least one."""


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    k_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Outputs (B, H, Lq, K) in q's dtype, and with `return_lse` also ln of the softmax's sums (B, H, Lq), at least float32.

    q (B, H, Lq, K); k, v (B, G, Lk, K) with H a multiple of G (grouped queries: head h reads h // (H / G)).

    Positions (B or 1, L) int64: by default key j is at j and the queries are the last ones, query i at Lk - Lq + i. A key at a
    negative position is hidden. `offsets` (D + 1,) int: one row of D documents packed behind one another, of which i holds
    tokens offsets[i]:offsets[i + 1]; they do not see each other and default positions start anew in each. `k_offsets`: the same
    of the keys where these are not as many. `k_lengths` (B,) int: keys of row b from k_lengths[b] on are padding, hidden.

    `bias` broadcasts to (B, H, Lq, Lk), -inf hides; `slopes` (H,) float32 take slope x distance off the scores (ALiBi: Press et
    al., 2022); `softcap` bounds the scores before both. `scale` is 1/sqrt(K) by default.

    `dropout` is the share of weights dropped; a weight is kept if philox(seed; j, i, b H + h, 0) is at least that (`_philox`),
    the same ones whatever runs. `seed`: an int or an int64 scalar; None draws one from torch's generator, or leaves it to the
    backend. The lse is of all weights.

    A row that sees nothing has output 0, lse -inf and no gradient. Scores and softmax are at least float32. Where there are
    many scores the reference works in slices of queries and computes each again in the backward pass, keeping nothing
    quadratic.
    """
    real = torch.promote_types(q.dtype, torch.float32)
    if dropout and seed is None:
        seed = torch.randint(2**62, (), device=q.device)
    places = Places.of(q, k, q_position, k_position, offsets, k_offsets, k_lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run: Callable[..., tuple[Tensor, Tensor]] = functools.partial(
        _attend, pattern=pattern, places=places, softcap=softcap, scale=scale, dropout=dropout, seed=seed
    )
    keys, values = k.to(real), v.to(real)
    rows = max(1, _SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, max(1, q.shape[2]), rows):
        some = slice(start, start + rows)
        tall = bias is not None and bias.ndim > 1 and bias.shape[-2] > 1
        given = q[:, :, some].to(real), keys, values, bias[..., some, :] if tall and bias is not None else bias, slopes
        if rows < q.shape[2] and torch.is_grad_enabled():
            parts.append(checkpoint(run, *given, start, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(run(*given, start))
    y = torch.cat([part[0] for part in parts], 2).to(q.dtype)
    return (y, torch.cat([part[1] for part in parts], 2)) if return_lse else y


attention.check(check)


class Places:
    """Where queries and keys stand: positions (B or 1, L), and numbers of documents (1, L) if they are a pack."""

    def __init__(self, q_at: Tensor, k_at: Tensor, q_document: Tensor | None = None, k_document: Tensor | None = None) -> None:
        self.q_at, self.k_at, self.q_document, self.k_document = q_at, k_at, q_document, k_document

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        q_position: Tensor | None = None,
        k_position: Tensor | None = None,
        offsets: Tensor | None = None,
        k_offsets: Tensor | None = None,
        k_lengths: Tensor | None = None,
    ) -> Places:
        """Those of a call, defaults filled in."""
        n_q, n_k = q.shape[2], k.shape[2]
        q_index, k_index = (torch.arange(n, device=q.device) for n in (n_q, n_k))
        if offsets is None:
            q_at = q_index[None] + (n_k - n_q) if q_position is None else q_position
            k_at = k_index[None] if k_position is None else k_position
            return cls(q_at, k_at if k_lengths is None else torch.where(k_index < k_lengths[:, None], k_at, -1))
        k_offsets = offsets if k_offsets is None else k_offsets
        # The number of a token's document is how many documents end at or before it: empty ones are skipped.
        q_document, k_document = (
            torch.searchsorted(ends[1:].contiguous(), index, right=True, out_int32=False)
            for ends, index in ((offsets.long(), q_index), (k_offsets.long(), k_index))
        )
        # Queries end where the keys of their document end.
        behind = (k_offsets[1:] - offsets[1:]).long()[q_document] - k_offsets.long()[q_document]
        q_at = (q_index + behind)[None] if q_position is None else q_position
        k_at = (k_index - k_offsets.long()[k_document])[None] if k_position is None else k_position
        return cls(q_at, k_at, q_document[None], k_document[None])

    def rows(self, some: slice) -> Places:
        """The same of some queries and all keys."""
        document = None if self.q_document is None else self.q_document[:, some]
        return Places(self.q_at[:, some], self.k_at, document, self.k_document)

    def visible(self, pattern: Pattern, heads: int) -> Tensor:
        """The bool mask (1 or B, H or 1, Lq, Lk)."""
        mask = pattern.visible(*self.pairs(heads)) & (self.k_at >= 0)[:, None, None, :]
        if self.q_document is None or self.k_document is None:
            return mask
        return mask & (self.q_document[:, None, :, None] == self.k_document[:, None, None, :])

    def count(self, pattern: Pattern, heads: int) -> Tensor | None:
        """How often each key counts, where a pattern is no set."""
        return pattern.count(*self.pairs(heads))

    def pairs(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Heads, query positions and key positions, which broadcast to (B, H, Lq, Lk)."""
        number = torch.arange(heads, device=self.q_at.device)[None, :, None, None]
        return number, self.q_at[:, None, :, None], self.k_at[:, None, None, :]


def visible(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    k_lengths: Tensor | None = None,
) -> Tensor:
    """The bool mask (1 or B, H or 1, Lq, Lk) of a call; keys at a negative position are hidden from all."""
    return Places.of(q, k, q_position, k_position, offsets, k_offsets, k_lengths).visible(pattern, q.shape[1])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    start: int,
    *,
    pattern: Pattern,
    places: Places,
    softcap: float | None,
    scale: float,
    dropout: float,
    seed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of the queries q (B, H, n, K) from `start` on."""
    batch, heads, n_q, _ = q.shape
    places = places.rows(slice(start, start + n_q))
    with torch.autocast(q.device.type, enabled=False):
        scores = _per_group(q, k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if slopes is not None:
            _, q_at, k_at = places.pairs(heads)
            scores = scores - slopes.to(scores.dtype)[:, None, None] * (q_at - k_at).abs()
        count = places.count(pattern, heads)
        if count is not None:
            scores = scores + count.to(scores.dtype).log()
        p, lse = _softmax(scores.masked_fill(~places.visible(pattern, heads), -torch.inf))
        if dropout:
            assert seed is not None
            index = torch.arange(start, start + n_q, device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
            number = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
            p = p * kept(seed, dropout, *index, number) / (1 - dropout)
        return _per_group(p, v), lse


def _per_group(a: Tensor, b: Tensor) -> Tensor:
    """a (B, H, n, X) times b (B, G, X, Y), of which each serves H / G heads: (B, H, n, Y)."""
    batch, heads, n, width = a.shape
    served = a.reshape(batch, b.shape[1], heads // b.shape[1] * n, width) @ b
    return served.reshape(batch, heads, n, b.shape[-1])


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse of scores of which -inf are hidden; a row of none else has weights 0 and lse -inf, also in gradients."""
    if not scores.shape[-1]:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    return weights / total, (top + total.log()).masked_fill(blind, -torch.inf).squeeze(-1)


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One attention from its parts over disjoint keys: outputs (S, ..., K) and lses (S, ...) become (..., K) and (...).

    O = sum_s e^(lse_s - lse) O_s, lse = logsumexp_s lse_s. Parts that saw nothing have lse -inf and add nothing; where all
    are such the output is 0 and the lse -inf. At least float32, the output in the parts' dtype.
    """
    real = torch.promote_types(outputs.dtype, torch.float32)
    share, lse = _softmax(lses.to(real).movedim(0, -1))
    return (outputs.to(real) * share.movedim(-1, 0)[..., None]).sum(0).to(outputs.dtype), lse


# Backends register themselves; the reference must exist first.
from hippodrome.ops.attention import sdpa as _sdpa  # noqa: E402, F401
from hippodrome.ops.attention import triton as _triton  # noqa: E402, F401
