"""attention_train: training steps of a Transformer through the op as it chooses and through standard attention, by context.

GPT-2 small's shape: 12 blocks of width 768, 12 heads, 50,257 ids padded to 50,304; bf16 autocast, fused AdamW, clipping, random
ids, 16,384 tokens a step. Standard attention writes its scores in bf16, takes the softmax in fp32 and writes the weights. Both
eagerly and with their blocks compiled. `longest`: rows of one sequence instead, doubled until memory is short, by every way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hippodrome import plots
from hippodrome.bench._attention import standard_attention
from hippodrome.bench._measure import Bench, Row, checked, grid
from hippodrome.bench._report import Report
from hippodrome.bench._steps import Mode, model_flops, step_row
from hippodrome.bench._targets import Ratio, memory, ratios
from hippodrome.bench.train import TASK, TRANSFORMER, VOCABULARY, models, random_batch
from hippodrome.model import ModelConfig

AUTO, STANDARD, COMPILED = "auto", "standard attention", ", compiled"
HOW: dict[str, tuple[bool, Mode]] = {
    AUTO: (False, "eager"),
    AUTO + COMPILED: (False, "blocks"),
    STANDARD: (True, "eager"),
    STANDARD + COMPILED: (True, "blocks"),
}
"""Way -> whether its attention is standard, and its mode."""
WAYS = tuple(HOW)

GPU_LENGTHS, CPU_LENGTHS = (1024, 2048, 4096, 8192, 16384), (128, 256)
GPU_TOKENS, CPU_TOKENS = 1 << 14, 1 << 9
LONGEST = {True: 1 << 22, False: 1 << 10}
"""Where doubling ends on a GPU and elsewhere, if memory does not end it."""


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    vocabulary: int | None = None,
    dtype: str | None = None,
    mode: Mode | None = None,
    checkpointing: bool = False,
    longest: bool = False,
) -> Iterator[Row]:
    """A training step by every way at every length, eager and compiled, or in `mode` alone (eager or blocks)."""
    checked("attention_train", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, layers = channels or (768 if gpu else 64), layers or (12 if gpu else 2)
    vocabulary, dtype = vocabulary or (VOCABULARY if gpu else 256), dtype or ("bf16" if gpu else "fp32")
    config = models(channels, layers, 1, vocabulary)[TRANSFORMER]
    sizes = {"channels": channels, "layers": layers, "vocabulary": vocabulary}
    # Compiling takes a compiler and some time: on a CPU it is done when asked for.
    modes = ("eager", "blocks") if gpu else ("eager",)
    how = {way: each for way, each in HOW.items() if bench.wants(way) and each[1] in ((mode,) if mode else modes)}
    chosen = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)

    def row(way: str, count: int, length: int) -> Row:
        empty = Row(way=way, task=TASK, length=length, batch=count, sizes=sizes, dtype=dtype)
        return _step(bench, empty, config, *how[way], checkpointing)

    if longest:
        _ = bench.ceilings
        for way in how:
            length = chosen[0]
            while length <= LONGEST[gpu]:
                found = row(way, 1, length)
                yield found
                if found.error:
                    break
                length *= 2
        return
    for count, length in grid(bench, chosen, batch, tokens or (GPU_TOKENS if gpu else CPU_TOKENS), ()):
        for way in how:
            yield row(way, count, length)


def _step(bench: Bench, row: Row, config: ModelConfig, standard: bool, mode: Mode, checkpointing: bool) -> Row:
    with standard_attention() if standard else contextlib.nullcontext():
        return step_row(
            bench,
            row,
            config,
            lambda size: random_batch(bench, size, row.length, row.sizes["vocabulary"]),
            mode=mode,
            checkpointing=checkpointing,
            flops_per_token=lambda model: model_flops(model, row.length),
        )


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Tokens a second and memory over standard attention's, and the longest row trained by each way, in tokens."""
    for mode in ("", COMPILED):
        what = f"{AUTO}{mode}: tokens/s over those of {STANDARD}{mode}"
        yield from ratios(rows_, STANDARD + mode, AUTO + mode, what, "at least", bound=lambda _: 1.0 if on_gpu else None)
    for mode in ("", COMPILED):
        what = f"{AUTO}{mode}: times less memory than {STANDARD}{mode}"
        yield from ratios(rows_, STANDARD + mode, AUTO + mode, what, "at least", of=memory)
    for way in dict.fromkeys(row.way for row in rows_):
        fitted = [row.length for row in rows_ if row.way == way and row.ms]
        if fitted:
            what = f"{way}: the longest row trained, in tokens"
            yield Ratio(what=what, task=TASK, length=0, batch=0, value=max(fitted), kind="at least")


def draw(report: Report, path: Path) -> None:
    """Two panels by the context: tokens a second, and gigabytes at the peak where that is known."""
    timed = [row for row in report.rows if row.ms]
    if not timed:
        return
    speed: dict[str, list[plots.Curve]] = {}
    held: dict[str, list[plots.Curve]] = {}
    for way in dict.fromkeys(row.way for row in timed):
        mine = sorted((row for row in timed if row.way == way), key=lambda row: row.length)
        x = [row.length for row in mine]
        speed[way] = [(x, [row.more["tokens_per_s"] for row in mine])]
        known = [(row.length, row.peak_bytes / 1e9) for row in mine if row.peak_bytes]
        if known:
            held[way] = [([at for at, _ in known], [peak for _, peak in known])]
    log: dict[str, Any] = {"x": "tokens of context", "log_x": True, "log_y": True, "markers": True}
    panels = [plots.Panel(title="training", y="tokens a second", curves=speed, **log)]
    if held:
        panels.append(plots.Panel(title="memory", y="gigabytes at the peak", curves=held, **log))
    plots.draw(path, panels, f"a Transformer's training step, {report.provenance['device']}")
