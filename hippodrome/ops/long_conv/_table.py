"""Which path a call of long_conv takes on the GPU: the fastest at the nearest point of a table of times, kept in table.json.

`tune` measures the table on a device; `counted` fills one where nothing was measured. A row has the field "pass", "forward" or
"backward", because the two may well take different paths.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("table.json")
PATHS = ("toeplitz", "partitioned", "fft")
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


@functools.cache
def _rows(device: str) -> dict[tuple[str, str], list[tuple[Point, dict[str, float]]]]:
    """The rows measured on this device, or on the first one in the table."""
    devices = json.loads(FILE.read_text())
    found: dict[tuple[str, str], list[tuple[Point, dict[str, float]]]] = {}
    for row in devices.get(device, next(iter(devices.values())))["rows"]:
        point = Point(*(row[name] for name in Point._fields))
        found.setdefault((row["pass"], row["dtype"]), []).append((point, row["ms"]))
    return found


@functools.lru_cache(maxsize=4096)
def fastest(which: str, dtype: torch.dtype, device: str, point: Point) -> str:
    """The path to run: which is "forward" or "backward", device its name."""
    rows = _rows(device)[which, str(dtype).removeprefix("torch.")]
    _, ms = min(rows, key=lambda row: row[0].far(point))
    return min(ms, key=ms.__getitem__)


LENGTHS = tuple(1 << p for p in (6, 8, 10, 11, 12, 13, 14, 16, 18, 20, 22))
TOKENS = 1 << 17
"""Tokens a channel of the larger batch."""
NUMBERS = 1 << 26
"""Most numbers in an input."""


def grid() -> Iterator[Point]:
    """Whole-length kernels and short ones, one sequence and many."""
    for length in LENGTHS:
        for batch in sorted({1, min(256, max(1, TOKENS // length))}):
            channels = max(16, min(768, NUMBERS // (batch * length)))
            for taps in sorted({min(t, length) for t in (64, 1024, length)}):
                yield Point(batch, channels, length, taps)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def counted() -> dict[str, Any]:
    """A table made by counting operations and bytes, at rates seen on an H200."""
    rows = [_row(point, dtype, which, _count(point, dtype, which)) for dtype in DTYPES for point in grid() for which in PASSES]
    return {"source": "counted", "rows": rows}


def _row(point: Point, dtype: torch.dtype, which: str, ms: dict[str, float]) -> dict[str, Any]:
    rounded = {path: float(f"{t:.3g}") for path, t in ms.items()}
    return {"pass": which, "dtype": str(dtype).removeprefix("torch."), **point._asdict(), "ms": rounded}


def _count(point: Point, dtype: torch.dtype, which: str) -> dict[str, float]:
    batch, channels, length, taps = point
    tokens, half = batch * channels * length, dtype == torch.bfloat16
    # Multiply-adds a second that dense products may reach, in bf16, tf32 and three times tf32.
    dense = {torch.bfloat16: 200e12, torch.float16: 80e12, torch.float32: 30e12}[dtype]
    t = max(64, 1 << round(math.log2(length / 2) / 2))
    n = length if length & (length - 1) == 0 else 1.2 * length
    seconds = {
        "toeplitz": 20e-6 + tokens * (64 + min(taps, length / 2 + 64)) / dense + tokens * 2 * dtype.itemsize / 3e12,
        "partitioned": 150e-6
        + tokens * (4 * t + 3 * min(length, 2 * taps + t) / t) / (0.5 * dense)
        + tokens * (20 if half else 40) / 3e12,
        "fft": 150e-6 + tokens * n / length * (35e-12 if length <= 1 << 15 else 55e-12) * (1 + 0.4 / batch),
    }
    return {path: 1e3 * s * (2 if which == "backward" else 1) for path, s in seconds.items()}


def tune(device: torch.device | str = "cuda", say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every path over the grid on a device: {"source": "measured", "rows": [...]}; `say` is told of each row."""
    device = torch.device(device)
    points = [(point, dtype) for dtype in DTYPES for point in grid()]
    say(f"compiling the programs of {len(points)} points")
    _compile(points, device)
    rows = []
    for point, dtype in points:
        for which, ms in _measure(point, dtype, device).items():
            rows.append(_row(point, dtype, which, ms))
            say(f"{rows[-1]}")
    return {"source": "measured", "rows": rows}


def _compile(points: list[tuple[Point, torch.dtype]], device: torch.device) -> None:
    """Run every program once, in processes beside each other, so that Triton's cache on disk has them."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Whichever worker is free takes the next point: some compile more than others.
        for done in [pool.submit(_try, point, dtype, device) for point, dtype in points]:
            done.result()


def _try(point: Point, dtype: torch.dtype, device: torch.device) -> None:
    for _, _, run in _runs(point, dtype, device):
        run()
    torch.cuda.synchronize(device)


def _runs(point: Point, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Pass, path and call, but for those that counting calls hopeless: a dense product of a million taps takes minutes."""
    from hippodrome.ops.long_conv._taps import Taps, Wanted
    from hippodrome.ops.long_conv.triton import path

    batch, channels, length, taps = point
    u, dy = torch.randn(2, batch, channels, length, dtype=dtype, device=device)
    kernel = Taps(torch.randn(channels, taps, device=device) / taps)
    for which in PASSES:
        ms = _count(point, dtype, which)
        for name in PATHS:
            if ms[name] < 5 * min(ms.values()):
                backward = functools.partial(path(name).backward, dy, u, kernel, None, None, Wanted(True, True, False))
                yield which, name, backward if which == "backward" else functools.partial(path(name).convolve, u, kernel, None)


def _measure(point: Point, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    from triton.testing import do_bench

    found: dict[str, dict[str, float]] = {which: {} for which in PASSES}
    for which, name, run in _runs(point, dtype, device):
        found[which][name] = do_bench(run, warmup=1, rep=5, return_mode="median")
    return found


def save(device: str, table: dict[str, Any], file: Path = FILE) -> None:
    """Put a device's table, one row a line, into the file; a device's older one goes."""
    devices = json.loads(file.read_text()) if file.exists() else {}
    devices = {
        device: table,
        **{name: other for name, other in devices.items() if name != device and other["source"] == "measured"},
    }
    lines = [
        f'{json.dumps(name)}: {{"source": {json.dumps(one["source"])}, "rows": [\n'
        + ",\n".join(json.dumps(row) for row in one["rows"])
        + "\n]}"
        for name, one in devices.items()
    ]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    _rows.cache_clear()
    fastest.cache_clear()
