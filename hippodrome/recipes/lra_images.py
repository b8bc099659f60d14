"""Tasks on images read pixel by pixel: Long Range Arena's Image, Pathfinder and Path-X, and DLR's PathfinderSegmentation.

Sizes and budgets are the authors' own: S4's for state spaces, the benchmark's for attention, DLR's for the segmentation. What
their blocks have and ours have not is said in `_lra.py`; DLR also cuts its kernels at 8,192 or 32,768 taps, ours see the whole
row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from hippodrome.embeds.signal import Signal
from hippodrome.lti._base import LTI
from hippodrome.lti.dlr import DLR
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.pool import Pool
from hippodrome.readouts.positions import Positions
from hippodrome.recipes._lra import (
    MODELS,
    PAPER_BUDGET,
    PAPER_SIZE,
    Budget,
    Name,
    Published,
    Rows,
    Size,
    classifier,
    training,
)
from hippodrome.run import RunConfig
from hippodrome.tasks.lra_image import LraImage
from hippodrome.tasks.pathfinder import Pathfinder
from hippodrome.tasks.pathfinder_segmentation import PathfinderSegmentation

Pixels = Literal["signal", "tokens"]
IMAGE_SIZE = Size(dropout=0.1)

_SEGMENTATION = {
    # The weight decay is that of the authors' other task of labels along a sequence.
    128: (Published(5, 128, None, None, 16, 150_000, 3_000 / 150_000, 1e-4, 0.01), 1024),
    256: (Published(6, 128, None, None, 18, 200_000, 1_000 / 200_000, 5e-5, 0.01), 1024),
    512: (Published(12, 64, None, None, 14, 600_000, 200 / 600_000, 1e-5, 0.01), 2048),
}
"""Size and budget by pixels a side, and the modes of a layer."""


def pathfinder(
    *,
    mixer: Name = "s4d",
    resolution: Literal[32, 64, 128, 256] = Pathfinder.Config.size,
    pixels: Pixels | None = None,
    train_rows: int = Pathfinder.Config.train_rows,
    test_rows: int = Pathfinder.Config.test_rows,
    folder: str | None = Pathfinder.Config.folder,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Pathfinder: does a path of dashes join two discs? Path-X is resolution 128. Half of the answers are yes.

    Args:
        mixer: What moves along the sequence: s4, s4d, transformer or linear_transformer.
        resolution: Pixels a side; rows have its square.
        pixels: A signal, or 256 tokens; None: what the mixer is published with, a signal for s4 and s4d.
        train_rows: Images drawn for training. The first run draws them, which takes a while; later ones find them in the cache.
        test_rows: Images of the test split, and of the valid split.
        folder: A published pathfinderN folder to read instead.
    """
    kind = _pixels(mixer, pixels)
    task = Pathfinder.Config(size=resolution, pixels=kind, train_rows=train_rows, test_rows=test_rows, folder=folder)
    rows = Rows(vocab_size=256, length=task.length, readout=Pool.Config(classes=2))
    long = resolution >= 128
    config = classifier(mixer, task, "path-x" if long else "pathfinder", rows, _states(size), budget)
    return _of_pixels(config, kind, n_ssm=None, dt_min=1e-4 if long else 1e-3)


def image(
    *,
    mixer: Name = "s4d",
    cifar: str = LraImage.Config.cifar,
    pixels: Pixels | None = None,
    size: Size = IMAGE_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Image: CIFAR-10 in grey, ten classes of 1,024 pixels, from the binary version of the data set.

    Args:
        mixer: What moves along the sequence: s4, s4d, transformer or linear_transformer.
        cifar: The folder of the binary version of CIFAR-10, or cifar-10-binary.tar.gz.
        pixels: A signal, or 256 tokens; None: what the mixer is published with, a signal for s4 and s4d.
    """
    kind = _pixels(mixer, pixels)
    task = LraImage.Config(cifar=cifar, pixels=kind)
    rows = Rows(vocab_size=256, length=LraImage.length, readout=Pool.Config(classes=LraImage.classes))
    return _of_pixels(classifier(mixer, task, "image", rows, _states(size), budget), kind)


def pathfinder_segmentation(
    *,
    mixer: Literal["dlr", "s4d", "s4"] = "dlr",
    resolution: Literal[128, 256, 512] = PathfinderSegmentation.Config.size,
    train_rows: int = PathfinderSegmentation.Config.train_rows,
    test_rows: int = PathfinderSegmentation.Config.test_rows,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """PathfinderSegmentation: for every pixel, is it on a path, and does that path join the discs? Macro F1.

    Args:
        mixer: The state space, read in both directions: dlr, s4d or s4. d_state is 64 for the last two.
        resolution: Pixels a side; rows have its square.
        train_rows: Images drawn for training.
        test_rows: Images of the test split, and of the valid split.
    """
    published, modes = _SEGMENTATION[resolution]
    task = PathfinderSegmentation.Config(size=resolution, train_rows=train_rows, test_rows=test_rows)
    n_layer, d_model = (
        own if given is None else given for own, given in ((published.n_layer, size.n_layer), (published.d_model, size.d_model))
    )
    if n_layer < 1:
        raise BadInput(f"n_layer is {n_layer}: a model needs at least one block")
    d_state = size.d_state or (modes if mixer == "dlr" else 64)
    system: LTI.Config = {
        "dlr": DLR.Config(d_state=d_state),
        "s4d": S4D.Config(d_state=d_state, init="legs", dt_min=1e-4),
        "s4": S4.Config(d_state=d_state, length=task.length, dt_min=1e-4),
    }[mixer]
    block = BlockConfig(mixer=SSM.Config(system=system, bidirectional=True), dropout=size.dropout)
    readout = Positions.Config(classes=3, balanced=True)
    model = ModelConfig(d_model=d_model, blocks=(block,) * n_layer, embed=Signal.Config(), readout=readout)
    return RunConfig(model=model, task=task, train=training(published, budget))


def _pixels(mixer: Name, asked: Pixels | None) -> Pixels:
    """How pixels come to a mixer. Positions are told with tokens, so attention takes no signal."""
    told = MODELS[mixer].positions
    if told and asked == "signal":
        raise BadInput(f"pixels is 'signal': a {mixer} is told positions with its tokens, take tokens")
    return asked or ("tokens" if told else "signal")


def _states(size: Size) -> Size:
    return size if size.d_state is not None else replace(size, d_state=64)


def _of_pixels(config: RunConfig, pixels: Pixels, **system: Any) -> RunConfig:
    """The run with a signal instead of ids where one is read, and other settings of its state spaces."""
    model = config.model
    blocks = tuple(
        replace(block, mixer=replace(block.mixer, system=replace(block.mixer.system, **system)))
        if isinstance(block.mixer, SSM.Config)
        else block
        for block in model.blocks
    )
    embed = Signal.Config() if pixels == "signal" else model.embed
    return replace(config, model=replace(model, blocks=blocks, embed=embed))
