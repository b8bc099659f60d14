"""Packs under patterns whose lists depend on a document's length: one document after another.

The host reads where documents end, waiting for the device once a tensor of offsets. It does so within the leaves, so that a
compiled graph holds them whole; a CUDA graph cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._flops import count_flops
from hippodrome.ops.attention._call import walks
from hippodrome.ops.attention._check import check_offsets, numbers
from hippodrome.ops.attention._fused import differentiate, gradients, launched, lines, outputs
from hippodrome.ops.attention._spelled import read, spelled
from hippodrome.ops.attention._work import flops
from hippodrome.part import BadInput
from hippodrome.patterns import Pattern


def each_document(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, slopes: Tensor | None, counters: Tensor | None,
    offsets: Tensor, k_offsets: Tensor, numbers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `launched`, of a pack whose documents have lists of their own."""
    given = q, k, v, bias, slopes, counters, offsets, k_offsets
    return torch.ops.hippodrome.attention_documents(*given, *spelled(pattern), *numbers)


# What torch captures it must cut here: inductor knows the tag.
@torch.library.custom_op(
    "hippodrome::attention_documents", mutates_args=(), device_types="cuda", tags=(torch.Tag.cudagraph_unsafe,)
)
def documents(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None, offsets: Tensor,
    k_offsets: Tensor, pattern: str, sizes: list[int], scale: float, cap: float, drop: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs like q and log-sum-exps (1, H, Lq); BadInput for offsets of no pack, and in the capture of a CUDA graph."""
    y, lse = outputs(q)
    y.zero_()
    lse.fill_(-torch.inf)
    whose, wanted = read(pattern, tuple(sizes)), (scale, cap, drop)
    for i, some, keys in _own(whose, q, k, offsets, k_offsets):
        one = *_of(q, k, v, some, keys), whose, _of_bias(bias, some, keys), slopes, _first(seed, offsets, k_offsets, i)
        y[:, :, some], lse[:, :, some] = launched(*one, None, None, None, wanted)
    return y, lse


@documents.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return outputs(q)


@torch.library.custom_op(
    "hippodrome::attention_documents_backward", mutates_args=(), device_types="cuda", tags=(torch.Tag.cudagraph_unsafe,)
)
def documents_backward(
    d_y: Tensor, d_lse: Tensor | None, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, offsets: Tensor, k_offsets: Tensor, pattern: str, sizes: list[int],
    scale: float, cap: float, drop: float, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fused_backward`."""
    found = gradients(q, k, bias, of_bias)
    for t in found:
        t.zero_()
    d_q, d_k, d_v, d_bias = found
    whose, wanted = read(pattern, tuple(sizes)), (scale, cap, drop)
    for i, some, keys in _own(whose, q, k, offsets, k_offsets):
        one = _of(q, k, v, some, keys)
        call, spelling = walks(one[0], one[1], whose, wanted)
        made = (
            lines(d_y[:, :, some]), None if d_lse is None else d_lse[:, :, some].contiguous(), y[:, :, some],
            lse[:, :, some].contiguous(),
        )  # fmt: skip
        aside = _of_bias(bias, some, keys), slopes, _first(seed, offsets, k_offsets, i), None, None, None
        given = *made, *map(lines, one), *aside, *spelling, *call.numbers(), of_bias
        d_q[:, :, some], d_k[:, :, keys], d_v[:, :, keys], own = torch.ops.hippodrome.attention_fused_backward(*given)
        if of_bias:
            d_bias[:, :, some, keys] = own
    return found


@documents_backward.register_fake
def _(d_y: Any, d_lse: Any, y: Any, lse: Any, q: Tensor, k: Tensor, v: Any, bias: Tensor | None, *rest: Any) -> Any:
    return gradients(q, k, bias, rest[-1])


def _own(
    pattern: Pattern, q: Tensor, k: Tensor, offsets: Tensor, k_offsets: Tensor
) -> Iterator[tuple[int, slice, slice]]:  # fmt: skip
    """The documents that have both queries and keys: number, queries, keys."""
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise BadInput(f"a pack under {pattern} in a CUDA graph, which cannot know how long documents are: run it without one")
    check_offsets("offsets", offsets, q.shape[2])
    check_offsets("k_offsets", k_offsets, k.shape[2])
    pairs = (itertools.pairwise(numbers(ends)) for ends in (offsets, k_offsets))
    for i, ((start, stop), (k_start, k_stop)) in enumerate(zip(*pairs, strict=True)):
        if start < stop and k_start < k_stop:
            yield i, slice(start, stop), slice(k_start, k_stop)


def _of(q: Tensor, k: Tensor, v: Tensor, some: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, some], k[:, :, keys], v[:, :, keys]


def _of_bias(bias: Tensor | None, some: slice, keys: slice) -> Tensor | None:
    return None if bias is None else bias[:, :, some, keys]


def _first(seed: Tensor | None, offsets: Tensor, k_offsets: Tensor, i: int) -> Tensor | None:
    """Dropout's seed and the numbers of document i's first query and key."""
    return None if seed is None else torch.stack((seed[0], offsets[i].long(), k_offsets[i].long()))


def _flops(q: Any, k: Any, v: Any, bias: Any, slopes: Any, seed: Any, offsets: Any, k_offsets: Any, pattern: str, sizes: list[int], *rest: Any, **out: Any) -> int:  # fmt: skip # noqa: E501
    total, whose = 0, read(pattern, tuple(sizes))
    for _, some, keys in _own(whose, q, k, offsets, k_offsets):
        one = _of(q, k, k, some, keys)
        call, spelling = walks(one[0], one[1], whose, (1.0, 0.0, 0.0))
        total += flops(*one, None, None, None, None, None, None, *spelling, call.code, call.a, call.r, call.tile)
    return total


def _flops_backward(d_y: Any, d_lse: Any, y: Any, lse: Any, *rest: Any, **out: Any) -> int:
    return 7 * _flops(*rest) // 2


differentiate(documents, torch.ops.hippodrome.attention_documents_backward, tensors=8)
count_flops(
    {torch.ops.hippodrome.attention_documents: _flops, torch.ops.hippodrome.attention_documents_backward: _flops_backward}
)
