"""Which path a call of long_conv takes on the GPU: the fastest at the nearest point of a table of times, kept in table.json.

A row has times of one pass, "forward" or "backward", with gates or without, for these may well take different paths, and says
in "source" where they come from: "measured: DEVICE, DATE", or "counted" from operations and bytes. Several rows may share a
point, so that what was measured stands beside what was counted for the other paths.

The table in the repository is measured in part only: an H100's times of the paths taken at the whole-length kernels of 1,024 to
8,192 and 65,536 tokens, in bfloat16, a backward's being forward + backward less forward. All else is counted, and a table
measured whole on one card is still to come: `tune` makes it. The block FFT is not counted: it is taken where it was measured.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("table.json")
PATHS = ("toeplitz", "partitioned", "fft", "block_fft")
PASSES = ("forward", "backward")


class Point(NamedTuple):
    """One call: sequences, channels, length and taps (of the longer direction)."""

    batch: int
    channels: int
    length: int
    taps: int

    def far(self, other: Point) -> float:
        """A distance in octaves. What a token costs depends on length and taps first, then on how many rows share the taps."""
        octaves = [abs(math.log2(a / b)) for a, b in zip(self, other, strict=True)]
        return sum(weight * d for weight, d in zip((0.4, 0.1, 1, 1), octaves, strict=True))


COUNTED = "counted"
MARGIN = 1.25
"""How much longer a counted time may prove: it must be less by this to stand against a measured one."""


@functools.cache
def _rows(device: str) -> dict[tuple[str, str, bool], dict[Point, dict[str, float]]]:
    """The times at each point on this device, or on the first one in the table."""
    devices = json.loads(FILE.read_text())
    found: dict[tuple[str, str, bool], dict[Point, dict[str, float]]] = {}
    for row in devices.get(device, next(iter(devices.values()))):
        at = found.setdefault((row["pass"], row["dtype"], row["gated"]), {}).setdefault(_point(row), {})
        at.update({path: ms * (MARGIN if row["source"] == COUNTED else 1) for path, ms in row["ms"].items()})
    return found


def _point(row: dict[str, Any]) -> Point:
    return Point(*(row[name] for name in Point._fields))


@functools.lru_cache(maxsize=4096)
def fastest(which: str, dtype: torch.dtype, device: str, point: Point, gated: bool, able: tuple[str, ...] = PATHS) -> str:
    """The path to run: which is "forward" or "backward", device its name, gated if there is a gate, able those that can."""
    rows = _rows(device)[which, str(dtype).removeprefix("torch."), gated]
    points = {at: found for at, ms in rows.items() if (found := {path: t for path, t in ms.items() if path in able})}
    ms = points[min(points, key=point.far)]
    return min(ms, key=ms.__getitem__)


LENGTHS = tuple(1 << p for p in (6, 8, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22))
TOKENS = 1 << 17
"""Tokens a channel of the larger batch."""
NUMBERS = 768 * TOKENS
"""Most numbers in an input."""


def grid(lengths: Iterable[int] = LENGTHS) -> Iterator[Point]:
    """Whole-length kernels and short ones, one sequence and many."""
    for length in lengths:
        for batch in sorted({1, min(256, max(1, TOKENS // length))}):
            channels = max(16, min(768, NUMBERS // (batch * length)))
            for taps in sorted({min(t, length) for t in (64, 1024, length)}):
                yield Point(batch, channels, length, taps)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = tuple((which, gated) for which in PASSES for gated in (False, True))


def counted(beside: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows made by counting operations and bytes, of all that the rows `beside` do not have."""
    known = {(row["pass"], row["dtype"], row["gated"], _point(row), path) for row in beside for path in row["ms"]}
    rows = []
    for dtype in DTYPES:
        for point in grid():
            for which, gated in KINDS:
                row = _row(point, dtype, which, gated, _count(point, dtype, which, gated), COUNTED)
                for path in PATHS:
                    if (which, row["dtype"], gated, point, path) in known:
                        row["ms"].pop(path, None)
                rows.append(row)
    return rows


def _row(point: Point, dtype: torch.dtype, which: str, gated: bool, ms: dict[str, float], source: str) -> dict[str, Any]:
    rounded = {path: float(f"{t:.3g}") for path, t in ms.items()}
    name = str(dtype).removeprefix("torch.")
    return {"pass": which, "dtype": name, "gated": gated, **point._asdict(), "ms": rounded, "source": source}


