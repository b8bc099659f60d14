"""linear_attention in chunks of matrix products, on any device: time and memory linear in the length.

With chunks of T tokens, [V 1] the values and a one, and the sums S_c before chunk c:

    [num den]_c = tril(Q_c K_c^T) [V 1]_c + Q_c S_c,      S_(c+1) = S_c + K_c^T [V 1]_c

The backward recomputes the sums: the queries' gradients follow from left to right, those of keys and values from right to left
with the sums of Q_c^T [d_num d_den]_c (section 3.3.1 of the paper). d_den is -(d_num . y); but where values have a mean, what
the two add to the gradient of q cancels up to a small part, and y was rounded to the dtype of v. So d_den is taken, which is
the same, as -(q . A) / den, A what d_num adds to that gradient. A segment of chunks goes through at a time, in float32, and
nothing but the denominators is kept for the backward. On CUDA it runs what the kernels of `triton.py` do not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.linear_attention import EPS, check, linear_attention, with_ones

CHUNK = 64
"""Tokens of a chunk: T + 2 F multiply-adds a token and value channel."""
WORKSPACE = {"cpu": 1 << 18}
"""Numbers in the largest tensor of a segment: what stays in a CPU's cache, elsewhere much more."""
ELSEWHERE = 1 << 26


def _why_not(*_: object, **__: object) -> str | None:
    return None


@linear_attention.backend("chunked", why_not=_why_not)
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    eps: float = EPS,
) -> tuple[Tensor, Tensor | None]:
    check(q, k, v, causal)
    if causal and q.shape[2] != 1:
        y, after, _ = torch.ops.hippodrome.linear_attention_chunks(q, k, v, state, eps)
        return y, after if return_state else None
    with torch.autocast(q.device.type, enabled=False):
        # Every query sees every key: the sums come first, and there is no triangle.
        values = with_ones(v)
        after = k.to(values.dtype).mT @ values
        if state is not None:
            after = state + after
        sums = q.to(values.dtype) @ after
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype), after if return_state else None


@torch.library.custom_op("hippodrome::linear_attention_chunks", mutates_args=())
def _chunks(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, H, L, M), the sums after them, and the denominators (B, H, L)."""
    y, after, denominators = _new_outputs(q, k, v, state)
    with torch.autocast(q.device.type, enabled=False):
        for segment in _segments(q, v):
            queries, keys, values = segment.cut(q), segment.cut(k), with_ones(segment.cut(v))
            before = _sums_before(keys.mT @ values, after)
            sums = (queries @ keys.mT).tril_() @ values
            sums += queries @ before
            below = sums[..., -1] + eps
            y[:, :, segment.tokens] = (sums[..., :-1] / below.unsqueeze(-1)).flatten(2, 3)
            denominators[:, :, segment.tokens] = below.flatten(2)
    return y, after, denominators


def _new_outputs(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The sums are those before all tokens."""
    real = torch.promote_types(v.dtype, torch.float32)
    batch, heads, length, width = v.shape
    after = v.new_zeros(batch, heads, q.shape[3], width + 1, dtype=real)
    if state is not None:
        after.copy_(state)
    return v.new_empty(v.shape), after, v.new_empty(batch, heads, length, dtype=real)


@_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(q, k, v, state)


