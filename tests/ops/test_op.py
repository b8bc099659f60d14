"""What leaves of operations share: the line that a long first call prints."""

import time

import torch

from hippodrome.ops import _op
from hippodrome.ops._op import Op, announced, use_backend


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


def test_a_backend_that_yields_runs_when_it_is_asked_for_by_name():
    @Op
    def twice(x):
        return "reference"

    @twice.backend("triton", why_not=lambda x: "negative" if x < 0 else None, yields=lambda x: "small" if x < 5 else None)
    def _fast(x):
        return "triton"

    assert twice(9) == "triton"
    assert twice(1) == "reference"
    assert twice.explain(1) == {"triton": "small", "reference": "ok"}
    with use_backend("triton"):
        assert twice(1) == "triton"
        assert twice.explain(-1)["triton"] == "negative"
