"""How diagonal_ssm on the CPU goes through its signals: which chunks and channels at a time, in which memory. See `cpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import NamedTuple

from torch import Tensor

ROWS = 512
"""Rows of a matrix product, which are the chunks of a segment times the batch, unless a batch has more."""
WORKSPACE = 1 << 21
"""Numbers in the workspace of a block of channels, or one channel's if that is more."""
LANES = 8
"""Most steps that the recurrence takes one by one in the signal's precision."""


def most_chunks(batch: int) -> int:
    """The most chunks of a segment, a multiple of LANES, for so many sequences."""
    return max(1, ROWS // (LANES * max(1, batch))) * LANES


class Segment(NamedTuple):
    """Some chunks of `chunk` tokens each, which are `tokens` of the signal."""

    tokens: slice
    chunks: int
    chunk: int


def segments_of(length: int, chunk: int, most: int) -> list[Segment]:
    """`most` whole chunks each; then those left in groups of LANES, those left then, and the last one, not whole."""
    whole, rest = divmod(length, chunk)
    left = whole % most
    alone = left % LANES
    counts = [*[most] * (whole // most), left - alone, alone]
    segments, end = [], 0
    for chunks, wide in (*((n, chunk) for n in counts), (1, rest)):
        if chunks * wide:
            start, end = end, end + chunks * wide
            segments.append(Segment(slice(start, end), chunks, wide))
    return segments


def blocks_of(
    u: Tensor, in_map: Tensor, most: int, *, signals: int, states: int
) -> Iterator[tuple[slice, Callable[[Segment], list[Tensor]]]]:
    """Slices of the channels, and for each how one workspace is cut for a segment: chunk by chunk, then by batch.

    That is `signals` of (H', (C + 1) B, T), `states` of (H', C B, 2N) and one of (H', C B, T).
    """
    batch, channels, length = u.shape
    chunk, pairs = in_map.shape[1:]
    rows = batch * min(most, -(-length // chunk))
    widths = [(rows + batch, chunk)] * signals + [(rows, pairs)] * states + [(rows, chunk)]
    size = min(channels, max(1, WORKSPACE // sum(tall * wide for tall, wide in widths)))
    spaces = [in_map.new_empty(size * tall * wide) for tall, wide in widths]

    def cut(count: int, segment: Segment) -> list[Tensor]:
        tall, wide = batch * segment.chunks, segment.chunk
        shapes = [(tall + batch, wide)] * signals + [(tall, pairs)] * states + [(tall, wide)]
        return [space[: count * prod(shape)].view(count, *shape) for space, shape in zip(spaces, shapes, strict=True)]

    for start in range(0, channels, size):
        stop = min(start + size, channels)
        yield slice(start, stop), partial(cut, stop - start)
