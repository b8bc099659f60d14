"""cross_entropy: the plain formula, and that the chunked backend spares memory and needless work."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hippodrome.ops import cross_entropy as module
from hippodrome.ops._op import use_backend
from hippodrome.ops.cross_entropy import IGNORE, cross_entropy
from tests.support import assert_close

TOKENS, WIDTH, VOCABULARY = 40, 6, 50
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.matmul.default)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three tokens a chunk, the last one shorter."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 3 * VOCABULARY + 1)


def inputs(dtype=torch.float32):
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=dice).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=dice).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, hidden.shape[:-1], generator=dice)
    targets[0, ::4] = IGNORE
    return hidden, weight, targets


class Largest(TorchDispatchMode):
    """The most numbers a tensor held, and how many matrix products there were, in the leaf of a graph too."""

    def __init__(self):
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.hippodrome.chunked_nats.default:
            with self:
                return module.walk(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        self.products += func in PRODUCTS
        return out


@pytest.mark.parametrize("backend", cross_entropy.backends)
def test_it_is_minus_the_log_of_the_share_of_the_target(backend):
    hidden, weight, targets = inputs()
    with use_backend(backend):
        nats, count = cross_entropy(hidden, weight, targets)
    asked = targets != IGNORE
    p = torch.exp(hidden.double() @ weight.double().T)
    p = p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) / p.sum(-1)
    assert_close(nats, -p[asked].log().sum(), 1e-6)
    assert nats.dtype == torch.float32
    assert count.dtype == torch.int64
    assert count == asked.sum()


@pytest.mark.parametrize("backend", cross_entropy.backends)
def test_nothing_asked_is_nothing(backend):
    hidden, weight, targets = inputs()
    with use_backend(backend):
        nats, count = cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    nats.backward()
    assert nats == 0
    assert count == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    wanted = {}
    for backend in cross_entropy.backends:
        hidden, weight, targets = inputs()
        {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
        with use_backend(backend):
            (3 * cross_entropy(hidden, weight, targets)[0]).backward()
        wanted[backend] = {"hidden": hidden.grad, "weight": weight.grad}
        assert wanted[backend].pop(frozen) is None
    (ours,), (theirs,) = wanted["chunked"].values(), wanted["reference"].values()
    assert_close(ours, theirs, 1e-5)


def test_autocast_multiplies_in_its_dtype_and_gradients_keep_the_parameters():
    found = {}
    for backend in cross_entropy.backends:
        hidden, weight, targets = inputs()
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            nats, _ = cross_entropy(hidden, weight, targets)
        nats.backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        found[backend] = (nats, hidden.grad, weight.grad)
    exact = cross_entropy(*inputs())[0]
    assert found["chunked"][0] != exact
    assert_close(found["chunked"][0], found["reference"][0], 1e-6)
    for ours, theirs in zip(found["chunked"][1:], found["reference"][1:], strict=True):
        assert_close(ours, theirs, 2e-2)


def test_all_logits_never_exist():
    hidden, weight, targets = inputs()
    with Largest() as seen:
        cross_entropy(hidden, weight, targets)[0].backward()
    assert seen.numbers <= module.CHUNK_LOGITS * 2
    assert seen.numbers < TOKENS * VOCABULARY
    with Largest() as plain, use_backend("reference"):
        cross_entropy(hidden, weight, targets)[0].backward()
    assert plain.numbers >= TOKENS * VOCABULARY


def test_scoring_makes_no_gradients():
    hidden, weight, targets = inputs()
    with torch.no_grad(), Largest() as seen:
        cross_entropy(hidden, weight, targets)
    assert seen.products == -(-TOKENS // 3)


def test_it_is_chosen_by_size():
    hidden, weight, targets = inputs()
    assert cross_entropy.choose(hidden, weight, targets) == "chunked"
    assert cross_entropy.choose(hidden[:, :1], weight, targets[:, :1]) == "reference"
    assert "float64" in cross_entropy.explain(hidden.double(), weight.double(), targets)["chunked"]


def test_compiled_it_is_a_leaf_where_logits_are_many(monkeypatch):
    wanted, graphs = [], []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    for most in (TOKENS * VOCABULARY, TOKENS * VOCABULARY - 1):
        monkeypatch.setattr(module, "COMPILED_LOGITS", most)
        torch.compiler.reset()
        hidden, weight, targets = inputs()
        nats = torch.compile(lambda *given: cross_entropy(*given)[0], fullgraph=True, backend=keep)(hidden, weight, targets)
        nats.backward()
        wanted.append((nats, hidden.grad, weight.grad))
    assert ["chunked_nats" in graph for graph in graphs] == [False, True]
    for ours, theirs in zip(*wanted, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_a_gradient_of_its_gradient_is_refused():
    hidden, weight, targets = inputs()
    nats, _ = cross_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad(nats, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
