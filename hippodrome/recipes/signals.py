"""Signals: pictures read pixel by pixel, recordings by their samples, DNA base by base, classified by any system by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import BlockConfig, Embed, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.pool import Pool
from hippodrome.recipes._systems import mixer_named
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.task import Task
from hippodrome.tasks.dna import SYMBOLS, Dna
from hippodrome.tasks.image import Image
from hippodrome.tasks.waveform import Waveform

BUDGET = TrainConfig(
    steps=2000, batch_size=64, lr=1e-3, weight_decay=0.01, clip=1.0, eval_every=500, eval_batches=20, save_every=500
)
"""What a GPU does in minutes. S4's own models train for some hundred epochs."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """The model between the signal and the mean over its positions."""

    system: str = "s4d"
    """A mixer (attention, h3, gss ...), or a linear system (s4d, s4, dlr ...) in S4's layer."""
    n_layer: int = 4
    d_model: int = 128
    d_ff: int = 0
    """Width inside the MLPs; 0: there are none, as in S4's models."""
    bidirectional: bool = False
    """Look both ways."""
    order: Literal["pre", "post"] = "pre"
    """Where the norms are: before the mixers, or after the sums."""
    dropout: float = 0.1
    """Of what each block adds."""


SMALL = Body()


def image(
    *,
    data: str = Image.Config.data,
    permuted: bool = False,
    channels: int = 1,
    classes: int = 10,
    holdout: float = Image.Config.holdout,
    validate_on_test: bool = False,
    permutation_seed: int = 0,
    body: Body = SMALL,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Sequential or permuted image classification: (Fashion-)MNIST, CIFAR-10.

    Args:
        data: The folder with the files: train-images-idx3-ubyte.gz and its like, or CIFAR-10's data_batch_1.bin.
        permuted: Read the pixels in a random order, the same for all pictures.
        channels: 1 for grey, 3 for the colours of CIFAR-10.
        classes: Of the pictures.
        holdout: Share of the training pictures that validate.
        validate_on_test: Hold nothing out and validate on the test pictures, as some papers do.
        permutation_seed: Draws the random order.
    """
    task = Image.Config(
        data=data,
        permuted=permuted,
        channels=channels,
        classes=classes,
        holdout=holdout,
        validate_on_test=validate_on_test,
        permutation_seed=permutation_seed,
    )
    # MNIST has 784 pixels, CIFAR-10 1024.
    return _classifier(task, Signal.Config(channels=channels), classes, 1024, body, train)


def waveform(
    *,
    data: str = Waveform.Config.data,
    classes: int = 10,
    length: int = 16000,
    holdout: float = Waveform.Config.holdout,
    body: Body = SMALL,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Classification of recordings by their raw samples: a folder of .wav files, a sub-folder a class.

    Args:
        data: The folder.
        classes: Sub-folders that there are.
        length: Samples a row; longer recordings lose their end.
        holdout: Share of the files that test, and again that validate, where no list in the folder says it.
    """
    task = Waveform.Config(data=data, classes=classes, length=length, holdout=holdout)
    return _classifier(task, Signal.Config(), classes, length, body, train)


def dna(
    *,
    data: str = Dna.Config.data,
    label: Literal["folder", "header"] = "folder",
    classes: int = 2,
    length: int = 1024,
    holdout: float = Dna.Config.holdout,
    body: Body = SMALL,
    train: TrainConfig = BUDGET,
) -> RunConfig:
    """Classification of DNA: FASTA files, a sub-folder or the last word of a header a class.

    Args:
        data: The folder, or a file with the classes in its headers.
        label: What says the class: the sub-folder, or the header.
        classes: That there are.
        length: Letters a row.
        holdout: Share of the files or records of a class that test, and again that validate.
    """
    task = Dna.Config(data=data, label=label, classes=classes, length=length, holdout=holdout)
    return _classifier(task, Tokens.Config(vocab_size=SYMBOLS), classes, length, body, train)


def _classifier(task: Task.Config, embed: Embed.Config, classes: int, length: int, body: Body, train: TrainConfig) -> RunConfig:
    if body.n_layer < 1 or body.d_ff < 0:
        raise BadInput(f"n_layer is {body.n_layer} and d_ff {body.d_ff}: they must be at least 1 and 0")
    mixer = mixer_named(body.system, d_model=body.d_model, length=length, bidirectional=body.bidirectional)
    channel = Mlp.Config(d_ff=body.d_ff) if body.d_ff else None
    block = BlockConfig(mixer=mixer, channel=channel, order=body.order, dropout=body.dropout)
    model = ModelConfig(d_model=body.d_model, blocks=(block,) * body.n_layer, embed=embed, readout=Pool.Config(classes=classes))
    return RunConfig(model=model, task=task, train=train)
