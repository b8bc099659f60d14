"""The random tiles of BigBird's authors (google-research/bigbird, bigbird/core/attention.py), number for number.

Both procedures take the legacy stream of numpy's RandomState, here a stream of their own: their code (and its ports) seed the
one of the whole process.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput

PAPER_LENGTHS = (1024, 2048, 3072, 4096)
"""Lengths for which the authors' code draws by the paper's procedure."""


def google_table(n_tiles: int, tile: int, n_random: int, n_head: int, seed: int, plan: str) -> Tensor:
    """(n_head, n_tiles - 2, n_random) int64: row r holds the random tiles of tile r + 1.

    plan is "paper", "general", or "google" for the one that the authors' code takes at this length. `BadInput` where a
    procedure does not exist for the length, or finds too few tiles, which ends in an exception in the authors' code.
    """
    return _drawn(n_tiles, tile, n_random, n_head, seed, plan)


# In a compiled graph the table is a constant: torch.compile cannot read numpy's streams. This is what
# torch.compiler.assume_constant_result does, which would import the compiler for all who import patterns.
setattr(google_table, "_dynamo_marked_constant", True)  # noqa: B010


@functools.lru_cache(maxsize=256)
def _drawn(n_tiles: int, tile: int, n_random: int, n_head: int, seed: int, plan: str) -> Tensor:
    length = n_tiles * tile
    if plan == "paper" and length not in PAPER_LENGTHS:
        near = min(PAPER_LENGTHS, key=lambda each: abs(each - length))
        raise BadInput(f"BigBird's plan paper is for lengths {PAPER_LENGTHS}, not {length}: take {near}, or plan general")
    paper = plan == "paper" or (plan == "google" and length in PAPER_LENGTHS)
    stream = np.random.RandomState(seed)
    if paper:
        heads = [_paper(stream, 4096 // tile, 1024 // tile, n_random)[: n_tiles - 2] for _ in range(n_head)]
        return torch.from_numpy(np.stack(heads).astype(np.int64))
    return torch.from_numpy(_general(stream, n_tiles, n_random, n_head)[:, 1 : n_tiles - 1])


def _paper(stream: np.random.RandomState, n_tiles: int, limit: int, n_random: int) -> np.ndarray:
    """Rows 1 ... n_tiles - 2 of one head: drawn from tiles 1 ... limit - 2 outside the window."""
    inner, last = np.arange(1, n_tiles - 1, dtype=np.int32), limit - 1
    rows = []
    for i in range(1, n_tiles - 1):
        before, after = inner[: max(i - 2, 0)], inner[i + 1 : last]
        if i in (n_tiles - 3, n_tiles - 2):
            candidates = inner[:last]
        elif i <= 2:
            candidates = inner[i + 1 : last]
        elif i - 2 > last:
            candidates = inner[:last]
        elif i + 1 == last:
            candidates = before
        else:
            candidates = np.concatenate([before, after])
        rows.append(_enough(stream.permutation(candidates)[:n_random], n_random, n_tiles))
    return np.stack(rows)


def _general(stream: np.random.RandomState, n_tiles: int, n_random: int, n_head: int) -> np.ndarray:
    """All rows, (n_head, n_tiles, n_random); row 0 stays 0. Segments of tiles give a share of the random ones each."""
    stops, shares = _segments(n_tiles, n_random)
    starts, slots = [0, *stops[:-1]], np.cumsum([0, *shares])
    table = np.zeros((n_head, n_tiles, n_random), dtype=np.int64)
    for segment, stop in enumerate(stops):
        start = starts[segment]
        # In the authors' order: earlier rows look into this segment, its rows into earlier ones, then into their own.
        visits = [(range(1, start), segment)]
        visits += [(range(start, stop), earlier) for earlier in range(segment)]
        visits += [(range(max(start, 1), stop), segment)]
        for rows, source in visits:
            if not shares[source]:
                continue
            for row in rows:
                for head in range(n_head):
                    drawn = _legal(stream, row, starts[source], stops[source], shares[source])
                    slot = slice(slots[source], slots[source + 1])
                    table[head, row, slot] = _enough(drawn, shares[source], n_tiles)
    return table


def _segments(n_tiles: int, n_random: int) -> tuple[list[int], list[int]]:
    """Where segments of tiles end, and how many random tiles of a row come from each."""
    if 2 * n_random + 5 < n_tiles:
        return [2 * n_random + 5, n_tiles], [n_random, 0]
    if n_random + 5 < n_tiles:
        return [n_random + 5, n_tiles], [n_random // 2, n_random - n_random // 2]
    return [n_tiles], [n_random]


def _legal(stream: np.random.RandomState, row: int, start: int, stop: int, wanted: int) -> np.ndarray:
    """At most `wanted` tiles of [start, stop), neither global nor in the window, in a random order."""
    illegal = {row - 1, row, row + 1, 0, stop - 1}
    if row == 1:
        illegal.add(stop - 2)
    if row == stop - 2:
        illegal.add(1)
    order = stream.permutation(np.arange(start, stop, dtype=np.int32))
    return np.array([tile for tile in order if tile not in illegal][:wanted], dtype=np.int32)


def _enough(drawn: np.ndarray, wanted: int, n_tiles: int) -> np.ndarray:
    """`drawn`, where a single tile fills all slots, as in the authors' code."""
    if len(drawn) not in (1, wanted):
        raise BadInput(
            f"BigBird's authors' plans find {len(drawn)} of {wanted} random tiles for a row of {n_tiles}: take plan uniform"
        )
    return drawn
