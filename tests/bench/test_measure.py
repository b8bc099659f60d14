"""Timer, checks, failures."""

import math

import pytest
import torch

from hippodrome.bench._measure import (
    BOTH,
    FORWARD,
    Bench,
    Differs,
    Expected,
    Row,
    calls,
    difference,
    grid,
    one_line,
)
from hippodrome.bench.diagonal_ssm import s4d_parameters
from hippodrome.ops.h3 import h3

CPU = torch.device("cpu")


def mixed(q, k, v, taps, log_modes, weights, skip):
    return h3(q, k, v, taps, log_modes, weights, skip=skip)[0]


def test_a_call_is_timed_as_often_as_asked_after_one_that_is_not_counted():
    count = []
    assert Bench(CPU, repeats=4).time(lambda: count.append(1)) >= 0
    assert len(count) == 5


def test_difference_is_relative_and_sees_what_is_not_finite():
    a = torch.tensor([3.0, 4.0])
    assert difference(a, a) == 0
    assert difference(a * 1.5, a) == pytest.approx(0.5)
    assert difference(torch.tensor([3.0, math.nan]), a) == math.inf
    assert difference(torch.tensor([1j, 0]), torch.tensor([1.0 + 0j, 0])) == pytest.approx(2**0.5)


@pytest.mark.parametrize("wrong", range(8))
def test_a_few_channels_check_y_and_every_gradient(wrong):
    """Channels in heads of 2: whatever one of y and the seven gradients is off by, is found."""
    bench = Bench(CPU)
    bench.reseed()
    q, k, v = (bench.draw(2, 24, 9).requires_grad_() for _ in range(3))
    inputs = (q, k, v, bench.draw(24, 4).requires_grad_(), *s4d_parameters(bench, 12, 3))
    dy = bench.draw(2, 24, 9)
    expected = Expected(mixed, inputs, dy, heads=12)
    found = list(calls(mixed, inputs, dy)[BOTH]())
    assert len(found) == 8
    assert expected(found) < 1e-5
    found[wrong] = found[wrong] * 1.01
    assert expected(found) == pytest.approx(0.01, rel=0.05)


def test_forward_makes_no_graph_and_no_gradient():
    a = torch.ones(1, 2, 3, requires_grad=True)
    (y,) = calls(lambda t: t * 2, (a,), torch.ones(1, 2, 3))[FORWARD]()
    assert not y.requires_grad
    assert a.grad is None


def test_a_row_of_a_failure_says_why_and_holds_no_time():
    row = Row(way="w", task="t", length=1, batch=1)

    def fail():
        raise RuntimeError("first line\nsecond line")

    said = []
    found = Bench(CPU, progress=said.append).measure(row, fail)
    assert (found.ms, found.error) == (None, "RuntimeError: first line")
    assert said == ["w, t, 1 x 1: RuntimeError: first line"]


def test_ctrl_c_is_no_failure():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(CPU).measure(Row(way="w", task="t", length=1, batch=1), stop)


def test_no_memory_is_seen_behind_another_error():
    failure = RuntimeError("capture failed")
    failure.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert one_line(failure) == "out of memory for 2.00 GiB more"
    allocator = (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes. Error code 12"
    )
    assert one_line(RuntimeError(allocator)) == "out of memory for 4.00 GiB more"
    assert one_line(Differs("differs")) == "differs"


def test_peak_counts_what_a_call_holds():
    found = Bench(CPU).peak(lambda: torch.ones(1 << 24).sum())
    assert found is None or 0.5 < found / (1 << 26) < 3


def test_a_process_that_hardly_grows_has_no_peak():
    """A call that fits into pages held already took 0 bytes, or 15 MB where it came first."""
    assert Bench(CPU).peak(lambda: torch.ones(64).sum()) is None


def test_ceilings_are_measured_once():
    said = []
    bench = Bench(CPU, repeats=1, progress=said.append)
    assert bench.ceilings is bench.ceilings
    assert len(said) == 1
    assert bench.ceilings.matmul_flop_per_s > 1e8


def test_sizes_keep_the_tokens_or_the_batch():
    bench = Bench(CPU, repeats=1)
    default = [(4, 8), (2, 8), (1, 16)]
    assert list(grid(bench, None, None, 32, default)) == default
    assert list(grid(bench, (8, 64), None, 32, default)) == [(4, 8), (1, 64)]
    assert list(grid(bench, None, 3, 32, default)) == [(3, 8), (3, 16)]
