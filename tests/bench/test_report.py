"""Ratios, targets, rooflines, crossovers: arithmetic on rows."""

import dataclasses

import pytest
import torch

from hippodrome.bench import _targets
from hippodrome.bench import h3 as h3_subject
from hippodrome.bench._measure import BOTH, FORWARD, OURS, Ceilings, Row
from hippodrome.bench._report import Report, crossover, device_name, ratio_lines, roofline, table

CEILINGS = Ceilings(copy_bytes_per_s=1e12, matmul_flop_per_s=1e14, matmul_dtype="bf16")


def row(way, length, ms, task=FORWARD, batch=1, **more):
    return Row(way=way, task=task, length=length, batch=batch, sizes={"channels": 2}, ms=ms, **more)


def test_ratios_pair_rows_of_one_size_and_task():
    rows = [row("a", 8, 6.0), row("b", 8, 2.0), row("a", 16, 5.0), row("b", 16, None), row("b", 8, 1.0, task=BOTH)]
    (ratio,) = _targets.ratios(rows, "a", "b", "times", "at least", bound=lambda _: 3.0)
    assert (ratio.value, ratio.length, ratio.met) == (3.0, 8, True)


@pytest.mark.parametrize(("kind", "bound", "met"), [("at least", 3.1, False), ("at most", 3.1, True), ("at most", None, None)])
def test_targets_are_met_or_missed(kind, bound, met):
    (ratio,) = _targets.ratios([row("a", 8, 6.0), row("b", 8, 2.0)], "a", "b", "", kind, bound=lambda _: bound)
    assert ratio.met is met


def test_rates_are_compared_over_batches():
    rows = [row("a", 8, 9.0, batch=1, more={"tokens_per_s": 10.0}), row("b", 8, 9.0, batch=4, more={"tokens_per_s": 58.0})]
    (ratio,) = _targets.ratios(rows, "a", "b", "", "at least")
    assert ratio.value == pytest.approx(5.8)


def test_h3_is_held_to_its_targets_on_a_gpu_only():
    rows = [row(way, n, ms) for n in (512, 8192, 16384) for way, ms in ((OURS, 2.0), ("copy", 1.0))]
    assert [ratio.met for ratio in h3_subject.targets(rows, True)] == [None, False, True]
    assert {ratio.met for ratio in h3_subject.targets(rows, False)} == {None}


def test_roofline_takes_the_nearer_ceiling():
    shares = roofline(row("a", 8, 2.0, bytes=10**9, flops=10**10), CEILINGS)
    assert shares == {
        "share_of_copy": pytest.approx(0.5),
        "share_of_matmul": pytest.approx(0.05),
        "bound": "bytes",
        "share_of_roofline": pytest.approx(0.5),
    }
    assert roofline(row("a", 8, 2.0, bytes=10**9, flops=10**12), CEILINGS)["bound"] == "FLOPs"
    assert roofline(row("a", 8, None, bytes=1, error="out of memory"), CEILINGS) is None


def test_crossover_lies_between_the_lengths_where_the_order_changes():
    rows = [row("a", n, ms) for n, ms in ((8, 1.0), (16, 2.0), (32, 8.0), (64, 32.0))]
    rows += [row("b", n, ms) for n, ms in ((8, 2.0), (16, 3.0), (32, 4.0), (64, 8.0))]
    assert crossover(rows) == [{"task": FORWARD, "from": "a", "to": "b", "between": [16, 32]}]
    assert crossover(rows[:2] + rows[4:6]) == []


def test_what_is_printed():
    rows = [row("a", 8, 6.0, batch=2), row("b", 8, 2.0, batch=2), row("b", 16, None, error="out of memory")]
    ratios = tuple(_targets.ratios(rows, "a", "b", "a over b", "at least", bound=lambda _: 4.0))
    report = Report(subject="s", rows=tuple(rows), ratios=ratios, ceilings=CEILINGS, provenance={"device": "d"})
    heads, cells = table(report)
    assert heads == ("task", "batch x length", "a", "b")
    assert cells == [("forward", "2 x 8", "6 ms", "2 ms"), ("forward", "1 x 16", "", "out of memory")]
    assert list(ratio_lines(report)) == ["a over b, forward: 3.00 at 2 x 8 (at least 4: MISSED)"]


def test_models_of_gpus_make_file_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert device_name(torch.device("cuda", 0)) == "h100-80gb-hbm3"
    assert device_name(torch.device("cpu")) == "cpu"


def test_many_ways_have_a_line_each():
    rows = [dataclasses.replace(row(f"w{i}", 8, 2.0), peak_bytes=3 * 10**9) for i in range(7)]
    rows.append(row("w0", 16, None, error="out of memory"))
    report = Report(subject="s", rows=tuple(rows), ratios=(), ceilings=CEILINGS, provenance={"device": "d"})
    heads, cells = table(report)
    assert heads[2:] == ("way", "found", "peak memory")
    assert cells[0][2:] == ("w0", "2 ms", "3.00 GB")
    assert cells[-1][1:] == ("1 x 16", "w0", "out of memory", "")
