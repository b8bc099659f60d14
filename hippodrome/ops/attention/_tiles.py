"""Lists of kept tiles, as the kernels walk them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Pattern

Key = tuple[Pattern, int, int, int, int, torch.device]
Walk = tuple["Lists", "Lists", Tensor, bool]

LONGEST = 32
"""Tiles that a program walks over at most, unless most rows have more: longer rows are cut into pieces."""
SIDES = (128, 64, 32, 16)
"""Tiles that the kernels know."""
CACHE = 1 << 28
"""Bytes of lists that stay on devices for later calls; what was not asked for longest goes first."""
PAIRS = 1 << 22
"""Pairs that are looked at in a piece."""

_cached: OrderedDict[Key, Walk] = OrderedDict()
_captured: set[Key] = set()
"""Lists that a CUDA graph reads, which must never go."""
_lock = threading.Lock()


@dataclass(frozen=True)
class Lists:
    """Tiles of all rows: `plan` (heads, programs, 5) holds a row, where its wholly visible tiles begin and end in `members`,
    where its partly visible ones end, and a slot for a piece of a row (-1: the row is whole), the longest first; `masks`, one a
    member, which of the masks of partly visible tiles is its own; `joins` (heads, n, 3) a row in pieces and its slots. Rows of
    -1 fill up.
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


def lists(pattern: Pattern, n_q: int, n_k: int, heads: int, tile: int, device: torch.device) -> Walk:
    """Lists over the tiles of queries and over those of keys, and the masks of what is partly visible: int32 (n, tile, words),
    32 keys a word. Also whether partly visible tiles hide what comes after a query and nothing else: then there are no masks.
    BadInput in the capture of a CUDA graph, unless they are known: making them is the host's work.
    """
    key = pattern, n_q, n_k, heads if pattern.by_head else 1, tile, device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        if key not in _cached:
            if capturing:
                raise BadInput(f"a CUDA graph of {pattern} over {n_q} queries and {n_k} keys: call it once before the capture")
            _cached[key] = _aside(key)
            _make_room()
        _cached.move_to_end(key)
        if capturing:
            _captured.add(key)
        return _cached[key]


def _aside(key: Key) -> Walk:
    """Lists made in a thread of their own, where no mode of the caller has a hold on them: inference, a default device, the
    memory of a graph that is about to be captured.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_built, *key).result()


def _make_room() -> None:
    """Forgets what was not asked for longest, but for the last lists and those that a CUDA graph reads."""
    total = sum(map(_bytes, _cached.values()))
    for old in list(_cached)[:-1]:
        if total > CACHE and old not in _captured:
            if old[-1].type == "cuda":
                torch.cuda.synchronize(old[-1])  # a kernel of another stream may still read them
            total -= _bytes(_cached.pop(old))


def _bytes(walk: Walk) -> int:
    return sum(t.nbytes for t in (*walk[0].tensors(), *walk[1].tensors(), walk[2]))


def _built(pattern: Pattern, n_q: int, n_k: int, heads: int, tile: int, device: torch.device) -> Walk:
    rows, columns, masks = [], [], _Masks(pattern, tile)
    for head in range(heads):
        kept = pattern.kept(n_q, n_k, tile, n_k - n_q, head)
        i = torch.arange(len(kept.rows) - 1).repeat_interleave(kept.rows.diff().long())
        j = kept.columns.long()
        number = torch.full_like(i, -1)
        partial = ~kept.whole
        if partial.any():
            number[partial] = masks.numbers(i[partial] * tile + n_k - n_q, j[partial] * tile, head)
        rows.append((i, j, number))
        columns.append((j, i, number))
    triangular = masks.triangular and len(masks.known) > 0
    table = torch.empty(0, tile, 1, dtype=torch.int32) if triangular else masks.table()
    of_q, of_k = _lists(rows, -(-n_q // tile), device), _lists(columns, -(-n_k // tile), device)
    return of_q, of_k, table.to(device), triangular


class _Masks:
    """The masks of partly visible tiles, each of the different ones once."""

    def __init__(self, pattern: Pattern, tile: int) -> None:
        self.pattern, self.tile = pattern, tile
        self.known: dict[tuple[int, ...], int] = {}
        self.triangular = pattern.causal
        """So far all hide what comes after a query and nothing else."""

    def numbers(self, q: Tensor, k: Tensor, head: int) -> Tensor:
        """Of the tiles of queries from q on and keys from k on the numbers of their masks."""
        back = None
        if self.pattern.moves:
            # Distances say all: of many tiles few differ.
            apart, back = torch.unique(q - k, return_inverse=True)
            q, k = apart.clamp(min=0), (-apart).clamp(min=0)
        step, parts = max(1, PAIRS // self.tile**2), []
        for some_q, some_k in zip(q.split(step), k.split(step), strict=True):
            words = _words(self.pattern, some_q, some_k, head, self.tile)
            self.triangular &= torch.equal(words, _words(Causal(), some_q, some_k, head, self.tile))
            masks, of = torch.unique(words.flatten(1), dim=0, return_inverse=True)
            named = [self.known.setdefault(tuple(mask), len(self.known)) for mask in masks.tolist()]
            parts.append(torch.tensor(named)[of])
        number = torch.cat(parts)
        return number if back is None else number[back]

    def table(self) -> Tensor:
        words = max(1, self.tile // 32)
        return torch.tensor(list(self.known), dtype=torch.int32).view(-1, self.tile, words)


def _words(pattern: Pattern, q: Tensor, k: Tensor, head: int, tile: int) -> Tensor:
    """int32 (n, tile, words): what queries from q on see of keys from k on, a bit each."""
    at = torch.arange(tile)
    seen = pattern.visible(torch.tensor(head), q[:, None, None] + at[:, None], k[:, None, None] + at)
    words = (seen.long().unflatten(2, (-1, min(tile, 32))) << at[:32]).sum(3)
    return (words - (words >> 31 << 32)).int()  # the highest bit is a sign


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
    plan.sort(key=lambda part: part[1] - part[3])
    return plan, joins, slot


def _padded(heads: list[list[list[int]]], width: int, device: torch.device) -> Tensor:
    longest = max(len(rows) for rows in heads)
    filled = [rows + [[-1] * width] * (longest - len(rows)) for rows in heads]
    return torch.tensor(filled, dtype=torch.int32, device=device).view(len(heads), longest, width)
