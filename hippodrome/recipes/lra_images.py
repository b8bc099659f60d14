"""Tasks on images read pixel by pixel: Long Range Arena's Image, Pathfinder and Path-X, and DLR's PathfinderSegmentation.

Sizes and budgets are the authors' own: S4's for state spaces, the benchmark's for attention, DLR's for the segmentation. What
their blocks have and ours have not is said in `_lra.py`; DLR also cuts its kernels at 8,192 or 32,768 taps, ours see the whole
row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.dlr import DLR
from hippodrome.lti.dss import DSS
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.gss import GSS
from hippodrome.mixers.linear_attention import LinearAttention
from hippodrome.mixers.mega import Mega
from hippodrome.mixers.s5 import S5
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Mixer, ModelConfig
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
from hippodrome.tasks.pathfinder import Dashes, Pathfinder
from hippodrome.tasks.pathfinder_segmentation import PathfinderSegmentation

Pixels = Literal["signal", "tokens"]
Segmenting = Literal["dlr", "s4d", "s4", "dss", "gss", "s5", "mega", "mega_chunk", "linear_transformer"]


def _segmenter(
    modes: int, *, n_layer: int, d_model: int, batch_size: int, steps: int, warmup_steps: int, lr: float
) -> Published:
    # The weight decay is that of the authors' other task of labels along a sequence.
    return Published(
        mixer=lambda size, length: SSM.Config(system=DLR.Config(d_state=size.d_state or modes), bidirectional=True),
        n_layer=n_layer,
        d_model=d_model,
        batch_size=batch_size,
        steps=steps,
        warmup=warmup_steps / steps,
        lr=lr,
        weight_decay=0.01,
    )


_SEGMENTATION = {
    128: _segmenter(1024, n_layer=5, d_model=128, batch_size=16, steps=150_000, warmup_steps=3_000, lr=1e-4),
    256: _segmenter(1024, n_layer=6, d_model=128, batch_size=18, steps=200_000, warmup_steps=1_000, lr=5e-5),
    512: _segmenter(2048, n_layer=12, d_model=64, batch_size=14, steps=600_000, warmup_steps=200, lr=1e-5),
}
"""Size and budget by pixels a side, DLR's modes of a layer with them."""


