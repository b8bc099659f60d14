import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from hippodrome.model import ChannelMixer
from hippodrome.optim import build_optimizer, param_groups, schedule, set_rates
from hippodrome.part import BadInput, OptimRule
from hippodrome.run import TrainConfig

CPU = torch.device("cpu")


class Ruled(ChannelMixer):
    """A part with one parameter of each kind of rule."""

    optim_rules: ClassVar = {"slow": OptimRule(lr_scale=0.1, weight_decay=0.0), "inner.weight": OptimRule(lr_max=1e-3)}

    def __init__(self):
        super().__init__()
        self.slow = nn.Parameter(torch.ones(3, 3))
        self.inner = nn.Linear(3, 3)
        self.plain = nn.Parameter(torch.ones(3))


def groups_by_name(model, config):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in param_groups(model, config) for p in g["params"]}


def test_rules_reach_their_parameters_wherever_the_part_sits():
    model = nn.ModuleDict({"a": Ruled(), "b": nn.Linear(3, 3)})
    found = groups_by_name(model, TrainConfig(lr=1e-2, weight_decay=0.1))
    assert found == {
        "a.slow": (pytest.approx(1e-3), 0.0),
        "a.inner.weight": (1e-3, 0.1),
        "a.inner.bias": (1e-2, 0.0),
        "a.plain": (1e-2, 0.0),
        "b.weight": (1e-2, 0.1),
        "b.bias": (1e-2, 0.0),
    }


def test_a_cap_raises_no_rate():
    assert groups_by_name(Ruled(), TrainConfig(lr=1e-4))["inner.weight"][0] == 1e-4


def test_decay_all_spares_only_what_a_rule_spares():
    found = groups_by_name(Ruled(), TrainConfig(decay="all", weight_decay=0.2))
    assert {name: decay for name, (_, decay) in found.items()} == {
        "slow": 0.0,
        "inner.weight": 0.2,
        "inner.bias": 0.2,
        "plain": 0.2,
    }


def test_a_rule_for_no_parameter_raises_with_the_nearest():
    class Misspelt(Ruled):
        optim_rules: ClassVar = {"slwo": OptimRule()}

    with pytest.raises(BadInput, match=r"Misspelt.optim_rules names 'slwo'.*did you mean 'slow'"):
        param_groups(Misspelt(), TrainConfig())


def test_frozen_parameters_are_left_out():
    model = Ruled()
    model.plain.requires_grad_(False)
    assert "plain" not in groups_by_name(model, TrainConfig())


def test_the_schedule_multiplies_each_groups_own_peak():
    optimizer = build_optimizer(Ruled(), TrainConfig(lr=1e-2), CPU)
    set_rates(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-4, 5e-3])
    set_rates(optimizer, 1.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([1e-3, 1e-2])


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("cosine", 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90))), ("linear", 0.55, 0.11), ("constant", 1.0, 1.0)],
)
def test_schedule_values(kind, middle, last):
    config = TrainConfig(steps=100, warmup=0.1, lr_final=0.1, schedule=kind)
    assert schedule(config, 0) == pytest.approx(0.1)
    assert schedule(config, 9) == schedule(config, 10) == pytest.approx(1.0)
    assert schedule(config, 55) == pytest.approx(middle)
    assert schedule(config, 99) == pytest.approx(last)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_schedule_without_or_with_nothing_but_warm_up(warmup):
    config = TrainConfig(steps=4, warmup=warmup, schedule="linear", lr_final=0.0)
    expected = [1.0, 0.75, 0.5, 0.25] if warmup == 0 else [0.25, 0.5, 0.75, 1.0]
    assert [schedule(config, step) for step in range(4)] == pytest.approx(expected)
