"""scan by its Triton programs: in the interpreter on CPU tensors, and on the device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops._flops import register_flops
from hippodrome.ops._op import use_backend
from hippodrome.ops.scan import scan
from hippodrome.ops.scan import triton as backend
from tests.support import assert_close, interpreted

DTYPES = [torch.float32, torch.complex64, torch.complex128]


@pytest.fixture
def on_cpu(monkeypatch, poisoned):
    """The leaves take CPU tensors too, in chunks short enough for several."""
    for leaf in (backend._fused, backend._fused_backward):
        leaf.register_kernel("cpu")(leaf._init_fn)
    from hippodrome.ops.scan import _kernels

    monkeypatch.setattr(_kernels, "SHORTEST", 4)


def draw(a_shape, b_shape, dtype, device="cpu", seed=0):
    """a of moduli within (0.5, 1), b, and the state before, in double precision rounded to dtype."""
    dice = torch.Generator().manual_seed(seed)
    a, b, state = (torch.randn(shape, generator=dice, dtype=torch.complex128) for shape in (a_shape, b_shape, b_shape[::2]))
    a = a / a.abs() * (0.5 + 0.5 * torch.rand(a.shape, generator=dice, dtype=torch.float64))
    return [(t if dtype.is_complex else t.real).to(device, dtype) for t in (a, b, state)]


def run(call, given, with_state=True, **way):
    """The states and all gradients, of a fixed random projection."""
    leaves = [t.detach().requires_grad_() for t in given[: 3 if with_state else 2]]
    x = call(*leaves, **way)
    dice = torch.Generator().manual_seed(1)
    g = torch.randn(x.shape, generator=dice, dtype=torch.complex128 if x.is_complex() else torch.float64)
    x.backward(g.to(x.device, x.dtype))
    return [x.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(call, given, with_state=True, tolerance=1e-5, **way):
    wide = torch.complex128 if given[1].is_complex() else torch.float64
    exact = run(scan.reference, [t.to(wide) for t in given], with_state, **way)
    found = run(call, given, with_state, **way)
    for got, right in zip(found, exact, strict=True):
        assert got.dtype == given[1].dtype
        assert_close(got, right, tolerance if got.dtype in (torch.float32, torch.complex64) else 1e-11)
    return found


SHAPES = {
    "one token": ((2, 1, 3), (2, 1, 3)),
    "one chunk": ((2, 4, 3), (2, 4, 3)),
    "a last chunk of one token": ((2, 9, 3), (2, 9, 3)),
    "more channels than a block": ((1, 6, 35), (1, 6, 35)),
    "a system that does not change": ((5,), (3, 21, 5)),
    "a system of each row": ((3, 1, 5), (3, 21, 5)),
    "steps that rows share": ((21, 5), (3, 21, 5)),
    "one coefficient for all channels": ((2, 9, 1), (2, 9, 5)),
    "one coefficient for all": ((1,), (2, 9, 5)),
}


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_in_the_interpreter(on_cpu, name, dtype, reverse):
    assert_same(backend._triton, draw(*SHAPES[name], dtype), reverse=reverse)


@interpreted
def test_at_rest_and_again_the_same_bits(on_cpu):
    given = draw((2, 21, 5), (2, 21, 5), torch.complex64)
    first = assert_same(backend._triton, given, with_state=False)
    assert all(torch.equal(a, b) for a, b in zip(first, run(backend._triton, given, with_state=False), strict=True))


@interpreted
@pytest.mark.parametrize("which", [0, 1, 2])
def test_arguments_of_any_strides(on_cpu, which):
    given = draw((2, 11, 5), (2, 11, 5), torch.complex64)
    expected, t = backend._triton(*given), given[which]
    apart = torch.empty((*t.shape, 2), dtype=t.dtype)[..., 0].copy_(t)
    for other in (apart, t.mT.contiguous().mT, t.conj().resolve_conj().conj()):
        assert torch.equal(backend._triton(*(other if i == which else s for i, s in enumerate(given))), expected)


@interpreted
def test_a_state_passed_through_chunks_is_the_whole(on_cpu):
    a, b, state = draw((2, 30, 3), (2, 30, 3), torch.complex128)
    whole, parts = scan.reference(a, b, state), []
    for piece in zip(a.split([1, 12, 17], 1), b.split([1, 12, 17], 1), strict=True):
        parts.append(backend._triton(*piece, state))
        state = parts[-1][:, -1]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(on_cpu, dtype):
    a, b, state = draw((2, 30, 3), (2, 30, 3), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    x = backend._triton(a, b, state)
    assert x.dtype == dtype
    assert torch.equal(x, scan.reference(a.float(), b.float(), state).to(dtype))


@interpreted
def test_the_leaves_are_good_citizens_of_torch(on_cpu):
    for a_shape in ((2, 9, 3), (1, 1, 3)):
        given = draw(a_shape, (2, 9, 3), torch.complex64)
        x = torch.ops.hippodrome.scan_fused(*given, False)
        a, _, state = given
        torch.library.opcheck(
            torch.ops.hippodrome.scan_fused_backward.default,
            (torch.ones_like(x), a, state, x, False),
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(torch.ops.hippodrome.scan_fused.default, (*(t.requires_grad_() for t in given), False))


@interpreted
def test_compiles_in_one_graph_with_a_dynamic_length(on_cpu):
    compiled = torch.compile(lambda *given: backend._triton(*given), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (13, 9):
        assert_same(compiled, draw((length, 3), (2, length, 3), torch.complex64))


@interpreted
def test_flops_are_counted(on_cpu):
    register_flops()
    a, b, state = draw((2, 9, 3), (2, 9, 3), torch.complex64)
    with FlopCounterMode(display=False) as counter:
        backend._triton(a, b.requires_grad_(), state).abs().sum().backward()
    assert counter.get_total_flops() == 2 * 22 * b.numel()


def test_it_says_why_it_cannot_take_a_call():
    a, b, _ = draw((3,), (1, 2, 3), torch.float32)
    assert scan.explain(a, b)["triton"] == "the tensors are on cpu"


@pytest.mark.parametrize("length", [1, 31, 32, 33, 2048, 16384, 1 << 20])
def test_chunks_and_carries_take_as_long(length):
    kernels = pytest.importorskip("hippodrome.ops.scan._kernels")
    chunk = kernels.chunk_length(length)
    assert chunk & (chunk - 1) == 0
    assert kernels.SHORTEST <= chunk <= max(kernels.SHORTEST, 2 * length**0.5)
    assert -(-length // chunk) <= max(1, length**0.5)


DEVICE = {
    "tokens of their own": ((3, 1000, 70), (3, 1000, 70)),
    "a system that does not change": ((192,), (16, 2048, 192)),
    "steps that rows share": ((1025, 64), (4, 1025, 64)),
    "one token": ((64,), (64, 1, 64)),
    "a long row": ((1, 65536, 33), (1, 65536, 33)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DEVICE)
def test_values_and_gradients_on_the_device(name, dtype, reverse, poisoned):
    given = draw(*DEVICE[name], dtype, "cuda")
    with use_backend("chunked"):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        exact = run(scan, [t.to(wide) for t in given], reverse=reverse)
    with use_backend("triton"):
        found, again = (run(scan, given, reverse=reverse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for got, right in zip(found, exact, strict=True):
        assert_close(got, right, 2e-5 if dtype != torch.complex128 else 1e-11)


@pytest.mark.gpu
def test_its_memory_is_what_it_reads_and_writes():
    """Forward and backward hold b, x and their gradients, and no coefficients of every token for a system without them."""
    a, b, _ = draw((128,), (8, 8192, 128), torch.complex64, "cuda")
    a.requires_grad_()
    b.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scan(a, b).real.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 5 * b.untyped_storage().nbytes()


@pytest.mark.gpu
def test_a_gpu_takes_it_without_being_asked():
    assert scan.choose(*draw((5,), (2, 9, 5), torch.complex64, "cuda")) == "triton"
