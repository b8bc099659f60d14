"""What attention is timed beside, and what it is checked with: standard attention, FlexAttention, and rows in float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hippodrome.bench._measure import OURS, Bench
from hippodrome.ops._op import Backend, use_backend
from hippodrome.ops.attention import attention
from hippodrome.patterns import Full, Pattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

AUTO, CUDNN, FLASH, FLEX, STANDARD, FLASH_ATTN = "auto", "SDPA cuDNN", "SDPA flash", "FlexAttention", "standard", "flash-attn"
MOST_SCORES = 1 << 31
"""Scores up to which standard attention writes them out: 4 GiB in bf16, and some times that with the softmax in fp32."""
_SLICE = 1 << 27
"""Scores of one slice of the check, 1 GiB in float64."""


def ours(bench: Bench, pattern: Pattern) -> Attention:
    """The op on the backend that is its own: Triton's on a GPU, the reference elsewhere."""
    name = "triton" if bench.on_gpu else "reference"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_backend(name):
            return attention(q, k, v, pattern)

    return run


def chosen(bench: Bench, way: str, pattern: Pattern, *tensors: Tensor) -> str:
    """The backend that the op takes on the way `OURS` or `AUTO`."""
    with use_backend(("triton" if bench.on_gpu else "reference") if way == OURS else None):
        return attention.choose(*tensors, pattern)


def automatic(pattern: Pattern) -> Attention:
    """The op as models call it."""
    return lambda q, k, v: attention(q, k, v, pattern)


def standard(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, scale: float | None = None, **how: Any) -> Tensor:
    """Attention as it is written in textbooks: scores in the inputs' dtype in memory, softmax in fp32, weights in memory.

    Queries and keys from position 0 on. Raises `NotImplementedError` for anything else that is asked of the op.
    """
    asked = [name for name, value in how.items() if value is not None and not (isinstance(value, float | bool) and not value)]
    asked += ["counts of keys"] if pattern.count_tile is not None else []
    if asked:
        raise NotImplementedError(f"standard attention here knows no {', '.join(asked)}")
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, 1) if repeat > 1 else t for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if not isinstance(pattern, Full):
        scores = scores.masked_fill(~_visible(pattern, q, k, 0), float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@contextlib.contextmanager
def standard_attention() -> Iterator[None]:
    """Within the block the op `attention` is `standard`, whatever the mixer."""
    before = attention._backends
    attention._backends = {"sdpa": Backend("sdpa", standard, lambda *_, **__: None)}
    try:
        yield
    finally:
        attention._backends = before


def exact(pattern: Pattern, heads: Tensor) -> Attention:
    """Attention of the heads of these numbers by its definition, in the dtype of its inputs, a slice of queries at a time."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = max(1, _SLICE // (q.shape[0] * q.shape[1] * k.shape[2]))

        def some(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            hidden = ~_visible(pattern, q, k, start, heads)
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
            return torch.softmax(scores, -1).masked_fill(hidden, 0) @ v

        starts = range(0, q.shape[2], size)
        return torch.cat(
            [checkpoint(some, q[:, :, i : i + size], k, v, i, use_reentrant=False) for i in starts],
            2,
        )

    return run


def kept_pairs(pattern: Pattern, length: int, device: torch.device) -> int:
    """How many pairs of a query and a key the first head sees."""
    head, keys = torch.zeros((), dtype=torch.int64, device=device), torch.arange(length, device=device)
    step = max(1, _SLICE // length)
    return sum(int(pattern.visible(head, rows[:, None], keys).expand(len(rows), length).sum()) for rows in keys.split(step))


def flex(bench: Bench, pattern: Pattern, heads: int, length: int) -> Attention:
    """torch's FlexAttention, compiled, with the block mask of the pattern, which is made before anything is timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    @functools.cache
    def mask() -> Any:
        if isinstance(pattern, Full):
            return None

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return pattern.visible(h, q, k)

        by_head = heads if getattr(pattern, "by_head", False) else None
        return create_block_mask(seen, None, by_head, length, length, device=str(bench.device), _compile=True)

    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask())


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # A shape and a mask are compiled each; the default limit is the eighth.
    torch._dynamo.config.cache_size_limit = max(256, torch._dynamo.config.cache_size_limit)
    return torch.compile(flex_attention, dynamic=False)


def _visible(pattern: Pattern, q: Tensor, k: Tensor, start: int, heads: Tensor | None = None) -> Tensor:
    """Bool, broadcastable to the scores of queries from `start` on."""
    numbers = torch.arange(q.shape[1], device=q.device) if heads is None else heads.to(q.device)
    rows = torch.arange(start, start + q.shape[2], device=q.device)
    return pattern.visible(numbers[None, :, None, None], rows[:, None], torch.arange(k.shape[2], device=q.device))
