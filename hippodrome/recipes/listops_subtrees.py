"""ListOpsSubTrees (Gupta, Mehta, Berant, 2022): the value of every sub-tree of a tree of 8000 tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.dlr import DLR
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput
from hippodrome.patterns import Window
from hippodrome.positions import Rotary
from hippodrome.readouts.positions import Positions
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.listops_subtrees import ListOpsSubTrees

BUDGET = TrainConfig(
    steps=300_000,
    batch_size=32,
    lr=8e-4,
    weight_decay=0.01,
    warmup=5_000 / 300_000,
    lr_final=0.0,
    clip=None,
    log_every=50,
    eval_every=3000,
    save_every=3000,
)
"""The paper's."""


@dataclass(frozen=True, kw_only=True)
class LongTrees:
    """Which trees, and how many."""

    max_depth: int = ListOpsSubTrees.Config.max_depth
    max_args: int = ListOpsSubTrees.Config.max_args
    min_length: int = ListOpsSubTrees.Config.min_length
    """Tokens of a row lie strictly between these two."""
    max_length: int = ListOpsSubTrees.Config.max_length
    train_rows: int = ListOpsSubTrees.Config.train_rows
    test_rows: int = ListOpsSubTrees.Config.test_rows
    """Rows of the test split, and of the valid split."""


PUBLISHED = LongTrees()


def listops_subtrees(
    *,
    mixer: Literal["dlr", "s4d", "attention"] = "dlr",
    n_layer: int = 6,
    d_model: int = 128,
    d_state: int = 1024,
    n_head: int = 4,
    window: int = 1024,
    dropout: float = 0.0,
    trees: LongTrees = PUBLISHED,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Every sub-tree's value at its closing bracket. Heights 1 and 2, two thirds of them, are nearly free.

    Args:
        mixer: dlr, s4d, or rotary attention to a window. The paper's attention sees its chunk of 1024 and the one before.
        n_layer: Blocks, without MLPs as in the paper.
        d_model: Width.
        d_state: Modes of a layer of dlr, shared by its channels; states of a channel of s4d.
        n_head: Attention heads.
        window: Tokens that attention looks back, itself included.
        dropout: Of what each block adds.
    """
    if n_layer < 1:
        raise BadInput("n_layer is 0: a model needs at least one block")
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    mixers: dict[str, Mixer.Config] = {
        "dlr": SSM.Config(system=DLR.Config(d_state=d_state, dt_min=1e-4, dt_max=1e-1)),
        "s4d": SSM.Config(system=S4D.Config(d_state=d_state)),
        "attention": Attention.Config(n_head=n_head, pattern=Window(size=window), position=Rotary(d_model // n_head // 2 * 2)),
    }
    model = ModelConfig(
        d_model=d_model,
        blocks=(BlockConfig(mixer=mixers[mixer], order="post", dropout=dropout),) * n_layer,
        embed=Tokens.Config(vocab_size=ListOpsSubTrees.vocab_size),
        readout=Positions.Config(classes=ListOpsSubTrees.classes),
    )
    return RunConfig(model=model, task=ListOpsSubTrees.Config(**vars(trees)), train=train)
