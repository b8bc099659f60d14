"""linear_attention by its Triton programs: in the interpreter on CPU tensors, and on the device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops._flops import register_flops
from hippodrome.ops._op import use_backend
from hippodrome.ops.linear_attention import linear_attention
from hippodrome.ops.linear_attention import triton as backend
from tests.support import assert_close, interpreted

NAMES = ("q", "k", "v", "state")


@pytest.fixture
def on_cpu(monkeypatch, poisoned):
    """The leaves take CPU tensors too, in chunks of 64: the interpreter's time goes by chunks."""
    for leaf in (backend._fused, backend._fused_backward):
        leaf.register_kernel("cpu")(leaf._init_fn)
    monkeypatch.setattr(backend, "LAYOUTS", dict.fromkeys(backend.LAYOUTS, (64, 4, 1)))
    monkeypatch.setattr(backend, "refusal", lambda *_: None)


def case(batch, heads, length, features, values, *, state=True, mean=0.0, seed=0):
    """Float64: positive features, values around `mean`; token by token as a projection writes them, v a slice of it."""
    dice = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)  # noqa: E731
    given = {name: torch.exp(draw(batch, length, heads, features)).transpose(1, 2) for name in "qk"}
    given["v"] = mean + draw(batch, length, heads, 2 * values)[..., values:].transpose(1, 2)
    if state:
        given["state"] = draw(batch, heads, features, values + 1).abs()
    return given


def rounded(given, *dtypes, device="cpu"):
    """q, k and v in `dtypes` (one for all, or one each), the state in float32."""
    kinds = dict(zip(NAMES, (*(dtypes * 3)[:3], torch.float32), strict=True))
    return {name: t.to(device, kinds[name]) for name, t in given.items()}


def double(given):
    return {name: t.double() for name, t in given.items()}


def fused(q, k, v, **rest):
    return backend._triton(q, k, v, **rest)


def exact(q, k, v, **rest):
    """In float64, by the reference where it is not too long."""
    with use_backend("reference" if q.shape[2] <= 4096 else "chunked"):
        return linear_attention(q, k, v, **rest)


def results(run, given, seed=1):
    """Outputs, sums and all gradients by name, of a fixed random projection."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    found = run(**leaves, return_state=True)
    dice = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=dice, dtype=torch.float64).to(t.device, t.dtype) for t in found]
    made = torch.autograd.grad(found, list(leaves.values()), grads)
    named = {f"d_{name}": grad for name, grad in zip(leaves, made, strict=True)}
    return {"y": found[0].detach(), "after": found[1].detach(), **named}


def errors(found, right):
    """Relative to the norm of the exact result; of the gradient of a first query, which is zero but for eps, absolute."""
    assert found.keys() == right.keys()
    return {name: float((found[name].double() - t).norm() / t.norm().clamp(min=0.1)) for name, t in right.items()}


def assert_same(given, tolerance=2e-6):
    found = results(fused, given)
    for name, error in errors(found, results(exact, double(given))).items():
        assert error < tolerance, (name, error)
    return found


SHAPES = {
    "one token": (2, 2, 1, 16, 16),
    "a chunk less a token": (1, 2, 63, 7, 5),
    "a chunk": (1, 1, 64, 64, 64),
    "a chunk and a token": (2, 1, 65, 16, 40),
    "prime": (1, 1, 131, 65, 3),
    "wide values": (1, 1, 70, 33, 128),
    "wide features": (1, 1, 70, 128, 65),
}


@interpreted
@pytest.mark.parametrize("state", [True, False], ids=["after others", "at rest"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_in_the_interpreter(on_cpu, name, state):
    assert_same(rounded(case(*SHAPES[name], state=state), torch.float32))


@interpreted
@pytest.mark.parametrize(("length", "state"), [(1000, True), (331, False), (120, True)])
def test_pieces_are_the_whole(on_cpu, monkeypatch, length, state):
    monkeypatch.setattr(backend, "SHORTEST", 128)
    given = rounded(case(1, 1 if length == 1000 else 2, length, 16, 8, state=state), torch.float32)
    groups, _ = backend.tiling(*(given[name] for name in "qkv")).pieces(2, length)
    assert (groups > 1) == (length > 128)
    found = assert_same(given)
    if length < 1000:
        again = results(fused, given)
        assert all(torch.equal(found[name], again[name]) for name in found)


@interpreted
def test_chunks_of_16_tokens_as_fp32_has_them(poisoned, monkeypatch):
    for leaf in (backend._fused, backend._fused_backward):
        leaf.register_kernel("cpu")(leaf._init_fn)
    given = rounded(case(1, 1, 70, 20, 12), torch.float32)
    assert backend.tiling(*(given[name] for name in "qkv")).T == 16
    assert_same(given)


@interpreted
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.float32, torch.float32, torch.bfloat16)], ids=["fp16", "mixed"])
def test_half_precision_in_the_interpreter(on_cpu, dtypes):
    """Outputs and gradients are rounded to their tensors' dtypes, and nothing else is; it knows no products of bf16."""
    given = rounded(case(1, 2, 131, 16, 12), *dtypes)
    found = results(fused, given)
    for name in NAMES[:3]:
        assert found[f"d_{name}"].dtype == given[name].dtype
    assert found["y"].dtype == given["v"].dtype
    assert found["after"].dtype == torch.float32
    for name, error in errors(found, results(exact, double(given))).items():
        assert error < 2 * torch.finfo(dtypes[-1]).eps, (name, error)


