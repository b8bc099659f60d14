"""Every file of hippodrome/bench without an underscore, from end to end on tiny sizes."""

import json

import pytest
import torch

from hippodrome import bench as timing
from hippodrome.bench import _peers, bench, differing, find_subject, subjects
from hippodrome.bench import attention as attention_subject
from hippodrome.bench import attention_train as attention_train_subject
from hippodrome.bench import block_sparse as block_sparse_subject
from hippodrome.bench import long_conv as long_conv_subject
from hippodrome.bench import state as state_subject
from hippodrome.bench._attention import kept_pairs, standard_attention
from hippodrome.bench._measure import BOTH, FORWARD, OURS, TOLERANCE, Row
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Window
from tests.commands import run

CPU = torch.device("cpu")
TINY = {
    "attention": {"lengths": (5, 70), "tokens": 140, "channels": 128, "head_dim": 64},
    "attention_train": {"lengths": (8, 16), "tokens": 16, "channels": 64, "layers": 2, "vocabulary": 40},
    "block_sparse": {"lengths": (32, 70), "tokens": 140, "channels": 128, "tiles": (16,)},
    "diagonal_ssm": {"lengths": (5, 70), "batch": 2, "channels": 6, "modes": 3},
    "generate": {"lengths": (5, 9), "channels": 128, "layers": 2, "new_tokens": 2, "vocabulary": 40},
    "h3": {"lengths": (5, 70), "tokens": 140, "channels": 64, "head_dim": 2, "modes": 3, "taps": 4},
    "linear_attention": {"lengths": (5, 70), "tokens": 140, "channels": 128, "head_dim": 64},
    "long_conv": {"lengths": (5, 70), "batch": 2, "channels": 6},
    "lra": {"lengths": (8, 16), "tokens": 16, "channels": 8, "layers": 1, "modes": 2},
    "scan": {"lengths": (5, 70), "batch": 2, "channels": 6},
    "state": {"lengths": (192, 256), "channels": 128, "layers": 1, "modes": 16, "new_tokens": 2, "vocabulary": 40},
    "train": {"lengths": (8, 16), "tokens": 16, "channels": 64, "layers": 2, "vocabulary": 40},
}
OPS = ("attention", "block_sparse", "diagonal_ssm", "h3", "linear_attention", "long_conv", "scan")


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
    assert {row.task.rpartition(", ")[2] for row in rows} >= {FORWARD, BOTH}


