"""The synthetic languages as the H3 paper trains them: two small blocks, 5000 rows, all positions in the loss.

Settings: HazyResearch/safari, configs/experiment/synthetics. Every parameter decays except those of the state spaces, and no
gradient is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.readouts.lm import Lm as LmReadout
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.induction import Induction
from hippodrome.tasks.recall import Recall


@dataclass(frozen=True, kw_only=True)
class Language:
    """Which language, and for how long it is learned."""

    task: Literal["induction", "recall"] = "induction"
    """Induction: 20 tokens, rows of 30, cosine schedule. Recall: 10 tokens, rows of 20, linear schedule."""
    epochs: int | None = None
    """Passes over the training rows; None: the paper's 400 for induction, 200 for recall."""
    rows: int = 5000
    """Training rows."""
    batch_size: int = 32
    lr: float = 5e-4
    seed: int = 0
    """Of the weights and the dropout. The rows and their order are the same for all seeds, as the authors draw them."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph: launches bind models this small."""
    log_every: int = 100
    eval_epochs: int = 10
    """Epochs between scores, and between checkpoints."""


PAPER = Language()


def synthetic(mixer: Mixer.Config, language: Language, *, learned_positions: bool = False) -> RunConfig:
    """Two blocks of `mixer` and an MLP of width 128, 32 channels, dropout 0.1 on the embeddings."""
    induction = language.task == "induction"
    task = Induction.Config(train_rows=language.rows) if induction else Recall.Config(train_rows=language.rows)
    # The question and, in induction, nothing else follow the drawn tokens: the authors leave room for two.
    positions = task.length + 2 if learned_positions else 0
    model = ModelConfig(
        d_model=32,
        blocks=(BlockConfig(mixer=mixer, channel=Mlp.Config(d_ff=128)),) * 2,
        embed=Tokens.Config(vocab_size=task.vocab_size, positions=positions, dropout=0.1),
        readout=LmReadout.Config(tied=True),
    )
    epochs = language.epochs if language.epochs is not None else 400 if induction else 200
    per_epoch = math.ceil(language.rows / max(1, language.batch_size))
    train = TrainConfig(
        steps=per_epoch * epochs,
        batch_size=language.batch_size,
        lr=language.lr,
        schedule="cosine" if induction else "linear",
        warmup=0.1,
        lr_final=0.1 if induction else 0.0,
        weight_decay=0.1,
        decay="all",
        clip=None,
        precision=language.precision,
        cuda_graph=language.cuda_graph,
        seed=language.seed,
        device=language.device,
        log_every=language.log_every,
        eval_every=per_epoch * language.eval_epochs,
        save_every=per_epoch * language.eval_epochs,
    )
    return RunConfig(model=model, task=task, train=train)
