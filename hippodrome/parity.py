"""Parity: is a mixer, or a whole model, the same function however its sequence is fed?

The whole sequence in one call without a state is the yardstick. Chunks, single tokens, padding on any side, a row alone and
reordered rows must all agree with it, and nothing after a token may change what was said at it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hippodrome.checkpoint import load
from hippodrome.model import BlockConfig, Embed, Mixer, Model, ModelConfig, ModelState, Readout
from hippodrome.part import BadInput, find, names, nearest

Precision = Literal["fp64", "fp32", "bf16", "fp16"]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp64": 1e-9, "fp32": 5e-5, "bf16": 2e-2, "fp16": 3e-3}
"""Largest difference, relative to the largest output: a few times what the mixers show at lengths up to 2048."""


@dataclass(frozen=True)
class Parity:
    """One line of the table. difference: the largest, relative to the largest output of the whole sequence."""

    check: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


class _Vectors(Embed):
    """Inputs that are vectors already."""

    def __init__(self, config: Embed.Config, d_model: int) -> None:
        super().__init__()

    def forward(self, inputs: Tensor, position: Tensor | None = None) -> Tensor:
        return inputs


class _Hidden(Readout):
    """The hidden vectors themselves."""

    def __init__(self, config: Readout.Config, d_model: int, embed: Embed) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        return hidden


def around(mixer: Mixer.Config, d_model: int) -> Model:
    """A model of one block that is little but the mixer: vectors in, vectors out.

    The weights are scaled so that what the mixer says is as large as what passes it by, and shows in the differences.
    """
    return ModelConfig(
        d_model=d_model,
        blocks=(BlockConfig(mixer=mixer),),
        embed=_Vectors.Config(),
        readout=_Hidden.Config(),
        init_std=d_model**-0.5,
    ).build()


def find_subject(name: str) -> Model | Mixer.Config:
    """A run's folder as its model, or a mixer's name as its default config."""
    if Path(name).is_dir():
        return load(name)
    if name not in names("mixers"):
        raise BadInput(f"{name!r} is no folder of a run and no mixer: {nearest(name, names('mixers'))}")
    return find(Mixer, name).Config()


def parity(
    subject: Model | Mixer.Config,
    *,
    length: int = 64,
    batch: int = 3,
    precision: Precision = "fp32",
    d_model: int = 32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Parity]:
    """The table of a model (its hidden vectors are compared), or of a mixer in a model of one block of width `d_model`.

    Weights of a mixer, inputs and where chunks are cut come from `seed`. The model given is left as it is.
    """
    if length < 4 or batch < 2 or d_model < 1:
        raise BadInput(f"parity needs length >= 4, batch >= 2 and d_model >= 1, not {length}, {batch} and {d_model}")
    if precision not in DTYPES:
        raise BadInput(f"no precision is called {precision!r}: {nearest(precision, DTYPES)}")
    dtype = DTYPES[precision]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(subject) if isinstance(subject, Model) else around(subject, d_model)
        model.readout = _Hidden(_Hidden.Config(), model.config.d_model, model.embed)
        inputs = _inputs(model, batch, length).to(device)
        cuts = _cuts(length)
        starts = torch.randint(length // 2, (batch,))
        stops = starts + 1 + (torch.rand(batch) * (length - starts)).long()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    model = model.to(device=device, dtype=dtype).eval()
    with torch.no_grad():
        checks = list(_checks(model, inputs, torch.stack([starts, stops], 1).to(device), cuts))
    return [Parity(name, difference, TOLERANCES[precision]) for name, difference in checks]


def show(rows: list[Parity], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "difference", "allowed", "", title=title, title_justify="left")
    for row in rows:
        table.add_row(row.check, f"{row.difference:.1e}", f"{row.tolerance:.0e}", "ok" if row.ok else "DIFFERS")
    Console().print(table)


def _inputs(model: Model, batch: int, length: int) -> Tensor:
    """Ids for a model that embeds tokens, else vectors."""
    table = getattr(model.embed, "weight", None)
    if isinstance(table, Tensor):
        return torch.randint(len(table), (batch, length))
    return torch.randn(batch, length, getattr(model.embed, "channels", model.config.d_model))


def _checks(model: Model, inputs: Tensor, spans: Tensor, cuts: list[int]) -> Iterator[tuple[str, float]]:
    """Name and difference of every check that applies to the model."""
    batch, length = inputs.shape[:2]
    whole = model(inputs).logits
    scale = whole.double().abs().max()

    def far(got: Tensor, wanted: Tensor = whole) -> float:
        return ((got.double() - wanted.double()).abs().max() / scale).item()

    alone = torch.cat([model(inputs[row : row + 1]).logits for row in range(batch)])
    yield "a row alone", far(alone)
    counts = spans[:, 1] - spans[:, 0]
    right = torch.stack([torch.zeros_like(counts), counts], 1)
    left = torch.stack([length - counts, torch.full_like(counts, length)], 1)
    for name, padded in (("right", right), ("left", left), ("mixed", spans)):
        yield f"{name} padding", _padding(model, inputs, padded, far)
    if not model.causal:
        return
    half = length // 2
    yield "one call with a state", far(model(inputs, model.init_state(batch)).logits)
    yield "two chunks", far(_chunks(model, inputs, [0, half, length], model.init_state(batch))[0])
    yield "random chunks", far(_chunks(model, inputs, cuts, model.init_state(batch))[0])
    yield "chunks in fixed room", far(_chunks(model, inputs, cuts, model.init_state(batch, length))[0])
    yield "token by token", far(_steps(model, inputs, model.init_state(batch))[0])
    first, state = _chunks(model, inputs[:, :half], [0, half], model.init_state(batch, length))
    yield "prefill, then steps", far(torch.cat([first, _steps(model, inputs[:, half:], state)[0]], 1))
    order = torch.arange(batch - 1, -1, -1, device=inputs.device)
    _, state = _chunks(model, inputs[:, :half], [0, half], model.init_state(batch))
    yield "reordered rows", far(model(inputs[order, half:], state.reorder(order)).logits, whole[order, half:])
    yield "ragged prompts, then steps", _ragged(model, inputs, counts.clamp(max=half), far)
    changed = torch.cat([inputs[:, :half], inputs[:, half:].flip(0).flip(1)], 1)
    yield "another future", far(model(changed).logits[:, :half], whole[:, :half])


def _padding(model: Model, inputs: Tensor, spans: Tensor, far: Callable[[Tensor, Tensor], float]) -> float:
    """Rows padded to one length against each row's real tokens alone."""
    padded = model(inputs, lengths=spans).logits
    worst = 0.0
    for row, (start, stop) in enumerate(spans.tolist()):
        real = inputs[row : row + 1, start:stop]
        worst = max(worst, far(padded[row : row + 1, start:stop], model(real).logits))
    return worst


