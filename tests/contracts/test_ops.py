"""Every op: each backend equals the reference in values and all gradients, and says why it cannot run a call."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hippodrome.ops
from hippodrome.ops._op import Op, use_backend
from hippodrome.ops.add_norm import add_norm
from hippodrome.ops.attention import attention
from hippodrome.ops.attention_step import attention_step
from hippodrome.ops.cross_entropy import IGNORE, cross_entropy
from hippodrome.ops.diagonal_ssm import diagonal_ssm, mode_kernel
from hippodrome.ops.h3 import h3
from hippodrome.ops.h3_step import h3_step
from hippodrome.ops.linear_attention import linear_attention
from hippodrome.ops.long_conv import long_conv
from hippodrome.ops.scan import scan
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Window

LENGTHS = [1, 2, 63, 64, 65, 128, 200, 257]


def draw(generator, dtype, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ssm_case(length, dtype, seed=0):
    """Gates, skip, incoming and outgoing state; strided inputs."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    pair = lambda *shape: torch.complex(draw(g, wide, *shape), draw(g, wide, *shape))  # noqa: E731
    log_modes = torch.complex(-draw(g, wide, 3, 5).abs() * 0.1 - 1e-3, draw(g, wide, 3, 5))
    gates = {name: draw(g, dtype, 2, length, 3).transpose(1, 2) for name in ("u", "pre_gate", "post_gate")}
    inputs = {**gates, "log_modes": log_modes, "weights": pair(3, 5), "skip": draw(g, wide, 3), "state": pair(2, 3, 5)}

    def call(u, log_modes, weights, **rest):
        return diagonal_ssm(u, log_modes, weights, return_state=True, **rest)

    return call, inputs


