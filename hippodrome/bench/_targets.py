"""Ratios of rows of one run, beside what they were to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hippodrome.bench._measure import Row


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """`value` was to be at least, or at most, `bound`; without a bound it is only stated."""

    what: str
    task: str
    length: int
    batch: int
    value: float
    kind: Literal["at least", "at most"]
    bound: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None where none was set."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.kind == "at least" else self.value <= self.bound


Bound = Callable[[Row], float | None]


def cost(row: Row) -> float | None:
    """What a way takes: seconds a token where rows may differ in their batch, else milliseconds."""
    return 1 / row.more["tokens_per_s"] if "tokens_per_s" in row.more else row.ms


def memory(row: Row) -> float | None:
    """Bytes at the peak of a call."""
    return None if row.ms is None or not row.peak_bytes else float(row.peak_bytes)


def ratios(
    rows: Sequence[Row],
    over: str,
    under: str,
    what: str,
    kind: Literal["at least", "at most"],
    *,
    bound: Bound = lambda _: None,
    of: Callable[[Row], float | None] = cost,
    task: str | None = None,
) -> Iterator[Ratio]:
    """`of` the way `over` divided by that of the way `under`, wherever both were measured at one task, length and size."""
    for a in rows:
        if a.way != over or (task is not None and a.task != task):
            continue
        for b in rows:
            same = (b.task, b.length, b.sizes, b.dtype) == (a.task, a.length, a.sizes, a.dtype)
            alike = same and (b.batch == a.batch or "tokens_per_s" in a.more)
            top, bottom = of(a), of(b)
            if b.way == under and alike and top is not None and bottom:
                named = {"what": what, "task": a.task, "length": a.length, "batch": a.batch}
                yield Ratio(**named, value=top / bottom, kind=kind, bound=bound(a))  # type: ignore[arg-type]
