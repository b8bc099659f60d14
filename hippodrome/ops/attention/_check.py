"""What a call of the attention op must keep to, whatever runs it."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hippodrome.part import BadInput
from hippodrome.patterns import Pattern

_INTEGERS = (torch.int32, torch.int64)
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of offsets on a GPU the version and the values that the host has waited for."""


def check(
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
) -> None:
    """Raises BadInput unless the call has a meaning."""
    if not isinstance(pattern, Pattern):
        raise BadInput(f"the pattern is {pattern!r}: it must be one of hippodrome.patterns, such as Causal()")
    _check_shapes(q, k, v)
    tensors = {"k": k, "v": v, "q_position": q_position, "k_position": k_position, "offsets": offsets, "k_offsets": k_offsets}
    tensors |= {"k_lengths": k_lengths, "bias": bias, "slopes": slopes}
    for name, t in (tensors if not isinstance(seed, Tensor) else tensors | {"seed": seed}).items():
        if t is not None and not isinstance(t, Tensor):
            raise BadInput(f"{name} is {t!r}: it must be a tensor, or None")
        if t is not None and t.device != q.device:
            raise BadInput(f"{name} is on {t.device}, q on {q.device}: all tensors of an attention must be on one device")
    _check_positions("q_position", q_position, q)
    _check_positions("k_position", k_position, k)
    _check_pack(q, k, offsets, k_offsets)
    _check_lengths(k, k_lengths, offsets)
    target = (*q.shape[:3], k.shape[2])
    if bias is not None and (bias.ndim > 4 or not _broadcasts(bias, target)):
        raise BadInput(f"the bias is {_sizes(bias)}: it must broadcast to (B, H, Lq, Lk) = {tuple(target)}")
    for name, t in {"bias": bias, "slopes": slopes}.items():
        if t is not None and not t.is_floating_point():
            raise BadInput(f"{name} is {t.dtype}: it must be floating point")
    if slopes is not None and slopes.shape != q.shape[1:2]:
        raise BadInput(f"slopes are {_sizes(slopes)}: there must be one a head, ({q.shape[1]},)")
    if softcap is not None and not 0 < softcap < math.inf:
        raise BadInput(f"softcap is {softcap}: it must be above 0 and finite; None for none")
    if scale is not None and not math.isfinite(scale):
        raise BadInput(f"scale is {scale}: it must be finite; None for 1/sqrt(K) = {q.shape[3] ** -0.5:.4g}")
    if not 0 <= dropout < 1:
        raise BadInput(f"dropout is {dropout}: it must be at least 0 and below 1")
    _check_seed(seed)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.ndim != 4:
            raise BadInput(f"{name} is {_sizes(t)}: it must have four dimensions, (batch, heads, length, width)")
        if not t.is_floating_point():
            raise BadInput(f"{name} is {t.dtype}: it must be floating point")
    if k.shape != v.shape:
        raise BadInput(f"k is {_sizes(k)} and v {_sizes(v)}: they must have one shape")
    if q.shape[0] != k.shape[0]:
        raise BadInput(f"q has a batch of {q.shape[0]} and k one of {k.shape[0]}: they must be equal")
    if q.shape[3] != k.shape[3] or not q.shape[3]:
        raise BadInput(f"q has heads {q.shape[3]} wide and k {k.shape[3]}: they must be equal and not 0")
    if not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise BadInput(f"{k.shape[1]} heads of keys do not divide {q.shape[1]} heads of queries: they must")


def _check_positions(name: str, position: Tensor | None, of: Tensor) -> None:
    if position is None:
        return
    batch, length = of.shape[0], of.shape[2]
    if position.ndim != 2 or position.shape[0] not in (1, batch) or position.shape[1] != length:
        raise BadInput(f"{name} is {_sizes(position)}: it must be ({batch}, {length}) or (1, {length})")
    if position.dtype not in _INTEGERS:
        raise BadInput(f"{name} is {position.dtype}: it must be int64, or int32")


def _check_pack(q: Tensor, k: Tensor, offsets: Tensor | None, k_offsets: Tensor | None) -> None:
    if offsets is None:
        if k_offsets is not None:
            raise BadInput("k_offsets without offsets: the queries' documents are missing")
        return
    if q.shape[0] != 1:
        raise BadInput(f"a pack with a batch of {q.shape[0]}: documents that lie behind one another are one row, B = 1")
    check_offsets("offsets", offsets, q.shape[2])
    if k_offsets is None and q.shape[2] != k.shape[2]:
        raise BadInput(f"{q.shape[2]} packed queries and {k.shape[2]} keys: where these differ, give k_offsets too")
    if k_offsets is not None:
        check_offsets("k_offsets", k_offsets, k.shape[2])
        if k_offsets.shape != offsets.shape:
            raise BadInput(f"{len(offsets) - 1} documents of queries and {len(k_offsets) - 1} of keys: they must be as many")


def check_offsets(name: str, offsets: Tensor, length: int) -> None:
    """Raises BadInput unless `offsets` are those of a pack of `length` tokens, as far as may be asked."""
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype not in _INTEGERS:
        raise BadInput(f"{name} is {offsets.dtype} {_sizes(offsets)}: it must be int32 or int64 and (documents + 1,)")
    if torch.compiler.is_compiling() or (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph may not wait for values
    at = numbers(offsets)
    if at[0] != 0:
        raise BadInput(f"{name} begins with {at[0]}: a pack begins at 0")
    for before, after in itertools.pairwise(at):
        if after < before:
            raise BadInput(f"{name} falls from {before} to {after}: the offsets of a pack ascend")
    if at[-1] != length:
        raise BadInput(f"{name} ends at {at[-1]}: a pack of {length} tokens ends at {length}")


def _check_lengths(k: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> None:
    if lengths is None:
        return
    if lengths.shape != k.shape[:1] or lengths.dtype not in _INTEGERS:
        raise BadInput(f"k_lengths is {lengths.dtype} {_sizes(lengths)}: it must be int32 or int64 and ({k.shape[0]},)")
    if offsets is not None:
        raise BadInput("k_lengths of a pack: its documents hold no padding, k_offsets says where the keys of each end")


def numbers(offsets: Tensor) -> list[int]:
    """The values of a pack's offsets; the host waits for a GPU once a tensor, not once a call: all layers share a pack."""
    if not offsets.is_cuda or offsets.is_inference():
        return offsets.tolist()
    version, values = _read.get(offsets, (None, []))
    if version != offsets._version:
        values = offsets.tolist()
        _read[offsets] = offsets._version, values
    return values


def _check_seed(seed: Tensor | int | None) -> None:
    if isinstance(seed, Tensor):
        if seed.ndim or seed.dtype != torch.int64:
            raise BadInput(f"the seed is {seed.dtype} {_sizes(seed)}: it must be an int or an int64 tensor without dimensions")
    elif seed is not None and not isinstance(seed, int):
        raise BadInput(f"the seed is {seed!r}: it must be an int or an int64 tensor without dimensions")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise BadInput(f"the seed is {seed}: it must fit 64 bits")


def _broadcasts(t: Tensor, target: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(t.shape[::-1], target[::-1], strict=False))


def _sizes(t: Tensor) -> str:
    return str(tuple(t.shape))
