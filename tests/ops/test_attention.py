"""The attention op: the reference against a loop, torch's kernel against the reference."""

import math

import pytest
import torch

from hippodrome.ops._op import use_backend
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Full, Pattern, Window
from tests.support import assert_close

PATTERNS: tuple[Pattern, ...] = (Causal(), Window(size=3), Full())
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(n_q, n_k, *, batch=2, heads=4, groups=2, width=8, dtype=torch.float32, seed=0):
    dice = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n_q, width, generator=dice)
    k, v = torch.randn(2, batch, groups, n_k, width, generator=dice)
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, v))


def shuffled_positions(n_q, n_k):
    """Queries somewhere in the middle; keys out of order, with empty slots; nothing to see for the first query of row 1."""
    dice = torch.Generator().manual_seed(1)
    k_position = torch.stack([torch.randperm(n_k, generator=dice), torch.randperm(n_k, generator=dice) + 2])
    k_position[:, ::4] = -1
    q_position = torch.stack([torch.arange(n_q) + n_k // 2, torch.arange(n_q)])
    return {"q_position": q_position, "k_position": k_position}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_equals_a_loop(pattern):
    q, k, v = inputs(5, 7)
    places = shuffled_positions(5, 7)
    y = attention.reference(q, k, v, pattern, scale=0.3, **places)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                total, mixed = 0.0, torch.zeros(8)
                for j in range(7):
                    at_q, at_k = int(places["q_position"][b, i]), int(places["k_position"][b, j])
                    near = not isinstance(pattern, Window) or at_q - at_k < 3
                    if at_k >= 0 and (isinstance(pattern, Full) or (at_k <= at_q and near)):
                        weight = math.exp(0.3 * float(q[b, h, i].detach() @ k[b, h // 2, j].detach()))
                        total += weight
                        mixed = mixed + weight * v[b, h // 2, j]
                assert_close(y[b, h, i], mixed / total if total else mixed, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
@pytest.mark.parametrize(
    ("n_q", "n_k", "placed"), [(1, 1, False), (9, 9, False), (5, 13, False), (13, 5, False), (5, 13, True), (1, 9, True)]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_equals_the_reference_in_values_and_gradients(dtype, pattern, n_q, n_k, placed, groups):
    places = shuffled_positions(n_q, n_k) if placed else {}
    results = []
    for name in ("reference", "sdpa"):
        given = inputs(n_q, n_k, groups=groups, dtype=dtype)
        with use_backend(name):
            y = attention(*given, pattern, scale=0.2, **places)
        assert y.dtype == dtype
        y.backward(inputs(n_q, n_k, dtype=dtype, seed=5)[0].detach())
        results.append([y.detach(), *(t.grad for t in given)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found.double(), expected.double(), TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients(backend):
    q, k, v = inputs(3, 4)
    k_position = torch.tensor([[-1, -1, -1, -1], [1, 2, 3, 4]])
    with use_backend(backend):
        y = attention(q, k, v, Causal(), q_position=torch.arange(3)[None], k_position=k_position)
    assert not y[0].any()
    assert not y[1, :, 0].any()
    assert y[1, :, 1:].abs().min() > 0
    y.square().sum().backward()
    for t in (q, k, v):
        assert torch.isfinite(t.grad).all()
        assert not t.grad[0].any()
        assert t.grad[1].any()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_pattern_may_differ_between_heads(backend):
    class Strided(Pattern):
        def visible(self, head, q, k):
            return (k <= q) & ((q - k) % (head + 1) == 0)

    q, k, v = inputs(6, 6)
    with use_backend(backend):
        y = attention(q, k, v, Strided())
    for head in range(4):
        seen = [j for j in range(6) if (5 - j) % (head + 1) == 0]
        weights = (q[:, head, 5:] @ k[:, head // 2, seen].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        assert_close(y[:, head, 5:], weights @ v[:, head // 2, seen])


def test_large_scores_neither_overflow_nor_see_hidden_keys():
    q, k, v = inputs(4, 4)
    for backend in ("reference", "sdpa"):
        with use_backend(backend):
            y = attention(q * 1e4, k * 1e4, v, Causal())
        assert_close(y[:, :, 0], v[:, :, 0].repeat_interleave(2, 1))


def test_half_precision_has_fp32_statistics():
    """2000 equal scores: probabilities that bf16 cannot add up."""
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    k, v = torch.zeros(1, 1, 2000, 8, dtype=torch.bfloat16), torch.ones(1, 1, 2000, 8, dtype=torch.bfloat16)
    for backend in ("reference", "sdpa"):
        with use_backend(backend):
            assert torch.equal(attention(q, k, v, Full()), torch.ones_like(q))


def test_the_op_says_which_backend_it_takes_and_why_not():
    q, k, v = inputs(4, 4)
    assert attention.explain(q, k, v, Causal()) == {"triton": "the tensor is on cpu", "sdpa": "ok", "reference": "ok"}
    reasons = attention.explain(q, k.bfloat16(), v, Causal())
    assert reasons["reference"] == "ok"
    assert "torch.bfloat16" in reasons["sdpa"]
    assert attention(q, k.bfloat16(), v, Causal()).dtype == torch.float32
    with use_backend("sdpa"), pytest.raises(BadInput, match="differ in dtype"):
        attention(q, k.bfloat16(), v, Causal())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_keeps_the_mean(backend):
    q, k, v = inputs(64, 64)
    torch.manual_seed(0)
    with use_backend(backend), torch.no_grad():
        plain = attention(q, k, torch.ones_like(v), Full())
        dropped = attention(q, k, torch.ones_like(v), Full(), dropout=0.25)
    assert_close(plain, torch.ones_like(plain))
    assert dropped.std() > 0.01
    assert abs(float(dropped.mean()) - 1) < 0.02


def test_traces_into_one_graph():
    q, k, v = inputs(6, 6)
    for pattern in PATTERNS:
        torch.compiler.reset()
        y = torch.compile(lambda *t, p=pattern: attention(*t, p), fullgraph=True, backend="eager")(q, k, v)
        assert_close(y, attention.reference(q, k, v, pattern))
