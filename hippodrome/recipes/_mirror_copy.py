"""The mirror copy for stacks of blocks: what Perceiver AR's cross-attention is measured beside."""

from __future__ import annotations

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.lm import Lm as LmReadout
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.mirror_copy import MirrorCopy

COPY = TrainConfig(steps=2000, batch_size=64, lr=1e-3, warmup=0.05, weight_decay=0.0, log_every=50, eval_batches=4)
"""How every system learns it."""


def mirror_copy(
    mixer: Mixer.Config, *, length: int, n_layer: int, d_model: int, rows: int, train: TrainConfig, sines: float | None = None
) -> RunConfig:
    """Blocks of `mixer` and an MLP over whole rows; `sines`: the slowest wavelength of fixed positions, None for none."""
    if n_layer < 1:
        raise BadInput(f"n_layer is {n_layer}: a model needs at least one block")
    task = MirrorCopy.Config(length=length, test_rows=rows, seed=train.seed)
    model = ModelConfig(
        d_model=d_model,
        blocks=(BlockConfig(mixer=mixer, channel=Mlp.Config()),) * n_layer,
        embed=Tokens.Config(vocab_size=task.vocab_size, sines=sines),
        readout=LmReadout.Config(tied=False),
    )
    return RunConfig(model=model, task=task, train=train)
