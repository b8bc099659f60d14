"""h3: the reference against the equations in loops, the authors' gated convolution, chunks with their state, and errors."""

import pytest
import torch

from hippodrome.ops._op import use_backend
from hippodrome.ops.h3 import gather, h3, outer
from tests.golden_files import cases, load, relative_error
from tests.support import assert_close

BACKENDS = ["reference", "cpu"]
MODES = 3


@pytest.fixture(autouse=True)
def _short_signals(monkeypatch):
    """The convolution's CPU backend also takes what is too short to be worth it."""
    monkeypatch.setattr("hippodrome.ops.long_conv.cpu.WORTH", 0)


def case(heads, p, length, taps=4, past=3, batch=2):
    """The op's arguments in float64 by name."""
    dice = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)  # noqa: E731
    given = {name: draw(batch, heads * p, length) for name in "qkv"}
    given |= {"taps": draw(heads * p, taps), "log_modes": torch.complex(-0.1 * draw(heads, MODES).abs(), draw(heads, MODES))}
    given |= {"weights": torch.complex(draw(heads, MODES), draw(heads, MODES)), "skip": draw(heads)}
    states = torch.complex(*draw(2, batch, p, p, heads, MODES))
    return given | {"past": draw(batch, heads * p, past), "state": states}


def in_loops(q, k, v, taps, log_modes, weights, skip, past, state):
    """Token by token and product by product. Returns outputs and the state."""
    width, length = k.shape[1:]
    heads = len(log_modes)
    p = width // heads
    keys = torch.cat([past, k], -1)
    y, z = torch.zeros_like(q), state.clone()
    for t in range(length):
        now = past.shape[-1] + t
        for h in range(heads):
            for i in range(p):
                d = h * p + i
                key = sum(taps[d, s] * keys[:, d, now - s] for s in range(min(taps.shape[1], now + 1)))
                for j in range(p):
                    driven = key * v[:, h * p + j, t]
                    z[:, i, j, h] = torch.exp(log_modes[h]) * z[:, i, j, h] + driven[:, None]
                    answer = (weights[h] * z[:, i, j, h]).real.sum(-1) + skip[h] * driven
                    y[:, h * p + j, t] += q[:, d, t] * answer
    return y, z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "p"), [(3, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (2, 3), (9, 3), (9, 1), (5, 8)])
def test_equals_the_equations_in_loops(backend, heads, p, length, past):
    given = case(heads, p, length, past=past)
    with use_backend(backend):
        y, after = h3(**given, return_state=True)
    expected, state = in_loops(**given)
    assert_close(y, expected, 1e-12)
    assert_close(after, state, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_given_is_nothing(backend):
    """No taps is one tap of 1; no past, state or skip are zeros."""
    given = case(2, 2, 7)
    zeros = {name: torch.zeros_like(given[name]) for name in ("past", "state", "skip")}
    one = torch.ones(4, 1, dtype=torch.float64)
    signals = [given[name] for name in "qkv"]
    with use_backend(backend):
        y, after = h3(*signals, None, given["log_modes"], given["weights"])
        expected, _ = h3(*signals, one, given["log_modes"], given["weights"], **zeros)
    assert after is None
    assert_close(y, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("cuts", [[40], [1, 39], [13, 1, 2, 24], [1] * 40])
def test_chunks_with_their_past_and_state_are_the_whole(backend, p, cuts):
    given = case(2, p, 40)
    with use_backend(backend):
        whole, final = h3(**given, return_state=True)
        signals, parts = {name: given[name].split(cuts, -1) for name in "qkv"}, []
        past, state = given["past"], given["state"]
        for q, k, v in zip(*signals.values(), strict=True):
            rest = {name: given[name] for name in ("taps", "log_modes", "weights", "skip")}
            y, state = h3(q, k, v, **rest, past=past, state=state, return_state=True)
            past = torch.cat([past, k], -1)[..., -3:]
            parts.append(y)
    assert_close(torch.cat(parts, -1), whole, 1e-12)
    assert_close(state, final, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_against_finite_differences(backend, p):
    given = case(1, p, 5, batch=1)
    leaves = [t.clone().requires_grad_() for t in given.values()]

    def call(*tensors):
        with use_backend(backend):
            return h3(**dict(zip(given, tensors, strict=True)), return_state=True)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in cases("fftconv_h3_ref") if "rev1" not in name])
def test_the_authors_gated_convolution(name):
    """Their kernel, of any shape, is a sum of 2 L modes: their powers are a discrete Fourier basis."""
    golden = load(name)
    kernel = golden["in/ssm_kernel"].double()
    heads, length = kernel.shape
    phases = torch.pi * torch.arange(2 * length, dtype=torch.float64) / length
    log_modes = (1j * phases).expand(heads, -1).contiguous()
    given = {name: golden[f"in/{name}"].double().requires_grad_() for name in ("q", "k", "v", "D")}
    weights = torch.fft.fft(kernel, 2 * length) / (2 * length)
    y, _ = h3(given["q"], given["k"], given["v"], None, log_modes, weights, skip=given["D"])
    assert relative_error(y, golden["out/y"]) < 1e-5
    y.backward(golden["in/g"].double())
    for name, leaf in given.items():
        assert relative_error(leaf.grad, golden[f"grad/{name}"]) < 1e-5, name


def test_outer_and_gather_order_channels_as_heads_of_them():
    q, k, v = torch.arange(18.0).reshape(3, 1, 6, 1)
    wide_q, wide_k, wide_v = outer(q, k, v, heads=3)
    for i in range(2):
        for j in range(2):
            assert wide_q[0, i, j, :, 0].tolist() == [i, 2 + i, 4 + i]
            assert wide_k[0, i, j, :, 0].tolist() == [6 + i, 8 + i, 10 + i]
            assert wide_v[0, i, j, :, 0].tolist() == [12 + j, 14 + j, 16 + j]
    assert torch.equal(gather(wide_v), 2 * v)


@pytest.mark.parametrize(("dtype", "real"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_outputs_have_the_signals_dtype_and_states_at_least_float32(dtype, real):
    given = case(2, 2, 7)
    signals = {name: given[name].to(dtype) for name in "qkv"}
    systems = {name: given[name].to(torch.complex64 if given[name].is_complex() else torch.float32) for name in given}
    if dtype == torch.float64:
        systems = given
    y, after = h3(**(systems | signals), return_state=True)
    assert y.dtype == dtype
    assert after.real.dtype == real


def test_it_says_why_a_backend_cannot_take_a_call():
    given = case(2, 1, 7)
    assert h3.explain(**given) == {"triton": "the tensor is on cpu", "cpu": "ok", "reference": "ok"}
    half = given | {"q": given["q"].half()}
    assert "q, k and v differ in dtype: torch.float16, torch.float64" in h3.explain(**half)["triton"]