@interpreted
def test_sums_pass_what_float16_can_hold(on_cpu):
    q = torch.full((1, 1, 1000, 8), 96.0, dtype=torch.float16)
    v = torch.linspace(0, 1, 1000)[None, None, :, None].half()
    y, after = fused(q, q, v, return_state=True)
    assert (after[..., -1] == 96_000).all()
    running = v.double().cumsum(2) / torch.arange(1, 1001)[:, None]
    assert (y.double() - running).abs().max() < 1e-3


@interpreted
def test_queries_have_small_gradients_where_values_have_a_mean(on_cpu):
    """The two terms of dQ cancel: y is rounded to float16, and slopes made of it would err by a fifth."""
    given = rounded(case(1, 1, 1000, 16, 8, state=False, mean=30.0), torch.float16)
    found, right = results(fused, given), results(exact, double(given))
    late = {"d_q": right["d_q"][:, :, 500:]}
    assert errors({"d_q": found["d_q"][:, :, 500:]}, late)["d_q"] < 5e-3


@interpreted
def test_any_strides(on_cpu):
    given = rounded(case(2, 2, 70, 16, 8), torch.float32)
    expected = results(fused, given)
    for name, t in given.items():
        strided = torch.empty((*t.shape, 2), dtype=t.dtype)[..., 0].copy_(t)
        for other in (strided, t.contiguous(), t.mT.contiguous().mT):
            again = results(fused, given | {name: other})
            assert all(torch.equal(again[key], expected[key]) for key in expected), name


@interpreted
def test_a_cotangent_without_strides_and_one_state_for_all(on_cpu):
    given = rounded(case(3, 2, 70, 16, 8), torch.float32)
    given["state"] = given["state"][:1]
    for run, data in ((fused, given), (exact, double(given) | {"state": given["state"].double().expand(3, -1, -1, -1)})):
        leaves = [t.detach().requires_grad_() for t in data.values()]
        y, after = run(**dict(zip(data, leaves, strict=True)))
        assert after is None
        grads = torch.autograd.grad(y.sum(), leaves)
        if run is fused:
            found = grads
    for got, right in zip(found, (*grads[:3], grads[3].sum(0, keepdim=True)), strict=True):
        assert_close(got, right, 1e-5)


@interpreted
def test_segments_are_the_whole(on_cpu):
    given = rounded(case(1, 2, 200, 16, 8), torch.float32)
    whole, final = fused(**given, return_state=True)
    state, parts = given["state"], []
    for part in zip(*(given[name].split([70, 1, 64, 65], 2) for name in "qkv"), strict=True):
        y, state = fused(*part, state=state, return_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 2), whole, 1e-6)
    assert_close(state, final, 1e-6)


@interpreted
@pytest.mark.parametrize("state", [True, False])
def test_the_leaves_are_good_citizens_of_torch(on_cpu, state):
    given = rounded(case(1, 2, 20, 5, 4, state=state), torch.float32)
    q, k, v, before = (given[name].requires_grad_() if name in given else None for name in NAMES)
    torch.library.opcheck(torch.ops.hippodrome.linear_attention_fused.default, (q, k, v, before, 1e-6, state))
    y, after, below = torch.ops.hippodrome.linear_attention_fused(q, k, v, before, 1e-6, state)
    given = [t if t is None else t.detach() for t in (y, after if state else None, below, q, k, v, before)]
    torch.library.opcheck(torch.ops.hippodrome.linear_attention_fused_backward.default, tuple(given))


@interpreted
def test_compiles_in_one_graph_with_a_dynamic_length(on_cpu):
    compiled = torch.compile(lambda q, k, v: fused(q, k, v)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 97):
        given = rounded(case(1, 2, length, 16, 8, state=False), torch.float32)
        leaves = [t.requires_grad_() for t in given.values()]
        y, (right, _) = compiled(*leaves), exact(**double(given))
        assert_close(y, right, 1e-5)
        for found, grad in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, right)), strict=True):
            assert_close(found, grad, 1e-5)


