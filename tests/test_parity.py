"""Parity holds for every mixer, and its checks find what is broken."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from hippodrome.checkpoint import save
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.model import BlockConfig, Mixer, Model, ModelConfig
from hippodrome.parity import DTYPES, Parity, find_subject, parity, show
from hippodrome.part import BadInput, names
from hippodrome.patterns import Full
from hippodrome.readouts.lm import Lm
from hippodrome.readouts.pool import Pool
from hippodrome.state import State


def failed(rows: list[Parity]) -> set[str]:
    return {row.check for row in rows if not row.ok}


@pytest.mark.parametrize("name", names("mixers"))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_mixer_is_one_function_however_it_is_fed(name, precision):
    rows = parity(find_subject(name), length=37, precision=precision)
    assert not failed(rows)
    assert len(rows) == 13


@pytest.mark.parametrize("precision", DTYPES)
def test_tables_in_every_precision(precision):
    assert not failed(parity(H3.Config(d_state=8), length=21, precision=precision))


def hybrid(**changes) -> Model:
    config = ModelConfig(
        d_model=16,
        blocks=(BlockConfig(mixer=H3.Config(d_state=8)), BlockConfig(mixer=Attention.Config(n_head=2))),
        embed=Tokens.Config(vocab_size=40),
        readout=Lm.Config(),
    )
    return replace(config, **changes).build()


@pytest.mark.parametrize(
    "changes", [{}, {"embed": Signal.Config(channels=3), "readout": Pool.Config(classes=2)}], ids=["tokens", "signal"]
)
def test_whole_models(changes):
    assert not failed(parity(hybrid(**changes), length=33))


def test_a_run_is_found_by_its_folder_and_left_as_it_is(tmp_path):
    model = hybrid()
    save(model, tmp_path / "run")
    found = find_subject(str(tmp_path / "run"))
    assert isinstance(found, Model)
    before = copy.deepcopy(found.state_dict())
    assert parity(found, length=9, precision="bf16")
    assert all(torch.equal(before[key], value) for key, value in found.state_dict().items())
    assert isinstance(found.readout, Lm)


def test_a_mixer_that_sees_the_future_has_only_its_padding_checked():
    rows = parity(Attention.Config(pattern=Full()), length=20)
    assert {row.check for row in rows} == {"a row alone", "right padding", "left padding", "mixed padding"}
    assert not failed(rows)


@dataclass(frozen=True)
class Total(State):
    sum: Tensor


class Leaky(Mixer[Total]):
    """y_t = the sum of x up to t, with one fault: what the checks are for."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        fault: str

    def __init__(self, config: Config, d_model: int) -> None:
        super().__init__()
        self.fault = config.fault
        self.anchor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, state: Total | None = None, *, lengths: Tensor | None = None):
        if self.fault == "future":
            x = x + x.roll(-1, 1)
        if self.fault == "rows":
            x = x + x.mean(0)
        real = x
        if lengths is not None and self.fault != "padding":
            real = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        before = 0 if state is None or self.fault == "forgets" else state.sum[:, None]
        y = real.cumsum(1) + before
        return y, None if state is None else Total(y[:, -1])

    def init_state(self, batch: int, max_len: int | None = None) -> Total:
        return Total(torch.zeros(batch, 8))

    def step(self, x: Tensor, state: Total) -> tuple[Tensor, Total]:
        y = state.sum + x * (2 if self.fault == "step" else 1)
        return y, Total(y)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("none", set()),
        ("future", {"two chunks", "another future", "token by token"}),
        ("rows", {"a row alone", "right padding"}),
        ("padding", {"ragged prompts, then steps"}),
        ("forgets", {"two chunks", "random chunks", "chunks in fixed room", "reordered rows"}),
        ("step", {"token by token", "prefill, then steps", "ragged prompts, then steps"}),
    ],
)
def test_each_fault_is_found(fault, found):
    rows = parity(Leaky.Config(fault=fault), length=16, d_model=8)
    assert found <= failed(rows)
    if fault in ("none", "padding", "step"):
        assert found == failed(rows)


def test_the_seed_decides_all():
    first, again, other = (parity(H3.Config(d_state=8), length=15, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_table_names_what_differs(capsys):
    show([Parity("two chunks", 0.5, 1e-5), Parity("a row alone", 0.0, 1e-5)], "broken")
    lines = capsys.readouterr().out.splitlines()
    assert any("two chunks" in line and "DIFFERS" in line for line in lines)
    assert any("a row alone" in line and "ok" in line for line in lines)


@pytest.mark.parametrize("options", [{"length": 3}, {"batch": 1}, {"d_model": 0}, {"precision": "fp8"}])
def test_bad_options_are_named(options):
    with pytest.raises(BadInput):
        parity(H3.Config(), **options)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(BadInput, match="did you mean 'attention'"):
        find_subject("atention")