@pytest.mark.parametrize("subject", [name for name in subjects() if name not in OPS])
def test_models_state_their_rate(found, subject):
    report, _ = found(subject)
    for row in report.rows:
        new = {"generate": row.sizes.get("new_tokens"), "state": 1}.get(subject, row.length)
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
    "heads of linear attention": ("linear_attention", {"head_dim": 48, "channels": 64}, "head_dim 48 does not divide 64"),
    "width of a state's attention": ("state", {"channels": 100}, "multiple of 128"),
    "attention heads": ("train", {"channels": 100}, "multiple of 64"),
    "mode": ("train", {"mode": "blokcs"}, "did you mean 'blocks'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_timed_is_refused(case, tmp_path):
    subject, settings, said = REFUSED[case]
    with pytest.raises(BadInput, match=said):
        bench(subject, CPU, out=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_fixed_states_stay_and_keys_and_values_grow(found):
    report, _ = found("state")
    held = {}
    for row in report.rows:
        held.setdefault(row.way, []).append(row.more["state_bytes"])
    # Keys and values of the context, of two new tokens and of the two steps that warm up; the two counters.
    wide, tokens = TINY["state"]["channels"], TINY["state"]["lengths"]
    assert held.pop(state_subject.TRANSFORMER) == [2 * 4 * wide * (n + 2 + 2) + 8 for n in tokens]
    assert {"linear attention", "H3", "S4", "S4D", "GSS", "DLR"} <= set(held)
    for way, (short, long) in held.items():
        assert short == long, way
    linear = [ratio.value for ratio in report.ratios if ratio.what.startswith("linear attention: times fewer bytes")]
    assert linear == pytest.approx([(8 * wide * (n + 4) + 8) / (4 * wide * (128 + 1) + 8) for n in tokens])


def test_what_a_state_is_measured_on_is_said_before_it_takes_time():
    said = []
    bench("state", CPU, ways=("S4D",), repeats=1, progress=said.append, **TINY["state"])
    assert said[1:3] == ["S4D: building 1 blocks of width 128", "S4D: 2 tokens after 192"]
    assert said[3].startswith("S4D, a token, 1 x 192: ")
    assert said[4] == "S4D: 2 tokens after 256"


def test_a_filled_state_has_seen_its_tokens():
    config = state_subject._models(128, 2, 16, 40)
    for way in ("H3", "linear attention", state_subject.TRANSFORMER):
        state = state_subject._filled(config[way].build(), 3, 70, 80)
        assert state.position.tolist() == [70, 70, 70]
        for tensor in state.tensors():
            parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            assert parts.unique().numel() > 1 or parts.eq(70).all(), (way, "what holds zeros was not filled")


def test_a_state_that_is_too_large_misses_its_target():
    def row(way, held, ms):
        more = {"tokens_per_s": 1.0, "state_bytes": held}
        return [Row(way=way, task="a token", length=n, batch=1, ms=ms * n**0.5, more=more) for n in (1024, 16384)]

    found = {ratio.what: ratio for ratio in state_subject.targets(row("DLR", 1.0, 1.0) + row("Transformer", 49.0, 1.0), True)}
    bytes_, flat = found["DLR: times fewer bytes of state than keys and values"], next(iter(found.values()))
    assert (bytes_.value, bytes_.met) == (49, False)
    assert (flat.value, flat.met) == (4, False)


def test_tuning_is_for_gpus():
    with pytest.raises(BadInput, match="not for cpu"):
        timing.tune(CPU)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"paths": ["blok_fft"]}, "did you mean 'block_fft'"),
        ({"lengths": [1000]}, "no length 1000: .* 1024 is the nearest"),
        ({"dtype": "bf61"}, "did you mean 'bf16'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(part, said):
    with pytest.raises(BadInput, match=said):
        timing.tune(CPU, **part)


def test_auto_is_judged_by_the_fastest_and_ours_by_cudnn():
    def row(way, task, ms, **more):
        return Row(way=way, task=f"causal, heads of 64, {task}", length=1024, batch=1, ms=ms, **more)

    times = {"auto": (1.0, 3.0), OURS: (1.25, 4.25), "SDPA cuDNN": (1.0, 3.0), "SDPA flash": (0.9, 2.0)}
    rows = [row(way, task, ms) for way, each in times.items() for task, ms in zip((FORWARD, BOTH), each, strict=True)]
    found = {(ratio.what, ratio.task.rpartition(", ")[2]): ratio for ratio in attention_subject.targets(rows, True)}
    auto = found["auto: speed over the fastest's", FORWARD]
    assert (auto.value, auto.bound, auto.met) == (pytest.approx(0.9), 0.98, False)
    ours = found["ours: speed over cuDNN's", FORWARD]
    assert (ours.value, ours.met) == (pytest.approx(0.8), True)
    assert found["ours: speed over cuDNN's", BOTH].bound is None
    alone = found["ours: speed over cuDNN's, backward alone", BOTH]
    assert (alone.value, alone.bound, alone.met) == (pytest.approx(2 / 3), 0.65, True)


def test_standard_attention_is_the_same_function():
    with standard_attention():
        assert attention.choose(*3 * [torch.randn(1, 2, 4, 8)], Causal()) == "sdpa"
        q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
        standard = attention(q, k[:, :2], v[:, :2], Causal())
    torch.testing.assert_close(standard, attention.reference(q, k[:, :2], v[:, :2], Causal()))
    with standard_attention(), pytest.raises(NotImplementedError, match="knows no dropout"):
        attention(q, k, v, Causal(), dropout=0.1)


def test_the_longest_row_that_can_be_trained(monkeypatch):
    monkeypatch.setattr(attention_train_subject, "LONGEST", {False: 64})
    tiny = {**TINY["attention_train"], "lengths": (16,), "longest": True}
    report = bench("attention_train", CPU, repeats=1, **tiny)
    assert [(row.way, row.length) for row in report.rows if row.way == "auto"] == [("auto", n) for n in (16, 32, 64)]
    longest = {ratio.what: ratio.value for ratio in report.ratios if "longest" in ratio.what}
    assert longest == {f"{way}: the longest row trained, in tokens": 64 for way in ("auto", "standard attention")}


def test_break_even_is_where_time_meets_that_of_dense():
    def row(kept, share):
        more = {"kept": kept, "ideal_ms": 10 * kept, "share_of_ideal": share}
        return Row(way=OURS, task=f"p{kept}, tiles of 16, {FORWARD}", length=64, batch=1, ms=10 * kept / share, more=more)

    # 1 ms at no density and 20 ms more at all of it, where dense takes 10.
    rows = [row(kept, 10 * kept / (1 + 20 * kept)) for kept in (0.1, 0.2, 0.4)]
    even = [ratio.value for ratio in block_sparse_subject.targets(rows, True) if "break-even" in ratio.what]
    assert even == pytest.approx([0.45])


def test_the_pairs_that_a_pattern_keeps():
    for pattern in (Causal(), Window(size=5)):
        assert kept_pairs(pattern, 37, CPU) == int(pattern.mask(37, 37).sum())


@pytest.mark.gpu
@pytest.mark.parametrize("subject", subjects())
def test_on_a_gpu(found, subject):
    report, _ = found(subject, torch.device("cuda", 0))
    assert [row.error for row in report.rows if row.error] == []
    assert all(row.peak_bytes is not None for row in report.rows if row.way not in ("copy", "transformers' generate, GPT-2"))