@interpreted
def test_flops_are_those_of_the_products(on_cpu):
    register_flops()
    given = rounded(case(2, 3, 70, 16, 8, state=False), torch.float32)
    given["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y, _ = fused(**given)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 2 * 3 * 70 * (64 * (16 + 8) + 2 * 16 * 8)
    assert counter.get_total_flops() - forward == 2 * 2 * 3 * 70 * (64 * (4 * 16 + 3 * 8) + 6 * 16 * 8)


@pytest.mark.parametrize("dtype", backend.DTYPES)
@pytest.mark.parametrize("width", [1, 64, 128])
def test_pieces_are_whole_chunks_that_cover_the_tokens(dtype, width):
    for length in (1, 16, 17, 63, 64, 65, 8193, 1 << 20):
        q = torch.empty(1, 1, length, width, dtype=dtype, device="meta")
        plan = backend.tiling(q, q, q)
        assert width <= plan.F
        for rows in (1, 3, 64, 1000):
            groups, span = plan.pieces(rows, length)
            assert span % plan.T == 0
            assert groups * span >= length > (groups - 1) * span
            assert groups == 1 or rows * groups <= backend.PROGRAMS


def test_it_says_why_it_cannot_take_a_call():
    q = torch.zeros(1, 2, 5, 4)
    assert backend._why_not(q, q, q) == "the tensor is on cpu"
    assert "without causality" in backend._why_not(q, q, q, causal=False)
    assert backend.unfit(q, q, q, None) is None
    assert "q is torch.float64" in backend.unfit(q.double(), q, q, None)
    assert "the state is torch.float64" in backend.unfit(q, q, q, q.double())
    assert "129 features" in backend.unfit(torch.zeros(1, 2, 5, 129), torch.zeros(1, 2, 5, 129), q, None)
    assert "no token" in backend.unfit(q[:, :, :0], q[:, :, :0], q[:, :, :0], None)


# Sizes, dtypes and what is given compile anew, so that pairs are covered and not the product.
GRID = [
    (3, 4, 65, 64, 64, torch.bfloat16, True),
    (1, 2, 8193, 64, 64, torch.bfloat16, False),
    (1, 2, 8193, 64, 64, torch.float32, True),
    (2, 2, 1, 64, 64, torch.bfloat16, True),
    (1, 3, 1000, 128, 128, torch.bfloat16, True),
    (1, 3, 1000, 128, 128, torch.float32, False),
    (1, 2, 8193, 128, 64, torch.bfloat16, True),
    (2, 2, 997, 65, 128, torch.float16, True),
    (100, 3, 64, 16, 16, torch.float16, False),
    (1, 2, 4096, 32, 40, torch.float16, True),
    (2, 3, 63, 7, 5, torch.float32, True),
    (300, 2, 130, 33, 64, torch.bfloat16, False),
    (1, 2, 1, 128, 128, torch.float32, True),
]


def ids(value):
    return str(value).removeprefix("torch.")


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads", "length", "features", "values", "dtype", "state"), GRID, ids=ids)
def test_values_and_gradients_on_the_gpu(poisoned, batch, heads, length, features, values, dtype, state):
    """Against float64 of the same inputs, and the same bits again."""
    given = rounded(case(batch, heads, length, features, values, state=state), dtype, device="cuda")
    assert linear_attention.choose(**given) == "triton"
    found, again = results(fused, given), results(fused, given)
    assert all(torch.equal(found[name], again[name]) for name in found)
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, error in errors(found, results(exact, double(given))).items():
        assert error < tolerance, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_have_a_mean_on_the_gpu(dtype):
    """The gradients of late queries are differences of terms a hundred times as large."""
    given = rounded(case(1, 4, 16384, 64, 64, state=False, mean=1.0), dtype, device="cuda")
    tolerance = 1e-3 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, error in errors(results(fused, given), results(exact, double(given))).items():
        assert error < tolerance, (name, error)


@pytest.mark.gpu
def test_mixed_dtypes_on_the_gpu():
    given = rounded(case(1, 2, 1000, 64, 64), torch.float32, torch.float32, torch.bfloat16, device="cuda")
    found = results(fused, given)
    assert found["d_q"].dtype == torch.float32
    for name, error in errors(found, results(exact, double(given))).items():
        assert error < 2 * torch.finfo(torch.bfloat16).eps, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_are_the_whole_on_the_gpu(dtype):
    given = rounded(case(2, 2, 1000, 64, 64), dtype, device="cuda")
    whole, final = fused(**given, return_state=True)
    state, parts = given["state"], []
    for part in zip(*(given[name].split([600, 1, 63, 336], 2) for name in "qkv"), strict=True):
        y, state = fused(*part, state=state, return_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 2).float(), whole.float(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert_close(state, final, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "length"), [(2, 1 << 17), (300, 1 << 14)], ids=["pieces", "whole"])
def test_long_sums_keep_their_digits_on_the_gpu(rows, length):
    """Additions within tensor cores, which round towards zero, would leave some 1e-4 of a thousand chunks."""
    dice = torch.Generator(device="cuda").manual_seed(0)
    k, v = 0.5 + torch.rand(2, 1, rows, length, 16, device="cuda", generator=dice)
    with torch.no_grad():
        _, after = fused(k, k, v, return_state=True)
        right = k.double().mT @ v.double()
    assert float(((after[..., :-1] - right) / right).abs().max()) < 1e-5


@pytest.mark.gpu
def test_a_million_tokens_and_their_gradients_on_the_gpu():
    given = rounded(case(1, 1, 1 << 20, 64, 64), torch.bfloat16, device="cuda")
    for name, error in errors(results(fused, given), results(exact, double(given))).items():
        assert error < 2 * torch.finfo(torch.bfloat16).eps, (name, error)
