"""Lists of kept tiles, as the kernels walk them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.patterns import Causal, Pattern

LONGEST = 64
"""Tiles that a program walks over at most, unless most rows have more: longer rows are cut into pieces."""
SIDES = (128, 64, 32, 16)
"""Tiles that the kernels know."""


@dataclass(frozen=True)
class Lists:
    """Tiles of all rows: `plan` (heads, programs, 5) holds a row, where its wholly visible tiles begin and end in `members`,
    where its partly visible ones end, and a slot for a piece of a row (-1: the row is whole); `masks`, one a member, says which
    of the masks of partly visible tiles is its own; `joins` (heads, n, 3) a row in pieces and its slots. Rows of -1 fill up.
    """

    plan: Tensor
    members: Tensor
    masks: Tensor
    joins: Tensor
    slots: int

    def tensors(self) -> list[Tensor]:
        return [self.plan, self.members, self.masks, self.joins]


def side(pattern: Pattern, most: int = 128) -> int:
    """The side of the tiles in which a pattern is walked: what divides its own, so that few tiles are partly visible."""
    own = [n for n in _sides(pattern) if n]
    return next((size for size in SIDES if size <= most and all(n % size == 0 for n in own)), SIDES[-1]) if own else 64


def _sides(pattern: Pattern) -> Iterator[int]:
    for part in getattr(pattern, "parts", (pattern,)):
        yield getattr(part, "side", 0) if part is pattern else 0
        if part is not pattern:
            yield from _sides(part)


@functools.lru_cache(64)
def lists(
    pattern: Pattern, n_q: int, n_k: int, heads: int, tile: int, device: torch.device
) -> tuple[Lists, Lists, Tensor, bool]:
    """Lists over the tiles of queries and over those of keys, and the masks of what is partly visible: int32 (n, tile, words),
    32 keys a word. Also whether partly visible tiles hide what comes after a query and nothing else: then there are no masks.
    """
    rows, columns, masks, seen, triangular = [], [], [], 0, pattern.causal
    for head in range(heads if pattern.by_head else 1):
        kept = pattern.kept(n_q, n_k, tile, n_k - n_q, head)
        i = torch.arange(len(kept.rows) - 1).repeat_interleave(kept.rows.diff().long())
        j = kept.columns.long()
        number = torch.full_like(i, -1)
        partial = ~kept.whole
        if partial.any():
            q, k = i[partial] * tile + n_k - n_q, j[partial] * tile
            found = _masks(pattern, q, k, head, tile)
            triangular = triangular and torch.equal(found, _masks(Causal(), q, k, head, tile))
            some, number[partial] = torch.unique(found, dim=0, return_inverse=True)
            number[partial] += seen
            masks.append(some)
            seen += len(some)
        rows.append((i, j, number))
        columns.append((j, i, number))
    triangular = triangular and seen > 0
    table = torch.cat(masks) if masks and not triangular else torch.empty(0, tile, 1, dtype=torch.int32)
    of_q, of_k = _lists(rows, -(-n_q // tile), device), _lists(columns, -(-n_k // tile), device)
    return of_q, of_k, table.to(device), triangular


def _masks(pattern: Pattern, q: Tensor, k: Tensor, head: int, tile: int) -> Tensor:
    """int32 (n, tile, words): what queries from q on see of keys from k on, a bit each."""
    at, step, parts = torch.arange(tile), max(1, (1 << 20) // tile**2), []
    for first in range(0, len(q), step):
        of = slice(first, first + step)
        seen = pattern.visible(torch.tensor(head), q[of, None, None] + at[:, None], k[of, None, None] + at)
        words = (seen.long().unflatten(2, (-1, min(tile, 32))) << at[:32]).sum(3)
        parts.append((words - (words >> 31 << 32)).int())  # the highest bit is a sign
    return torch.cat(parts)


def _lists(heads: list[tuple[Tensor, Tensor, Tensor]], n: int, device: torch.device) -> Lists:
    members, masks, plans, joins, slots, start = [], [], [], [], 0, 0
    for row, member, number in heads:
        # Wholly visible tiles first, then as they lie.
        order = torch.argsort(row * 2 + (number >= 0).long(), stable=True)
        members.append(member[order])
        masks.append(number[order])
        sizes = torch.bincount(row, minlength=n)
        whole = torch.bincount(row[number < 0], minlength=n)
        plan, join, used = _cut(sizes.tolist(), whole.tolist(), start)
        plans.append(plan)
        joins.append(join)
        slots = max(slots, used)
        start += len(row)
    return Lists(
        _padded(plans, 5, device),
        torch.cat(members).int().to(device),
        torch.cat(masks).int().to(device),
        _padded(joins, 3, device),
        slots,
    )


def _cut(sizes: list[int], whole: list[int], start: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Programs, joins and slots of one head."""
    longest = max(LONGEST, 2 * sorted(sizes)[len(sizes) // 2])
    plan, joins, slot = [], [], 0
    for row, (size, of_them) in enumerate(zip(sizes, whole, strict=True)):
        middle, end = start + of_them, start + size
        if size <= longest:
            plan.append([row, start, middle, end, -1])
        else:
            first = slot
            for begin in range(start, end, longest):
                stop = min(begin + longest, end)
                plan.append([row, begin, min(max(middle, begin), stop), stop, slot])
                slot += 1
            joins.append([row, first, slot])
        start = end
    return plan, joins, slot


def _padded(heads: list[list[list[int]]], width: int, device: torch.device) -> Tensor:
    longest = max(len(rows) for rows in heads)
    filled = [rows + [[-1] * width] * (longest - len(rows)) for rows in heads]
    return torch.tensor(filled, dtype=torch.int32, device=device).view(len(heads), longest, width)
