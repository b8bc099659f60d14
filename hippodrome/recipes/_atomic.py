"""The atomic tasks as DLR's paper trains systems on them: one layer of width 128, post-norm, squared errors, fresh rows.

Settings: ag1988/dlr, its README's commands. A constant learning rate for all parameters, no warm-up, no weight decay, no
clipping, 12 epochs of 57,600 rows: the authors write 16,000 rows of which a tenth validates, and four workers draw them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.regression import Regression
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.atomic import Atomic, Name

ROWS_PER_EPOCH = 57_600


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """Which task, how large a model, and for how long it learns."""

    task: Name = "shift"
    length: int = 512
    """L of the task; reverse and sort read twice as many tokens, select 64 more."""
    n_layer: int = 1
    """Layers of the one system: the paper's models have 1 or 6."""
    d_model: int = 128
    d_ff: int | None = None
    """Width inside an MLP after each layer; None: no MLPs, as the paper has it."""
    epochs: int = 12
    """Of 57,600 rows."""
    steps: int | None = None
    """Instead of epochs."""
    batch_size: int | None = None
    """None: the paper's 64, 16 above 1024 tokens, 4 from 16384 on and on mips."""
    lr: float | None = None
    """None: the recipe's own, the paper's where it has one for the system."""
    test_rows: int = 1600
    """Rows of the test split, and of the valid split."""
    seed: int = 0
    """Of the weights. The rows are the same for all seeds."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph: launches bind models this small."""
    log_every: int = 50


PAPER = Exercise()


def atomic(mixer: Mixer.Config, exercise: Exercise, *, lr: float) -> RunConfig:
    """Layers of `mixer` between two linear maps, each x + mixer(x) and then the norm of two scalars."""
    if exercise.n_layer < 1:
        raise BadInput(f"n_layer is {exercise.n_layer}: it must be at least 1")
    task = Atomic.Config(task=exercise.task, length=exercise.length, test_rows=exercise.test_rows)
    channel = None if exercise.d_ff is None else Mlp.Config(d_ff=exercise.d_ff)
    model = ModelConfig(
        d_model=exercise.d_model,
        blocks=(BlockConfig(mixer=mixer, channel=channel, norm="scalar", order="post"),) * exercise.n_layer,
        embed=Signal.Config(channels=task.channels),
        readout=Regression.Config(outputs=task.outputs),
        # What the authors' linear maps of this width start with: uniform in +-1 / sqrt(width).
        init_std=1 / math.sqrt(3 * max(1, exercise.d_model)),
    )
    batch_size = _batch_size(exercise) if exercise.batch_size is None else exercise.batch_size
    per_epoch = math.ceil(ROWS_PER_EPOCH / max(1, batch_size))
    steps = per_epoch * exercise.epochs if exercise.steps is None else exercise.steps
    train = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr if exercise.lr is None else exercise.lr,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        clip=None,
        precision=exercise.precision,
        cuda_graph=exercise.cuda_graph,
        seed=exercise.seed,
        device=exercise.device,
        log_every=exercise.log_every,
        eval_every=min(per_epoch, max(1, steps // 4)),
        save_every=per_epoch,
    )
    return RunConfig(model=model, task=task, train=train)


def _batch_size(exercise: Exercise) -> int:
    if exercise.task == "mips" or exercise.length >= 16_384:
        return 4
    return 64 if exercise.length <= 1024 else 16