def pathfinder(
    *,
    mixer: Name = "s4d",
    resolution: Literal[32, 64, 128, 256] = Pathfinder.Config.size,
    contour_length: Dashes = Pathfinder.Config.contour_length,
    pixels: Pixels | None = None,
    train_rows: int = Pathfinder.Config.train_rows,
    test_rows: int = Pathfinder.Config.test_rows,
    folder: str | None = Pathfinder.Config.folder,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Pathfinder: does a path of dashes join two discs? Path-X is resolution 128. Half of the answers are yes.

    Args:
        mixer: What moves along the sequence.
        resolution: Pixels a side; rows have its square.
        contour_length: Dashes of a path. 14 is the benchmark, 6 and 9 are its easier sets, whose weights can be a start.
        pixels: A signal, or 256 tokens; None: what the mixer is published with, tokens for Transformers, a signal for all else.
        train_rows: Images drawn for training. The first run draws them, which takes a while; later ones find them in the cache.
        test_rows: Images of the test split, and of the valid split.
        folder: A published pathfinderN folder to read instead.
    """
    kind = _pixels(mixer, pixels)
    task = Pathfinder.Config(
        size=resolution,
        contour_length=contour_length,
        pixels=kind,
        train_rows=train_rows,
        test_rows=test_rows,
        folder=folder,
    )
    rows = Rows(vocab_size=256, length=task.length, readout=Pool.Config(classes=2))
    long = resolution >= 128
    config = classifier(mixer, task, "path-x" if long else "pathfinder", rows, _states(size, mixer), budget)
    return _of_pixels(config, kind, n_ssm=None, dt_min=1e-4 if long else 1e-3)


def image(
    *,
    mixer: Name = "s4d",
    cifar: str = LraImage.Config.cifar,
    pixels: Pixels | None = None,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Image: CIFAR-10 in grey, ten classes of 1,024 pixels, from the binary version of the data set.

    Args:
        mixer: What moves along the sequence.
        cifar: The folder of the binary version of CIFAR-10, or cifar-10-binary.tar.gz.
        pixels: A signal, or 256 tokens; None: what the mixer is published with, tokens for Transformers, a signal for all else.
    """
    kind = _pixels(mixer, pixels)
    task = LraImage.Config(cifar=cifar, pixels=kind)
    rows = Rows(vocab_size=256, length=LraImage.length, readout=Pool.Config(classes=LraImage.classes))
    return _of_pixels(classifier(mixer, task, "image", rows, _states(size, mixer), budget), kind)


def pathfinder_segmentation(
    *,
    mixer: Segmenting = "dlr",
    resolution: Literal[128, 256, 512] = PathfinderSegmentation.Config.size,
    train_rows: int = PathfinderSegmentation.Config.train_rows,
    test_rows: int = PathfinderSegmentation.Config.test_rows,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """PathfinderSegmentation: for every pixel, is it on a path, and does that path join the discs? Macro F1.

    Args:
        mixer: What reads the pixels, in both directions, of gss from the left only; linear_transformer reads them as tokens
            with learned positions, in 4 heads, between MLPs. d_state is 64 of all but dlr (as published), gss (512) and
            mega and mega_chunk (16).
        resolution: Pixels a side; rows have its square.
        train_rows: Images drawn for training.
        test_rows: Images of the test split, and of the valid split.
    """
    published = _SEGMENTATION[resolution]
    task = PathfinderSegmentation.Config(size=resolution, train_rows=train_rows, test_rows=test_rows)
    n_layer, d_model = (
        own if given is None else given for own, given in ((published.n_layer, size.n_layer), (published.d_model, size.d_model))
    )
    if n_layer < 1:
        raise BadInput(f"n_layer is {n_layer}: a model needs at least one block")
    attends = mixer == "linear_transformer"
    d_ff = size.d_ff or (2 * d_model if attends else None)
    block = BlockConfig(
        mixer=_reader(mixer, published, size, task.length),
        channel=None if d_ff is None else Mlp.Config(d_ff=d_ff),
        dropout=size.dropout or 0.0,
    )
    # Sums over all keys do not know where a pixel stands; the other mixers do.
    told = Tokens.Config(vocab_size=256, positions=task.length, dropout=size.dropout or 0.0)
    embed = told if attends else Signal.Config()
    readout = Positions.Config(classes=3, balanced=True)
    model = ModelConfig(d_model=d_model, blocks=(block,) * n_layer, embed=embed, readout=readout)
    task = replace(task, pixels="tokens" if attends else "signal")
    return RunConfig(model=model, task=task, train=training(published, budget))


def _reader(mixer: Segmenting, published: Published, size: Size, length: int) -> Mixer.Config:
    d_state = size.d_state or 64
    mega = Mega.Config(d_state=size.d_state or 16, function="laplace", bidirectional=True, truncation=4096)
    mixers: dict[Segmenting, Callable[[], Mixer.Config]] = {
        "dlr": lambda: published.mixer(size, length),
        "s4d": lambda: SSM.Config(system=S4D.Config(d_state=d_state, init="legs", dt_min=1e-4), bidirectional=True),
        "s4": lambda: SSM.Config(system=S4.Config(d_state=d_state, length=length, dt_min=1e-4), bidirectional=True),
        "dss": lambda: SSM.Config(system=DSS.Config(d_state=d_state, dt_min=1e-4), bidirectional=True),
        "gss": lambda: GSS.Config(d_state=size.d_state or 512, init="lin"),
        "s5": lambda: S5.Config(d_state=d_state, dt_min=1e-4, bidirectional=True),
        "mega": lambda: mega,
        "mega_chunk": lambda: replace(mega, chunk=1024),
        "linear_transformer": lambda: LinearAttention.Config(n_head=size.n_head or 4, causal=False),
    }
    return mixers[mixer]()


def _pixels(mixer: Name, asked: Pixels | None) -> Pixels:
    """How pixels come to a mixer. Positions are told with tokens, so attention takes no signal."""
    told = MODELS[mixer]["pathfinder"].learned_positions
    if told and asked == "signal":
        raise BadInput(f"pixels is 'signal': a {mixer} is told positions with its tokens, take tokens")
    return asked or ("tokens" if told else "signal")


def _states(size: Size, mixer: Name) -> Size:
    return replace(size, d_state=64) if size.d_state is None and mixer in ("s4", "s4d") else size


def _of_pixels(config: RunConfig, pixels: Pixels, **system: Any) -> RunConfig:
    """The run with a signal instead of ids where one is read, and other settings of S4 and S4D."""
    model = config.model
    blocks = tuple(
        replace(block, mixer=replace(block.mixer, system=replace(block.mixer.system, **system)))
        if isinstance(block.mixer, SSM.Config) and isinstance(block.mixer.system, (S4.Config, S4D.Config))
        else block
        for block in model.blocks
    )
    embed = Signal.Config() if pixels == "signal" else model.embed
    return replace(config, model=replace(model, blocks=blocks, embed=embed))
