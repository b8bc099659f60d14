"""A run small enough to train in a test, and a task that can be learned at once."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.mixers.attention import Attention
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.readouts.lm import Lm
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.task import IGNORE, Batch, Task, accuracy
from hippodrome.tasks.induction import Induction


class Double(Task):
    """The target of a token is twice the token, modulo the vocabulary; some positions are not asked for."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        rows: int = 40
        length: int = 8
        endless: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def batch(self, split, index, size):
        first = index * size
        rows = size if split == "train" or self.config.endless else min(size, self.config.rows - first)
        dice = torch.Generator()
        rowwise = []
        for row in range(first, first + rows):
            dice.manual_seed(row)
            rowwise.append(torch.randint(20, (self.config.length,), generator=dice))
        inputs = torch.stack(rowwise)
        targets = inputs * 2 % 20
        targets[inputs % 3 == 0] = IGNORE
        starts = torch.tensor([row % 4 == index % 4 for row in range(size)]) if split == "train" else None
        return Batch(inputs, targets, starts=starts)

    def size(self, split):
        return None if self.config.endless else self.config.rows

    def score(self, logits, batch):
        return {"accuracy": accuracy(logits, batch.targets)}


def tiny_model(dropout: float = 0.0) -> ModelConfig:
    block = BlockConfig(mixer=Attention.Config(n_head=2), channel=Mlp.Config(), dropout=dropout)
    return ModelConfig(d_model=16, blocks=(block, block), embed=Tokens.Config(vocab_size=20), readout=Lm.Config())


def tiny_run(task: Task.Config | None = None, model: ModelConfig | None = None, **settings: Any) -> RunConfig:
    """A run of 12 steps on 8 rows, every step logged. `settings` are fields of its TrainConfig."""
    train = TrainConfig(steps=12, batch_size=8, lr=1e-2, log_every=1, device="cpu")
    task = task or Induction.Config(length=8, train_rows=64, test_rows=20)
    return RunConfig(model=model or tiny_model(), task=task, train=dataclasses.replace(train, **settings))