@torch.library.custom_op("hippodrome::linear_attention_chunks_backward", mutates_args=())
def _chunks_backward(
    d_y: Tensor, d_after: Tensor, denominators: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sums before."""
    d_q, d_k, d_v, d_state = _new_gradients(d_after, q, k, v)
    d_below = torch.empty_like(denominators)
    carry = torch.zeros_like(d_after) if state is None else state.to(d_after.dtype, copy=True)
    with torch.autocast(q.device.type, enabled=False):
        segments = list(_segments(q, v))
        for segment in segments:
            queries, keys, values = segment.cut(q), segment.cut(k), segment.cut(v)
            below = segment.cut(denominators).unsqueeze(-1)
            d_top = segment.cut(d_y) / below
            before = _sums_before(keys.mT @ with_ones(values), carry)
            found = (d_top @ values.mT).tril_() @ keys
            found += d_top @ before[..., :-1].mT
            slope = -(queries * found).sum(-1, keepdim=True) / below
            found += slope * (keys.cumsum(-2) + before[..., -1].unsqueeze(-2))
            d_q[:, :, segment.tokens] = found.flatten(2, 3)
            d_below[:, :, segment.tokens] = slope.flatten(2)
        for segment in reversed(segments):
            queries, keys, values = segment.cut(q), segment.cut(k), with_ones(segment.cut(v))
            d_top = segment.cut(d_y) / segment.cut(denominators).unsqueeze(-1)
            d_sums = torch.cat([d_top, segment.cut(d_below).unsqueeze(-1)], -1)
            after = _sums_before((queries.mT @ d_sums).flip(2), d_state).flip(2)
            found = (d_sums @ values.mT).tril_().mT @ queries
            found += values @ after.mT
            d_k[:, :, segment.tokens] = found.flatten(2, 3)
            found = (queries @ keys.mT).tril_().mT @ d_sums
            found += keys @ after
            d_v[:, :, segment.tokens] = found[..., :-1].flatten(2, 3)
    return d_q, d_k, d_v, d_state


def _new_gradients(d_after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    return d_q, d_k, d_v, d_after.clone(memory_format=torch.contiguous_format)


@_chunks_backward.register_fake
def _(
    d_y: Any, d_after: Tensor, denominators: Any, q: Tensor, k: Tensor, v: Tensor, state: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_gradients(d_after, q, k, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], *inputs[:4])


def _grad(ctx: Any, d_y: Tensor, d_after: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, d_state = torch.ops.hippodrome.linear_attention_chunks_backward(d_y, d_after, *ctx.saved_tensors)
    return *grads, None if ctx.saved_tensors[4] is None else d_state, None


_chunks.register_autograd(_grad, setup_context=_save)


def _flops(q: Tensor, k: Any, v: Tensor, *rest: Any, **out: Any) -> int:
    """Two a multiply-add of the matrix products, whole chunks of the triangle."""
    features, width = q.shape[3], v.shape[3] + 1
    return 2 * q[..., 0].numel() * (CHUNK * (features + width) + 2 * features * width)


def _flops_backward(d_y: Any, d_after: Any, denominators: Any, q: Tensor, k: Any, v: Tensor, *rest: Any, **out: Any) -> int:
    features, width = q.shape[3], v.shape[3] + 1
    return 2 * q[..., 0].numel() * (CHUNK * (3 * features + 3 * width) + 5 * features * width)


count_flops(
    {
        torch.ops.hippodrome.linear_attention_chunks: _flops,
        torch.ops.hippodrome.linear_attention_chunks_backward: _flops_backward,
    }
)


class _Segment(NamedTuple):
    """Chunks of `chunk` tokens each, which are `tokens` of the sequence; computed with in `dtype`."""

    tokens: slice
    chunk: int
    dtype: torch.dtype

    def cut(self, t: Tensor) -> Tensor:
        """(B, H, L, ...) -> (B, H, C, T, ...)."""
        return t[:, :, self.tokens].to(self.dtype).unflatten(2, (-1, self.chunk))


def _segments(q: Tensor, v: Tensor) -> Iterator[_Segment]:
    """As many whole chunks at a time as fit the workspace, then the last one, not whole."""
    batch, heads, length, features = q.shape
    real = torch.promote_types(v.dtype, torch.float32)
    width = v.shape[3] + 1
    largest = batch * heads * max(CHUNK * max(CHUNK, features, width), features * width)
    most = CHUNK * max(1, WORKSPACE.get(q.device.type, ELSEWHERE) // largest)
    whole = length - length % CHUNK
    for start in range(0, whole, most):
        yield _Segment(slice(start, min(start + most, whole)), CHUNK, real)
    if whole < length:
        yield _Segment(slice(whole, length), length - whole, real)


def _sums_before(added: Tensor, carry: Tensor) -> Tensor:
    """The sums before each chunk (B, H, C, F, M + 1) from what each adds.

    `carry`, the sums before the first chunk, becomes those after the last.
    """
    sums = torch.cat([carry.unsqueeze(2), added], 2).cumsum(2)
    carry.copy_(sums[:, :, -1])
    return sums[:, :, :-1]
