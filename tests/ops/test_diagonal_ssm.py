"""diagonal_ssm: the reference against the recurrence itself, the CPU backend in all its parts, errors and memory."""

import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hippodrome.ops._flops import register_flops
from hippodrome.ops._op import use_backend
from hippodrome.ops.diagonal_ssm import _cpu_segments, cpu, diagonal_ssm, mode_kernel, mode_powers, mode_states
from tests.golden_files import as_complex, cases, load
from tests.support import assert_close

CHANNELS, MODES = 5, 3
BACKENDS = ["reference", "cpu"]


def system(channels=CHANNELS, modes=MODES, dtype=torch.complex128):
    dice = torch.Generator().manual_seed(0)
    draw = torch.randn(4, channels, modes, generator=dice, dtype=torch.float64)
    return torch.complex(-0.1 * draw[0].abs(), draw[1]).to(dtype), torch.complex(draw[2], draw[3]).to(dtype)


def signals(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17])
def test_reference_is_the_recurrence(length):
    log_modes, weights = system()
    u, pre, post = signals(3, 2, CHANNELS, length)
    skip = signals(1, CHANNELS)[0]
    z = state = torch.complex(*signals(2, 2, CHANNELS, MODES))
    steps = []
    for t in range(length):
        v = (pre * u)[..., t]
        z = torch.exp(log_modes) * z + v.unsqueeze(-1)
        steps.append(post[..., t] * ((weights * z).real.sum(-1) + skip * v))
    gates = {"skip": skip, "pre_gate": pre, "post_gate": post}
    y, after = diagonal_ssm.reference(u, log_modes, weights, **gates, state=state, return_state=True)
    assert_close(y, torch.stack(steps, -1), 1e-12)
    assert_close(after, z, 1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 10, 64])
def test_kernel_and_states_are_sums_of_powers(length):
    log_modes, weights = system()
    steps = torch.arange(length)
    powers = torch.exp(log_modes.unsqueeze(-1) * steps)
    u = signals(1, 2, CHANNELS, length)[0]
    assert_close(mode_powers(log_modes, length), powers, 1e-12)
    assert_close(mode_kernel(log_modes, weights, length), (weights.unsqueeze(-1) * powers).sum(1).real, 1e-12)
    assert_close(mode_states(log_modes, u), torch.einsum("bhl,hnl->bhn", u + 0j, powers.flip(-1)), 1e-12)


@pytest.mark.parametrize("name", cases("sskernel_diag"))
def test_kernel_is_the_authors(name):
    """Discretised as they do it, in float64: what is compared is the sum of powers."""
    golden = load(name)
    dt = golden["param/kernel.log_dt"].double().exp().unsqueeze(-1)
    a = torch.complex(-golden["param/kernel.inv_A_real"].double().exp(), golden["param/kernel.A_imag"].double())
    b, c = as_complex(golden["param/kernel.B"].double()), as_complex(golden["param/kernel.C"][0].double())
    if "zoh" in name:
        log_modes, weights = dt * a, 2 * b * c * (torch.exp(dt * a) - 1) / a
    else:
        log_modes = torch.log((1 + dt * a / 2) / (1 - dt * a / 2))
        weights = 2 * b * c * dt / (1 - dt * a / 2)
    expected = golden["out/kernel"][0]
    found = mode_kernel(log_modes.to(torch.complex64), weights.to(torch.complex64), expected.shape[-1])
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(("chunk", "length"), [(2, 301), (16, 1100), (16, 1104), (64, 1100)])
@pytest.mark.parametrize(("lanes", "rows"), [(1, 1), (3, 1), (3, 24), (8, 1 << 20)])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_channels_and_segments_of_chunks_are_the_whole(chunk, length, lanes, rows, gated, monkeypatch):
    """5 channels in blocks of 2, 2 and 1; segments of one group of chunks, of four, or all, with some left and with none."""
    batch = 2
    monkeypatch.setattr(cpu, "CHUNKS", ((0, chunk),))
    monkeypatch.setattr(_cpu_segments, "LANES", lanes)
    monkeypatch.setattr(_cpu_segments, "ROWS", rows)
    most = min(lanes * max(1, rows // (lanes * batch)), -(-length // chunk))
    monkeypatch.setattr(_cpu_segments, "WORKSPACE", 2 * batch * ((3 * most + 2) * chunk + 4 * most * MODES))
    log_modes, weights = system()
    u, pre, post, d_y = signals(4, batch, CHANNELS, length)
    skip = signals(1, CHANNELS)[0]
    state, d_after = torch.complex(*signals(2, 2 * batch, CHANNELS, MODES)).chunk(2)
    leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, skip, state, *([pre, post] if gated else []))]
    found = {}
    for backend in ("reference", "cpu"):
        gates = dict(zip(("pre_gate", "post_gate"), leaves[5:], strict=False))
        with use_backend(backend):
            y, after = diagonal_ssm(*leaves[:3], skip=leaves[3], state=leaves[4], return_state=True, **gates)
        found[backend] = [y, after, *torch.autograd.grad([y, after], leaves, [d_y, d_after])]
    for ours, theirs in zip(found["cpu"], found["reference"], strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(), ("skip",), ("pre_gate",), ("post_gate", "state")])