def _count(point: Point, dtype: torch.dtype, which: str, gated: bool) -> dict[str, float]:
    """Milliseconds of each path, of products at the rates that an H100 showed in the points measured, bfloat16, and for other
    dtypes in proportion to its peaks. No FFT is among those points: its rate is most of what the H100 showed in a copy."""
    batch, channels, length, taps = point
    tokens, back = batch * channels * length, which == "backward"
    # bfloat16, tf32, and three times tf32; which the partitioned path takes for float16 too.
    slow = {torch.bfloat16: 1, torch.float16: 2.5, torch.float32: 6.5}[dtype]

    # Tiles of 128 rows (sequence, chunk of 128) reach as far back as their latest row; a backward has the taps' gradient, and
    # with gates one convolution more.
    reach = 64 + min(taps, length / 2 * (1 + min(1, 128 * 128 / (batch * length))))
    products = (1 + (back and gated)) * reach / (140e12 if gated else 240e12)
    if back:
        products += (128 + min(taps, length / 2)) / (45e12 if gated else 70e12)
    numbers = (5 if back else 2) * (2 if gated else 1)
    toeplitz = 20e-6 * (1 + 2 * back) + tokens * max(slow * products, numbers * dtype.itemsize / 3e12)

    # Each transform of blocks of T costs 2 T multiply-adds a token, each product of spectra two a block that taps reach; and
    # every tap is brought into its table, and the gradient of every tap back from one.
    t = max(64, 1 << round(math.log2(length / 2) / 2))
    transforms, numbers, of_tap = {
        ("forward", False): (2, 10, 52e-12),
        ("forward", True): (2, 12, 52e-12),
        ("backward", False): (3, 17, 372e-12),
        ("backward", True): (4, 30, 424e-12),
    }[which, gated]
    half = dtype == torch.bfloat16
    products = (2 * t * transforms + 2 * min(length, 2 * taps + t) / t * (transforms - 1)) / 140e12
    partitioned = 150e-6 * (1 + back) + channels * taps * of_tap
    partitioned += tokens * max((1 if half else 6.5) * products, numbers * (2 if half else 4) / 3e12)

    # Bytes a token over all passes, of which cuFFT makes one a transform, and two of long ones.
    n = length if length & (length - 1) == 0 else 1.2 * length
    passes = (2.5 if gated else 2) if back else 1
    fft = passes * (150e-6 + channels * batch * n * (110 if length <= 1 << 15 else 140) / 2.5e12 * (1 + 0.4 / batch))
    return {"toeplitz": 1e3 * toeplitz, "partitioned": 1e3 * partitioned, "fft": 1e3 * fft}


def tune(
    device: torch.device | str = "cuda",
    say: Callable[[str], None] = print,
    *,
    lengths: Sequence[int] = (),
    dtypes: Sequence[torch.dtype] = (),
    paths: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure paths over the grid of lengths on a device; of what is empty, all. Returns the rows; `say` is told of each."""
    device, paths = torch.device(device), paths or PATHS
    points = [(point, dtype) for dtype in dtypes or DTYPES for point in grid(lengths or LENGTHS)]
    say(f"compiling the programs of {len(points)} points")
    _compile(points, device, paths)
    source = f"measured: {torch.cuda.get_device_name(device)}, {datetime.datetime.now(datetime.UTC).date()}"
    rows = []
    for point, dtype in points:
        for (which, gated), ms in _measure(point, dtype, device, paths).items():
            if ms:
                rows.append(_row(point, dtype, which, gated, ms, source))
                say(f"{rows[-1]}")
    return rows


def _compile(points: list[tuple[Point, torch.dtype]], device: torch.device, paths: Sequence[str]) -> None:
    """Run every program once, in processes beside each other, so that Triton's cache on disk has them."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Whichever worker is free takes the next point: some compile more than others.
        for done in [pool.submit(_try, point, dtype, device, paths) for point, dtype in points]:
            done.result()


def _try(point: Point, dtype: torch.dtype, device: torch.device, paths: Sequence[str]) -> None:
    for *_, run in _runs(point, dtype, device, paths):
        run()
    torch.cuda.synchronize(device)


def _runs(
    point: Point, dtype: torch.dtype, device: torch.device, paths: Sequence[str]
) -> Iterator[tuple[str, bool, str, Callable[[], object]]]:
    """Pass, gated, path and call, but for those that cannot take the length, and for what counting calls hopeless: a dense
    product of a million taps takes minutes."""
    from hippodrome.ops.long_conv._taps import Taps, Wanted
    from hippodrome.ops.long_conv.triton import explain_paths, path

    batch, channels, length, taps = point
    able = [name for name, said in explain_paths(length, dtype, device).items() if name in paths and said == "ok"]
    u, dy, *gates = torch.randn(4, batch, channels, length, dtype=dtype, device=device)
    kernel = Taps(torch.randn(channels, taps, device=device) / taps)
    for which, gated in KINDS:
        ms = _count(point, dtype, which, gated)
        pre, post = gates if gated else (None, None)
        for name in able:
            if ms.get(name, 0) < 5 * min(ms.values()):
                backward = functools.partial(path(name).backward, dy, u, kernel, pre, post, Wanted(True, True, gated))
                forward = functools.partial(path(name).convolve, u, kernel, pre, (post,))
                yield which, gated, name, backward if which == "backward" else forward


def _measure(
    point: Point, dtype: torch.dtype, device: torch.device, paths: Sequence[str]
) -> dict[tuple[str, bool], dict[str, float]]:
    from triton.testing import do_bench

    found: dict[tuple[str, bool], dict[str, float]] = {kind: {} for kind in KINDS}
    for which, gated, name, run in _runs(point, dtype, device, paths):
        found[which, gated][name] = do_bench(run, warmup=1, rep=5, return_mode="median")
    return found


def without(device: str, rows: list[dict[str, Any]], file: Path = FILE) -> list[dict[str, Any]]:
    """The rows that the file has for a device, or counted ones, less the times that `rows` have of the same calls."""
    kept = []
    for row in json.loads(file.read_text()).get(device) or counted():
        anew = {path for other in rows if _call(other) == _call(row) for path in other["ms"]}
        ms = {path: t for path, t in row["ms"].items() if path not in anew}
        if ms:
            kept.append(row | {"ms": ms})
    return kept


def _call(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["pass"], row["dtype"], row["gated"], _point(row)


def save(device: str, rows: list[dict[str, Any]], file: Path = FILE) -> None:
    """Put a device's rows, one a line, into the file, before those of other devices; its older ones go."""
    devices = json.loads(file.read_text()) if file.exists() else {}
    devices = {device: rows, **{name: other for name, other in devices.items() if name != device}}
    tables = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, of)) + "\n]" for name, of in devices.items()]
    file.write_text("{\n" + ",\n".join(tables) + "\n}\n")
    _rows.cache_clear()
    fastest.cache_clear()
