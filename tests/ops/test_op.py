"""What leaves of operations share: the line that a long first call prints."""

import time

import torch

from hippodrome.ops import _op
from hippodrome.ops._op import announced


def test_a_first_call_that_takes_long_says_what_it_does(monkeypatch, capfd):
    monkeypatch.setattr(_op, "PATIENCE", 0.05)

    @announced("the leaf")
    def leaf(t: torch.Tensor, flag: bool) -> torch.Tensor:
        time.sleep(0.3)
        return t

    def said(t, flag):
        leaf(t, flag)
        return capfd.readouterr().err

    assert said(torch.zeros(2), True) == "hippodrome: compiling the GPU kernels of the leaf for this machine, once\n"
    assert said(torch.zeros(5), True) == ""
    assert "compiling" in said(torch.zeros(2, dtype=torch.float64), True)
    assert "compiling" in said(torch.zeros(2), False)


def test_a_quick_call_says_nothing(capfd):
    assert announced("the leaf")(lambda t: t + 1)(torch.zeros(1)) == 1
    assert capfd.readouterr().err == ""
