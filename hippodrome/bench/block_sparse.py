"""block_sparse: attention that sees some tiles of the keys, beside FlexAttention and beside attention that sees all of them.

Butterfly and BigBird in tiles of 16 to 128, and windows as wide as three tiles and as a quarter and half of the row; 16,384
tokens x 1,024 in heads of 64, causal unless `bidirectional`. `kept` is the share of the pairs that dense attention sees; the
ideal time is the dense one (cuDNN's) times that; `share_of_ideal` how near a way comes. The break-even density is the share of
pairs up to which a way is faster than dense attention, by the line through its patterns at a length and tile. What is timed is
checked against float64 in two heads; of our backward, whether a second call gives the same bits.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import hippodrome.bench._peers as _peers
from hippodrome import plots
from hippodrome.bench._attention import FLEX, MOST_SCORES, STANDARD, Attention, chosen, exact, flex, kept_pairs, ours, standard
from hippodrome.bench._measure import BOTH, DTYPES, OURS, Bench, Expected, Row, calls, checked, grid
from hippodrome.bench._report import Report
from hippodrome.bench._targets import Ratio
from hippodrome.bench.attention import PASSES, PRODUCTS
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Butterfly, Causal, Full, Pattern, Window

DENSE = "dense"
WAYS = (OURS, FLEX, DENSE, STANDARD)
EVERYTHING = "all keys"
WIDE = ("window, a quarter", "window, half")
BIGBIRD = "BigBird"

GPU_TOKENS, CPU_TOKENS = 1 << 14, 1 << 9
GPU_LENGTHS, CPU_LENGTHS = (4096, 8192, 16384, 32768, 65536), (256, 512)
GPU_TILES, CPU_TILES = (16, 32, 64, 128), (16, 32)
LONGER = 8
"""BigBird was to take rows so many times as long in the memory of standard attention."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    head_dim: int = 64,
    tiles: Sequence[int] | None = None,
    bidirectional: bool = False,
    dtype: str | None = None,
) -> Iterator[Row]:
    """Forward, and forward with backward, of every pattern, tile and way at every length; dense attention first."""
    checked("block_sparse", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, dtype = channels or (1024 if gpu else 128), dtype or ("bf16" if gpu else "fp32")
    if channels % head_dim:
        raise BadInput(f"head_dim {head_dim} does not divide {channels} channels")
    sizes = {"channels": channels, "head_dim": head_dim, "bidirectional": int(bidirectional)}
    sides = tiles or (GPU_TILES if gpu else CPU_TILES)
    chosen_lengths = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    for count, length in grid(bench, chosen_lengths, batch, tokens or (GPU_TOKENS if gpu else CPU_TOKENS), ()):
        row = Row(way="", task="", length=length, batch=count, sizes=sizes, dtype=dtype)
        yield from _at(bench, row, sides)


def _at(bench: Bench, row: Row, sides: Sequence[int]) -> Iterator[Row]:
    width = row.sizes["head_dim"]
    heads, both_ways = row.sizes["channels"] // width, bool(row.sizes["bidirectional"])
    drawn = [bench.draw(row.batch, row.length, heads, width, dtype=DTYPES[row.dtype]).transpose(1, 2) for _ in range(4)]
    inputs, dy = [t.requires_grad_() for t in drawn[:3]], drawn[3]
    whole = Full() if both_ways else Causal()
    pairs = row.length**2 if both_ways else row.length * (row.length + 1) // 2
    dense: dict[str, float] = {}
    for found in _timed(bench, row, EVERYTHING, whole, pairs, _dense_ways(bench, row, whole, heads), inputs, dy, {}):
        if found.way == DENSE and found.ms:
            dense[found.task.rpartition(", ")[2]] = found.ms
        yield found
    for name, pattern in _patterns(row.length, heads, sides, both_ways).items():
        ways = {OURS: ours(bench, pattern)} | ({FLEX: flex(bench, pattern, heads, row.length)} if bench.on_gpu else {})
        yield from _timed(bench, row, name, pattern, pairs, ways, inputs, dy, dense)


def _patterns(length: int, heads: int, sides: Sequence[int], both_ways: bool) -> dict[str, Pattern]:
    """Name -> pattern. A pattern with more tiles a row than the row has is left out."""

    def window(size: int) -> Pattern:
        return Window(size=size, right=size - 1) if both_ways else Window(size=size)

    found: dict[str, Pattern] = {}
    for side in sides:
        found[f"butterfly, tiles of {side}"] = Butterfly(tile=side) if both_ways else Butterfly(tile=side) & Causal()
        bird = BigBird(tile=side, form="encoder" if both_ways else "causal")
        found[f"{BIGBIRD}, tiles of {side}"] = bird.sized(length, heads)
        found[f"window, tiles of {side}"] = window(3 * side)
    return found | {name: window(max(1, length // share)) for name, share in zip(WIDE, (4, 2), strict=True)}


def _dense_ways(bench: Bench, row: Row, pattern: Pattern, heads: int) -> dict[str, Attention]:
    backends = (SDPBackend.CUDNN_ATTENTION,) if bench.on_gpu else ()
    ways: dict[str, Attention] = {DENSE: _peers.sdpa(*backends, causal=pattern.causal)}
    if row.batch * heads * row.length**2 <= MOST_SCORES:
        ways[STANDARD] = lambda q, k, v: standard(q, k, v, pattern)
    return ways


def _timed(
    bench: Bench,
    row: Row,
    name: str,
    pattern: Pattern,
    pairs: int,
    ways: Mapping[str, Attention],
    inputs: Sequence[Tensor],
    dy: Tensor,
    dense: Mapping[str, float],
) -> Iterator[Row]:
    wanted = {way: call for way, call in ways.items() if bench.wants(way)}
    if not wanted:
        return
    heads = dy.shape[1]
    kept = kept_pairs(pattern, row.length, bench.device) / pairs
    expected = Expected(exact(pattern, torch.tensor(sorted({0, heads - 1}))), inputs, dy, heads=heads, picked=1)
    for way, function in wanted.items():
        for task, call in calls(function, inputs, dy).items():
            flops = int(kept * pairs / row.length * PRODUCTS[task] * 2 * dy.numel())
            moved = PASSES[task] * dy.numel() * dy.element_size()
            found = replace(row, way=way, task=f"{name}, {task}", bytes=moved, flops=flops)
            backend = functools.partial(chosen, bench, way, pattern, *inputs) if way == OURS else None
            check = _Repeated(expected, call)
            found = bench.measure(found, call, check if way == OURS and task == BOTH else expected, backend=backend)
            more = {"kept": kept}
            if found.ms:
                more["tflop_per_s"] = 1e-9 * flops / found.ms
                if task in dense:
                    more |= {"ideal_ms": dense[task] * kept, "share_of_ideal": dense[task] * kept / found.ms}
                if check.same is not None:
                    more["same_bits_again"] = float(check.same)
            yield replace(found, more=more)
            bench.free()


class _Repeated:
    """A check that also calls once more: `same` is whether that gave the same bits, None where it was not asked."""

    def __init__(self, expected: Expected, call: Callable[[], Sequence[Tensor]]) -> None:
        self.expected, self.call = expected, call
        self.same: bool | None = None

    def __call__(self, found: Sequence[Tensor]) -> float:
        self.same = all(torch.equal(a, b) for a, b in zip(found, self.call(), strict=True))
        return self.expected(found)


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Speed over dense attention and over FlexAttention, share of the ideal, break-even, repeatability, and memory."""
    sparse = [row for row in rows_ if "share_of_ideal" in row.more]
    for row in sparse:
        if row.way == OURS:
            yield _ratio("ours: share of the ideal time", row, row.more["share_of_ideal"])
            yield _ratio("ours: times faster than dense", row, row.more["share_of_ideal"] / row.more["kept"])
    flex_ms = {(row.task, row.length): row.ms for row in rows_ if row.way == FLEX and row.ms}
    for row in rows_:
        peer = flex_ms.get((row.task, row.length))
        if row.way == OURS and row.ms and peer:
            yield _ratio("ours: times faster than FlexAttention", row, peer / row.ms, 1.0)
    yield from _break_even(sparse)
    for row in rows_:
        if "same_bits_again" in row.more:
            yield _ratio("ours: the backward gives the same bits again", row, row.more["same_bits_again"], 1.0)
    yield from _memory(rows_)


def _break_even(sparse: Sequence[Row]) -> Iterator[Ratio]:
    """By length, tile and task: where the line of time by density, over patterns of the tile and wide windows, meets dense.

    0: dense is faster at any density.
    """
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    sides = {_tile(row) for row in sparse} - {None}
    for row in sparse:
        task = row.task.rpartition(", ")[2]
        for side in sides if _tile(row) is None else {_tile(row)}:
            groups.setdefault((row.way, row.length, f"tiles of {side}", task), []).append(row)
    for (way, length, tile, task), found in groups.items():
        x = [row.more["kept"] for row in found]
        y = [(row.ms or 0.0) / (row.more["ideal_ms"] / row.more["kept"]) for row in found]
        if len(set(x)) < 2:
            continue
        slope, start = statistics.linear_regression(x, y)
        if slope > 0:
            what = f"{way}, {tile}: break-even density"
            named = {"task": task, "length": length, "batch": found[0].batch}
            yield Ratio(what=what, value=min(1.0, max(0.0, (1 - start) / slope)), kind="at least", **named)  # type: ignore[arg-type]


def _tile(row: Row) -> str | None:
    return row.task.split("tiles of ")[1].split(",")[0] if "tiles of" in row.task else None


def _memory(rows_: Sequence[Row]) -> Iterator[Ratio]:
    """Memory a row of BigBird over that of standard attention on rows an eighth as long."""
    held = {
        row.length: row.peak_bytes / row.batch
        for row in rows_
        if row.way == STANDARD and row.task.endswith(BOTH) and row.peak_bytes
    }
    for row in rows_:
        short = held.get(row.length // LONGER)
        if row.way == OURS and row.task.startswith(BIGBIRD) and row.task.endswith(BOTH) and row.peak_bytes and short:
            what = f"{BIGBIRD}'s memory over that of standard attention on rows 1/{LONGER} as long"
            yield replace(_ratio(what, row, row.peak_bytes / row.batch / short, 1.0), kind="at most")


def _ratio(what: str, row: Row, value: float, bound: float | None = None) -> Ratio:
    return Ratio(what=what, task=row.task, length=row.length, batch=row.batch, value=value, kind="at least", bound=bound)


def draw(report: Report, path: Path) -> None:
    """A panel a task: how many times faster than dense attention ours is, by length and pattern."""
    ours_ = [row for row in report.rows if row.way == OURS and "share_of_ideal" in row.more]
    panels = []
    for task in dict.fromkeys(row.task.rpartition(", ")[2] for row in ours_):
        curves: dict[str, list[plots.Curve]] = {}
        mine = [row for row in ours_ if row.task.rpartition(", ")[2] == task]
        for name in dict.fromkeys(row.task for row in mine):
            found = sorted((row for row in mine if row.task == name), key=lambda row: row.length)
            speed = [row.more["share_of_ideal"] / row.more["kept"] for row in found]
            curves[name.rpartition(", ")[0]] = [([row.length for row in found], speed)]
        shape: dict[str, Any] = {"x": "length", "y": "times faster than dense", "log_x": True, "log_y": True, "markers": True}
        panels.append(plots.Panel(title=task, curves=curves, **shape))
    if panels:
        plots.draw(path, panels, f"block-sparse attention, {report.provenance['device']}")
