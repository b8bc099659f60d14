"""What every subject measures with: a timer, a memory gauge, the device's ceilings, and a check before each time.

On a GPU a time is the median of several calls between CUDA events, each after a buffer larger than L2 was written and the
device has idled for some milliseconds: the inputs come from memory, and the host is far enough ahead that launches are not
timed. On a CPU it is the median of several calls by the clock. What fails (a missing kernel, memory) leaves a row that says so
instead of a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippodrome.memory import OUT_OF_MEMORY, shortage
from hippodrome.part import BadInput, nearest

OURS = "hippodrome"
FORWARD, BOTH = "forward", "forward + backward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}
"""Largest ||found - expected|| / ||expected|| of an output or a gradient that may be timed."""

FLUSH_BYTES = 1 << 30
AHEAD_CYCLES = 8_000_000
"""What the device idles through before each call, some 4 ms: the host launches all of a forward and backward meanwhile."""
GPU_BUDGET_MS = 60.0
CPU_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to do one task at one size. ms: median milliseconds, None where `error` says why there is none.

    difference: from the reference, relative; None where the task has no reference. bytes and flops: the least a perfect
    implementation moves and, of this way's algorithm, computes. peak_bytes: memory above what was held before the call.
    """

    way: str
    task: str
    length: int
    batch: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    backend: str | None = None
    ms: float | None = None
    error: str | None = None
    difference: float | None = None
    bytes: int | None = None
    flops: int | None = None
    peak_bytes: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)
    """Further figures, such as tokens_per_s."""


