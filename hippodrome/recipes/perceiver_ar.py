"""Perceiver AR (Hawthorne et al., ICML 2022): contexts longer than the latents that read them."""

from __future__ import annotations

import math
from typing import Any, Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.mixers.attention import Attention
from hippodrome.model import BlockConfig
from hippodrome.models.perceiver_ar import PerceiverAR
from hippodrome.part import BadInput
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm as LmReadout
from hippodrome.recipes._lm import BUDGET, Text
from hippodrome.recipes._mirror_copy import COPY
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.mirror_copy import MirrorCopy

LONG = Text(length=1024)


def perceiver_ar(
    *,
    n_layer: int = 4,
    d_model: int = 256,
    d_ff: int | None = None,
    n_head: int = 4,
    latents: int = 256,
    eval_latents: int | None = None,
    stride: int | None = None,
    latents_per_position: int = 1,
    cross_after: tuple[int, ...] = (),
    query_offset: int = 0,
    axes: tuple[int, ...] = (),
    dropout: float = 0.0,
    text: Text = LONG,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Perceiver AR language model: the last tokens read all of the context once.

    Args:
        n_layer: Blocks over the latents, behind the cross-attention.
        d_model: Width.
        d_ff: Width inside the MLPs; None: 4 d_model.
        n_head: Attention heads.
        latents: Tokens at the end of a row that are latents and targets in training.
        eval_latents: Latents in scoring and generation; None: as in training.
        stride: New tokens scored a pass; 0: the latents roll and no pass begins anew; None: half of the latents.
        latents_per_position: Latents of each of these tokens, whose readings are averaged.
        cross_after: Blocks, counted from 0, behind which the context is read again.
        query_offset: Tokens that latents turn ahead when they read the context; 1: to the one that they predict.
        axes: Sizes of the axes on which tokens have learned positions, the last the fastest, instead of rotary ones: such as
            rows, columns and channels of pictures whose values are the tokens, a picture a row. None given: rotary.
        dropout: Of the embeddings and of what each block adds.
    """
    task = text.task(train)
    if axes and math.prod(axes) < text.length:
        places = math.prod(axes)
        raise BadInput(f"axes are {axes}, of {places} places, and a row has {text.length} tokens: take --length {places}")
    settings: dict[str, Any] = {
        "eval_latents": eval_latents,
        "stride": stride,
        "latents_per_position": latents_per_position,
        "cross_after": cross_after,
        "query_offset": query_offset,
        "crop": 1,
        "wavelength": float(max(2, text.length)),
    }
    if axes:
        settings |= {"rotary": 0.0}
    embed = Tokens.Config(vocab_size=task.ids, axes=axes, dropout=dropout)
    model = _model(embed, n_layer, d_model, d_ff, n_head, latents, settings)
    return RunConfig(model=model, task=task, train=train)


def mirror_copy(
    *,
    length: int = 32,
    n_layer: int = 1,
    d_model: int = 128,
    n_head: int = 4,
    latents: int | None = None,
    eval_latents: int | None = None,
    stride: int | None = None,
    latents_per_position: int = 1,
    cross_after: tuple[int, ...] = (),
    positions: Literal["sines", "rotary"] = "sines",
    grow: float = 0.0,
    rows: int = 200,
    train: TrainConfig = COPY,
) -> RunConfig:
    """Perceiver AR on the mirror copy: a sequence backwards (the paper: solved at 131,072 tokens with 1,024 latents).

    Args:
        length: Inputs of a row, twice what is copied.
        n_layer: Blocks over the latents, behind the cross-attention.
        d_model: Width.
        n_head: Attention heads.
        latents: Tokens at the end of a row that are latents and targets in training; None: all that are asked, at most 2049.
            Fewer than are asked: rows end at a random place, so that each is a latent at times.
        eval_latents: Latents in scoring; None: as in training.
        stride: New tokens scored a pass; 0: the latents roll and no pass begins anew; None: half of the latents.
        latents_per_position: Latents of each of these tokens, whose readings are averaged.
        cross_after: Blocks, counted from 0, behind which the context is read again.
        positions: Fixed sines of the position, as the paper, or rotary.
        grow: Share of training in which the copied symbols grow from 16 to half of the row, their middle in its place.
        rows: Of the test split, and of the valid split.
    """
    if not 0 <= grow <= 1:
        raise BadInput(f"grow is {grow}: it is a share of training, from 0 to 1")
    growing = int(grow * train.steps * train.batch_size)
    task = MirrorCopy.Config(length=length, test_rows=rows, grow=growing, seed=train.seed)
    asked = length // 2 + 1
    latents = min(2049, asked) if latents is None else latents
    crop = None if latents >= asked else max(1, length // 2)
    settings: dict[str, Any] = {"eval_latents": eval_latents, "stride": stride, "crop": crop}
    settings |= {"latents_per_position": latents_per_position, "cross_after": cross_after}
    settings |= {"wavelength": float(max(2, length)), "rotary": 0.5 if positions == "rotary" else 0.0}
    # Time scales in equal ratios up to the row: a slower wave tells no two places apart.
    embed = Tokens.Config(vocab_size=task.vocab_size, sines=float(max(2, length)) if positions == "sines" else None)
    model = _model(embed, n_layer, d_model, None, n_head, latents, settings)
    return RunConfig(model=model, task=task, train=train)


def _model(
    embed: Tokens.Config, n_layer: int, d_model: int, d_ff: int | None, n_head: int, latents: int, settings: dict[str, Any]
) -> PerceiverAR.Config:
    """The dropout is the embedding's; rotary positions where `settings` leave any to the cross-attention."""
    if n_head < 1 or d_model % n_head:
        raise BadInput(f"n_head {n_head} does not divide d_model {d_model}")
    if n_layer < 1:
        raise BadInput(f"n_layer is {n_layer}: it must be at least 1")
    turned = Rotary(dim=d_model // n_head // 4 * 2, base=settings["wavelength"], closed=True)
    mixer = Attention.Config(n_head=n_head, position=turned if settings.get("rotary", 0.5) else None)
    channel = Mlp.Config(d_ff=d_ff, activation="relu2")
    return PerceiverAR.Config(
        d_model=d_model,
        blocks=(BlockConfig(mixer=mixer, channel=channel, dropout=embed.dropout),) * n_layer,
        embed=embed,
        readout=LmReadout.Config(tied=False),
        latents=latents,
        n_head=n_head,
        channel=channel,
        dropout=embed.dropout,
        **settings,
    )
