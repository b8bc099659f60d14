"""Every file of hippodrome/bench without an underscore, from end to end on tiny sizes."""

import json

import pytest
import torch

from hippodrome import bench as timing
from hippodrome.bench import _peers, bench, differing, find_subject, subjects
from hippodrome.bench import long_conv as long_conv_subject
from hippodrome.bench._measure import BOTH, FORWARD, OURS, TOLERANCE
from hippodrome.part import BadInput
from tests.commands import run

CPU = torch.device("cpu")
TINY = {
    "diagonal_ssm": {"lengths": (5, 70), "batch": 2, "channels": 6, "modes": 3},
    "generate": {"lengths": (5, 9), "channels": 128, "layers": 2, "new_tokens": 2, "vocabulary": 40},
    "h3": {"lengths": (5, 70), "tokens": 140, "channels": 64, "head_dim": 2, "modes": 3, "taps": 4},
    "long_conv": {"lengths": (5, 70), "batch": 2, "channels": 6},
    "lra": {"lengths": (8, 16), "tokens": 16, "channels": 8, "layers": 1, "modes": 2},
    "scan": {"lengths": (5, 70), "batch": 2, "channels": 6},
    "train": {"lengths": (8, 16), "tokens": 16, "channels": 64, "layers": 2, "vocabulary": 40},
}
OPS = ("diagonal_ssm", "h3", "long_conv", "scan")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Subject -> its report and the folder it was written to, made when asked for."""
    made = {}

    def find(subject, device=CPU):
        if (subject, device) not in made:
            folder = tmp_path_factory.mktemp(subject)
            made[subject, device] = bench(subject, device, out=folder, repeats=1, **TINY[subject]), folder
        return made[subject, device]

    return find


@pytest.mark.parametrize("subject", subjects())
def test_every_way_has_a_number_at_every_length(found, subject):
    report, _ = found(subject)
    assert [row.error for row in report.rows if row.error] == []
    assert all(row.ms > 0 for row in report.rows)
    for way in {row.way for row in report.rows}:
        assert {row.length for row in report.rows if row.way == way} == set(TINY[subject]["lengths"])
    assert {row.way for row in report.rows} <= set(find_subject(subject).WAYS)
    assert len({row.way for row in report.rows}) > 1, "nothing to compare with"
    assert report.ratios


@pytest.mark.parametrize("subject", subjects())
def test_the_file_holds_all_that_was_found(found, subject):
    report, folder = found(subject)
    written = json.loads((folder / f"{subject}_cpu.json").read_text())
    assert [row["ms"] for row in written["rows"]] == [row.ms for row in report.rows]
    assert {row["length"] for row in written["rows"]} == set(TINY[subject]["lengths"])
    assert {"commit", "versions", "device", "seed", "command"} <= set(written["provenance"])
    assert written["peers"]["fla"] == _peers.versions()["fla"]
    assert written["ceilings"]["copy_bytes_per_s"] > 1e6
    assert (folder / f"{subject}_cpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("subject", OPS)
def test_no_time_of_an_op_without_a_check(found, subject):
    report, _ = found(subject)
    rows = [row for row in report.rows if row.way != "copy"]
    assert all(row.difference < TOLERANCE[row.dtype] for row in rows)
    assert {row.backend for row in rows if row.way == OURS} <= {"cpu", "chunked", "reference"}
    assert {row.task for row in rows} >= {FORWARD, BOTH}


@pytest.mark.parametrize("subject", [name for name in subjects() if name not in OPS])
def test_models_state_their_rate(found, subject):
    report, _ = found(subject)
    for row in report.rows:
        new = row.sizes["new_tokens"] if subject == "generate" else row.length
        assert row.more["tokens_per_s"] == pytest.approx(1e3 * row.batch * new / row.ms)


def test_a_way_that_differs_is_not_timed(monkeypatch, tmp_path):
    right = long_conv_subject._ours
    monkeypatch.setattr(long_conv_subject, "_ours", lambda *inputs: 1.01 * right(*inputs))
    report = bench("long_conv", CPU, out=tmp_path, repeats=1, **TINY["long_conv"])
    ours = [row for row in report.rows if row.way == OURS]
    assert ours
    assert all(row.ms is None and "differs from the reference by 1.0e-02" in row.error for row in ours)
    assert all(row.ms for row in report.rows if row.way != OURS)
    assert len(differing(report)) == len(ours)


def test_a_gradient_that_differs_is_not_timed(monkeypatch, tmp_path):
    right = long_conv_subject._ours

    def wrong(u, kernel, *gates):
        y = right(u, kernel, *gates)
        return y.detach() + 1.01 * (y - y.detach())

    monkeypatch.setattr(long_conv_subject, "_ours", wrong)
    report = bench("long_conv", CPU, repeats=1, **TINY["long_conv"])
    assert {row.task for row in report.rows if row.error} == {BOTH, "gated " + BOTH}


def test_the_command_says_so_and_writes_the_rest(monkeypatch, tmp_path):
    def broken(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(long_conv_subject, "_ours", broken)
    result = run("bench", "long_conv", "--lengths", 8, "--channels", 2, "--repeats", 1, "--device", "cpu", "--out", tmp_path)
    assert result.code == 2
    assert "out of memory for 3.00 GiB more" in result.err.splitlines()[-1]
    rows = json.loads((tmp_path / "long_conv_cpu.json").read_text())["rows"]
    assert {row["way"]: row["error"] for row in rows} == {
        OURS: "out of memory for 3.00 GiB more",
        "copy": None,
        "torch FFT": None,
    }


def test_a_run_that_is_stopped_leaves_what_it_found(tmp_path):
    said = []

    def stop(line):
        said.append(line)
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench("long_conv", CPU, out=tmp_path, repeats=1, progress=stop, **TINY["long_conv"])
    assert len(json.loads((tmp_path / "long_conv_cpu.json").read_text())["rows"]) == 2


def test_only_the_ways_asked_for():
    report = bench("diagonal_ssm", CPU, repeats=1, ways=("FFT",), **TINY["diagonal_ssm"])
    assert {row.way for row in report.rows} == {"two-level kernel + torch FFT", "Vandermonde kernel + torch FFT"}


REFUSED = {
    "subject": ("h4", {}, "did you mean 'h3'"),
    "flag of another": ("long_conv", {"modes": 3}, "no flag --modes: it takes --lengths"),
    "way": ("h3", {"ways": ("SPDA",)}, "no way called 'SPDA'"),
    "no length": ("h3", {"lengths": ()}, "lengths is empty"),
    "length": ("h3", {"lengths": (4, 0)}, "lengths is 0"),
    "channels": ("h3", {"channels": -1}, "channels is -1"),
    "repeats": ("h3", {"repeats": 0}, "repeats is 0"),
    "dtype": ("h3", {"dtype": "bf61"}, "did you mean 'bf16'"),
    "heads": ("h3", {"head_dim": 3, "channels": 64}, "head_dim 3 does not divide 64"),
    "attention heads": ("train", {"channels": 100}, "multiple of 64"),
    "mode": ("train", {"mode": "blokcs"}, "did you mean 'blocks'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_timed_is_refused(case, tmp_path):
    subject, settings, said = REFUSED[case]
    with pytest.raises(BadInput, match=said):
        bench(subject, CPU, out=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_tuning_is_for_gpus():
    with pytest.raises(BadInput, match="not for cpu"):
        timing.tune(CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("subject", subjects())
def test_on_a_gpu(found, subject):
    report, _ = found(subject, torch.device("cuda", 0))
    assert [row.error for row in report.rows if row.error] == []
    assert all(row.peak_bytes is not None for row in report.rows if row.way not in ("copy", "transformers' generate, GPT-2"))
