"""Timings of operations against their peers, each behind a check that they agree: no speed without a number.

Every row is the median of several calls in this process, forward alone and forward with backward for all inputs. Peers of
`diagonal_ssm`: the usual way (a Vandermonde kernel of H x N x L complex powers, then torch's FFT) and the best FFT way (the
kernel from two short tables of powers, then torch's FFT, which is the reference).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippodrome.ops._op import use_backend
from hippodrome.ops.diagonal_ssm import diagonal_ssm
from hippodrome.ops.long_conv import fft_conv, long_conv
from hippodrome.part import BadInput, nearest
from hippodrome.run import provenance, write_json

TOLERANCE = 1e-4
"""Largest difference of a peer's outputs, relative to the largest, that may be timed."""


@dataclass(frozen=True)
class Row:
    """One way to compute one op at one size: median milliseconds of a forward, and of a forward and backward."""

    op: str
    way: str
    batch: int
    channels: int
    length: int
    modes: int
    dtype: str
    forward_ms: float
    both_ms: float


def _vandermonde(u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    steps = torch.arange(u.shape[-1], device=u.device)
    kernel = torch.einsum("hn,hnl->hl", weights, torch.exp(log_modes.unsqueeze(-1) * steps)).real
    return fft_conv(u, kernel) + skip.unsqueeze(-1) * u


def _on(backend: str | None, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        with use_backend(backend):
            return call(*inputs)

    return run


def _ssm(u: Tensor, log_modes: Tensor, weights: Tensor, skip: Tensor) -> Tensor:
    return diagonal_ssm(u, log_modes, weights, skip=skip)[0]


def _conv(u: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    return long_conv(u, kernel, skip=skip)


def _ssm_inputs(batch: int, channels: int, length: int, modes: int) -> list[Tensor]:
    """S4D-Lin's modes at time steps from 1e-3 to 1e-1."""
    dt = torch.logspace(-3, -1, channels).unsqueeze(-1)
    log_modes = torch.complex(-0.5 * dt.expand(-1, modes), torch.pi * dt * torch.arange(modes))
    weights = dt * torch.randn(channels, modes, dtype=torch.complex64)
    return [torch.randn(batch, channels, length), log_modes, weights, torch.randn(channels)]


def _conv_inputs(batch: int, channels: int, length: int, modes: int) -> list[Tensor]:
    return [torch.randn(batch, channels, length), torch.randn(channels, modes) / modes**0.5, torch.randn(channels)]


OPS: dict[str, tuple[Callable[..., list[Tensor]], dict[str, Callable[..., Tensor]]]] = {
    "diagonal_ssm": (
        _ssm_inputs,
        {"hippodrome": _on(None, _ssm), "two-level + FFT": _on("reference", _ssm), "Vandermonde + FFT": _vandermonde},
    ),
    "long_conv": (_conv_inputs, {"hippodrome": _on(None, _conv), "FFT": _on("reference", _conv)}),
}
"""Op -> how its inputs are drawn, and the ways to compute it, ours first."""


def bench(
    op: str = "diagonal_ssm",
    *,
    lengths: Sequence[int] = (1024, 4096, 16384),
    batch: int = 8,
    channels: int = 128,
    modes: int = 32,
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time every way to compute `op` at each length, fp32. `modes`: complex modes, or taps of a `long_conv` kernel.

    Raises `BadInput` for an unknown op or impossible sizes, and `AssertionError` if two ways disagree.
    """
    if op not in OPS:
        raise BadInput(f"nothing is timed for the op {op!r}: {nearest(op, OPS)}")
    for name, value in (
        ("batch", batch),
        ("channels", channels),
        ("modes", modes),
        ("repeats", repeats),
        *(("length", n) for n in lengths),
    ):
        if value < 1:
            raise BadInput(f"{name} is {value}: it must be at least 1")
    draw, ways = OPS[op]
    rows = []
    for length in lengths:
        torch.manual_seed(seed)
        inputs = [t.to(device).requires_grad_() for t in draw(batch, channels, length, modes)]
        _check(op, ways, inputs)
        for way, call in ways.items():
            forward, both = _time(call, inputs, repeats)
            rows.append(Row(op, way, batch, channels, length, modes, "float32", forward, both))
            if progress is not None:
                progress(f"{op} {way} L = {length}: {forward:.1f} ms forward, {both:.1f} ms with backward")
    return rows


@torch.no_grad()
def _check(op: str, ways: dict[str, Callable[..., Tensor]], inputs: list[Tensor]) -> None:
    first, *others = (call(*inputs) for call in ways.values())
    for way, other in zip(list(ways)[1:], others, strict=True):
        error = float((first - other).abs().max() / other.abs().max())
        assert error < TOLERANCE, f"{op} and {way} differ by {error:.1e}: nothing is timed"


def _time(call: Callable[..., Tensor], inputs: list[Tensor], repeats: int) -> tuple[float, float]:
    """Median milliseconds of a forward, and of a forward and backward, after one call that is not counted."""
    forwards, boths = [], []
    grad = torch.randn_like(inputs[0])
    for repeat in range(repeats + 1):
        for tensor in inputs:
            tensor.grad = None
        start = _now(inputs[0])
        y = call(*inputs)
        middle = _now(inputs[0])
        y.backward(grad)
        end = _now(inputs[0])
        if repeat:
            forwards.append(1e3 * (middle - start))
            boths.append(1e3 * (end - start))
    return statistics.median(forwards), statistics.median(boths)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def save(rows: Sequence[Row], folder: Path, *, seed: int = 0, device: str = "cpu") -> Path:
    """Write FOLDER/OP.json, with provenance, and a picture of time by length beside it. Returns the JSON's path."""
    op = rows[0].op
    path = folder / f"{op}_{device}.json"
    ratios = {
        f"{row.way}, L = {row.length}": round(row.both_ms / ours.both_ms, 2)
        for row in rows
        for ours in rows
        if ours.length == row.length and ours.way == "hippodrome" and row.way != ours.way
    }
    write_json(
        path,
        {"rows": [asdict(row) for row in rows], "times slower than hippodrome, with backward": ratios,
         "provenance": provenance(seed, torch.device(device))},
    )  # fmt: skip
    _draw(rows, path.with_suffix(".png"))
    return path


def _draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for way, marker in zip(dict.fromkeys(row.way for row in rows), "os^Dv", strict=False):
        mine = [row for row in rows if row.way == way]
        axes.plot([row.length for row in mine], [row.both_ms for row in mine], marker=marker, label=way)
    first = rows[0]
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel="ms, forward and backward")
    axes.set_title(f"{first.op}: {first.batch} x {first.channels} channels, {first.modes} modes, {first.dtype}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
