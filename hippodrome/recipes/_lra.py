"""What the recipes of Long Range Arena share: the published sizes and budgets, and the models around the mixers.

Sizes, norms and budgets are those of each model's own authors: for S4 the configs of its version 4, for S4D the same with 64
states, for attention those of the benchmark. DSS, DLR and GSS stand in S4's blocks and budgets: what DSS and DLR were published
with is not known here (DLR trains at the rate of its own trees), and GSS, which looks back only, was published without.

Alike for every mixer, and not as each of them has it, are the readout, a linear map of the mean over positions (the benchmark's
Transformer reads its first token, Mega has a hidden layer), and gradients clipped at 1. Transformers have learned positions,
and their rate falls as a cosine, not as the root of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.dlr import DLR
from hippodrome.lti.dss import DSS
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.gss import GSS
from hippodrome.mixers.linear_attention import LinearAttention
from hippodrome.mixers.mega import Mega
from hippodrome.mixers.s5 import S5
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Mixer, ModelConfig, Readout
from hippodrome.norms import Norm
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Butterfly, Full
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.task import Task

Name = Literal[
    "s4", "s4d", "dss", "dlr", "gss", "s5", "mega", "mega_chunk", "transformer", "linear_transformer", "bigbird", "block_sparse"
]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is; None: as published for the task."""

    n_layer: int | None = None
    """Blocks."""
    d_model: int | None = None
    """Width."""
    d_ff: int | None = None
    """Width inside the MLPs; state spaces have none unless it is given."""
    n_head: int | None = None
    """Attention heads."""
    d_state: int | None = None
    """States of a channel: 4 of S4, 64 of S4D and DSS, 16 averages of Mega; modes of a layer: 1024 of DLR, 512 of GSS; of S5
    those of a layer, begun as one HiPPO matrix."""
    dropout: float | None = None
    """Of the embeddings and of what each block adds."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How a model is trained; None: as published for the task and the model."""

    steps: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    """Rows of one forward in one process; None: batch_size shared out over the processes."""
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    """Share of the steps in which the learning rate rises."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph."""
    weights: str | None = None
    """A run, a checkpoint or a saved model of the same sizes, whose weights are the start; None: fresh ones."""
    seed: int = 0
    """Of the weights and the dropout. The data and its order are the same for all seeds."""
    device: str = "auto"
    log_every: int = 50
    eval_every: int | None = 1000
    """Steps between scores on the validation split, and between checkpoints."""
    eval_batches: int | None = None
    """Batches of such a score; None: the whole split."""


PAPER_SIZE, PAPER_BUDGET = Size(), Budget()

Build = Callable[[Size, int], Mixer.Config]
"""A mixer, by the model's size and the longest row."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model on one task: its mixer, size, blocks and training. d_ff: of MLPs; warmup: share of the steps; lr: its peak."""

    mixer: Build
    n_layer: int
    d_model: int
    d_ff: int | None = None
    activation: Literal["gelu", "silu"] = "gelu"
    n_head: int | None = None
    dropout: float = 0.0
    norm: Norm = "layer"
    order: Literal["pre", "post"] = "pre"
    learned_positions: bool = False
    batch_size: int
    steps: int
    warmup: float
    lr: float
    weight_decay: float
    betas: tuple[float, ...] = (0.9, 0.999)
    schedule: Literal["cosine", "linear"] = "cosine"


def _s4(size: Size, length: int) -> Mixer.Config:
    system = S4.Config(d_state=4 if size.d_state is None else size.d_state, n_ssm=1, length=length)
    return SSM.Config(system=system, bidirectional=True)


def _s4d(size: Size, length: int) -> Mixer.Config:
    system = S4D.Config(init="legs", d_state=64 if size.d_state is None else size.d_state, n_ssm=1)
    return SSM.Config(system=system, bidirectional=True)


def _dss(size: Size, length: int) -> Mixer.Config:
    return SSM.Config(system=DSS.Config(d_state=64 if size.d_state is None else size.d_state), bidirectional=True)


