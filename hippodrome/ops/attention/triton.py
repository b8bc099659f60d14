"""attention on the GPU: tiles, an online softmax, and a backward that makes the weights again. See `_forward.py`."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from hippodrome.ops._op import capability
from hippodrome.ops.attention import _tiles, attention
from hippodrome.ops.attention._call import at_once
from hippodrome.ops.attention._fused import launched
from hippodrome.ops.attention._packs import each_document
from hippodrome.patterns import Causal, Full, Pattern

HAS_TRITON = importlib.util.find_spec("triton") is not None
CAPABILITY = (8, 0)
"""Least compute capability: bf16 products and asynchronous copies."""
WIDEST = 256
WIDEST_FLOAT32 = 128
"""Wider ones need more shared memory than there is."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    **_: object,
) -> str | None:
    if q.device.type != "cuda":
        return f"the tensor is on {q.device.type}"
    if not HAS_TRITON:
        return "triton is not installed"
    if capability(q.device) < CAPABILITY:
        return f"compute capability {capability(q.device)} is under {CAPABILITY}"
    return unfit(q, k, v, pattern, q_position is not None or k_position is not None, offsets, k_offsets, bias, slopes)


def unfit(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, placed: bool, offsets: Tensor | None, k_offsets: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take a call, whatever the device."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: it takes one of {', '.join(map(str, DTYPES))} for all"
    if q.shape[3] > WIDEST:
        return f"heads are {q.shape[3]} wide: it takes up to {WIDEST}"
    if q.dtype == torch.float32 and q.shape[3] > WIDEST_FLOAT32:
        return f"float32 heads are {q.shape[3]} wide: it takes up to {WIDEST_FLOAT32}"
    if placed:
        return "positions are given, and its kernels take tokens for standing side by side"
    if not q.numel() or not k.numel():
        return "there is no query or no key"
    if q.shape[0] * q.shape[1] > 65535:
        return f"{q.shape[0]} x {q.shape[1]} heads are more than a grid has rows"
    if bias is not None and bias.dtype == torch.float64:
        return "the bias is torch.float64, and scores are float32"
    if slopes is not None and slopes.requires_grad:
        return "slopes want a gradient, which its kernels do not make"
    if at_once(q, k, pattern, k_offsets):
        return None
    if offsets is not None and not torch.compiler.is_compiling() and q.is_cuda and torch.cuda.is_current_stream_capturing():
        return f"a pack under {pattern}, of which it walks one document after another: a CUDA graph cannot know their lengths"
    if bias is not None and bias.requires_grad and pattern.count_tile is not None:
        return "a key that counts twice gives the bias two gradients"
    if offsets is not None and k_offsets is not None and pattern.count_tile is not None:
        return f"a pack with k_offsets under {pattern}, in which keys count unevenly"
    return _no_list(pattern, k.shape[2] - q.shape[2])


def _no_list(pattern: Pattern, q_start: int) -> str | None:
    side = pattern.count_tile
    if side is not None and (side % _tiles.side(pattern) or q_start % _tiles.side(pattern)):
        return f"keys count unevenly within tiles of {_tiles.side(pattern)}"
    return None


def _yields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    offsets: Tensor | None = None,
    k_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
    **_: object,
) -> str | None:
    """Calls that torch's kernels take without a mask: those are faster, as docs/performance.md has it."""
    wants = [bias, slopes, softcap, offsets, k_lengths, seed if dropout else None]
    plain = all(want is None for want in wants) and not return_lse and not torch.are_deterministic_algorithms_enabled()
    square = isinstance(pattern, Causal) and q.shape[2] == k.shape[2]
    if plain and (isinstance(pattern, Full) or square):
        return "dense and causal calls that need nothing more are left to torch's kernels"
    return None


@attention.backend("triton", why_not=_why_not, yields=_yields)
def _triton(
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
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:  # the running maximum is taken before scaling
        q, scale = -q, -scale
    counters = None
    if dropout:
        seed = torch.randint(2**62, (), device=q.device) if seed is None else torch.as_tensor(seed, device=q.device)
        counters = F.pad(seed.view(1), (0, 2))
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    slopes = None if slopes is None else slopes.float()
    numbers = scale, softcap or 0.0, dropout
    ends = offsets if k_offsets is None else k_offsets
    if offsets is None or ends is None or at_once(q, k, pattern, k_offsets):
        y, lse = launched(q, k, v, pattern, bias, slopes, counters, offsets, ends, k_lengths, numbers)
    else:
        y, lse = each_document(q, k, v, pattern, bias, slopes, counters, offsets, ends, numbers)
    return (y, lse) if return_lse else y
