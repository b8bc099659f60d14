"""lra: a training step of a sequence classifier, state spaces beside a Transformer: speed claims on the Long Range Arena.

Six blocks of width 256 over signals, mean pooling, ten classes, AdamW. Blocks of S4D, S4, S5, DLR and GSS are their authors' on
that benchmark or in their papers: the system, a gate, no MLP. The Transformer has 4 heads that see the whole row, and MLPs of
four times the width; once with plain attention (product, softmax, product: what the papers compared to) and once with the
fastest at hand. One more S4D has the Transformer's MLPs. Mega has its own of twice the width, and attention over all or within
chunks. All in the same precision and mode; the batch is halved where memory is short, and ratios are of tokens a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from hippodrome.bench._measure import Bench, Row, checked, grid
from hippodrome.bench._steps import Mode, fast_attention, model_flops, plain_attention, step_row
from hippodrome.bench._targets import Ratio, ratios
from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.lti._base import LTI
from hippodrome.lti.dlr import DLR
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.gss import GSS
from hippodrome.mixers.mega import Mega
from hippodrome.mixers.s5 import S5
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.part import BadInput
from hippodrome.patterns import Full
from hippodrome.readouts.pool import Pool
from hippodrome.task import Batch

STATE, STATE_MLP = "S4D", "S4D and MLPs"
PLAIN, FAST = "Transformer, plain attention", "Transformer, SDPA"
MEGA, MEGA_CHUNK = "Mega", "Mega, chunks of 128"
SYSTEMS = (STATE, STATE_MLP, "S4", "S5", "DLR", "GSS", MEGA_CHUNK, MEGA)
WAYS = (*SYSTEMS, PLAIN, FAST)
TASK = "training step"
CLASSES, HEADS, CHUNK = 10, 4, 128
TARGET = 5.8

GPU_LENGTHS, CPU_LENGTHS = (1024, 2048, 4096, 16384), (128, 256)
GPU_TOKENS, CPU_TOKENS = 1 << 16, 1 << 9


def rows(
    bench: Bench,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    channels: int | None = None,
    layers: int | None = None,
    modes: int = 32,
    bidirectional: bool = False,
    dtype: str | None = None,
    mode: Mode | None = None,
) -> Iterator[Row]:
    """A training step of every classifier at every length, with the number of tokens kept."""
    checked("lra", bench.ways, WAYS)
    gpu = bench.on_gpu
    channels, layers = channels or (256 if gpu else 64), layers or (6 if gpu else 2)
    dtype, mode = dtype or ("bf16" if gpu else "fp32"), mode or ("graph" if gpu else "eager")
    if channels % HEADS:
        raise BadInput(f"channels is {channels}: it must be a multiple of {HEADS}, the number of attention heads")
    sizes = {"channels": channels, "layers": layers, "modes": modes, "bidirectional": int(bidirectional)}
    chosen = lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    for count, length in grid(bench, chosen, batch, tokens or (GPU_TOKENS if gpu else CPU_TOKENS), ()):
        for way, config in _models(channels, layers, modes, bidirectional, length).items():
            if not bench.wants(way):
                continue
            row = Row(way=way, task=TASK, length=length, batch=count, sizes=sizes, dtype=dtype)
            with plain_attention() if way == PLAIN else fast_attention(bench):
                yield step_row(
                    bench,
                    row,
                    config,
                    lambda size, length=length: _random(bench, size, length),  # type: ignore[misc]
                    mode=mode,
                    flops_per_token=lambda model, length=length: model_flops(model, length),  # type: ignore[misc]
                )


def _models(channels: int, layers: int, modes: int, bidirectional: bool, length: int) -> dict[str, ModelConfig]:
    """Way -> its model. GSS looks one way only and is left out where all look both ways."""

    def system(config: LTI.Config) -> SSM.Config:
        return SSM.Config(system=config, bidirectional=bidirectional)

    state = system(S4D.Config(d_state=2 * modes))
    attention = Attention.Config(n_head=HEADS, pattern=Full())
    mega, wide = Mega.Config(bidirectional=bidirectional), Mlp.Config(d_ff=2 * channels, activation="silu")
    blocks = {
        STATE: BlockConfig(mixer=state),
        STATE_MLP: BlockConfig(mixer=state, channel=Mlp.Config()),
        "S4": BlockConfig(mixer=system(S4.Config(d_state=2 * modes, length=length))),
        "S5": BlockConfig(mixer=S5.Config(d_state=2 * modes, bidirectional=bidirectional)),
        "DLR": BlockConfig(mixer=system(DLR.Config(d_state=2 * modes))),
        "GSS": BlockConfig(mixer=GSS.Config()),
        MEGA_CHUNK: BlockConfig(mixer=replace(mega, chunk=CHUNK), channel=wide),
        MEGA: BlockConfig(mixer=mega, channel=wide),
        PLAIN: BlockConfig(mixer=attention, channel=Mlp.Config()),
        FAST: BlockConfig(mixer=attention, channel=Mlp.Config()),
    }
    if bidirectional:
        del blocks["GSS"]
    return {
        way: ModelConfig(
            d_model=channels, blocks=(block,) * layers, embed=Signal.Config(), readout=Pool.Config(classes=CLASSES)
        )
        for way, block in blocks.items()
    }


def _random(bench: Bench, size: int, length: int) -> Batch:
    return Batch(bench.draw(size, length, 1), torch.randint(CLASSES, (size,), device=bench.device))


def targets(rows_: Sequence[Row], on_gpu: bool) -> Iterator[Ratio]:
    """Steps a token over the Transformers', and their mean over the lengths."""
    for way in (PLAIN, FAST):
        for state in SYSTEMS:
            what = f"{state}: tokens/s over those of the {way}"
            found = list(ratios(rows_, way, state, what, "at least"))
            yield from found
            if found:
                bound = TARGET if on_gpu and (way, state) == (PLAIN, STATE) else None
                mean = fmean(ratio.value for ratio in found)
                yield Ratio(
                    what=f"{what}, mean over lengths", task=TASK, length=0, batch=0, value=mean, kind="at least", bound=bound
                )
