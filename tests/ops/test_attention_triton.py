"""attention by its Triton programs: in the interpreter on CPU tensors, and on the device."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops._flops import register_flops
from hippodrome.ops._op import use_backend
from hippodrome.ops.attention import _call, _fused, _packs, _tiles, attention
from hippodrome.ops.attention import triton as backend
from hippodrome.ops.attention._spelled import read, spelled
from hippodrome.part import BadInput
from hippodrome.patterns import (
    BigBird,
    Butterfly,
    Causal,
    Chunk,
    Full,
    Global,
    Pattern,
    Prefix,
    Random,
    Strided,
    Window,
)
from tests.support import interpreted


@pytest.fixture
def on_cpu(monkeypatch):
    """The leaves take CPU tensors too, and fresh memory is NaN: what reads what was never written shows it."""
    for leaf in (_fused.fused, _fused.fused_backward, _packs.documents, _packs.documents_backward):
        leaf.register_kernel("cpu")(leaf._init_fn)
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _tiles._cached.clear()
    yield
    _tiles._cached.clear()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(call, pattern, shape, dtype, device, with_bias=False, **options):
    """Output, lse and gradients, of a fixed random projection of both."""
    batch, heads, groups, n_q, n_k, width = shape
    dice = torch.Generator().manual_seed(0)
    wide = [(heads, n_q), (groups, n_k), (groups, n_k)]
    given = [torch.randn(batch, h, n, width, generator=dice, dtype=torch.float64) for h, n in wide]
    if with_bias:
        given.append(torch.randn(1, heads, n_q, n_k, generator=dice, dtype=torch.float64))
    weights = torch.randn(batch, heads, n_q, width + 1, generator=dice, dtype=torch.float64).to(device)
    rounded = torch.float64 if call is attention.reference else dtype
    leaves = [t.to(device, dtype).to(rounded).requires_grad_() for t in given]
    bias = leaves[3] if with_bias else None
    y, lse = call(*leaves[:3], pattern, bias=bias, return_lse=True, **options)
    seen = torch.where(lse.isinf(), 0, lse)
    ((y.double() * weights[..., :-1]).sum() + (seen.double() * weights[..., -1]).sum()).backward()
    return [y.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(call, pattern, shape, dtype=torch.float32, device="cpu", **options):
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    exact = run(attention.reference, pattern, shape, dtype, device, **options)
    found = run(call, pattern, shape, dtype, device, **options)
    assert torch.equal(exact[1].isinf(), found[1].isinf())
    for got, right in zip(found, exact, strict=True):
        got, right = (t.double().masked_fill(t.isinf(), 0) for t in (got, right))
        assert (got - right).norm() <= tolerance * right.norm() + 1e-5  # of one key the gradients are zero
    return found


PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(20),
    "window that looks ahead": Window(20, right=5),
    "wide window": Window(300, right=3),
    "chunk": Chunk(24),
    "prefix": Prefix(30),
    "butterfly": Butterfly(16, 2),
    "causal butterfly": Butterfly(32) & Causal(),
    "causal BigBird": BigBird(tile=16),
    "strided": Strided(7) & Causal(),
    "either": Global(5) | Window(9),
}


@interpreted
@pytest.mark.parametrize("lengths", [(1, 1), (70, 70), (33, 140), (70, 33)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_in_the_interpreter(on_cpu, name, lengths):
    if (lengths[1] - lengths[0]) % 16 and "BigBird" in name:
        pytest.skip("BigBird's tiles are those of positions")
    assert_same(backend._triton, PATTERNS[name], (1, 2, 1, *lengths, 16))


OPTIONS = {
    "bias": {"with_bias": True},
    "softcap and slopes": {"softcap": 2.0, "slopes": torch.tensor([0.1, 0.2])},
    "dropout": {"dropout": 0.3, "seed": 5},
    "a negative scale": {"scale": -0.3},
    "a scale of 0": {"scale": 0.0},
    "padding": {"k_lengths": torch.tensor([50])},
    "nothing but padding": {"k_lengths": torch.tensor([0])},
    "pack": {"offsets": torch.tensor([0, 10, 10, 43, 70])},
    "pack with all": {
        "offsets": torch.tensor([0, 10, 10, 43, 70]),
        "k_offsets": torch.tensor([0, 20, 23, 60, 80]),
        "dropout": 0.2,
        "seed": 2**40 + 7,
        "with_bias": True,
    },
}


@interpreted
@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_the_interpreter(on_cpu, name):
    n_k = 80 if "k_offsets" in OPTIONS[name] else 70
    assert_same(backend._triton, Causal(), (1, 2, 2, 70, n_k, 16), **OPTIONS[name])


@interpreted
@pytest.mark.parametrize("pattern", [Butterfly(32) & Causal(), BigBird(tile=32)], ids=str)
def test_options_on_tiles(on_cpu, pattern):
    options = {"with_bias": True, "softcap": 3.0, "slopes": torch.tensor([0.1, 0.2]), "dropout": 0.3, "seed": 5}
    assert_same(backend._triton, pattern, (2, 2, 1, 100, 100, 24), **options)


@interpreted
@pytest.mark.parametrize("pattern", [Butterfly(128) & Causal(), BigBird(tile=128)], ids=str)
@pytest.mark.parametrize("width", [16, 72])
def test_a_step_may_be_a_share_of_a_tile(on_cpu, pattern, width):
    assert_same(backend._triton, pattern, (1, 1, 1, 300, 300, width), torch.float16)


BUTTERFLIES = [Butterfly(16), Butterfly(16, 2), Butterfly(32) & Causal(), Causal() & Butterfly(64, 0), Butterfly(256)]


@interpreted
@pytest.mark.parametrize("pattern", BUTTERFLIES, ids=str)
@pytest.mark.parametrize("lengths", [(300, 300), (44, 300)], ids=str)
def test_a_butterfly_is_computed(on_cpu, monkeypatch, pattern, lengths):
    monkeypatch.setattr(_tiles, "_lists", None)
    assert_same(backend._triton, pattern, (1, 2, 1, *lengths, 16), torch.float16)


WHOLE = [
    *BUTTERFLIES[:4],
    Butterfly(128),
    BigBird(tile=16, form="encoder", length=256),
    BigBird(tile=16, form="encoder", length=256, n_random=2) & Causal(),
    BigBird(tile=32),
    Global(5) | Window(9),
    Butterfly(16) & Chunk(128),
]


@interpreted
@pytest.mark.parametrize("pattern", WHOLE, ids=str)
@pytest.mark.parametrize("lengths", [(256, 256), (128, 256)], ids=str)
def test_lengths_of_whole_tiles(on_cpu, pattern, lengths):
    """Their wholly visible tiles are walked without a mask, and of small ones those that do not fill a step with the others."""
    assert_same(backend._triton, pattern, (1, 4, 2, *lengths, 16), torch.float16)


@interpreted
def test_options_on_whole_tiles(on_cpu):
    options = {"with_bias": True, "softcap": 3.0, "slopes": torch.tensor([0.1, 0.2]), "dropout": 0.3, "seed": 5}
    for pattern in (Butterfly(32) & Causal(), BigBird(tile=16)):
        assert_same(backend._triton, pattern, (2, 2, 1, 128, 128, 24), **options)


@interpreted
@pytest.mark.parametrize("pattern", BUTTERFLIES, ids=str)
def test_a_butterfly_of_a_pack_is_computed(on_cpu, monkeypatch, pattern):
    monkeypatch.setattr(_tiles, "_lists", None)
    offsets = torch.tensor([0, 10, 10, 143, 200])
    assert_same(backend._triton, pattern, (1, 2, 1, 200, 200, 16), offsets=offsets, dropout=0.3, seed=5)


@pytest.mark.parametrize(
    ("pattern", "ahead"), [(Butterfly(24), 0), (Butterfly(16), 8), (Butterfly(16) & Window(9), 0)], ids=str
)
def test_a_butterfly_out_of_step_is_listed(pattern, ahead):
    assert _call.butterfly(pattern, ahead) is None


PADDED = [Full(), Window(20, right=5), Butterfly(16), BigBird(tile=16, form="encoder", length=90), Global(5) | Window(9)]
LENGTHS = torch.tensor([90, 37, 0])


@interpreted
@pytest.mark.parametrize("pattern", PADDED, ids=str)
def test_padding_is_hidden(on_cpu, pattern):
    options = {"with_bias": True, "softcap": 3.0, "k_lengths": LENGTHS}
    assert_same(backend._triton, pattern, (3, 2, 1, 90, 90, 16), **options)
    assert_same(backend._triton, Prefix(30), (3, 2, 1, 3, 90, 16), k_lengths=LENGTHS.int())


@interpreted
def test_half_precision_and_padded_widths(on_cpu):
    assert_same(backend._triton, Causal(), (2, 4, 2, 70, 70, 40), torch.float16)


@interpreted
def test_few_queries_share_out_the_keys(on_cpu):
    assert_same(backend._triton, Causal(), (1, 1, 1, 3, 1500, 16))


@interpreted
def test_long_rows_are_cut(on_cpu, monkeypatch):
    monkeypatch.setattr(_tiles, "LONGEST", 2)
    pattern = BigBird(tile=16, n_random=0, form="encoder", length=250).sized(250, 2)
    assert _tiles.lists(pattern, 250, 250, 2, 16, torch.device("cpu"))[0].slots
    assert_same(backend._triton, pattern, (1, 2, 1, 250, 250, 16))


@pytest.mark.parametrize("pattern", [Strided(7) & Causal(), Global(5) | Window(9), BigBird(tile=16)], ids=str)
def test_masks_stand_once_and_are_found_in_pieces(monkeypatch, pattern):
    def found():
        _tiles._cached.clear()
        of_q, _, table, triangular = _tiles.lists(pattern, 200, 200, 2, 16, torch.device("cpu"))
        assert len(table) == len(table.unique(dim=0))
        return [table[number] for number in of_q.masks if number >= 0] if len(table) else triangular

    at_once = found()
    monkeypatch.setattr(_tiles, "PAIRS", 3 * 16**2)
    in_pieces = found()
    assert at_once is in_pieces is True or all(map(torch.equal, at_once, in_pieces))


def test_lists_that_were_not_asked_for_longest_go_first(monkeypatch):
    _tiles._cached.clear()
    few, many, last = Butterfly(16, 0), Butterfly(16), Butterfly(16, 1)
    sizes = [_tiles._bytes(_tiles.lists(p, 512, 512, 1, 16, torch.device("cpu"))) for p in (few, many)]
    _tiles.lists(few, 512, 512, 1, 16, torch.device("cpu"))
    monkeypatch.setattr(_tiles, "CACHE", sum(sizes))
    _tiles.lists(last, 512, 512, 1, 16, torch.device("cpu"))
    assert [key[0] for key in _tiles._cached] == [few, last]


@interpreted
def test_a_butterfly_compiles(on_cpu):
    q = torch.randn(1, 2, 64, 16)
    compiled = torch.compile(lambda q: backend._triton(q, q, q, Butterfly(16) & Causal()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), backend._triton(q, q, q, Butterfly(16) & Causal()))
    reason = torch.compile(lambda q: backend.unfit(q, q, q, Butterfly(16), False, None, None, None, None), fullgraph=True)
    assert reason(q) is None


TABLE = (((3, 3), (0, 2)), ((3, 0), (2, 1)))
LISTED = [
    BigBird(tile=16),
    BigBird(tile=16, form="encoder"),
    BigBird(tile=16, n_random=2, form="encoder", length=64, table=TABLE),
    Random(16, 2),
    Butterfly(24) & Causal(),
    Global(5) | Window(9) & Strided(7),
]


@interpreted
@pytest.mark.parametrize("pattern", LISTED, ids=str)
def test_patterns_through_lists_are_one_graph(on_cpu, pattern):
    def call(q, k, v):
        return backend._triton(q, k, v, pattern.sized(q.shape[2], q.shape[1]))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # From the third length on sizes are unknown to the graph.
    for length in (64, 48, 33) if "table" not in str(pattern) or "table=None" in str(pattern) else (64,):
        leaves = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in "qkv"]
        y, exact = compiled(*leaves), call(*leaves)
        assert torch.equal(y, exact)
        d_y = torch.randn_like(y)
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(exact, leaves, d_y)))


@interpreted
def test_the_leaves_are_what_torch_takes_them_for(on_cpu):
    q, bias = torch.randn(1, 2, 64, 16, requires_grad=True), torch.randn(1, 2, 64, 64, requires_grad=True)
    for pattern in (BigBird(tile=16), Window(9)):
        call, listed = _call.walks(q, q, pattern, (0.25, 2.0, 0.0))
        given = q, q, q, bias, None, None, None, None, None, *listed, *call.numbers()
        torch.library.opcheck(torch.ops.hippodrome.attention_fused.default, given)
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
        y, lse = torch.ops.hippodrome.attention_fused(*plain)
        given = torch.randn_like(y), torch.randn_like(lse), y, lse, *plain, True
        torch.library.opcheck(torch.ops.hippodrome.attention_fused_backward.default, given)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *LISTED], ids=str)
def test_a_pattern_is_spelled(pattern):
    assert read(*spelled(pattern)) == pattern


def test_a_class_that_is_defined_anew_is_another():
    def defined():
        @dataclasses.dataclass(frozen=True)
        class Mine(Pattern):
            word: str = "100%d"

        return Mine()

    first, second = defined(), defined()
    assert [type(read(*spelled(pattern))) for pattern in (first, second)] == [type(first), type(second)]
    with pytest.raises(BadInput, match=r"frozenset.* in a pattern"):
        spelled(dataclasses.replace(first, word=frozenset()))


def test_lists_are_free_of_the_callers_modes():
    _tiles._cached.clear()
    with torch.inference_mode(), torch.device("meta"):
        of_q, *_ = _tiles.lists(BigBird(tile=16), 64, 64, 2, 16, torch.device("cpu"))
    assert of_q.plan.device.type == "cpu"
    assert not of_q.plan.is_inference()


def test_lists_are_not_made_in_a_capture(monkeypatch):
    """With a device that only says that it is captured."""
    _tiles._cached.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BadInput, match="call it once before the capture"):
        _tiles.lists(BigBird(tile=16), 64, 64, 2, 16, torch.device("cuda", 0))


@interpreted
def test_a_tile_listed_twice_counts_twice(on_cpu):
    table = (((3, 3), (4, 0), (5, 0), (1, 1)),) * 2
    pattern = BigBird(tile=16, n_random=2, form="encoder", length=90, multiset=True, table=table)
    assert_same(backend._triton, pattern, (1, 2, 1, 90, 90, 16))


LISTED_PACKS = [BigBird(tile=16), Strided(7) & Causal(), Butterfly(24)]
BOTH = {"offsets": torch.tensor([0, 10, 10, 43, 70, 100]), "k_offsets": torch.tensor([0, 26, 26, 59, 59, 105])}


@interpreted
@pytest.mark.parametrize("pattern", [*LISTED_PACKS, Butterfly(16)], ids=str)
def test_each_document_of_a_pack_has_its_lists(on_cpu, pattern):
    options = {"with_bias": True, "slopes": torch.tensor([0.1, 0.2]), "dropout": 0.3, "seed": 2**40 + 7}
    assert_same(backend._triton, pattern, (1, 2, 1, 100, 100, 16), offsets=BOTH["offsets"], **options)
    if "BigBird" not in str(pattern):
        assert_same(backend._triton, pattern, (1, 2, 1, 100, 105, 16), **BOTH, **options)


@interpreted
def test_a_pack_under_lists_is_one_graph(on_cpu):
    def call(q, k, v, bias, offsets):
        return backend._triton(q, k, v, BigBird(tile=16), bias=bias, offsets=offsets)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [torch.randn(1, 2, 70, n, requires_grad=True) for n in (16, 16, 16, 70)]
    for offsets in (torch.tensor([0, 10, 10, 70]), torch.tensor([0, 43, 60, 70])):
        y, exact = compiled(*leaves, offsets), call(*leaves, offsets)
        assert torch.equal(y, exact)
        d_y = torch.randn_like(y)
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(exact, leaves, d_y)))
    with pytest.raises(BadInput, match="ends at 60"):
        compiled(*leaves, torch.tensor([0, 10, 10, 60]))


@interpreted
def test_work_on_a_pack_is_that_on_its_documents(on_cpu):
    register_flops()
    q, pattern = torch.randn(1, 2, 96, 16, requires_grad=True), BigBird(tile=16)
    with FlopCounterMode(display=False) as together:
        backend._triton(q, q, q, pattern, offsets=torch.tensor([0, 64, 64, 96])).sum().backward()
    with FlopCounterMode(display=False) as apart:
        for some in (q[:, :, :64], q[:, :, 64:]):
            backend._triton(some, some, some, pattern).sum().backward()
    assert together.get_total_flops() == apart.get_total_flops() > 0


def test_a_pack_under_lists_is_not_captured(monkeypatch):
    """With tensors that only say that they are on a GPU, in a capture."""
    monkeypatch.setattr(backend, "capability", lambda device: backend.CAPABILITY)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), use_backend("triton"):
        q, offsets = torch.zeros(1, 2, 32, 16, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        with pytest.raises(BadInput, match=r"a pack under BigBird.* a CUDA graph cannot know their lengths"):
            attention(q, q, q, BigBird(tile=16), offsets=offsets)
        with pytest.raises(BadInput, match=r"a pack under BigBird.* in a CUDA graph"):
            list(_packs._own(BigBird(tile=16), q, q, offsets, offsets))


def test_what_falls_back_to_torch_is_said(monkeypatch):
    monkeypatch.setattr(backend, "capability", lambda device: backend.CAPABILITY)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    with FakeTensorMode():
        q, slopes = torch.zeros(1, 2, 32, 16, device="cuda"), torch.zeros(2, device="cuda", requires_grad=True)
        at = torch.zeros(1, 32, dtype=torch.int64, device="cuda")
        said = attention.explain(q, q, q, Causal(), slopes=slopes)
        assert said["triton"] == "slopes want a gradient, which its kernels do not make"
        assert "ok" in said.values()
        for name in ("q_position", "k_position"):
            said = attention.explain(q, q, q, Causal(), **{name: at})
            assert said["triton"] == "positions are given, and its kernels take tokens for standing side by side"
            assert "ok" in said.values()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*LISTED_PACKS, Butterfly(16)], ids=str)
def test_listed_packs_on_the_device(pattern):
    offsets = torch.tensor([0, 1, 1, 700, 2000], device="cuda")
    assert_same(forced, pattern, (1, 4, 2, 2000, 2000, 64), torch.bfloat16, "cuda", offsets=offsets, dropout=0.3, seed=5)


@pytest.mark.gpu
def test_a_pack_is_read_once():
    q, offsets = torch.randn(1, 1, 100, 16, device="cuda"), torch.tensor([0, 40, 100], device="cuda")
    first = forced(q, q, q, Causal(), offsets=offsets)
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = forced(q, q, q, Causal(), offsets=offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@interpreted
def test_flops_are_those_of_kept_tiles(on_cpu):
    register_flops()
    q = torch.randn(1, 1, 128, 16)
    with FlopCounterMode(display=False) as dense:
        backend._triton(q, q, q, Full())
    with FlopCounterMode(display=False) as sparse:
        backend._triton(q, q, q, Butterfly(16, 1))
    assert dense.get_total_flops() == 4 * 128 * 128 * 16
    assert sparse.get_total_flops() == dense.get_total_flops() // 4
    for pattern in (Butterfly(16), Butterfly(16) & Causal()):
        with FlopCounterMode(display=False) as counted:
            backend._triton(q[:, :, :96], q, q, pattern)
        assert counted.get_total_flops() == 4 * 16 * 16**2 * len(pattern.kept(96, 128, 16, 32).columns)


@pytest.mark.parametrize(
    ("pattern", "options", "reason"),
    [(Full(), {}, None), (Strided(7), {"offsets": torch.tensor([0, 8])}, None), (Full(), {"placed": True}, "positions")],
)
def test_what_the_kernels_cannot_take(pattern, options, reason):
    q = torch.randn(1, 2, 8, 16)
    said = backend.unfit(q, q, q, pattern, options.get("placed", False), options.get("offsets"), None, None, None)
    assert said is None if reason is None else reason in said


def test_dense_calls_are_left_to_torch_unless_they_want_more():
    q = torch.randn(1, 2, 8, 16)
    assert "torch" in backend._yields(q, q, q, Causal())
    assert backend._yields(q, q, q, Causal(), return_lse=True) is None
    assert backend._yields(q, q, q, Butterfly(16)) is None
    assert backend._yields(q, q, q, Butterfly(16) & Causal()) is None


CAUSAL_TILES = [BigBird(tile=64), BigBird(tile=32), Butterfly(64) & Causal(), Butterfly(32) & Causal()]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", CAUSAL_TILES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_causal_tiles_on_a_device(pattern, width):
    assert_same(forced, pattern, (1, 4, 2, 2000, 2000, width), torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_lengths_of_whole_tiles_on_the_device(tile, width):
    bird = BigBird(tile=tile, form="encoder").sized(2048, 4)
    for pattern in (Butterfly(tile), Butterfly(tile) & Causal(), bird, bird & Causal(), BigBird(tile=tile)):
        shape = (2, 4, 2, 2048, 2048, width)
        found = assert_same(forced, pattern, shape, torch.bfloat16, "cuda")
        again = run(forced, pattern, shape, torch.bfloat16, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def forced(*args, **options):
    with use_backend("triton"):
        return attention(*args, **options)


def test_float64_asked_of_the_gpu_is_one_line(monkeypatch):
    """With tensors that only say that they are on a GPU."""
    monkeypatch.setattr(backend, "capability", lambda device: backend.CAPABILITY)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    with FakeTensorMode(), use_backend("triton"):
        q = torch.zeros(1, 2, 4, 8, dtype=torch.float64, device="cuda")
        with pytest.raises(BadInput, match=r"'triton' asked for: .*float64.*it takes one of .*float32") as raised:
            attention(q, q, q, Causal())
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("width", [40, 64, 128, 256])
def test_lengths_and_widths_on_the_device(length, width):
    shape = (1, 4, 2, length, length, width)
    found = assert_same(forced, Causal(), shape, torch.bfloat16, "cuda")
    again = run(forced, Causal(), shape, torch.bfloat16, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_on_the_device(name, dtype):
    assert_same(forced, PATTERNS[name], (2, 4, 2, 1000, 1000, 64), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [64, 128])
def test_butterflies_on_the_device(tile, width, dtype):
    for pattern in (Butterfly(tile), Butterfly(tile, 2), Butterfly(tile) & Causal()):
        for n_q in (2000, 2000 - 4 * tile):
            assert_same(forced, pattern, (1, 4, 2, n_q, 2000, width), dtype, "cuda")
    offsets = torch.tensor([0, 1, 1, 700, 2000], device="cuda")
    assert_same(forced, Butterfly(tile) & Causal(), (1, 4, 2, 2000, 2000, width), dtype, "cuda", offsets=offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PADDED[:3], BigBird(tile=64, form="encoder", length=2000), PADDED[4]], ids=str)
def test_padding_on_the_device(pattern):
    lengths = torch.tensor([2000, 1037, 0], device="cuda")
    assert_same(forced, pattern, (3, 4, 2, 2000, 2000, 64), torch.bfloat16, "cuda", k_lengths=lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_the_device(name):
    options = {key: t.cuda() if isinstance(t, torch.Tensor) else t for key, t in OPTIONS[name].items()}
    n_k = 80 if "k_offsets" in options else 70
    assert_same(forced, Causal(), (1, 2, 2, 70, n_k, 64), torch.bfloat16, "cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_long_sparse_calls_on_the_device(tile):
    """At 64K a dense reference does not fit: the same tiles as a dense call over each row's keys."""
    length = 1 << 16
    dice = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16, generator=dice) for _ in range(3))
    pattern = Butterfly(tile)
    y = forced(q, k, v, pattern)
    kept = pattern.kept(length, length, tile)
    for row in (0, 1, length // tile - 1):
        columns = kept.columns[kept.rows[row] : kept.rows[row + 1]].long()
        at = (columns[:, None] * tile + torch.arange(tile)).flatten().cuda()
        some = slice(row * tile, row * tile + tile)
        exact = attention.reference(q[:, :, some].double(), k[:, :, at].double(), v[:, :, at].double(), Full())
        assert (y[:, :, some] - exact).norm() <= 1e-2 * exact.norm()
