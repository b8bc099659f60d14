"""Images as rows of pixels: sets that are drawn or read once and then kept as bytes on disk, and tasks over them.

$HIPPODROME_CACHE (or ~/.cache/hippodrome) / NAME-KEY / facts.json and an .npy of bytes for each array, which is memory-mapped.
A long build runs in as many processes as there are cores, or as $HIPPODROME_WORKERS says, and shows how far it is.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hippodrome.data import alone, cache_root
from hippodrome.files import replacing, write_json
from hippodrome.part import BadInput
from hippodrome.task import Batch, Split, Task, ordered_rows, shuffled_rows

Arrays = Mapping[str, np.ndarray]
Make = Callable[[int, int], Arrays]
"""Rows start to stop of every array of a set."""

_FORMAT, _CHUNK = 1, 64
_SOON, _QUIET = 3.0, 10.0
"""Seconds of work that are not worth more processes or a bar, and between two lines where there is no terminal."""


def kept(name: str, facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], make: Make) -> dict[str, np.ndarray]:
    """The arrays of bytes that `facts` (JSON data) determine, from the cache or else made by `make` and put there.

    `shapes` by array name; the first axis is the same for all, the rows. Read-only and memory-mapped.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, dict(facts)]).encode()).hexdigest()[:12]
    folder = cache_root() / f"{name}-{key}"
    if not (folder / "facts.json").is_file():
        with alone(folder):
            # Another process may have built it while this one waited.
            if not (folder / "facts.json").is_file():
                with replacing(folder) as beside:
                    beside.mkdir()
                    files = {
                        array: np.lib.format.open_memmap(beside / f"{array}.npy", mode="w+", dtype=np.uint8, shape=shape)
                        for array, shape in shapes.items()
                    }
                    _fill(files, make, name)
                    for file in files.values():
                        file.flush()
                    write_json(beside / "facts.json", dict(facts))
    return {array: np.load(folder / f"{array}.npy", mmap_mode="r", allow_pickle=False) for array in shapes}


def _fill(files: Arrays, make: Make, name: str) -> None:
    rows = len(next(iter(files.values())))
    starts = range(0, rows, _CHUNK)

    def put(start: int, made: Arrays) -> None:
        for array, values in made.items():
            files[array][start : start + len(values)] = values

    began, done = time.monotonic(), 0
    while done < rows and time.monotonic() - began < _SOON:
        put(done, make(done, min(done + _CHUNK, rows)))
        done = min(done + _CHUNK, rows)
    if done == rows:
        return
    left = [start for start in starts if start >= done]
    workers = min(_workers(), len(left))
    with _progress(f"{name}, {workers} process{'es' if workers > 1 else ''}", rows, done) as watch:
        for start, made in zip(left, _chunks(make, left, rows, workers), strict=True):
            put(start, made)
            watch(min(start + _CHUNK, rows))


def _chunks(make: Make, starts: list[int], rows: int, workers: int) -> Iterator[Arrays]:
    """What `make` says of the chunks that begin at `starts`, in order."""
    stops = [min(start + _CHUNK, rows) for start in starts]
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(make, starts, stops)
        return
    # Forked, workers need not import torch nor be sent `make`; they only compute with NumPy.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _remember, (make,))
    try:
        yield from pool.map(_remembered, starts, stops)
    finally:
        pool.shutdown(cancel_futures=True)


_make: Make


def _remember(make: Make) -> None:
    global _make
    _make = make


def _remembered(start: int, stop: int) -> Arrays:
    return _make(start, stop)


def _workers() -> int:
    said = os.environ.get("HIPPODROME_WORKERS", "")
    if not said:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not said.isdecimal() or int(said) < 1:
        raise BadInput(f"HIPPODROME_WORKERS is {said!r}: it is a number of processes, 1 or more")
    return int(said)


@contextmanager
def _progress(doing: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """What is told how many rows are done: a bar on a terminal, elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(doing, total=total, completed=done)
            yield lambda now: bars.update(bar, completed=now)
        return
    said = time.monotonic()

    def line(now: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _QUIET:
            said = time.monotonic()
            print(f"{doing}: {now:,} of {total:,} images", file=sys.stderr, flush=True)

    yield line


class _Images(Task):
    """A task over images in raster order, H x W bytes a row. A subclass says what a split holds."""

    mean_std: tuple[float, float] = (127.5, 127.5)
    """What is taken off a byte, and what it is then divided by, where pixels are a signal."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        pixels: Literal["signal", "tokens"] = "signal"
        """signal: one real number a pixel. tokens: 256 ids, which an embedding must learn to order."""
        seed: int = 0
        """Draws the order of training, and the images that are drawn."""

        def __post_init__(self) -> None:
            if self.seed < 0:
                raise BadInput(f"seed is {self.seed}: it must be at least 0")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self._splits: dict[Split, dict[str, np.ndarray]] = {}

    def arrays(self, split: Split) -> dict[str, np.ndarray]:
        """images (n, H * W) and targets (n,) or (n, H * W) of a split, uint8. Made or opened at the first call."""
        if split not in self._splits:
            self._splits[split] = self._open(split)
        return self._splits[split]

    def _open(self, split: Split) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def size(self, split: Split) -> int:
        return len(self.arrays(split)["images"])

    def batch(self, split: Split, index: int, size: int) -> Batch:
        """Signals (B, H * W, 1) float32 or ids (B, H * W) int64, and int64 targets (B,) or (B, H * W)."""
        count = self.size(split)
        train = split == "train"
        rows = shuffled_rows(count, index, size, self.config.seed) if train else ordered_rows(count, index, size)
        arrays = self.arrays(split)
        images = torch.from_numpy(arrays["images"][rows.numpy()])
        targets = torch.from_numpy(arrays["targets"][rows.numpy()]).long()
        if self.config.pixels == "tokens":
            return Batch(images.long(), targets)
        mean, spread = self.mean_std
        return Batch(((images.float() - mean) / spread).unsqueeze(-1), targets)
