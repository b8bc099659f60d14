"""state: a token's time and the bytes of state a row, from contexts of 1K to 128K: systems of fixed state beside a Transformer.

1.3B's shape on a GPU: 24 blocks of width 2048, attention in heads of 128, bf16, one row. No prompt is read: keys, values and
sums are filled with random numbers and positions set, which changes no step's work. Steps are greedy and, on a GPU, one CUDA
graph each. Systems have the sizes of their papers; H3 has heads of one channel, as in the published hybrids. A system whose
recipe is not here is left out.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippodrome import plots
from hippodrome.bench._measure import DTYPES, Bench, Row, checked, grid
from hippodrome.bench._report import Report
from hippodrome.bench._steps import fast_attention
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.bench.generate import HEAD_WIDTH, VOCABULARY
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import Model, ModelConfig, ModelState
from hippodrome.part import BadInput
from hippodrome.recipes import find_recipe
from hippodrome.recipes._lm import Text
from hippodrome.timing import time_steps

TRANSFORMER = "Transformer"
SYSTEMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear attention": ("linear_transformer", {"positions": "none"}),
    "H3": ("h3.pure", {"d_state": 64, "head_dim": 1}),
    "S4": ("s4", {"d_state": 64}),
    "S4D": ("s4d", {"d_state": 64}),
    "GSS": ("gss", {"d_state": 512}),
    "DLR": ("dlr", {"d_state": 4096}),
    "S5": ("s5", {}),
    "Mega, chunks of 128": ("mega.chunked", {"chunk": 128}),
}
"""Way -> its recipe and what that is asked for."""
WAYS = (TRANSFORMER, *SYSTEMS)
TASK = "a token"

GPU_LENGTHS = tuple(1 << n for n in range(10, 18))
CPU_LENGTHS = (1024, 4096, 16384)
REPEATS = 3
JUDGED = 16384
"""Tokens at which states were to be so much smaller than keys and values."""
UNCOUNTED = 2
"""Steps before those that are timed, which need room too."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    modes: int | None = None,
    vocabulary: int | None = None,
    new_tokens: int | None = None,
    dtype: str | None = None,
    state_dtype: str | None = None,
) -> Iterator[Row]:
    """Steps after contexts of every length, by every model. Models are built once; on a CPU they are small."""
    checked("state", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, layers = channels or (2048 if gpu else 128), layers or (24 if gpu else 2)
    vocabulary, dtype = vocabulary or (VOCABULARY if gpu else 256), dtype or ("bf16" if gpu else "fp32")
    new_tokens = new_tokens or (64 if gpu else 8)
    sizes = {"channels": channels, "layers": layers, "vocabulary": vocabulary, "new_tokens": new_tokens}
    sizes |= {} if modes is None else {"modes": modes}
    chosen = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    empty = [
        Row(way="", task=TASK, length=length, batch=count, sizes=sizes, dtype=dtype)
        for count, length in grid(bench, chosen, batch or 1, 0, ())
    ]
    for way, config in _models(channels, layers, modes, vocabulary).items():
        if bench.wants(way):
            kept = None if state_dtype is None else DTYPES[state_dtype]
            yield from _steps(bench, [replace(row, way=way) for row in empty], config, kept)
            bench.free()


def _models(channels: int, layers: int, modes: int | None, vocabulary: int) -> dict[str, ModelConfig]:
    """Attention comes last: where its keys and values do not fit, the rest is measured."""
    if channels % HEAD_WIDTH:
        raise BadInput(f"channels is {channels}: it must be a multiple of {HEAD_WIDTH}, the width of an attention head")
    shape: dict[str, Any] = {"n_layer": layers, "d_model": channels, "n_head": channels // HEAD_WIDTH}
    shape |= {"text": Text(tokenizer="bytes")}
    embed = Tokens.Config(vocab_size=vocabulary, pad_to_multiple=64)
    found = {}
    for way, (name, asked) in {**SYSTEMS, TRANSFORMER: ("transformer", {})}.items():
        recipe = find_recipe(name)
        known = inspect.signature(recipe).parameters
        sized = {"d_state": modes} if modes is not None and "d_state" in known else {}
        given = {key: value for key, value in shape.items() if key in known} | dict(asked) | sized
        found[way] = dataclasses.replace(recipe(**given).model, embed=embed)
    return found


def _steps(bench: Bench, empty: Sequence[Row], config: ModelConfig, kept: torch.dtype | None) -> Iterator[Row]:
    bench.reseed()
    bench.say(f"{empty[0].way}: building {len(config.blocks)} blocks of width {config.d_model:,}")
    with torch.device(bench.device):
        model = config.build().to(DTYPES[empty[0].dtype]).eval()
    for row in empty:

        def measured(row: Row) -> Row:
            bench.say(f"{row.way}: {row.sizes['new_tokens']} tokens after {row.length:,}")
            new = row.sizes["new_tokens"]
            facts: list[dict[str, float]] = []

            def call() -> None:
                state = _filled(model, row.batch, row.length, row.length + new + UNCOUNTED)
                facts.append(time_steps(model, state, new, state_dtype=kept))

            with fast_attention(bench):
                peak = bench.peak(call)
                for _ in range((bench.repeats or REPEATS) - 1):
                    call()
            step_s = statistics.median(fact["step_s"] for fact in facts)
            more = {"tokens_per_s": row.batch / step_s, "state_bytes": facts[-1]["state_bytes"] / row.batch}
            more |= {"step_bytes": facts[-1]["step_bytes"]}
            more["step_share_of_copy"] = more["step_bytes"] / step_s / bench.ceilings.copy_bytes_per_s
            return replace(row, ms=1e3 * step_s, peak_bytes=peak, more=more)

        yield bench.fit(row, measured)


@torch.no_grad()
def _filled(model: Model, batch: int, length: int, room: int) -> ModelState:
    """The state of rows that have seen `length` tokens, of random numbers in [0, 1): sums of features are not negative."""

    def fill(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.fill_(length)
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).uniform_()
        return tensor

    return model.init_state(batch, room).map(fill)


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """How flat the steps are, how much smaller the states, how much faster than the Transformer's."""
    ways = [way for way in dict.fromkeys(row.way for row in rows_) if way != TRANSFORMER]
    for way in ways:
        steps = [row.ms for row in rows_ if row.way == way and row.ms]
        if len(steps) > 1:
            what = f"{way}: the slowest step over the fastest, all contexts"
            bound = 1.1 if on_gpu else None
            yield Ratio(what=what, task=TASK, length=0, batch=0, value=max(steps) / min(steps), kind="at most", bound=bound)

    def fifty(row: Row) -> float | None:
        return 50.0 if row.length == JUDGED else None

    for way in ways:
        what = f"{way}: times fewer bytes of state than keys and values"
        yield from ratios(rows_, TRANSFORMER, way, what, "at least", of=_bytes, bound=fifty)
    for way in ways:
        yield from ratios(rows_, TRANSFORMER, way, f"{way}: times faster than the Transformer", "at least")


def _bytes(row: Row) -> float | None:
    return row.more.get("state_bytes")


def draw(report: Report, path: Path) -> None:
    """Two panels by the context: a token's time, and the bytes of state a row."""
    timed = [row for row in report.rows if row.ms]

    def curves(of: str, scale: float) -> dict[str, list[plots.Curve]]:
        drawn: dict[str, list[plots.Curve]] = {}
        for way in dict.fromkeys(row.way for row in timed):
            mine = sorted((row for row in timed if row.way == way), key=lambda row: row.length)
            values = [row.ms or 0.0 if of == "ms" else row.more[of] for row in mine]
            drawn[way] = [([row.length for row in mine], [scale * value for value in values])]
        return drawn

    log: dict[str, Any] = {"x": "tokens before", "log_x": True, "log_y": True, "markers": True}
    panels = [
        plots.Panel(title="time of a token", y="milliseconds", curves=curves("ms", 1.0), **log),
        plots.Panel(title="state of a row", y="megabytes", curves=curves("state_bytes", 1e-6), **log),
    ]
    if timed:
        plots.draw(path, panels, f"generation with a fixed state, {report.provenance['device']}")
