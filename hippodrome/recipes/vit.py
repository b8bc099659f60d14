"""ViT: pictures as patches (Dosovitskiy et al., ICLR 2021), with attention or any other mixer in its blocks.

Sizes are the authors', starts those of their JAX code. The budgets are ours, for small sets of small pictures from scratch.
Where the paper reads the class token, the default here is the mean over the patches, which suits every mixer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.patches import Patches
from hippodrome.mixers.attention import Attention
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.pool import Pool
from hippodrome.recipes._systems import mixer_named
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.tasks.image import Image

Name = Literal["attention", "linear_attention", "h3", "gss", "mega", "s5", "s4", "s4d", "dss", "dlr"]
Size = Literal["mini", "tiny", "small", "base"]

SIZES: dict[Size, tuple[int, int, int]] = {
    "mini": (64, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
"""Width, blocks, attention heads. All but mini, which a CPU trains in minutes, are published."""

_ONE_WAY = ("h3", "gss")

BUDGET = TrainConfig(
    steps=10_000, batch_size=128, lr=1e-3, lr_final=0.0, weight_decay=0.05, log_every=50, eval_every=1000, save_every=1000
)
"""24 epochs of Fashion-MNIST."""
LONG_BUDGET = TrainConfig(
    steps=70_000, batch_size=128, lr=1e-3, lr_final=0.0, weight_decay=0.05, log_every=50, eval_every=5000, save_every=5000
)
"""200 epochs of CIFAR-10."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The model around the mixer. None: as its size has it."""

    n_layer: int | None = None
    d_model: int | None = None
    d_ff: int | None = None
    """Width inside the MLPs; None: four times d_model."""
    n_head: int | None = None
    """Heads of attention, softmax or linear."""
    pool: Literal["mean", "token"] = "mean"
    """What is read out: the mean over the patches, or a class token before them."""
    dropout: float = 0.1
    """Of the embeddings, inside the MLPs, and of what the blocks add."""
    holdout: float = Image.Config.holdout
    """Share of the training pictures that validate."""


PAPER = Frame()


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """CIFAR-10 as the recipes read it."""

    data: str = "cifar-10-batches-bin"
    """The folder with data_batch_1.bin and its like."""
    patch: int = 4
    """Side of a patch in pixels."""
    crop: int = 4
    """Pixels that a training picture may be moved by."""
    flip: bool = True
    """Mirror every other training picture."""


CIFAR = Cifar()


def fashion(
    *,
    data: str = Image.Config.data,
    mixer: Name = "attention",
    size: Size = "tiny",
    patch: int = 4,
    crop: int = 0,
    flip: bool = False,
    frame: Frame = PAPER,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """ViT on (Fashion-)MNIST: 28 x 28 grey pixels, in patches of 1, 2, 4, 7, 14 or 28.

    Args:
        data: The folder with the files: train-images-idx3-ubyte.gz and its like.
        mixer: What moves information between patches; H3 and GSS read them in raster order, all others both ways.
        size: How large the model is.
        patch: Side of a patch in pixels.
        crop: Pixels that a training picture may be moved by.
        flip: Mirror every other training picture.
    """
    embed = Patches.Config(patch=patch, token=frame.pool == "token", dropout=frame.dropout)
    task = Image.Config(data=data, crop=crop, flip=flip, holdout=frame.holdout)
    return _classifier(task, embed, mixer, size, frame, train)


def tiny(
    *, mixer: Name = "attention", pictures: Cifar = CIFAR, frame: Frame = PAPER, train: TrainConfig = LONG_BUDGET
) -> RunConfig:
    """ViT-Ti on CIFAR-10: width 192, 12 blocks, 3 heads.

    Args:
        mixer: What moves information between patches.
    """
    return _cifar("tiny", mixer, pictures, frame, train)


def small(
    *, mixer: Name = "attention", pictures: Cifar = CIFAR, frame: Frame = PAPER, train: TrainConfig = LONG_BUDGET
) -> RunConfig:
    """ViT-S on CIFAR-10: width 384, 12 blocks, 6 heads.

    Args:
        mixer: What moves information between patches.
    """
    return _cifar("small", mixer, pictures, frame, train)


def base(
    *, mixer: Name = "attention", pictures: Cifar = CIFAR, frame: Frame = PAPER, train: TrainConfig = LONG_BUDGET
) -> RunConfig:
    """ViT-B on CIFAR-10: width 768, 12 blocks, 12 heads.

    Args:
        mixer: What moves information between patches.
    """
    return _cifar("base", mixer, pictures, frame, train)


def _cifar(size: Size, mixer: Name, pictures: Cifar, frame: Frame, train: TrainConfig) -> RunConfig:
    token = frame.pool == "token"
    embed = Patches.Config(height=32, width=32, channels=3, patch=pictures.patch, token=token, dropout=frame.dropout)
    task = Image.Config(data=pictures.data, channels=3, crop=pictures.crop, flip=pictures.flip, holdout=frame.holdout)
    return _classifier(task, embed, mixer, size, frame, train)


def _classifier(
    task: Image.Config, embed: Patches.Config, mixer: Name, size: Size, frame: Frame, train: TrainConfig
) -> RunConfig:
    given, published = (frame.d_model, frame.n_layer, frame.n_head), SIZES[size]
    d_model, n_layer, n_head = (own if value is None else value for value, own in zip(given, published, strict=True))
    if n_layer < 1:
        raise BadInput(f"n_layer is {n_layer}: a model needs at least one block")
    if mixer in _ONE_WAY and frame.pool == "token":
        raise BadInput(f"pool is token, but {mixer} looks back only and a class token comes first: give pool mean")
    block = BlockConfig(
        mixer=_mixer(mixer, d_model, n_head, embed.length),
        channel=Mlp.Config(d_ff=frame.d_ff, activation="gelu_tanh", dropout=frame.dropout, init="xavier"),
        norm_eps=1e-6,
        dropout=frame.dropout,
    )
    readout = Pool.Config(classes=task.classes, how="first" if frame.pool == "token" else "mean", init="zeros")
    model = ModelConfig(d_model=d_model, blocks=(block,) * n_layer, embed=embed, readout=readout)
    return RunConfig(model=model, task=task, train=train)


def _mixer(name: Name, d_model: int, n_head: int, length: int) -> Mixer.Config:
    """The mixer, without rotary positions: those of the patches are learned. Attention starts as in the JAX code."""
    both_ways = name not in _ONE_WAY
    config = mixer_named(name, d_model=d_model, length=length, bidirectional=both_ways, n_head=n_head, rotary=False)
    return replace(config, init="xavier") if isinstance(config, Attention.Config) else config
