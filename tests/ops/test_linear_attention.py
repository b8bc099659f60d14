"""The linear attention op: against the authors' numbers and a loop; sums that stay float32; memory linear in the length."""

import json

import pytest
import torch
from safetensors import safe_open

from hippodrome.ops._op import use_backend
from hippodrome.ops.linear_attention import linear_attention
from hippodrome.part import BadInput
from tests.golden_files import FOLDER, cases, load, relative_error
from tests.support import assert_close

BACKENDS = ("reference", "chunked")
CORES = [name for name in cases("linattn_") if "core" in name]
CAUSAL = [name for name in CORES if "step.y" in load(name)]


def features(x):
    return torch.nn.functional.elu(x) + 1


def draw(length, *, batch=2, heads=3, width=7, values=5, dtype=torch.float32, seed=0):
    dice = torch.Generator().manual_seed(seed)
    q, k = features(torch.randn(2, batch, heads, length, width, generator=dice))
    return [t.to(dtype).requires_grad_() for t in (q, k, torch.randn(batch, heads, length, values, generator=dice))]


def call(q, k, v, lengths, **rest):
    """The op on the authors' layout (N, L, H, E), keys beyond `lengths` hidden."""
    hidden = torch.arange(k.shape[1]) >= lengths[:, None]
    keys = features(k).masked_fill(hidden[:, :, None, None], 0)
    y, state = linear_attention(*(t.transpose(1, 2) for t in (features(q), keys, v)), **rest)
    return y.transpose(1, 2), state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CORES)