def test_gradients_against_finite_differences(backend, given):
    length = 5
    log_modes, weights = system(2, 2)
    u, pre, post = signals(3, 1, 2, length)
    extra = {"skip": signals(1, 2)[0], "pre_gate": pre, "post_gate": post, "state": torch.complex(*signals(2, 1, 2, 2))}
    leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, *(extra[name] for name in given))]

    def call(*t):
        with use_backend(backend):
            return diagonal_ssm(*t[:3], **dict(zip(given, t[3:], strict=True)), return_state=True)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_axes_before_the_channels(backend, lead):
    log_modes, weights = system()
    u = signals(1, 6, CHANNELS, 40)[0][: max(1, torch.Size(lead).numel())].reshape(*lead, CHANNELS, 40)
    with use_backend(backend):
        y, after = diagonal_ssm(u, log_modes, weights, return_state=True)
        rows = [diagonal_ssm(row, log_modes, weights)[0] for row in u.reshape(-1, CHANNELS, 40)]
    assert after.shape == (*lead, CHANNELS, MODES)
    assert_close(y, torch.stack(rows).reshape(u.shape), 1e-12)


@pytest.mark.parametrize(("backend", "rows"), [("reference", 0), ("cpu", 1), ("cpu", 1 << 12)])
def test_modes_that_never_decay_stay_in_phase_over_a_million_tokens(backend, rows, monkeypatch):
    """An impulse at the start, seen until the end: float32 against float64's cosine, and the state that is left."""
    monkeypatch.setattr(_cpu_segments, "ROWS", rows)
    length, phases = 1 << 20, torch.tensor([0.3, 1.1, 2.5], dtype=torch.float32)[:, None]
    u = torch.zeros(1, len(phases), length)
    u[..., 0] = 1
    with use_backend(backend), torch.no_grad():
        y, after = diagonal_ssm(u, 1j * phases, torch.ones_like(phases) + 0j, return_state=True)
    at = torch.tensor([0, 1, 1000, 65_537, 777_777, length - 1])
    bound = 1e-4 if backend == "reference" else 5e-6
    assert (y[0, :, at] - torch.cos(phases.double() * at)).abs().max() < bound
    assert (after[0] - torch.exp(1j * phases.double() * (length - 1))).abs().max() < bound


