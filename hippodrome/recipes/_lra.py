"""What the recipes of Long Range Arena share: the published sizes and budgets, and the models around the mixers.

Sizes and budgets are those of each model's own authors: for S4 the configs of its version 4, for S4D the same with 64 states,
for attention those of the benchmark. What our blocks do not do as theirs, they do alike for every mixer: layer norm before the
mixer, where S4 has batch norm and on ListOps behind it; the mean over positions, where the benchmark's Transformer reads its
first token; a cosine after the warm-up, where its rate falls as the root of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.linear_attention import LinearAttention
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Mixer, ModelConfig, Readout
from hippodrome.part import BadInput
from hippodrome.patterns import Full
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.task import Task

Name = Literal["s4", "s4d", "transformer", "linear_transformer"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is; None: as published for the task."""

    n_layer: int | None = None
    """Blocks."""
    d_model: int | None = None
    """Width."""
    d_ff: int | None = None
    """Width inside the MLPs; state spaces have none unless it is given."""
    n_head: int | None = None
    """Attention heads."""
    d_state: int | None = None
    """States of a state space's channel: 4 of S4, 64 of S4D."""
    dropout: float = 0.0
    """Of the embeddings and of what each block adds."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How a model is trained; None: as published for the task and the model."""

    steps: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    """Rows of one forward in one process; None: batch_size shared out over the processes."""
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    """Share of the steps in which the learning rate rises."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph."""
    seed: int = 0
    """Of the weights and the dropout. The data and its order are the same for all seeds."""
    device: str = "auto"
    log_every: int = 50
    eval_every: int | None = 1000
    """Steps between scores on the validation split, and between checkpoints."""
    eval_batches: int | None = None
    """Batches of such a score; None: the whole split."""


PAPER_SIZE, PAPER_BUDGET = Size(), Budget()


@dataclass(frozen=True)
class Published:
    """A model's size and budget on one task. warmup: share of the steps; lr: its peak."""

    n_layer: int
    d_model: int
    d_ff: int | None
    n_head: int | None
    batch_size: int
    steps: int
    warmup: float
    lr: float
    weight_decay: float


# Steps are 40 epochs of 96,000 rows, 32 of 25,000, 20 of 147,086, 200 of 45,000 and 160,000, and 50 of 160,000.
_STATE_SPACES = {
    "listops": Published(6, 256, None, None, 32, 120_000, 0.1, 1e-2, 0.05),
    "text": Published(6, 256, None, None, 16, 50_000, 0.1, 1e-2, 0.05),
    "retrieval": Published(6, 256, None, None, 64, 45_965, 0.1, 1e-2, 0.05),
    "image": Published(6, 512, None, None, 50, 180_000, 0.1, 1e-2, 0.05),
    "pathfinder": Published(6, 256, None, None, 64, 500_000, 0.1, 4e-3, 0.05),
    "path-x": Published(6, 256, None, None, 16, 500_000, 0.1, 1e-3, 0.05),
}
# The rate is 0.05 / sqrt(step) after a warm-up of 1000 or 8000 steps, which on Retrieval is longer than the run.
_ATTENTION = {
    "listops": Published(4, 512, 1024, 8, 32, 5_000, 0.2, 1.58e-3, 0.1),
    "text": Published(4, 256, 1024, 4, 32, 20_000, 0.4, 5.6e-4, 0.1),
    "retrieval": Published(4, 128, 512, 4, 32, 5_000, 1.0, 3.5e-4, 0.1),
    "image": Published(1, 128, 128, 8, 256, 35_000, 0.005, 5e-4, 0.0),
    "pathfinder": Published(4, 32, 64, 4, 512, 62_400, 0.005, 1e-3, 0.0),
    "path-x": Published(4, 32, 64, 4, 64, 500_000, 0.005, 1e-3, 0.0),
}


_SIZES = ("n_layer", "d_model", "d_ff", "n_head")


def _s4(size: Size, length: int) -> Mixer.Config:
    system = S4.Config(d_state=4 if size.d_state is None else size.d_state, n_ssm=1, length=length)
    return SSM.Config(system=system, bidirectional=True)


def _s4d(size: Size, length: int) -> Mixer.Config:
    system = S4D.Config(init="legs", d_state=64 if size.d_state is None else size.d_state, n_ssm=1)
    return SSM.Config(system=system, bidirectional=True)


def _transformer(size: Size, length: int) -> Mixer.Config:
    assert size.n_head is not None
    return Attention.Config(n_head=size.n_head, pattern=Full())


def _linear_transformer(size: Size, length: int) -> Mixer.Config:
    assert size.n_head is not None
    return LinearAttention.Config(n_head=size.n_head, causal=False)


@dataclass(frozen=True)
class _Model:
    """A mixer by size and longest row, what it is published with, and whether positions must be told to it."""

    mixer: Callable[[Size, int], Mixer.Config]
    published: dict[str, Published]
    positions: bool


MODELS = {
    "s4": _Model(_s4, _STATE_SPACES, False),
    "s4d": _Model(_s4d, _STATE_SPACES, False),
    "transformer": _Model(_transformer, _ATTENTION, True),
    "linear_transformer": _Model(_linear_transformer, _ATTENTION, True),
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a model must know of a task: its ids, the longest row, and how its answer is read out."""

    vocab_size: int
    length: int
    readout: Readout.Config


def classifier(name: Name, task: Task.Config, task_name: str, rows: Rows, size: Size, budget: Budget) -> RunConfig:
    """A run of the model `name` on one of the benchmark's tasks."""
    model = MODELS[name]
    published = model.published[task_name]
    filled = replace(size, **{field: getattr(published, field) for field in _SIZES if getattr(size, field) is None})
    if not filled.n_layer or filled.n_layer < 1:
        raise BadInput(f"n_layer is {filled.n_layer}: a model needs at least one block")
    assert filled.d_model is not None
    block = BlockConfig(
        mixer=model.mixer(filled, rows.length),
        channel=None if filled.d_ff is None else Mlp.Config(d_ff=filled.d_ff),
        dropout=size.dropout,
    )
    positions = rows.length if model.positions else 0
    embed = Tokens.Config(vocab_size=rows.vocab_size, positions=positions, dropout=size.dropout)
    config = ModelConfig(d_model=filled.d_model, blocks=(block,) * filled.n_layer, embed=embed, readout=rows.readout)
    return RunConfig(model=config, task=task, train=training(published, budget))


def training(published: Published, budget: Budget) -> TrainConfig:
    """What is published, but for what the budget says."""
    chosen = {
        field.name: value
        for field in fields(budget)
        if (value := getattr(budget, field.name)) is not None or not hasattr(published, field.name)
    }
    own = {name: getattr(published, name) for name in ("steps", "batch_size", "lr", "weight_decay", "warmup")}
    return TrainConfig(**{**own, **chosen}, lr_final=0.0, save_every=budget.eval_every)
