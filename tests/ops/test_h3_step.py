"""One H3 step: the op against the equations written plainly, in place, and its kernel against the op."""

import pytest
import torch

from hippodrome.ops._op import use_backend
from hippodrome.ops.h3_step import ages, h3_step
from hippodrome.part import BadInput
from tests.support import assert_close, interpreted

SHAPES = [
    # batch, heads, p, modes, taps
    (3, 5, 1, 4, 8),
    (2, 40, 1, 5, 7),
    (9, 33, 1, 32, 64),
    (2, 3, 2, 3, 1),
    (3, 4, 4, 8, 5),
]


def inputs(batch, heads, p, modes, taps, dtype=torch.float32, stored=torch.float32, device="cpu", seed=0):
    """q, k and v are slices of one product; the rows have seen different numbers of tokens."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    width = heads * p
    q, k, v = draw(batch, 3 * width).to(dtype).split(width, 1)
    turned = torch.exp(torch.complex(-draw(heads, modes).abs() * 0.1, draw(heads, modes)))
    weights = torch.complex(draw(heads, modes), draw(heads, modes))
    ring, state = draw(batch, taps, width).to(dtype), draw(batch, p, p, heads, modes, 2).to(stored)
    position = torch.randint(0, 5 * taps, (batch,), generator=g)
    every = (q, k, v, draw(taps, width), turned, weights, draw(heads), ring, position, state)
    return [t.to(device) for t in every]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_the_equations_written_plainly(backend):
    q, k, v, taps, modes, weights, skip, ring, position, state = given = inputs(2, 3, 2, 4, 5)
    with use_backend(backend), torch.no_grad():
        y, after_ring, after = h3_step(*[t.clone() for t in given])
    for b in range(2):
        at = int(position[b])
        for h in range(3):
            for j in range(2):
                total = torch.zeros(())
                for i in range(2):
                    d = h * 2 + i
                    # The key of `age` tokens ago lies in the slot of its position.
                    past = sum(taps[age, d] * ring[b, (at - age) % 5, d] for age in range(1, 5))
                    driven = (past + taps[0, d] * k[b, d]) * v[b, h * 2 + j]
                    z = modes[h] * torch.view_as_complex(state[b, i, j, h]) + driven
                    assert_close(torch.view_as_complex(after[b, i, j, h]), z, 1e-5)
                    total = total + q[b, d] * ((weights[h] * z).real.sum() + skip[h] * driven)
                torch.testing.assert_close(y[b, h * 2 + j], total, rtol=1e-4, atol=1e-5)
        expected = ring[b].clone()
        expected[at % 5] = k[b]
        assert torch.equal(after_ring[b], expected)


def test_ages_count_back_from_the_new_token():
    assert ages(torch.tensor([0, 6]), 4).tolist() == [[0, 3, 2, 1], [2, 1, 0, 3]]


def test_states_are_written_in_place_unless_a_gradient_is_to_flow():
    given = inputs(2, 3, 1, 4, 5)
    with torch.no_grad():
        _, ring, state = h3_step(*given)
    assert ring.data_ptr() == given[7].data_ptr()
    assert state.data_ptr() == given[9].data_ptr()
    before = [t.clone() for t in given]
    h3_step(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_op_says_which_backend_it_takes_and_why_not():
    given = inputs(2, 3, 1, 4, 5, stored=torch.bfloat16)
    reasons = h3_step.explain(*given)
    assert reasons["reference"] == "ok"
    assert "torch.bfloat16" in reasons["cpu"]
    assert "on cpu" in reasons["triton"]
    with use_backend("cpu"), pytest.raises(BadInput, match="stored in"):
        h3_step(*given)


def test_a_state_stored_in_half_precision_stays_near():
    exact, half = (inputs(4, 8, 1, 8, 16, dtype, dtype) for dtype in (torch.float32, torch.bfloat16))
    g = torch.Generator().manual_seed(5)
    for step in range(40):
        tokens = torch.randn(3, 4, 8, generator=g)
        outs = []
        for given, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
            given[:3] = tokens.to(dtype)
            given[8] = torch.full((4,), step)
            y, given[7], given[9] = h3_step.reference(*given)
            outs.append(y.float())
    assert given[9].dtype == torch.bfloat16
    assert (outs[1] - outs[0]).norm() < 5e-2 * outs[0].norm()


@interpreted
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_the_kernel_equals_the_reference_in_the_interpreter(number):
    from hippodrome.ops.h3_step import _kernels

    dtype, stored = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2)[number % 3]
    given = inputs(*SHAPES[number], dtype, stored)
    if number == 1:
        given[6] = None
    wanted = h3_step.reference(*given)
    q, k, v, taps, modes, weights, skip, ring, position, state = given
    pairs = torch.view_as_real(modes), torch.view_as_real(weights)
    y = _kernels.launch(q, k, v, taps, *pairs, skip, ring, position, state, processors=1)
    for found, expected in zip((y, ring, state), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert_close(found.float(), expected.float(), 1e-5 if expected.dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 2048, 1, 32, 64), (1, 768, 1, 32, 64), (4, 32, 8, 32, 64), (2, 16, 1, 128, 3)])
def test_the_kernel_equals_the_reference_on_the_device(shape, dtype, stored):
    given = inputs(*shape, dtype, stored, "cuda")
    exact = [t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t for t in given]
    with torch.no_grad():
        wanted = h3_step.reference(*exact)
        with use_backend("triton"):
            found = h3_step(*given)
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got.double(), expected, 2e-5 if got.dtype == torch.float32 else 1e-2)
    assert found[1].data_ptr() == given[7].data_ptr()
    assert found[2].data_ptr() == given[9].data_ptr()


@pytest.mark.gpu
def test_the_kernel_refuses_where_a_gradient_is_wanted():
    given = inputs(2, 3, 1, 4, 5, device="cuda")
    given[0] = given[0].clone().requires_grad_()
    assert "gradient" in h3_step.explain(*given)["triton"]
    h3_step(*given)[0].sum().backward()
    assert given[0].grad is not None


@pytest.mark.gpu
def test_the_leaf_is_a_good_citizen_of_torch():
    q, k, v, taps, modes, weights, *rest = inputs(3, 5, 2, 4, 8, torch.bfloat16, device="cuda")
    pairs = torch.view_as_real(modes), torch.view_as_real(weights)
    args = (q, k, v, taps, *pairs, *rest)
    leaf = torch.ops.hippodrome.h3_step_in_place.default
    torch.library.opcheck(leaf, args, test_utils=("test_schema", "test_faketensor"))