def conv_case(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    gates = {name: draw(g, dtype, 2, length, 3).transpose(1, 2) for name in ("u", "pre_gate", "post_gate")}
    return lambda **inputs: (long_conv(**inputs),), {**gates, "kernel": draw(g, wide, 3, 64), "skip": draw(g, wide, 3)}


def attention_case(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = draw(g, dtype, 2, 4, length, 8), draw(g, dtype, 2, 2, length, 8), draw(g, dtype, 2, 2, length, 8)
    return lambda q, k, v: (attention(q, k, v, Window(size=30)), attention(q, k, v, Causal())), {"q": q, "k": k, "v": v}


def cross_entropy_case(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 11, (2, length), generator=g)
    targets[0, ::3] = IGNORE
    inputs = {"hidden": draw(g, dtype, 2, length, 6), "weight": draw(g, dtype, 11, 6)}
    return lambda hidden, weight: (cross_entropy(hidden, weight, targets)[0],), inputs


def attention_step_case(length, dtype, seed=0):
    """Rows that have seen nothing, some and more than there are slots; slices of one product."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (t.unflatten(1, (-1, 8)) for t in draw(g, dtype, 3, 64).split([32, 16, 16], 1))
    keys, values = draw(g, dtype, 2, 3, 2, length, 8)
    position = torch.tensor([0, length // 2, 3 * length + 1])
    return lambda **inputs: attention_step(**inputs, position=position), {
        "q": q,
        "k": k,
        "v": v,
        "keys": keys,
        "values": values,
    }


def h3_case(length, dtype, seed=0):
    """Four heads of one channel, and two of two with half the systems; time last, or in the middle for k."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    pair = lambda *shape: torch.complex(draw(g, wide, *shape), draw(g, wide, *shape))  # noqa: E731
    inputs = {"q": draw(g, dtype, 2, 4, length), "k": draw(g, dtype, 2, length, 4).transpose(1, 2)}
    inputs |= {"v": draw(g, dtype, 2, 4, length), "taps": draw(g, wide, 4, 7), "past": draw(g, dtype, 2, 4, 6)}
    inputs |= {"log_modes": torch.complex(-draw(g, wide, 4, 5).abs() * 0.1 - 1e-3, draw(g, wide, 4, 5)), "weights": pair(4, 5)}
    inputs |= {"skip": draw(g, wide, 4), "state": pair(2, 1, 1, 4, 5), "broad_state": pair(2, 2, 2, 2, 5)}

    def call(q, k, v, taps, past, log_modes, weights, skip, state, broad_state):
        outputs = []
        for heads, before in ((4, state), (2, broad_state)):
            systems = log_modes[:heads], weights[:heads]
            outputs += h3(q, k, v, taps, *systems, skip=skip[:heads], past=past, state=before, return_state=True)
        return outputs

    return call, inputs


def h3_step_case(length, dtype, seed=0):
    """Heads of two channels, `length` taps."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    pair = lambda *shape: torch.complex(draw(g, wide, *shape), draw(g, wide, *shape))  # noqa: E731
    position = torch.tensor([0, length // 2, 3 * length + 1])
    inputs = dict(zip("qkv", draw(g, dtype, 3, 18).split(6, 1), strict=True))
    inputs |= {"taps": draw(g, wide, length, 6) / length**0.5, "modes": pair(3, 5), "weights": pair(3, 5)}
    inputs |= {"skip": draw(g, wide, 3), "ring": draw(g, dtype, 3, length, 6), "state": draw(g, wide, 3, 2, 2, 3, 5, 2)}
    order = ("q", "k", "v", "taps", "modes", "weights", "skip", "ring")
    return lambda **given: h3_step(*(given[name] for name in order), position, given["state"]), inputs


def linear_attention_case(length, dtype, seed=0):
    """Causal after other tokens; not causal, 5 queries to all keys. Strided, values narrower than features."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    q, k = draw(g, dtype, 2, 2, length, 3, 6).abs().transpose(2, 3)
    inputs = {"q": q, "k": k, "v": draw(g, dtype, 2, length, 3, 4).transpose(1, 2), "state": draw(g, wide, 2, 3, 6, 5).abs()}

    def call(q, k, v, state):
        causal = linear_attention(q, k, v, state=state, return_state=True)
        return *causal, *linear_attention(q[:, :, :5], k, v, causal=False, state=state, return_state=True)

    return call, inputs


def scan_case(length, dtype, seed=0):
    """Both ways: complex coefficients of every token, one for all tokens, real ones; time in the middle or last in memory."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    pair = lambda *shape: torch.complex(draw(g, wide, *shape), draw(g, wide, *shape))  # noqa: E731
    inputs = {"a": pair(2, 5, length).transpose(1, 2) / 2, "b": pair(2, length, 5), "state": pair(2, 5)}
    inputs |= {"same": pair(5) / 2, "real_a": draw(g, dtype, 2, length, 5).sigmoid(), "real_b": draw(g, dtype, 2, length, 5)}

    def call(a, b, state, same, real_a, real_b):
        backwards = scan(a, b, state, reverse=True), scan(same, b, reverse=True)
        return scan(a, b, state), scan(same, b), scan(real_a, real_b), *backwards

    return call, inputs


def add_norm_case(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, delta = draw(g, dtype, 2, length, 6)
    weight, bias = draw(g, dtype, 2, 6)
    return lambda **inputs: add_norm(**inputs, eps=1e-5), {"x": x, "delta": delta, "weight": weight, "bias": bias}


CASES = {
    "add_norm": (add_norm, add_norm_case),
    "diagonal_ssm": (diagonal_ssm, ssm_case),
    "long_conv": (long_conv, conv_case),
    "attention": (attention, attention_case),
    "attention_step": (attention_step, attention_step_case),
    "cross_entropy": (cross_entropy, cross_entropy_case),
    "h3": (h3, h3_case),
    "h3_step": (h3_step, h3_step_case),
    "linear_attention": (linear_attention, linear_attention_case),
    "scan": (scan, scan_case),
}
PAIRS = [
    (name, backend)
    for name, (op, _) in CASES.items()
    for backend in op.backends
    if backend not in ("reference", "triton")  # Triton's have their tests on the device
]


def test_every_op_has_a_case_and_every_case_is_an_op():
    folders = {path.parent.name for path in Path(hippodrome.ops.__path__[0]).glob("*/__init__.py")}
    assert folders == set(CASES)
    assert all(isinstance(op, Op) for op, _ in CASES.values())


def results(call, inputs, backend):
    """Outputs and the gradients of all inputs, of a fixed random projection of the outputs."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    strided = {name: leaf if inputs[name].is_contiguous() else leaf + 0 for name, leaf in leaves.items()}
    with use_backend(backend):
        outputs = call(**strided)
    g = torch.Generator().manual_seed(9)
    total = 0
    for y in outputs:
        parts = torch.view_as_real(y) if y.is_complex() else y
        total = total + (parts.double() * torch.randn(parts.shape, generator=g, dtype=torch.float64)).sum()
    total.backward()
    return [*[y.detach() for y in outputs], *[leaf.grad for leaf in leaves.values()]]


@pytest.fixture
def always(monkeypatch):
    """Small cases must reach backends that choose themselves by size, and scratch must never be read unwritten."""
    monkeypatch.setattr("hippodrome.ops.cross_entropy.CHUNK_LOGITS", 20)
    monkeypatch.setattr("hippodrome.ops.long_conv.cpu.WORTH", 0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_backend_equals_the_reference(name, backend, length, always):
    make = CASES[name][1]
    call, exact = make(length, torch.float64)
    wanted = results(call, exact, "reference")
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-5)):
        if name == "cross_entropy" and dtype == torch.float64:
            continue  # the chunked backend leaves float64 to the reference
        call, inputs = make(length, dtype)
        for got, right in zip(results(call, inputs, backend), wanted, strict=True):
            assert (got - right).abs().max() <= tolerance * right.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_half_precision_errs_no_more_than_the_reference_in_it(name, backend, dtype, always):
    call, inputs = CASES[name][1](200, dtype)
    wide = {key: t.to(torch.complex128 if t.is_complex() else torch.float64) for key, t in inputs.items()}
    exact = results(call, wide, "reference")
    for got, plain, right in zip(results(call, inputs, backend), results(call, inputs, "reference"), exact, strict=True):
        floor = 4 * torch.finfo(dtype).eps * right.abs().max()
        assert (got - right).abs().max() <= 2 * (plain - right).abs().max() + floor


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 90), min_size=1, max_size=5), seed=st.integers(0, 9))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_state_passed_through_any_chunks_is_the_whole(backend, cuts, seed):
    call, inputs = ssm_case(sum(cuts), torch.float64, seed)
    with use_backend(backend):
        whole, final = call(**inputs)
        state, parts, at = inputs["state"], [], 0
        for cut in cuts:
            chunk = {k: t[..., at : at + cut] if k in ("u", "pre_gate", "post_gate") else t for k, t in inputs.items()}
            y, state = call(**{**chunk, "state": state})
            parts.append(y)
            at += cut
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 5, 70])
def test_gradients_against_finite_differences(length):
    call, inputs = ssm_case(length, torch.float64)
    inputs = {name: t[:1].clone() if name in ("u", "pre_gate", "post_gate", "state") else t for name, t in inputs.items()}
    leaves = [t.clone().requires_grad_() for t in inputs.values()]
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(lambda *t: call(**dict(zip(inputs, t, strict=True))), leaves, fast_mode=True)


