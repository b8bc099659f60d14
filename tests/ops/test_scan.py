"""The scan op: against a loop over numbers, states through chunks, gradients, memory, and long memories in single precision."""

import functools

import pytest
import torch

from hippodrome.ops._op import use_backend
from hippodrome.ops.scan import chunked, scan
from hippodrome.part import BadInput
from tests.support import assert_close

BACKENDS = ("reference", "chunked")


def draw(length, *, batch=2, width=3, dtype=torch.complex128, seed=0):
    """a within the unit circle, b, and a state."""
    dice = torch.Generator().manual_seed(seed)
    shapes = (batch, length, width), (batch, length, width), (batch, width)
    a, b, state = (torch.randn(shape, generator=dice, dtype=torch.complex128) for shape in shapes)
    a = a / a.abs() * torch.rand(a.shape, generator=dice, dtype=torch.float64)
    given = (a, b, state) if dtype.is_complex else (a.abs(), b.real, state.real)
    return [t.to(dtype).requires_grad_() for t in given]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_a_loop_over_numbers(backend, dtype, reverse):
    a, b, state = draw(11, dtype=dtype)
    with use_backend(backend):
        x = scan(a, b, state, reverse=reverse)
    assert x.dtype == dtype
    for row in range(2):
        for n in range(3):
            z = state[row, n].item()
            for t in range(10, -1, -1) if reverse else range(11):
                z = a[row, t, n].item() * z + b[row, t, n].item()
                assert abs(x[row, t, n].item() - z) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (1,), (11, 3), (11, 1), (1, 11, 3), (2, 1, 3)])
def test_coefficients_broadcast(backend, shape):
    _, b, state = draw(11)
    a = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        x = scan(a, b, state)
    whole = scan.reference(a.detach().expand(2, 11, 3), b, state)
    torch.testing.assert_close(x, whole)
    x.real.sum().backward()
    assert a.grad.shape == shape


@pytest.mark.parametrize("cuts", [[1, 199], [64, 136], [3, 70, 1, 126]])
def test_a_state_passed_through_any_chunks_is_the_whole(cuts):
    a, b, state = draw(200)
    whole, parts = scan(a, b, state), []
    for piece in zip(a.split(cuts, 1), b.split(cuts, 1), strict=True):
        parts.append(scan(*piece, state))
        state = parts[-1][:, -1]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("shape", [(70, 3), (3,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_from_right_to_left_is_the_mirror_image(backend, shape):
    _, b, state = draw(70)
    a = torch.rand(shape, dtype=torch.float64)
    with use_backend(backend):
        mirrored = scan(a.flip(0) if len(shape) > 1 else a, b.flip(1), state).flip(1)
        torch.testing.assert_close(scan(a, b, state, reverse=True), mirrored)


@pytest.mark.parametrize("length", [1, 2, 5, 70])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_against_finite_differences(length, dtype, reverse):
    call = functools.partial(scan, reverse=reverse)
    with use_backend("chunked"):
        assert torch.autograd.gradcheck(call, draw(length, batch=1, dtype=dtype), fast_mode=True)
        if length == 5:
            assert torch.autograd.gradgradcheck(call, draw(length, batch=1, dtype=dtype), fast_mode=True)


def test_the_leaf_is_a_good_citizen_of_torch():
    torch.library.opcheck(torch.ops.hippodrome.scan_chunks.default, (*draw(70, dtype=torch.complex64), True))


def test_compiles_in_one_graph_with_a_dynamic_length():
    compiled = torch.compile(lambda *given: scan(*given), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (130, 97):
        inputs = draw(length, dtype=torch.float32)
        assert_close(compiled(*inputs), scan(*inputs))


def test_a_memory_that_never_fades_keeps_its_phase():
    """|a| = 1 for 16,384 tokens: chunks in complex64 against the loop in complex128."""
    length = 16384
    angle = torch.linspace(0.1, 3.0, 4, dtype=torch.float64)
    # The coefficients as complex64 has them are the truth; their moduli differ from one by 1e-8.
    a = torch.polar(torch.ones(4, dtype=torch.float64), angle).to(torch.complex64)
    b = torch.zeros(1, length, 4, dtype=torch.complex64)
    b[:, 0] = 1
    exact = (a.to(torch.complex128).log() * torch.arange(length, dtype=torch.float64)[:, None]).exp()
    assert (scan(a, b)[0] - exact).abs().max() < 1e-3


def test_memory_is_linear_in_the_length():
    def largest(length):
        inputs, found = draw(length, batch=1, dtype=torch.complex64), 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal found
                out = func(*args, **(kwargs or {}))
                fresh = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
                found = max([found, *(t.untyped_storage().nbytes() for t in fresh)])
                return out

        with Watch():
            scan(*inputs).real.sum().backward()
        return found / inputs[1].untyped_storage().nbytes()

    assert largest(4096) <= 1.1
    assert largest(16384) <= 1.1


def test_a_system_that_does_not_change_has_no_coefficients_of_every_token():
    """What is made on the way is hardly more than the states themselves."""
    (_, b, state), held = draw(4096, dtype=torch.complex64), {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage  # kept, so that no address comes twice
            return out

    a = torch.full((1, 1, 3), 0.9 + 0.1j, dtype=torch.complex64)
    with torch.no_grad(), Watch():
        chunked._chunks._init_fn(a, b.detach(), state.detach(), reverse=False)
    made = sum(storage.nbytes() for storage in held.values()) - b.untyped_storage().nbytes()
    assert made < 1.3 * b.untyped_storage().nbytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend):
    a, b, _ = draw(6)
    with use_backend(backend):
        with pytest.raises(BadInput, match="does not broadcast"):
            scan(a[:, :5], b)
        with pytest.raises(BadInput, match="with at least one token"):
            scan(a[:, :0], b[:, :0])
        with pytest.raises(BadInput, match="so b must be"):
            scan(a, b.real)


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_a_cpu():
    def results(device):
        leaves = [t.detach().to(device).requires_grad_() for t in draw(1000, dtype=torch.complex64)]
        x = scan(*leaves)
        x.abs().square().sum().backward()
        return [t.detach().cpu() for t in (x, *(leaf.grad for leaf in leaves))]

    for found, expected in zip(results("cuda"), results("cpu"), strict=True):
        assert_close(found, expected)