SIGNALS = {
    "constant": lambda length: torch.full((length,), 1e3),
    "ramp": lambda length: torch.arange(length) - 100.0,
    "impulse at the start": lambda length: 1e3 * (torch.arange(length) == 0),
    "impulse inside a chunk": lambda length: 1e3 * (torch.arange(length) == 777),
    "alternating": lambda length: 1e3 * (-1.0) ** torch.arange(length),
    "random": lambda length: 1e3 * torch.randn(length, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_float32_errs_by_less_than_a_hundred_thousandth_on_large_structured_inputs(name):
    """Against float64, relative to the largest: outputs, states and all gradients, decays from e^-1 to e^-1e-6 a step."""
    length, decays = 5000, torch.tensor([1.0, 1e-1, 1e-3, 1e-6])
    log_modes = torch.complex(-decays.expand(3, 4), torch.tensor([0.0, 0.01, 3.0])[:, None].expand(3, 4))
    weights = torch.complex(*torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)))
    u = SIGNALS[name](length).float().expand(2, 3, length)
    results = {}
    for backend, real, pair in (("cpu", torch.float32, torch.complex64), ("reference", torch.float64, torch.complex128)):
        leaves = [u.to(real), log_modes.to(pair), weights.to(pair), torch.ones(3, dtype=real)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        with use_backend(backend):
            y, after = diagonal_ssm(*leaves[:3], skip=leaves[3], return_state=True)
        # Of a square: gradients that are sums of large terms of both signs would measure their cancellation.
        results[backend] = [y, after, *torch.autograd.grad(y.square().sum(), leaves)]
    for found, exact in zip(results["cpu"], results["reference"], strict=True):
        assert_close(found, exact, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_errs_at_most_twice_what_its_rounded_inputs_do(backend, dtype):
    """Root mean square, of outputs and all gradients: beside the exact result of inputs and gradients rounded to the dtype."""
    log_modes, weights = system(CHANNELS, 32)
    signals_ = [*signals(4, 2, CHANNELS, 700)]
    skip = signals(1, CHANNELS)[0]

    def results(by, signals_, *tables):
        leaves = [t.clone().requires_grad_() for t in (*signals_[:3], *tables)]
        with use_backend(by):
            y, _ = diagonal_ssm(leaves[0], *leaves[3:5], skip=leaves[5], pre_gate=leaves[1], post_gate=leaves[2])
        return [y, *torch.autograd.grad(y, leaves, signals_[3])]

    exact = results("reference", signals_, log_modes, weights, skip)
    rounded = results("reference", [t.to(dtype).double() for t in signals_], log_modes, weights, skip)
    narrow = log_modes.to(torch.complex64), weights.to(torch.complex64), skip.float()
    found = results(backend, [t.to(dtype) for t in signals_], *narrow)
    for ours, cast, right in zip(found, rounded, exact, strict=True):
        assert (ours - right).abs().square().mean() <= 4 * (cast - right).abs().square().mean()


def peak_bytes(call):
    """The most memory that tensors made by `call` took at any one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("batch", [1, 4])
def test_memory_is_outputs_and_gradients_and_little_else(batch, monkeypatch):
    """Neither N x L powers nor an FFT's 2 L, nor states of all chunks, exist, forward or backward."""
    monkeypatch.setattr(_cpu_segments, "WORKSPACE", 1 << 16)
    channels, modes, length = 8, 32, (1 << 17) // batch
    leaves = [
        t.requires_grad_() for t in (signals(1, batch, channels, length)[0].float(), *system(channels, modes, torch.complex64))
    ]
    grad = torch.ones_like(leaves[0])
    with use_backend("cpu"):
        assert leaves[0].nbytes < peak_bytes(lambda: diagonal_ssm(*leaves)[0]) < 1.5 * leaves[0].nbytes
        y = diagonal_ssm(*leaves)[0]
        assert leaves[0].nbytes < peak_bytes(lambda: torch.autograd.grad(y, leaves, grad)) < 1.5 * leaves[0].nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_million_tokens_forward_take_less_than_a_gigabyte_above_their_input():
    """The peak of the process, in one of its own, over what it holds before, at 64 channels."""
    script = """
import re, resource, torch
from hippodrome.ops.diagonal_ssm import diagonal_ssm
torch.set_num_threads(1)
u, modes = torch.zeros(1, 64, 1 << 20), torch.complex(-torch.rand(64, 32), torch.randn(64, 32))
u[..., ::1000] = 1
with torch.no_grad():
    diagonal_ssm(u[..., :4096], modes, modes)
    before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    y, _ = diagonal_ssm(u, modes, modes)
# Not getrusage: its peak is that of the process that this one was forked from, if that was larger.
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - before, y.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    taken, output = map(int, done.stdout.split())
    assert 0.9 * output < taken < 1e9


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    register_flops()
    batch, channels, modes, length = 2, 8, 4, 1 << 12
    u = signals(1, batch, channels, length)[0].float().requires_grad_()
    log_modes, weights = system(channels, modes, torch.complex64)
    chunk = next(chunk for tokens, chunk in cpu.CHUNKS if batch * length >= tokens)
    with use_backend("cpu"), FlopCounterMode(display=False) as counter:
        y, _ = diagonal_ssm(u, log_modes, weights)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * u.numel() * (chunk + 4 * modes)
    assert counter.get_total_flops() - forward == 2 * u.numel() * (2 * chunk + 10 * modes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_gives_equal_gradients(backend):
    log_modes, weights = system()
    u, pre, post = signals(3, 2, CHANNELS, 200)
    leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, signals(1, CHANNELS)[0], pre, post)]

    def call(u, log_modes, weights, skip, pre, post):
        with use_backend(backend):
            y, after = diagonal_ssm(u, log_modes, weights, skip=skip, pre_gate=pre, post_gate=post, return_state=True)
        return y.square().sum() + after.abs().square().sum()

    plain = torch.autograd.grad(call(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False), leaves)
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


def test_compiled_in_one_graph_of_any_length_the_gradients_are_the_same():
    log_modes, weights = system()
    skip, state = signals(1, CHANNELS)[0], torch.complex(*signals(2, 2, CHANNELS, MODES))

    def call(u, log_modes, weights, skip, state):
        with use_backend("cpu"):
            return diagonal_ssm(u, log_modes, weights, skip=skip, state=state, return_state=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 97, 2100):
        u = signals(1, 2, CHANNELS, length)[0]
        leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, skip, state)]
        found = {}
        for way in (call, compiled):
            y, after = way(*leaves)
            found[way] = [y, after, *torch.autograd.grad(y.square().sum() + after.abs().sum(), leaves)]
        for ours, eager in zip(found[compiled], found[call], strict=True):
            assert_close(ours, eager, 1e-12)