def test_the_leaf_is_a_good_citizen_of_torch():
    seen = {}
    call, inputs = ssm_case(70, torch.float32)
    real = torch.ops.hippodrome.diagonal_chunks

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (real, real.default):
                seen["args"] = args
            return func(*args, **(kwargs or {}))

    with Spy(), use_backend("cpu"):
        call(**inputs)
    args = [t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in seen["args"]]
    torch.library.opcheck(real.default, tuple(args))


def test_compiles_in_one_graph_with_a_dynamic_length():
    call, inputs = ssm_case(130, torch.float32)
    compiled = torch.compile(lambda **given: call(**given)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 97):
        given_ = {k: t[..., :length] if k in ("u", "pre_gate", "post_gate") else t for k, t in inputs.items()}
        torch.testing.assert_close(compiled(**given_), call(**given_)[0], rtol=1e-4, atol=1e-4)


def test_powers_keep_their_phase_to_a_million():
    log_modes = torch.complex(torch.zeros(1, 1), torch.tensor([[2.5]]))
    kernel = mode_kernel(log_modes, torch.ones(1, 1, dtype=torch.complex64), 1 << 20)
    at = torch.tensor([1000, 65537, 999_999])
    exact = torch.cos(2.5 * at.double())
    assert (kernel[0, at] - exact).abs().max() < 1e-4


def test_a_backend_asked_for_by_name_says_why_not():
    u, kernel = torch.randn(1, 2, 300), torch.randn(2, 300)
    assert "300 taps" in long_conv.explain(u, kernel)["cpu"]
    with use_backend("cpu"), pytest.raises(BadInput, match="300 taps"):
        long_conv(u, kernel)
    with pytest.raises(BadInput, match="did you mean 'triton'"), use_backend("tritn"):
        pass


def test_the_chunked_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr("hippodrome.ops.cross_entropy.CHUNK_LOGITS", 5000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(400, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with Watch():
        cross_entropy(hidden, weight, torch.randint(0, 500, (400,)))[0].backward()
    assert largest <= 5000
