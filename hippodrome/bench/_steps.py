"""Whole training steps of a model, as `train` takes them: forward, backward, clipping, AdamW."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hippodrome.bench._measure import Bench, Differs, Row
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.gss import GSS
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.mega import Mega
from hippodrome.mixers.s5 import S5
from hippodrome.mixers.ssm import SSM
from hippodrome.model import Block, Model, ModelConfig
from hippodrome.optim import build_optimizer
from hippodrome.part import BadInput, nearest
from hippodrome.readouts.lm import Lm
from hippodrome.run import TrainConfig
from hippodrome.step import Step
from hippodrome.task import Batch, Split, Task

Mode = Literal["eager", "blocks", "whole", "graph"]
MODES: tuple[Mode, ...] = ("eager", "blocks", "whole", "graph")
WARMUP, TIMED = 3, 5


class _Same(Task):
    """The same batch at every step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, split: Split, index: int, size: int) -> Batch:
        return self._batch


def step_row(
    bench: Bench,
    row: Row,
    config: ModelConfig,
    draw: Callable[[int], Batch],
    *,
    mode: Mode,
    checkpointing: bool = False,
    flops_per_token: Callable[[Model], int],
) -> Row:
    """The row with the median of a few training steps. `draw(rows)` gives the batch; where memory is short, it is halved."""
    if mode not in MODES:
        raise BadInput(f"mode is {mode!r}: {nearest(mode, MODES)}")
    how: Any = {"precision": row.dtype, "cuda_graph": mode == "graph", "compile": mode == "whole"}

    def measured(row: Row) -> Row:
        settings = TrainConfig(batch_size=row.batch, **how)
        bench.reseed()
        torch.compiler.reset()
        model = config.build().to(bench.device)
        model.activation_checkpointing = checkpointing
        if mode == "blocks":
            compile_blocks(model)
        task, optimizer = _Same(draw(row.batch)), build_optimizer(model, settings, bench.device)
        step = Step(settings, task, model, optimizer, bench.device)
        model.train()
        found: list[float] = []

        def steps() -> None:
            found.extend(_timed_steps(bench, step))

        peak = bench.peak(steps)
        ms = statistics.median(found)
        tokens, flops = row.batch * row.length, flops_per_token(model) * row.batch * row.length
        more = {"tokens_per_s": 1e3 * tokens / ms, "tflop_per_s": 1e-9 * flops / ms}
        more |= {"parameters": sum(p.numel() for p in model.parameters())}
        return replace(row, ms=ms, flops=flops, peak_bytes=peak, more=more)

    return bench.fit(row, measured)


def _timed_steps(bench: Bench, step: Step) -> list[float]:
    """Milliseconds of the steps after those that warm up, each until the device is done."""
    spent = []
    for number in range(WARMUP + (bench.repeats or TIMED)):
        start = time.perf_counter()
        loss, _ = step(number)
        if bench.on_gpu:
            torch.cuda.synchronize(bench.device)
        spent.append(1e3 * (time.perf_counter() - start))
    if not bool(torch.isfinite(loss)):
        raise Differs(f"the loss is {float(loss)} after {number + 1} steps: not timed")
    return spent[WARMUP:]


def compile_blocks(model: Model) -> None:
    """torch.compile of every block and of the readout's loss: blocks alike share their code, so that it is made once."""
    for block in model.blocks:
        block.compile(dynamic=False)
    model.readout.loss = torch.compile(model.readout.loss, dynamic=False)  # type: ignore[method-assign]


def model_flops(model: Model, length: int) -> int:
    """FLOPs a token of a training step, without recomputation: 6 a weight of every matrix that a token meets, and the mixing.

    A token meets half of the keys of a causal attention, or all of them: 2 products forward and 4 backward. A state space
    counts as state passing in chunks of 64, S5 as its maps into and out of the states, three times.
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if isinstance(model.readout, Lm) and model.readout.linear is None:
        weights += model.readout.weight.numel()  # tied to the embedding's table, which as such is looked up and not multiplied
    return 6 * weights + sum(_mixing_flops(cast(Block, block).mixer, length) for block in model.blocks)


def _mixing_flops(mixer: nn.Module, length: int) -> int:
    if isinstance(mixer, Attention):
        return 12 * length * mixer.n_head * mixer.d_head // (2 if mixer.causal else 1)
    ssm = 2 * 64 + 4 * 64
    if isinstance(mixer, H3):
        return 3 * mixer.q_proj.in_features * (2 * 2 * 64 + mixer.head_dim * ssm)
    if isinstance(mixer, SSM):
        return 3 * mixer.output_linear.in_features * ssm * (2 if mixer.backward_system is not None else 1)
    if isinstance(mixer, GSS):
        return 3 * mixer.v_proj.out_features * ssm
    if isinstance(mixer, S5):
        return 3 * 2 * (mixer.system.B.numel() + mixer.system.C.numel())
    if isinstance(mixer, Mega):
        keys = min(length, mixer.config.chunk or length) / (2 if mixer.causal else 1)
        averages = 3 * mixer.out_proj.out_features * ssm * (1 if mixer.causal else 2)
        return int(6 * keys * (mixer.scale.shape[-1] + mixer.out_proj.in_features)) + averages
    return 0


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within the block torch's attention is the product, the softmax and the product, in the dtype of its inputs."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def fast_attention(bench: Bench) -> contextlib.AbstractContextManager[object]:
    """Within the block attention is cuDNN's on a GPU, or another of torch's where that takes no such call."""
    if not bench.on_gpu:
        return contextlib.nullcontext()
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)
