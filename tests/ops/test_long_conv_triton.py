"""long_conv's paths on the GPU: in the interpreter, on the device, and the leaf, its table and its FFT path without either."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops._flops import register_flops
from hippodrome.ops._op import use_backend
from hippodrome.ops.long_conv import _fft, _table, _taps, long_conv
from hippodrome.ops.long_conv import triton as backend
from hippodrome.part import BadInput

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture
def by_fft(monkeypatch):
    """The leaf on the CPU, by the one path that needs no GPU; a few rows at a time."""
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(backend, "forced", "fft")
    monkeypatch.setattr(_taps, "SCRATCH", 32 * 1024 * 3)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(given, name):
    leaves = {key: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for key, t in given.items()}
    with use_backend(name):
        y = long_conv(**leaves)
    y.backward(draw(*y.shape, seed=1).to(y))
    return {"y": y.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}


def errors(got, exact):
    return {name: float((got[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


def case(batch, channels, length, taps, back=0, gates=True, dtype=torch.float32):
    given = {"u": draw(batch, channels, length), "kernel": draw(channels, taps, seed=2), "skip": draw(channels, seed=3)}
    if back:
        given["kernel_rev"] = draw(channels, back, seed=4)
    if gates:
        given["pre_gate"] = draw(batch, length, channels, seed=5).transpose(1, 2)
        given["post_gate"] = draw(channels, batch, length, seed=6).transpose(0, 1)
    return {name: t.to(dtype if name in ("u", "pre_gate", "post_gate") else torch.float32) for name, t in given.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "taps", "back"),
    [(1, 1, 1), (1, 5, 5), (63, 63, 0), (65, 20, 65), (127, 500, 3), (128, 128, 128), (1023, 1023, 0)],
)
def test_the_fft_path_is_the_reference(by_fft, length, taps, back, dtype):
    given = case(3, 2, length, taps, back, dtype=dtype)
    exact = results({name: t.double() for name, t in given.items()}, "reference")
    for name, error in errors(results(given, "triton"), exact).items():
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("shape", [(1, 3, 50), (2, 1, 50), (2, 2, 2, 50), (3, 50)])
def test_rows_of_any_shape_and_gates_that_broadcast(by_fft, shape):
    channels = shape[-2]
    u, gate = draw(*shape), draw(*(1,) * (len(shape) - 2), *shape[-2:], seed=1)
    kernel = draw(channels, 50, seed=2)
    for wanted in ({"u": u, "pre_gate": gate}, {"u": gate, "post_gate": u}):
        exact = results({"kernel": kernel.double(), **{name: t.double() for name, t in wanted.items()}}, "reference")
        assert max(errors(results({"kernel": kernel, **wanted}, "triton"), exact).values()) < 1e-5


def test_only_what_is_wanted_is_made(by_fft):
    given = case(2, 2, 40, 40)
    for name in given:
        leaves = {key: t.clone().requires_grad_(key == name) for key, t in given.items()}
        with use_backend("triton"):
            long_conv(**leaves).sum().backward()
        assert [key for key, leaf in leaves.items() if leaf.grad is not None] == [name]


def test_no_rows_and_no_tokens(by_fft):
    for shape in ((0, 2, 5), (2, 2, 0)):
        u, kernel = torch.zeros(shape, requires_grad=True), torch.randn(2, 3, requires_grad=True)
        with use_backend("triton"):
            y = long_conv(u, kernel)
        assert y.shape == shape
        y.sum().backward()
        assert not kernel.grad.any()


@pytest.mark.parametrize("names", [("kernel_rev", "pre_gate", "post_gate"), ("kernel_rev",), ()])
def test_the_leaf_is_a_good_citizen_of_torch(by_fft, names):
    given = case(2, 3, 40, 40, back=7)
    order = ("u", "kernel", "kernel_rev", "skip", "pre_gate", "post_gate")
    args = tuple(given[name].requires_grad_() if name in ("u", "kernel", "skip", *names) else None for name in order)
    torch.library.opcheck(torch.ops.hippodrome.long_conv.default, args)


def test_compiles_in_one_graph_with_a_dynamic_length(by_fft):
    given = case(2, 3, 130, 130)
    compiled = torch.compile(lambda **kw: long_conv(**kw), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 97):
        cut = {name: t[..., :length] if name != "skip" else t for name, t in given.items()}
        cut = {name: t.detach().clone().requires_grad_() for name, t in cut.items()}
        with use_backend("triton"):
            compiled(**cut).sum().backward()
        got = {name: t.grad for name, t in cut.items()}
        leaves = {name: t.detach().double().requires_grad_() for name, t in cut.items()}
        long_conv.reference(**leaves).sum().backward()
        assert max(errors(got, {name: t.grad for name, t in leaves.items()}).values()) < 1e-5


def test_operations_are_counted(by_fft):
    register_flops()
    u, short, full = draw(2, 3, 100).requires_grad_(), draw(3, 4).requires_grad_(), draw(3, 100)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y = long_conv(u, short)
        assert counter.get_total_flops() == 2 * 3 * 100 * 2 * 4
        y.sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 3 * 100 * 2 * 4
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        long_conv(u, full)
    assert 0 < counter.get_total_flops() < 2 * 3 * 100 * 2 * 100


def test_double_precision_and_other_devices_are_refused(by_fft):
    u, kernel = torch.zeros(1, 2, 5), torch.zeros(2, 5)
    assert long_conv.explain(u, kernel)["triton"] == "ok"
    assert "float64" in long_conv.explain(u.double(), kernel)["triton"]
    assert "kernel is torch.float64" in long_conv.explain(u, kernel.double())["triton"]
    assert "meta" in long_conv.explain(u.to("meta"), kernel)["triton"]


@pytest.mark.parametrize("n", [1, 2, 3, 127, 1023, 2049, 100_003, 8_388_607])
def test_transforms_have_good_lengths(n):
    size = _fft.good_size(n)
    assert n <= size <= max(4, 1.2 * n)
    for prime in (2, 3, 5, 7):
        while size % prime == 0:
            size //= prime
    assert size == 1


@pytest.mark.parametrize("gate", [None, "pre_gate", "post_gate"])
def test_the_table_is_asked_for_each_pass(by_fft, gate, monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "forced", None)
    monkeypatch.setattr(_table, "fastest", lambda *question: asked.append(question) or "fft")
    given = {"u": draw(3, 2, 40), "kernel": draw(2, 10), "kernel_rev": draw(2, 20)}
    results(given | ({gate: draw(3, 2, 40, seed=1)} if gate else {}), "triton")
    question = (torch.float32, "", _table.Point(3, 2, 40, 20), gate is not None, _table.PATHS)
    assert asked == [("forward", *question), ("backward", *question)]


LARGE = ["one more", "a thousand", "four thousand", "eight thousand", "sixteen thousand"]
SKIPPED = {
    "toeplitz": LARGE,
    "partitioned": ["pairs of tiles", "many sequences", "more taps than tokens", "one token", *LARGE],
    "block_fft": ["groups of channels", "short taps both ways"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", SKIPPED)
def test_programs_in_the_interpreter(path):
    from tests.ops.interpreted_long_conv import CASES

    command = [sys.executable, "-m", "tests.ops.interpreted_long_conv", path, *SKIPPED[path]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == set(CASES) - set(SKIPPED[path])
    for name, found, cast in lines:
        dtype = CASES[name].get("dtype", torch.float32)
        # The gradient of a skip is one number a channel, and may be small by chance.
        skip = found.pop("skip")
        assert skip < 3 * TOLERANCE[dtype], (name, skip)
        assert max(found.values()) < TOLERANCE[dtype], (name, found)
        if path == "block_fft" and dtype == torch.bfloat16:
            assert max(found.values()) < 2 * cast["y"], (name, found, cast)


def test_a_path_that_cannot_take_a_call_says_so_and_is_not_chosen(by_fft, monkeypatch):
    u, kernel = draw(1, 1, 16_385), draw(1, 3)
    said = backend.explain_paths(16_385, torch.float16, u.device)
    assert said == {"toeplitz": "ok", "partitioned": "ok", "fft": "ok", "block_fft": said["block_fft"]}
    assert "16,385 tokens are more than the 16,384" in said["block_fft"]
    with use_backend("triton"):
        with backend.use_path("block_fft"), pytest.raises(BadInput, match="path block_fft asked for: 16,385 tokens"):
            long_conv(u, kernel)
        monkeypatch.setattr(backend, "forced", None)
        asked = []
        monkeypatch.setattr(_table, "fastest", lambda *question: asked.append(question[-1]) or "fft")
        long_conv(u, kernel)
    assert asked == [("toeplitz", "partitioned", "fft")]


def test_a_path_is_used_within_its_block_alone(by_fft):
    with pytest.raises(BadInput, match="did you mean 'block_fft'"), backend.use_path("blok_fft"):
        pass
    with backend.use_path("toeplitz"):
        assert backend.forced == "toeplitz"
    assert backend.forced == "fft"


def able(path, length, dtype):
    return backend.explain_paths(length, dtype, torch.device("cuda", 0))[path] == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("path", _table.PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "channels", "length", "taps", "back"),
    [
        (1, 3, 1, 1, 1),
        (3, 5, 63, 63, 0),
        (64, 2, 64, 200, 64),
        (3, 5, 65, 7, 65),
        (3, 3, 1009, 1009, 1009),
        (64, 17, 1024, 1024, 0),
        (2, 3, 8193, 8193, 0),
        (2, 2, 20_000, 64, 9),
    ],
)
def test_values_and_gradients_on_the_gpu(path, dtype, batch, channels, length, taps, back, monkeypatch):
    if not able(path, length, dtype):
        pytest.skip(f"{path} does not take {length} tokens")
    monkeypatch.setattr(backend, "forced", path)
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    given = {name: t.cuda() for name, t in case(batch, channels, length, taps, back, dtype=dtype).items()}
    exact = results({name: t.double() for name, t in given.items()}, "reference")
    plain, first, second = results(given, "reference"), results(given, "triton"), results(given, "triton")
    torch.use_deterministic_algorithms(before)
    floor = errors(plain, exact)
    for name, error in errors(first, exact).items():
        assert error <= max(TOLERANCE[dtype], 2 * floor[name]), name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
def test_a_million_tokens_on_the_gpu():
    given = {name: t.cuda() for name, t in case(1, 2, 1 << 20, 1 << 20, gates=False, dtype=torch.bfloat16).items()}
    exact = results({name: t.double() for name, t in given.items()}, "reference")
    assert max(errors(results(given, "triton"), exact).values()) < 1.2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "back", "gates"),
    [
        (37, 255, 255, True),
        (5, 257, 0, False),
        (9, 1024, 1024, True),
        (6, 1025, 0, True),
        (3, 4095, 4095, True),
        (5, 8192, 0, False),
        (2, 16384, 16384, True),
    ],
)
def test_the_block_fft_on_the_gpu(batch, length, back, gates, dtype, monkeypatch):
    """Every tile, with fewer and more sequences than it holds and an odd one over, and scratch full of NaN."""
    if not able("block_fft", length, dtype):
        pytest.skip(f"block_fft does not take {length} tokens of {dtype}")
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    given = {name: t.cuda() for name, t in case(batch, 5, length, length, back, gates, dtype).items()}
    exact = results({name: t.double() for name, t in given.items()}, "reference")
    with backend.use_path("block_fft"):
        first, second = results(given, "triton"), results(given, "triton")
    torch.use_deterministic_algorithms(before)
    # Of bfloat16 at most twice what casting the inputs costs, 2.4e-3; the skip's gradient, one number a channel, may be small.
    most = 4.8e-3 if dtype == torch.bfloat16 else TOLERANCE[dtype]
    for name, error in errors(first, exact).items():
        assert error < most * (5 if name == "skip" else 1), name
        assert torch.equal(first[name], second[name]), name