def _dlr(size: Size, length: int) -> Mixer.Config:
    system = DLR.Config(d_state=1024 if size.d_state is None else size.d_state, dt_min=1e-4, dt_max=1e-1)
    return SSM.Config(system=system, bidirectional=True)


def _gss(size: Size, length: int) -> Mixer.Config:
    # Modes drawn at random forget within some twenty tokens.
    return GSS.Config(d_state=512 if size.d_state is None else size.d_state, init="lin")


def _s5(published: S5.Config) -> Build:
    def mixer(size: Size, length: int) -> Mixer.Config:
        dropout = published.dropout if size.dropout is None else size.dropout
        chosen = replace(published, bidirectional=True, dropout=dropout)
        return chosen if size.d_state is None else replace(chosen, d_state=size.d_state, blocks=1)

    return mixer


def _mega(size: Size, length: int) -> Mixer.Config:
    d_state = 16 if size.d_state is None else size.d_state
    return Mega.Config(
        d_key=64, d_state=d_state, bias="simple", max_positions=length + 2, bidirectional=True, truncation=min(1024, length)
    )


def _mega_on_pixels(size: Size, length: int) -> Mixer.Config:
    return replace(_mega(size, length), function="laplace")  # type: ignore[call-arg]


def _in_chunks(published: Published) -> Published:
    """Mega-chunk: attention within chunks of 128 tokens, of 4096 on Path-X (both from memory of the paper)."""

    def mixer(size: Size, length: int) -> Mixer.Config:
        return replace(published.mixer(size, length), chunk=4096 if length > 4096 else 128)  # type: ignore[call-arg]

    return replace(published, mixer=mixer)


def _transformer(size: Size, length: int) -> Mixer.Config:
    assert size.n_head is not None
    return Attention.Config(n_head=size.n_head, pattern=Full())


def _bigbird(size: Size, length: int) -> Mixer.Config:
    # A row must not depend on how long its neighbours in the batch are: the last global tile is that of the longest row.
    assert size.n_head is not None
    return Attention.Config(n_head=size.n_head, pattern=BigBird(form="encoder", length=length))


def _block_sparse(size: Size, length: int) -> Mixer.Config:
    assert size.n_head is not None
    return Attention.Config(n_head=size.n_head, pattern=Butterfly())


def _linear_transformer(size: Size, length: int) -> Mixer.Config:
    assert size.n_head is not None
    return LinearAttention.Config(n_head=size.n_head, causal=False)


def _of_s4(mixer: Build) -> dict[str, Published]:
    def on(order: Literal["pre", "post"], batch_size: int, steps: int, lr: float = 1e-2) -> Published:
        return Published(
            mixer=mixer,
            n_layer=6,
            d_model=256,
            norm="batch",
            order=order,
            batch_size=batch_size,
            steps=steps,
            warmup=0.1,
            lr=lr,
            weight_decay=0.05,
        )

    # 40 epochs of 96,000 rows, 32 of 25,000, 20 of 147,086, 200 of 45,000 and 160,000, and 50 of 160,000.
    return {
        "listops": on("post", 32, 120_000),
        "text": on("pre", 16, 50_000),
        "retrieval": on("pre", 64, 45_965),
        "image": replace(on("post", 50, 180_000), d_model=512, dropout=0.1),
        "pathfinder": on("pre", 64, 500_000, 4e-3),
        "path-x": on("pre", 16, 500_000, 1e-3),
    }