def _ragged(model: Model, inputs: Tensor, counts: Tensor, far: Callable[[Tensor, Tensor], float]) -> float:
    """Prompts of `counts` tokens prefilled together and continued token by token, against each row alone."""
    length = inputs.shape[1] // 2
    state = model(inputs[:, :length], model.init_state(len(inputs)), lengths=counts).state
    said, _ = _steps(model, inputs[:, length:], state)
    worst = 0.0
    for row, count in enumerate(counts.tolist()):
        real = torch.cat([inputs[row : row + 1, :count], inputs[row : row + 1, length:]], 1)
        worst = max(worst, far(said[row : row + 1], model(real).logits[:, count:]))
    return worst


def _chunks(model: Model, inputs: Tensor, cuts: list[int], state: ModelState) -> tuple[Tensor, ModelState]:
    said = []
    for start, stop in itertools.pairwise(cuts):
        output = model(inputs[:, start:stop], state)
        said.append(output.logits)
        state = output.state
    return torch.cat(said, 1), state


def _steps(model: Model, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    said = []
    for t in range(inputs.shape[1]):
        logits, state = model.step(inputs[:, t], state)
        said.append(logits)
    return torch.stack(said, 1), state


def _cuts(length: int) -> list[int]:
    """0, some places in order, length: a few chunks, one of them a single token."""
    middle = torch.randperm(length - 2)[:3].sort().values + 1
    return sorted({0, *middle.tolist(), length - 1, length})