@dataclass(frozen=True)
class Ceilings:
    """What this device did in this run: bytes (read and written) a second of a large copy, FLOP a second of a product."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_dtype: str


class Differs(AssertionError):
    """A way does not compute what it should: it is not timed."""


class Bench:
    """One run on one device. `ways`: names, or parts of them, of what is timed; empty: all. `repeats`: None: by a budget."""

    def __init__(
        self,
        device: torch.device,
        *,
        seed: int = 0,
        repeats: int | None = None,
        ways: Sequence[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if repeats is not None and repeats < 1:
            raise BadInput(f"repeats is {repeats}: it must be at least 1")
        self.device, self.seed, self.repeats, self.ways = device, seed, repeats, tuple(ways)
        self.say = progress or (lambda _line: None)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wants(self, way: str) -> bool:
        """Whether this way is to be timed."""
        return not self.ways or any(part.lower() in way.lower() for part in self.ways)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(shape, device=self.device).to(dtype)

    def reseed(self) -> None:
        torch.manual_seed(self.seed)

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        """Measured once a run, before anything else."""
        name, size, copied = ("bf16", 8192, 1 << 31) if self.on_gpu else ("fp32", 1024, 1 << 27)
        self.say("measuring the ceilings: a copy and a matrix product")
        a, b = (self.draw(size, size, dtype=DTYPES[name]) for _ in range(2))
        product, copy = self.time(lambda: a @ b), self.time(self.copy(copied))
        return Ceilings(1e3 * copied / copy, 1e3 * 2 * size**3 / product, name)

    def copy(self, moved: int) -> Callable[[], Tensor]:
        """A call that copies so that `moved` bytes are read and written in all."""

        @functools.cache
        def ends() -> tuple[Tensor, Tensor]:
            # At the first call, so that too little memory for them is a row that says so.
            source = self.draw(max(1, moved // 8))
            return torch.empty_like(source), source

        def call() -> Tensor:
            target, source = ends()
            return target.copy_(source)

        return call

    def time(self, call: Callable[[], object]) -> float:
        """Median milliseconds of a call; one call before is not counted."""
        call()
        return self._time_gpu(call) if self.on_gpu else self._time_cpu(call)

    def _time_cpu(self, call: Callable[[], object]) -> float:
        spent = []
        for _ in range(self.repeats or CPU_REPEATS):
            start = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - start))
        return statistics.median(spent)

    def _time_gpu(self, call: Callable[[], object]) -> float:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

        def timed(count: int) -> list[float]:
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
            for start, stop in pairs:
                flush.zero_()
                torch.cuda._sleep(AHEAD_CYCLES)
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(stop) for start, stop in pairs]

        estimate = timed(1)[0]
        return statistics.median(timed(self.repeats or min(50, max(3, int(GPU_BUDGET_MS / max(estimate, 1e-3))))))

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes of memory that a call needs at its peak above what is held before; None where that cannot be told."""
        if not self.on_gpu:
            return _peak_of_process(call)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def measure(
        self,
        row: Row,
        call: Callable[[], Any],
        check: Callable[[Any], float] | None = None,
        *,
        backend: Callable[[], str] | None = None,
    ) -> Row:
        """The row with what a call took, after `check` of its result stayed within the dtype's tolerance."""

        def measured() -> Row:
            # What an op says in one line ("... runs on reference") is asked before its kernels are compiled for the first call.
            taken = row.backend if backend is None else backend()
            difference = None if check is None else check(call())
            if difference is not None and not difference <= TOLERANCE[row.dtype]:
                raise Differs(
                    f"differs from the reference by {difference:.1e}, more than {TOLERANCE[row.dtype]:.0e}: not timed"
                )
            peak, spent = self.peak(call), self.time(call)
            return replace(row, ms=spent, difference=difference, peak_bytes=peak, backend=taken)

        return self.attempt(row, measured)

    def attempt(self, row: Row, measured: Callable[[], Row]) -> Row:
        """What `measured` returns, or `row` with the one line of its failure."""
        error: str | None = None
        try:
            found = measured()
        except Exception as failure:
            found, error = row, one_line(failure)
        if error is not None:
            # Out of the handler: the exception and with it the frames that hold tensors are gone.
            found = replace(row, error=error)
            self.free()
        self.say(summary(found))
        return found

    def fit(self, row: Row, measured: Callable[[Row], Row]) -> Row:
        """`attempt` of the row, and while memory is short of it with half of its batch."""
        while True:
            found = self.attempt(row, functools.partial(measured, row))
            self.free()
            if row.batch == 1 or not (found.error or "").startswith(OUT_OF_MEMORY):
                return found
            row = replace(row, batch=row.batch // 2)

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.on_gpu:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def summary(row: Row) -> str:
    """A row in one line."""
    head = f"{row.way}, {row.task}, {row.batch} x {row.length:,}"
    if row.ms is None:
        return f"{head}: {row.error}"
    return f"{head}: {row.ms:.3g} ms" + (f", {row.more['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row.more else "")


def one_line(failure: BaseException) -> str:
    """The kind and the first line of what went wrong."""
    said = str(failure).strip().partition("\n")[0][:300]
    if (lacking := shortage(failure)) is not None:
        return lacking
    return said if isinstance(failure, (BadInput, Differs)) else f"{type(failure).__name__}: {said}"


def difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinite for what is not finite."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    away, size = float((found - expected).norm()), float(expected.norm())
    return away / max(size, 1e-30) if math.isfinite(away) else math.inf


class Expected:
    """What a function of signals (B, H, L) or (B, H, L, K) and parameters (H, ...) gives for a few channels, and its gradients,
    in float64.

    Channels (heads, where channels come in heads) do not depend on each other, so a few of them check a call of full size:
    the very call that is timed, at the price of a small one. Called with (y, *gradients), it returns the largest difference.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        dy: Tensor,
        *,
        heads: int,
        picked: int = 4,
    ) -> None:
        chosen = sorted({*range(min(picked, heads)), *range(max(0, heads - picked), heads)})
        self._heads, self._chosen = heads, torch.tensor(chosen, device=dy.device)
        few = [self._wide(self._pick(t)).requires_grad_(t.requires_grad) for t in inputs]
        y = reference(*few)
        wanted = [t for t in few if t.requires_grad]
        self._tensors = (y.detach(), *torch.autograd.grad(y, wanted, self._wide(self._pick(dy))))

    def __call__(self, found: Sequence[Tensor]) -> float:
        pairs = zip(found, self._tensors, strict=False)
        return max(difference(self._pick(a), b) for a, b in pairs)

    def _pick(self, t: Tensor) -> Tensor:
        """Signals have their channels on axis 1, parameters on axis 0; several channels may make one head."""
        axis = 1 if t.dim() >= 3 else 0
        t = t.detach().unflatten(axis, (self._heads, -1))
        return t.index_select(axis, self._chosen).flatten(axis, axis + 1)

    @staticmethod
    def _wide(t: Tensor) -> Tensor:
        return t.to(torch.complex128 if t.is_complex() else torch.float64)


def calls(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Task -> a call that returns (y,), or y and the gradients of all inputs that want one."""

    @torch.no_grad()
    def forward() -> Sequence[Tensor]:
        return (function(*inputs),)

    def both() -> Sequence[Tensor]:
        y = function(*inputs)
        return y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)

    return {FORWARD: forward, BOTH: both}


def grid(
    bench: Bench, lengths: Sequence[int] | None, batch: int | None, tokens: int, default: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """(batch, length) of each size: the default's, or `lengths` with `batch` rows each, or with as many as make `tokens`."""
    sizes = list(default)
    if lengths is not None or batch is not None:
        sizes = [(batch or 0, n) for n in lengths or dict.fromkeys(n for _, n in default)]
    _ = bench.ceilings
    for rows, length in sizes:
        found = rows or max(1, tokens // length)
        bench.reseed()
        bench.free()
        yield found, length


def checked(subject: str, ways: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that is part of no way's."""
    for word in ways:
        if not any(word.lower() in way.lower() for way in known):
            raise BadInput(f"{subject} has no way called {word!r}: {nearest(word, known)}")


_LEAST = 16 << 20
"""Bytes that a process must grow by for it to mean anything: smaller calls are served from pages that it holds already."""


def _peak_of_process(call: Callable[[], object]) -> int | None:
    """By the high-water mark of the process, which Linux lets it lower; None where it hardly grows."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes(status.read_text(), "VmRSS")
        call()
        grown = (_kilobytes(status.read_text(), "VmHWM") - before) * 1024
        return grown if grown >= _LEAST else None
    except OSError:
        return None


def _kilobytes(status: str, name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