def _of_attention(mixer: Build) -> dict[str, Published]:
    def on(d_model: int, d_ff: int, n_head: int, steps: int, warmup: float, lr: float) -> Published:
        return Published(
            mixer=mixer,
            n_layer=4,
            d_model=d_model,
            d_ff=d_ff,
            n_head=n_head,
            learned_positions=True,
            batch_size=32,
            steps=steps,
            warmup=warmup,
            lr=lr,
            weight_decay=0.1,
        )

    # The rate is 0.05 / sqrt(step) after a warm-up of 1000 or 8000 steps, which on Retrieval is longer than the run.
    pathfinder = replace(on(32, 64, 4, 62_400, 0.005, 1e-3), batch_size=512, weight_decay=0.0)
    return {
        "listops": on(512, 1024, 8, 5_000, 0.2, 1.58e-3),
        "text": on(256, 1024, 4, 20_000, 0.4, 5.6e-4),
        "retrieval": on(128, 512, 4, 5_000, 1.0, 3.5e-4),
        "image": replace(on(128, 128, 8, 35_000, 0.005, 5e-4), n_layer=1, batch_size=256, weight_decay=0.0),
        "pathfinder": pathfinder,
        "path-x": replace(pathfinder, batch_size=64, steps=500_000),
    }


_LISTOPS = S5.Config(d_state=16, blocks=8, clip_eigs=False, activation="half_glu2", optim="BfastandCdecay")
_TEXT = S5.Config(d_state=192, blocks=12, clip_eigs=False, activation="half_glu2", dt_global=True, dropout=0.1)
_RETRIEVAL = S5.Config(d_state=256, blocks=16, clip_eigs=False, C_init="trunc_standard_normal", dt_global=True)
_IMAGE = S5.Config(d_state=384, blocks=3, clip_eigs=True, optim="BfastandCdecay", dropout=0.1)
_PATHFINDER = S5.Config(d_state=256, blocks=8, clip_eigs=False, C_init="trunc_standard_normal", ssm_lr=9e-4, dropout=0.05)
_PATH_X = S5.Config(
    d_state=256, blocks=16, clip_eigs=False, C_init="complex_normal", ssm_lr=6e-4, optim="BandCdecay", dt_min=1e-4
)


def _s5_on_pixels(
    system: S5.Config, *, d_model: int, batch_size: int, epochs: int, rows: int, lr: float, weight_decay: float
) -> Published:
    return Published(
        mixer=_s5(system),
        n_layer=6,
        d_model=d_model,
        norm="batch",
        dropout=system.dropout,
        batch_size=batch_size,
        steps=epochs * rows // batch_size,
        warmup=1 / epochs,
        lr=lr,
        weight_decay=weight_decay,
    )


_OF_S5 = {
    # 40, 35 and 20 epochs. That the first is the warm-up is our reading.
    "listops": Published(
        mixer=_s5(_LISTOPS),
        n_layer=8,
        d_model=128,
        norm="batch",
        batch_size=50,
        steps=76_800,
        warmup=1 / 40,
        lr=3e-3,
        weight_decay=0.04,
    ),
    "text": Published(
        mixer=_s5(_TEXT),
        n_layer=6,
        d_model=256,
        norm="batch",
        dropout=0.1,
        batch_size=50,
        steps=17_500,
        warmup=1 / 35,
        lr=4e-3,
        weight_decay=0.07,
    ),
    "retrieval": Published(
        mixer=_s5(_RETRIEVAL),
        n_layer=6,
        d_model=128,
        norm="batch",
        batch_size=32,
        steps=91_929,
        warmup=1 / 20,
        lr=2e-3,
        weight_decay=0.05,
    ),
    # 250, 200 and 75 epochs of 45,000 and 160,000 rows.
    "image": _s5_on_pixels(_IMAGE, d_model=512, batch_size=50, epochs=250, rows=45_000, lr=4.5e-3, weight_decay=0.07),
    "pathfinder": _s5_on_pixels(
        _PATHFINDER, d_model=192, batch_size=64, epochs=200, rows=160_000, lr=4.5e-3, weight_decay=0.03
    ),
    "path-x": _s5_on_pixels(_PATH_X, d_model=128, batch_size=32, epochs=75, rows=160_000, lr=1.8e-3, weight_decay=0.06),
}
_MEGA = Published(
    mixer=_mega,
    n_layer=6,
    d_model=128,
    d_ff=256,
    activation="silu",
    dropout=0.1,
    norm="scale",
    order="post",
    batch_size=64,
    steps=91_960,
    warmup=10_000 / 91_960,
    lr=3e-3,
    weight_decay=0.04,
    betas=(0.9, 0.98),
    schedule="linear",
)
_MEGA_ON_PIXELS = replace(_MEGA, mixer=_mega_on_pixels, norm="batch", order="pre", dropout=0.0, lr=1e-2, weight_decay=0.01)
_OF_MEGA = {
    "listops": replace(_MEGA, d_model=80, d_ff=160, norm="layer", steps=90_000, warmup=3 / 90, lr=1e-3, weight_decay=0.01),
    "text": replace(_MEGA, n_layer=4, batch_size=50, steps=25_000, warmup=10 / 25, lr=4e-3, weight_decay=0.01),
    "retrieval": _MEGA,
    "image": replace(
        _MEGA_ON_PIXELS, n_layer=8, d_model=160, d_ff=320, batch_size=50, steps=180_000, warmup=9 / 180, weight_decay=0.02
    ),
    "pathfinder": replace(_MEGA_ON_PIXELS, batch_size=128, steps=250_000, warmup=50 / 250),
    "path-x": replace(_MEGA_ON_PIXELS, n_layer=4, d_model=64, d_ff=128, batch_size=128, steps=125_000, warmup=25 / 125),
}