def test_outputs_and_gradients_are_the_authors(name, backend):
    golden = load(name)
    inputs = [golden[f"in.{key}"].requires_grad_() for key in "qkv"]
    with use_backend(backend):
        y, _ = call(*inputs, golden["in.key_lengths"], causal="noncausal" not in name)
    assert relative_error(y, golden["out.y"]) < 1e-5
    (y * golden["in.cotangent"]).sum().backward()
    for key, tensor in zip("qkv", inputs, strict=True):
        assert relative_error(tensor.grad, golden[f"grad.in.{key}"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_steps_and_states_are_the_authors(name, backend):
    golden = load(name)
    q, k, v = (golden[f"in.{key}"] for key in "qkv")
    state, outputs = None, []
    for t in range(q.shape[1]):
        token = [x[:, t : t + 1] for x in (q, k, v)]
        with use_backend(backend):
            y, state = call(*token, torch.ones(len(q)), state=state, return_state=True)
        outputs.append(y)
        if f"state.S.t{t + 1}" in golden:
            assert relative_error(state[..., :-1], golden[f"state.S.t{t + 1}"]) < 1e-5
            assert relative_error(state[..., -1], golden[f"state.z.t{t + 1}"]) < 1e-5
    assert relative_error(torch.cat(outputs, 1), golden["step.y"]) < 1e-5


def test_the_golden_files_say_where_they_are_from():
    for name in cases("linattn_"):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            assert file.metadata()["repo"] == "idiap/fast-transformers"
            assert json.loads(file.metadata()["constructor"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_loop(backend, causal):
    q, k, v = draw(9, dtype=torch.float64)
    state = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    with use_backend(backend):
        y, after = linear_attention(q, k, v, causal=causal, state=state, return_state=True, eps=0.5)
    for b in range(2):
        for h in range(3):
            for t in range(9):
                top, below = q[b, h, t] @ state[b, h, :, :-1], q[b, h, t] @ state[b, h, :, -1] + 0.5
                for s in range(t + 1 if causal else 9):
                    weight = q[b, h, t] @ k[b, h, s]
                    top, below = top + weight * v[b, h, s], below + weight
                torch.testing.assert_close(y[b, h, t], top / below)
            z = state[b, h, :, -1] + k[b, h].sum(0)
            torch.testing.assert_close(after[b, h, :, -1], z)


@pytest.mark.parametrize("cuts", [[1, 199], [64, 136], [3, 70, 1, 126]])
def test_a_state_passed_through_any_chunks_is_the_whole(cuts):
    q, k, v = draw(200, dtype=torch.float64)
    whole, final = linear_attention(q, k, v, return_state=True)
    state, outputs = None, []
    for part in zip(*(t.split(cuts, 2) for t in (q, k, v)), strict=True):
        y, state = linear_attention(*part, state=state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("length", [2, 5, 70])
def test_gradients_against_finite_differences(length):
    q, k, v = draw(length, batch=1, heads=2, dtype=torch.float64)
    state = torch.rand(1, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    with use_backend("chunked"):
        run = lambda q, k, v, state: linear_attention(q, k, v, state=state, return_state=True)  # noqa: E731
        assert torch.autograd.gradcheck(run, (q, k, v, state), fast_mode=True)


@pytest.mark.parametrize("with_state", [True, False])
def test_the_leaf_is_a_good_citizen_of_torch(with_state):
    q, k, v = draw(70)
    state = torch.rand(2, 3, 7, 6, requires_grad=True) if with_state else None
    torch.library.opcheck(torch.ops.hippodrome.linear_attention_chunks.default, (q, k, v, state, 1e-6))


def test_compiles_in_one_graph_with_a_dynamic_length():
    compiled = torch.compile(lambda *given: linear_attention(*given)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 97):
        inputs = draw(length)
        assert_close(compiled(*inputs), linear_attention(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_go_on_where_half_precision_would_stall(dtype):
    """The authors' trap: a running sum of half-precision numbers stops growing, and passes 65504 in float16."""
    length = 8192
    q = torch.full((1, 1, length, 8), 12.0, dtype=dtype)
    v = torch.linspace(0, 1, length, dtype=torch.float64)[None, None, :, None]
    y, state = linear_attention(q, q, v.to(dtype), return_state=True)
    assert state.dtype == torch.float32
    assert (state[..., -1] == 12.0 * length).all()
    exact = v.to(dtype).double().cumsum(2) / torch.arange(1, length + 1)[:, None]
    assert relative_error(y, exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_late_queries_keep_their_gradients_where_values_have_a_mean(dtype):
    """What numerators and denominators add cancels up to a fiftieth: y, rounded, must have no part in it."""
    q, k, v = (t.detach() for t in draw(2000, width=16, values=8, dtype=dtype))
    v = v + 3
    dy = torch.randn(v.shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def gradient(wanted):
        given = [t.to(wanted).requires_grad_() for t in (q, k, v)]
        with use_backend("chunked"):
            return torch.autograd.grad(linear_attention(*given)[0], given[0], dy.to(wanted))[0][:, :, 1000:]

    found, exact = gradient(dtype), gradient(torch.float64)
    assert (found.double() - exact).norm() < torch.finfo(dtype).eps * exact.norm()


def test_autocast_leaves_the_sums_alone():
    inputs = draw(130)
    for backend in BACKENDS:
        with use_backend(backend):
            plain = linear_attention(*inputs, return_state=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under = linear_attention(*inputs, return_state=True)
                under[0].sum().backward()
        assert torch.equal(under[0], plain[0])
        assert torch.equal(under[1], plain[1])


def test_memory_is_linear_in_the_length():
    """No tensor of the forward and backward is larger than a few times the inputs, and no length-by-length matrix exists."""

    def largest(length):
        inputs, found = draw(length, batch=1, heads=1), 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal found
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else [out]:
                    found = max(found, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
                return out

        with Watch():
            linear_attention(*inputs)[0].sum().backward()
        return found

    assert largest(16384) <= 64 * 16384
    assert largest(16384) <= 4.1 * largest(4096)


def test_a_fake_device_is_told_what_runs_there():
    q = torch.empty(1, 1, 4, 2, device="meta")
    assert linear_attention.explain(q, q, q) == {"triton": "the tensor is on meta", "chunked": "ok", "reference": "ok"}


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = draw(6)
    for backend in BACKENDS:
        with use_backend(backend):
            with pytest.raises(BadInput, match="5 queries and 6 keys"):
                linear_attention(q[:, :, :5], k, v)
            with pytest.raises(BadInput, match="are not"):
                linear_attention(q, k[..., :3], v)
            with pytest.raises(BadInput, match="are not"):
                linear_attention(q, k, v[:, :, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(dtype):
    def results(device):
        leaves = [t.detach().to(device).requires_grad_() for t in draw(1000, dtype=dtype)]
        y, state = linear_attention(*leaves, return_state=True)
        (y.float().square().sum() + state.square().mean()).backward()
        return [t.detach().cpu() for t in (y, state, *(leaf.grad for leaf in leaves))]

    for found, expected in zip(results("cuda"), results("cpu"), strict=True):
        assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)
