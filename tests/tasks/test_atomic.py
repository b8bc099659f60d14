"""Atomic: every definition maps the authors' inputs to the authors' targets; the scores are R^2; the floors are floors."""

import math
from typing import get_args

import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.task import Batch
from hippodrome.tasks import atomic
from hippodrome.tasks.atomic import Atomic, Name
from tests import golden_files
from tests.support import assert_close

NAMES = get_args(Name)
VARIANTS = tuple(Atomic.Config(task=name, marked=5) for name in NAMES)

GOLDEN = golden_files.load("dlr_tasks_atomic_L64")
THEIRS = {"select": "masked_select", "select_fixed": "masked_select_fixed"}


def golden(name):
    theirs = THEIRS.get(name, name)
    return GOLDEN[f"{theirs}.x"], GOLDEN[f"{theirs}.y"]


def close(found, expected, tolerance=1e-6):
    """Targets made by an FFT carry noise of 1e-6, and the inputs are at most one."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["shift", "cumsum", "cummax", "reverse", "sort"])
def test_a_definition_on_the_authors_noise(name):
    x, y = golden(name)
    close(getattr(atomic, name)(x[:, :64, 0]), y)
    assert not x[:, 64:, 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_the_authors(name):
    x, _ = golden(name)
    close(atomic.with_positions(x[..., :-2]), x)


@pytest.mark.parametrize("name", ["select", "select_fixed"])
def test_select_on_the_authors_noise(name):
    x, y = golden(name)
    places = x[:, :72, 1].nonzero()[:, 1].view(2, 8)
    seen, answer = atomic.select(x[:, :72, 0], places)
    assert torch.equal(seen, x[:, :72, :2])
    assert torch.equal(answer, y)
    assert not x[:, 72:, :2].any()


@pytest.mark.parametrize("name", ["solve", "solve_fixed"])
def test_solve_on_the_authors_systems(name):
    x, y = golden(name)
    a = x[:, :56, 0].view(2, 7, 8)[..., :7]
    close(a @ a.transpose(1, 2), torch.eye(7).expand(2, 7, 7))
    rows, answer = atomic.solve(a, y[..., 0], 64)
    close(rows, x[..., :1])
    assert torch.equal(answer, y)


def test_what_is_fixed_is_the_authors():
    x, _ = golden("select_fixed")
    task = Atomic.Config(task="select_fixed", length=64, marked=8).build()
    assert torch.equal(task.batch("train", 0, 2).inputs[..., 1], x[..., 1])
    x, _ = golden("solve_fixed")
    task = Atomic.Config(task="solve_fixed", length=64).build()
    for split, index in (("train", 0), ("train", 9), ("test", 1)):
        system = task.batch(split, index, 2).inputs[:, :56, 0].view(2, 7, 8)
        close(system[..., :7], x[:, :56, 0].view(2, 7, 8)[..., :7])


def test_context_shift_on_the_authors_noise():
    x, y = golden("context_shift")
    turn = torch.atan2(x[:, 1, 0], x[:, 0, 0]).remainder(2 * math.pi)
    by = (turn * 64 / (2 * math.pi)).round().long()
    seen, answer = atomic.context_shift(x[:, 2:, 0], by)
    close(seen, x[..., :1])
    close(answer, y)


def test_mips_on_the_authors_vectors(monkeypatch):
    x, y = golden("mips")
    q, k, v = x[..., :12].split(4, -1)
    assert torch.equal(atomic.mips(q, k, v), y)
    monkeypatch.setattr(atomic, "_SCORES", 2 * 64 * 5)
    assert torch.equal(atomic.mips(q, k, v), y), "blocks of five queries"


@pytest.mark.parametrize("length", [64, 100, 4096])
def test_shifts_are_the_authors_linspace(length):
    by = torch.linspace(0, length - length / 8, 8, dtype=torch.int64)
    impulse = torch.zeros(1, length)
    impulse[0, 0] = 1.0
    assert torch.equal(atomic.shift(impulse)[0].nonzero()[:, 0], by)


SIZES = {
    "shift": (512, 3, 8, 512),
    "cumsum": (512, 3, 1, 512),
    "cummax": (512, 3, 1, 512),
    "reverse": (1024, 3, 1, 512),
    "sort": (1024, 3, 1, 512),
    "select": (576, 4, 1, 32),
    "select_fixed": (576, 4, 1, 32),
    "solve": (512, 3, 1, 21),
    "solve_fixed": (512, 3, 1, 21),
    "context_shift": (512, 3, 1, 512),
    "mips": (512, 14, 4, 512),
}
"""Tokens, channels in, numbers out, and how many of the last positions are asked for, at length 512."""


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_papers(name):
    config = Atomic.Config(task=name)
    batch = config.build().batch("train", 3, 2)
    tokens, channels, outputs, asked = SIZES[name]
    assert (config.tokens, config.channels, config.outputs) == (tokens, channels, outputs)
    assert batch.inputs.shape == (2, tokens, channels)
    assert batch.targets.shape == (2, tokens, outputs)
    assert batch.asked[:, -asked:].all()
    assert not batch.asked[:, :-asked].any()


def test_4096_tokens_hold_63_unknowns():
    assert Atomic.Config(task="solve", length=4096).build().batch("train", 0, 1).asked.sum() == 63


@pytest.mark.parametrize("name", ["shift", "reverse", "select"])
def test_noise_has_its_largest_magnitude_at_one(name):
    x = Atomic.Config(task=name, length=200).build().batch("train", 0, 8).inputs[..., 0]
    assert torch.equal(x.abs().amax(1), torch.ones(8))
    assert x[x != 0].abs().median() < 0.5, "not uniform"


def test_select_marks_every_place_alike():
    config = Atomic.Config(task="select", length=12, marked=4)
    share = config.build().batch("train", 0, 4000).inputs[:, :16, 1].mean(0)
    assert (share - 0.25).abs().max() < 0.04


def test_context_shifts_go_from_none_to_length_less_three():
    x = Atomic.Config(task="context_shift", length=8).build().batch("train", 0, 400).inputs
    turn = torch.atan2(x[:, 1, 0], x[:, 0, 0]).remainder(2 * math.pi) * 8 / (2 * math.pi)
    assert set(turn.round().int().remainder(8).tolist()) == {0, 1, 2, 3, 4, 5}


# Scores


def scores(task, said, batch, parts=1):
    totals = {}
    for rows in torch.arange(len(said)).chunk(parts):
        asked = Batch(batch.inputs[rows], batch.targets[rows])
        for key, (total, count) in task.score(said[rows], asked).items():
            before = totals.get(key, (0.0, 0.0))
            totals[key] = before[0] + float(total), before[1] + float(count)
    return task.report(totals)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("name", ["cummax", "select", "mips"])
def test_r2_is_that_of_the_whole_split(name, parts):
    task = Atomic.Config(task=name, length=40, marked=5).build()
    batch = task.batch("test", 0, 30)
    torch.manual_seed(0)
    said = batch.targets.nan_to_num() * 0.8 + 0.1 * torch.randn(batch.targets.shape)
    y, off = batch.targets[batch.asked].double(), (said - batch.targets)[batch.asked].double()
    found = scores(task, said, batch, parts)
    assert found["r2"] == pytest.approx(1 - float(off.square().sum() / (y - y.mean()).square().sum()), abs=1e-9)
    assert found["loss"] == pytest.approx(float(off.square().mean()), abs=1e-9)


def test_targets_that_hardly_vary_do_not_blow_r2_up():
    task = Atomic.Config(length=8).build()
    targets = torch.full((4, 8, 8), 0.5)
    targets[0, 0, 0] += 1e-3
    found = scores(task, targets + 1e-3, Batch(torch.zeros(4, 8, 3), targets))
    assert found["r2"] == pytest.approx(1 - 1e-6 / 1e-5, abs=1e-3)


@pytest.mark.parametrize(("name", "floor"), [("cummax", 0.5), ("cumsum", 0.0), ("reverse", 0.0), ("sort", 0.0)])
def test_the_floors_are_those_that_were_measured(name, floor):
    floors = Atomic.Config(task=name).build().floors()
    assert floors["predict the mean"] == 0.0
    assert floors["predict each position's mean"] == pytest.approx(floor, abs=0.03)


def test_the_floor_is_what_such_a_prediction_scores():
    task = Atomic.Config(task="cummax", length=64).build()
    batch, other = task.batch("test", 0, 1600), task.batch("train", 0, 1600)
    said = other.targets.mean(0).expand_as(batch.targets)
    assert scores(task, said, batch)["r2"] == pytest.approx(task.floors()["predict each position's mean"], abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "shfit"}, "did you mean 'shift'"),
        ({"length": 7}, "length is 7: it must be at least 8"),
        ({"marked": 0}, "marked is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, message):
    with pytest.raises(BadInput, match=message):
        Atomic.Config(**wrong)


def test_a_model_that_knows_the_answer_scores_one():
    task = Atomic.Config(task="solve", length=64).build()
    batch = task.batch("valid", 0, 16)
    n = 7
    system = batch.inputs[:, : n * (n + 1), 0].view(-1, n, n + 1)
    said = torch.zeros_like(batch.targets)
    said[:, -n:, 0] = torch.linalg.solve(system[..., :n], system[..., n])
    assert scores(task, said, batch)["r2"] == pytest.approx(1.0, abs=1e-8)
    assert_close(said[batch.asked], batch.targets[batch.asked], 1e-5)