MODELS: dict[str, dict[str, Published]] = {
    "s4": _of_s4(_s4),
    "s4d": _of_s4(_s4d),
    "dss": _of_s4(_dss),
    "dlr": {task: replace(published, lr=8e-4) for task, published in _of_s4(_dlr).items()},
    "gss": _of_s4(_gss),
    "s5": _OF_S5,
    "mega": _OF_MEGA,
    "mega_chunk": {task: _in_chunks(published) for task, published in _OF_MEGA.items()},
    "transformer": _of_attention(_transformer),
    "linear_transformer": _of_attention(_linear_transformer),
    "bigbird": _of_attention(_bigbird),
    "block_sparse": _of_attention(_block_sparse),
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a model must know of a task: its ids, the longest row, and how its answer is read out."""

    vocab_size: int
    length: int
    readout: Readout.Config


def classifier(name: Name, task: Task.Config, task_name: str, rows: Rows, size: Size, budget: Budget) -> RunConfig:
    """A run of the model `name` on one of the benchmark's tasks."""
    published = MODELS[name][task_name]
    sizes = ("n_layer", "d_model", "d_ff", "n_head", "dropout")
    filled = replace(size, **{field: getattr(published, field) for field in sizes if getattr(size, field) is None})
    assert filled.n_layer is not None
    assert filled.d_model is not None
    assert filled.dropout is not None
    if filled.n_layer < 1:
        raise BadInput(f"n_layer is {filled.n_layer}: a model needs at least one block")
    block = BlockConfig(
        mixer=published.mixer(filled, rows.length),
        channel=None if filled.d_ff is None else Mlp.Config(d_ff=filled.d_ff, activation=published.activation),
        norm=published.norm,
        order=published.order,
        dropout=filled.dropout,
    )
    positions = rows.length if published.learned_positions else 0
    embed = Tokens.Config(vocab_size=rows.vocab_size, positions=positions, dropout=filled.dropout)
    config = ModelConfig(d_model=filled.d_model, blocks=(block,) * filled.n_layer, embed=embed, readout=rows.readout)
    return RunConfig(model=config, task=task, train=training(published, budget))


def training(published: Published, budget: Budget) -> TrainConfig:
    given = {field.name: getattr(budget, field.name) for field in fields(budget)}
    own = ("steps", "batch_size", "warmup", "lr", "weight_decay", "betas", "schedule")
    settings = {name: getattr(published, name) for name in own} | {
        name: value for name, value in given.items() if name not in own or value is not None
    }
    return TrainConfig(**settings, lr_final=0.0, save_every=budget.eval_every)
