"""diagonal_ssm and h3 by their Triton programs: in the interpreter on CPU tensors, and on the device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.ops._flops import register_flops
from hippodrome.ops.diagonal_ssm import _backward, _tiling, diagonal_ssm
from hippodrome.ops.diagonal_ssm import triton as backend
from hippodrome.ops.h3 import h3
from tests.support import assert_close, interpreted

SIGNALS = ("u", "pre", "post", "past")
LAYOUTS = ("BHL", "HBL", "BLH", "mixed")


@pytest.fixture
def on_cpu(monkeypatch, poisoned):
    """The leaves take CPU tensors too."""
    for leaf in (backend._fused, _backward.fused_backward):
        leaf.register_kernel("cpu")(leaf._init_fn)
    for module in (backend.__name__, "hippodrome.ops.h3.triton"):
        monkeypatch.setattr(f"{module}.refusal", lambda *_: None)


def case(batch, channels, length, modes, *, without=(), layout="HBL", taps=None, width=None, seed=0):
    """Arguments of `fused` in float64. layout: that of u and gates; "mixed": each another, pre one row for all."""
    dice = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=dice, dtype=torch.float64)  # noqa: E731
    lay = {
        "BHL": lambda: draw(batch, channels, length),
        "HBL": lambda: draw(channels, batch, length).transpose(0, 1),
        "BLH": lambda: draw(batch, length, channels).transpose(1, 2),
        "one row": lambda: draw(1, channels, length).expand(batch, -1, -1),
    }
    layouts = ("HBL", "one row", "BLH") if layout == "mixed" else (layout,) * 3
    given = {name: lay[layout]() for name, layout in zip(("u", "pre", "post"), layouts, strict=True)}
    taps = taps or 16
    given |= {"taps": draw(channels, taps) / taps**0.5, "past": draw(batch, channels, taps - 1)}
    given |= {"log_modes": torch.complex(-0.05 * draw(channels, modes).abs() - 1e-3, draw(channels, modes))}
    given |= {"weights": torch.complex(*draw(2, channels, modes)) / modes, "skip": draw(channels)}
    given |= {"state": torch.complex(*draw(2, batch, channels, modes))}
    return {name: t for name, t in given.items() if name not in without and not (name == "past" and "taps" in without)}


def rounded(given, dtype, device="cpu"):
    """Signals in `dtype`, all else in single precision, strides kept."""

    def narrow(name, t):
        return t.to(device, dtype if name in SIGNALS else torch.complex64 if t.is_complex() else torch.float32)

    return {name: narrow(name, t) for name, t in given.items()}


def double(given):
    return {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in given.items()}


def fused(u, log_modes, weights, **rest):
    return backend.fused(u, log_modes, weights, **rest, return_state=True)


def plain(u, log_modes, weights, pre=None, post=None, taps=None, **rest):
    """`fused` by the reference of h3."""
    rest["state"] = rest["state"][:, None, None] if "state" in rest else None
    q, v = (torch.ones_like(u) if gate is None else gate for gate in (post, pre))
    y, after = h3.reference(q, u, v, taps, log_modes, weights, **rest, return_state=True)
    return y, after[:, 0, 0]


def results(run, given, seed=1):
    """Outputs, the state and all gradients by name, of a fixed random projection; past has none."""
    leaves = {name: t.detach().requires_grad_(name != "past") for name, t in given.items()}
    found = run(**leaves)
    dice = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=dice, dtype=torch.complex128 if t.is_complex() else torch.float64) for t in found]
    wanted = [name for name in leaves if name != "past"]
    grads = [grad.to(t.device, t.dtype) for grad, t in zip(grads, found, strict=True)]
    made = torch.autograd.grad(found, [leaves[name] for name in wanted], grads)
    return {"y": found[0].detach(), "after": found[1].detach(), **dict(zip(wanted, made, strict=True))}


def errors(found, exact):
    """Relative to the norm of the exact result."""
    assert found.keys() == exact.keys()
    wide = double(found)
    return {name: float((wide[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)) for name in exact}


def assert_same(given, tolerance=1e-5):
    found = results(fused, given)
    for name, error in errors(found, results(plain, double(given))).items():
        assert error < tolerance, (name, error)
    return found


CASES = {
    "one token": {"batch": 3, "channels": 2, "length": 1, "modes": 2},
    "a chunk and less than a chunk": {"batch": 1, "channels": 2, "length": 63, "modes": 5, "layout": "BHL"},
    "many sequences": {"batch": 70, "channels": 1, "length": 65, "modes": 3, "without": ("state", "past")},
    "one row more than a tile": {"batch": 17, "channels": 2, "length": 130, "modes": 5, "layout": "mixed"},
    "pieces": {"batch": 1, "channels": 2, "length": 1300, "modes": 5, "layout": "BLH"},
    "pieces of some sequences": {"batch": 3, "channels": 1, "length": 1300, "modes": 3, "without": ("taps", "skip")},
    "pieces at rest": {"batch": 1, "channels": 1, "length": 700, "modes": 3, "without": ("state", "past", "post")},
    "nothing but a system": {
        "batch": 3,
        "channels": 2,
        "length": 65,
        "modes": 5,
        "without": ("pre", "post", "taps", "skip", "state"),
    },
    "only the gate in front": {"batch": 3, "channels": 1, "length": 130, "modes": 5, "without": ("post", "state", "past")},
    "modes in slices": {"batch": 2, "channels": 1, "length": 65, "modes": 70},
    "more taps than a chunk": {"batch": 2, "channels": 2, "length": 130, "modes": 3, "taps": 64},
    "a past longer than the taps": {"batch": 2, "channels": 1, "length": 40, "modes": 3, "taps": 5},
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_in_the_interpreter(on_cpu, name):
    given = rounded(case(**CASES[name]), torch.float32)
    if name == "a past longer than the taps":
        given["past"] = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(3))
    assert_same(given)


@interpreted
@pytest.mark.parametrize(("batch", "length", "without"), [(70, 65, ()), (3, 1300, ()), (1, 700, ("taps", "pre")), (3, 1, ())])
def test_tiles_of_64_rows_and_pieces_of_one_chunk(on_cpu, monkeypatch, batch, length, without):
    monkeypatch.setattr(_tiling, "SHORTEST", 1)
    monkeypatch.setattr(_tiling.Tiling, "of", lambda *_: _tiling.Tiling(64, 64, 16, 4, 1))
    given = rounded(case(batch, 1, length, 5, without=without, taps=64), torch.float32)
    first, second = assert_same(given), results(fused, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def slow(length, channels=1, device="cpu"):
    """Of a million tokens by modes that forget a tenth of them and turn fast: their phase rounded to float32 is lost."""
    given = case(1, channels, length, 5, layout="BHL", without=("taps", "past"))
    turn = torch.rand(channels, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    modes = torch.complex(torch.full_like(turn, -1e-7), 1 + 2 * turn)
    assert (modes.to(torch.complex64) - modes).imag.abs().max() * length > 5e-2
    return rounded(given, torch.float32, device) | {"log_modes": modes.to(device)}


def assert_in_phase(given, tolerance):
    """Outputs, state and gradients are float64's."""
    found = results(fused, given)
    assert found["log_modes"].dtype == torch.complex128
    for name, error in errors(found, results(plain, double(given))).items():
        assert error < tolerance, (name, error)


@interpreted
def test_logarithms_in_float64_keep_slow_modes_in_phase_over_a_million_tokens(on_cpu, monkeypatch):
    """128 pieces of 8 chunks of 1024 tokens: the interpreter counts its operations, not their sizes."""
    monkeypatch.setattr(_tiling.Tiling, "of", lambda *_: _tiling.Tiling(16, 1024, 16, 4, 1))
    assert_in_phase(slow(1 << 20), 1e-5)


@interpreted
@pytest.mark.parametrize("p", [1, 2])
def test_heads_of_one_and_of_two_channels(on_cpu, p):
    """Also the past has a gradient."""
    heads, batch, length = 2, 3, 70
    dice = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=dice)  # noqa: E731
    given = {name: draw(heads * p, batch, length).transpose(0, 1) for name in "qkv"}
    given |= {"taps": draw(heads * p, 9), "log_modes": torch.complex(-draw(heads, 4).abs() * 0.1, draw(heads, 4))}
    given |= {"weights": torch.complex(*draw(2, heads, 4)), "skip": draw(heads), "past": draw(batch, heads * p, 8)}
    given |= {"state": torch.complex(*draw(2, batch, p, p, heads, 4))}

    def gradients(run, given):
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        y, after = run(**leaves, return_state=True)
        return y, after, *torch.autograd.grad(y.square().sum() + after.abs().square().sum(), leaves.values())

    found = gradients(h3._backends["triton"].run, given)
    for got, exact in zip(found, gradients(h3.reference, double(given)), strict=True):
        assert_close(got, exact, 1e-5)


@interpreted
def test_any_axes_before_the_channels_and_gates_that_broadcast(on_cpu):
    given = rounded(case(4, 2, 40, 3, layout="BHL"), torch.float32)
    u, systems = given["u"].unflatten(0, (2, 2)), (given["log_modes"], given["weights"])
    rest = {"skip": given["skip"], "pre_gate": given["pre"][:1], "state": given["state"].unflatten(0, (2, 2))}
    y, after = diagonal_ssm._backends["triton"].run(u, *systems, **rest, return_state=True)
    rest["pre_gate"] = given["pre"][:1].expand(2, 2, -1, -1)
    exact = diagonal_ssm.reference(u.double(), *double(dict(enumerate(systems))).values(), **double(rest), return_state=True)
    assert_close(y, exact[0], 1e-5)
    assert_close(after, exact[1], 1e-5)


@interpreted
@pytest.mark.parametrize("name", ["past", "taps", "skip", "weights", "state"])
def test_arguments_of_any_strides(on_cpu, name):
    given = rounded(case(3, 2, 70, 4), torch.float32)
    t = given[name]
    strided = torch.empty((*t.shape, 2), dtype=t.dtype)[..., 0].copy_(t)
    conjugate = t.conj().resolve_conj().conj() if t.is_complex() else t
    expected = fused(**given)
    for other in (strided, t.mT.contiguous().mT if t.ndim > 1 else strided, conjugate):
        for found, right in zip(fused(**(given | {name: other})), expected, strict=True):
            assert torch.equal(found, right)


def leaf_arguments(given, carry):
    pairs = {name: torch.view_as_real(given[name]) if name in given else None for name in ("log_modes", "weights", "state")}
    given = given | pairs
    order = ("u", "pre", "post", "taps", "log_modes", "weights", "skip", "past", "state")
    return (*(given.get(name) for name in order), carry)


@interpreted
@pytest.mark.parametrize(
    ("without", "carry"), [((), True), (("taps", "pre", "skip"), False), (("post", "state", "past"), False)]
)
def test_the_leaves_are_good_citizens_of_torch(on_cpu, without, carry):
    given = rounded(case(2, 1, 33, 2, without=without, taps=4), torch.float32)
    if carry:
        given["log_modes"] = given["log_modes"].to(torch.complex128)
    args = leaf_arguments(given, carry)
    y, after, begin = torch.ops.hippodrome.diagonal_fused(*args)
    dcarry = torch.ones_like(after) if carry else None
    torch.library.opcheck(
        torch.ops.hippodrome.diagonal_fused_backward.default,
        (torch.ones_like(y), dcarry, begin, *args),
        test_utils=("test_schema", "test_faketensor"),
    )
    asks = [t.requires_grad_() if torch.is_tensor(t) and t is not args[7] else t for t in args]
    torch.library.opcheck(torch.ops.hippodrome.diagonal_fused.default, tuple(asks))


@interpreted
def test_compiles_in_one_graph_with_a_dynamic_length(on_cpu):
    def call(u, pre, post, **rest):
        return h3._backends["triton"].run(post, u, pre, **rest)[0]

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (70, 97):
        given = rounded(case(2, 2, length, 3, layout="BHL", without=("state", "past")), torch.float32)
        leaves = [t.requires_grad_() for t in given.values()]
        y = compiled(**given)
        exact, _ = plain(**double(given))
        assert_close(y, exact, 1e-5)
        for found, right in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, exact)), strict=True):
            assert_close(found, right, 1e-5)


@interpreted
@pytest.mark.parametrize("without", [(), ("taps", "post")])
def test_flops_are_those_of_the_products(on_cpu, without):
    register_flops()
    batch, channels, length, modes = 2, 3, 70, 4
    given = rounded(case(batch, channels, length, modes, without=(*without, "state", "past")), torch.float32)
    chunk, tokens = _tiling.Tiling.of(modes, torch.float32).T, batch * channels * length
    given["u"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y, _ = backend.fused(**given)
        forward = counter.get_total_flops()
        y.sum().backward()
    backward = counter.get_total_flops() - forward
    if without:
        assert forward == 2 * tokens * (chunk + 4 * modes)
        assert backward == 2 * tokens * (2 * chunk + 10 * modes)
    else:
        assert forward == 2 * tokens * (3 * chunk + 4 * modes)
        assert backward == 2 * tokens * (11 * chunk + 12 * modes)


@pytest.mark.parametrize("dtype", _tiling.PRODUCTS)
@pytest.mark.parametrize("modes", [1, 16, 33, 64, 65, 256])
def test_pieces_are_whole_chunks_that_cover_the_tokens(dtype, modes):
    plan = _tiling.Tiling.of(min(modes, _tiling.SLICE), dtype)
    assert min(modes, _tiling.SLICE) <= plan.N
    for batch in (1, 3, 64, 1000):
        for length in (1, 63, 64, 65, 8193, 1 << 20):
            groups, span = plan.pieces(batch, 3, length)
            assert span % plan.T == 0
            assert groups * span >= length > (groups - 1) * span


@interpreted
@pytest.mark.parametrize("without", [(), ("taps", "past"), ("post", "state")])
@pytest.mark.parametrize("layout", ["HBL", "mixed"])
def test_a_gate_for_several_sequences_is_that_of_each(on_cpu, without, layout):
    given = rounded(case(6, 2, 300, 3, layout=layout, without=without), torch.float32)
    shared = given | {"pre": given["pre"][:2].contiguous()}
    each = given | {"pre": shared["pre"].repeat(3, 1, 1)}
    found, exact = results(fused, shared), results(plain, double(each))
    exact["pre"] = exact["pre"].unflatten(0, (3, 2)).sum(0)
    for name, error in errors(found, exact).items():
        assert error < 1e-5, (name, error)


@interpreted
def test_one_state_for_all_sequences_is_that_of_each(on_cpu):
    given = rounded(case(3, 2, 65, 3, without=("taps",)), torch.float32)
    signals = {"u": given["u"], "pre_gate": given["pre"], "post_gate": given["post"]}
    call = {
        **signals,
        "log_modes": given["log_modes"],
        "weights": given["weights"],
        "state": given["state"][:1],
        "return_state": True,
    }
    for found, exact in zip(backend._triton(**call), diagonal_ssm.reference(**call), strict=True):
        assert_close(found, exact, 1e-5)


@interpreted
def test_no_tokens_leave_the_state(on_cpu):
    given = rounded(case(2, 2, 1, 3), torch.float32)
    nothing = {name: t[..., :0] if name in ("u", "pre", "post") else t for name, t in given.items()}
    y, after = fused(**nothing)
    assert y.shape == (2, 2, 0)
    assert torch.equal(after, given["state"])


def test_a_gate_that_would_lose_digits_is_refused():
    u, modes = torch.zeros(1, 2, 5, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.complex64)
    assert "gate of torch.float32" in backend._why_not(u, modes, modes, pre_gate=u.float())
    assert backend._why_not(u.float(), modes, modes, pre_gate=u) == "the tensor is on cpu"


def test_it_says_why_it_cannot_take_a_call():
    u, modes = torch.zeros(1, 2, 5), torch.zeros(2, 3, dtype=torch.complex64)
    assert backend.refusal(u, modes) == "the tensor is on cpu"


# A system's size, dtype and what is given compile anew, so that pairs are covered and not the product.
GRID = [
    (3, 65, 7, torch.float32, (), "HBL"),
    (64, 64, 7, torch.bfloat16, (), "HBL"),
    (1, 8193, 7, torch.bfloat16, ("skip",), "BLH"),
    (1, 8193, 64, torch.float32, ("pre", "post", "state"), "BHL"),
    (3, 8193, 1, torch.float16, ("taps",), "mixed"),
    (64, 63, 64, torch.float16, ("state", "past"), "HBL"),
    (3, 64, 256, torch.bfloat16, ("post",), "BHL"),
    (3, 130, 256, torch.float32, ("taps", "state", "skip"), "BHL"),
    (1, 63, 1, torch.bfloat16, ("pre", "post", "taps", "skip", "state"), "BHL"),
]


def ids(value):
    return "-".join(value) or "all" if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "modes", "dtype", "without", "layout"), GRID, ids=ids)
def test_values_and_gradients_on_the_gpu(poisoned, batch, length, modes, dtype, without, layout):
    """Half precision may err twice as much as the exact results of rounded inputs do, and by a rounding."""
    taps = min(_tiling.Tiling.of(min(modes, _tiling.SLICE), dtype).T, 64)
    exact_inputs = case(batch, 3, length, modes, without=without, layout=layout, taps=taps)
    given = rounded(exact_inputs, dtype, "cuda")
    found, again = results(fused, given), results(fused, given)
    assert all(torch.equal(found[name], again[name]) for name in found)
    close = results(plain, double(given))
    if dtype == torch.float32:
        for name, error in errors(found, close).items():
            assert error < 2e-5, (name, error)
        return
    exact = results(plain, {name: t.cuda() for name, t in exact_inputs.items()})
    cast = errors({name: t.to(found[name].dtype) for name, t in close.items()}, exact)
    for name, error in errors(found, exact).items():
        assert error < 2 * cast[name] + torch.finfo(dtype).eps, (name, error, cast[name])


@pytest.mark.gpu
def test_segments_are_the_whole_on_the_gpu():
    given = rounded(case(3, 3, 1000, 7), torch.float32, "cuda")
    with torch.no_grad():
        whole, final = fused(**given)
        past, state, at, parts = given["past"], given["state"], 0, []
        for cut in (600, 1, 63, 336):
            signals = {name: given[name][..., at : at + cut] for name in ("u", "pre", "post")}
            y, state = fused(**(given | signals | {"past": past, "state": state}))
            past = torch.cat([past, signals["u"]], -1)[..., -past.shape[-1] :]
            parts.append(y)
            at += cut
    assert_close(torch.cat(parts, -1), whole, 1e-5)
    assert_close(state, final, 1e-5)


@pytest.mark.gpu
def test_large_structured_inputs_on_the_gpu():
    """A constant, a ramp, an impulse and an alternation by modes that hardly decay: outputs, states and gradients in fp32."""
    length, at = 8193, torch.arange(8193, dtype=torch.float64)
    u = torch.stack([0 * at + 1e3, at - 100, 1e3 * (at == 777), 1e3 * (-1.0) ** at])[:, None].expand(4, 3, length).contiguous()
    decays = torch.tensor([1.0, 1e-1, 1e-3, 1e-6], dtype=torch.float64).expand(3, 4)
    log_modes = torch.complex(-decays, torch.tensor([0.0, 0.01, 3.0], dtype=torch.float64)[:, None].expand(3, 4))
    weights = torch.complex(*torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    given = rounded({"u": u, "log_modes": log_modes, "weights": weights, "skip": torch.ones(3)}, torch.float32, "cuda")

    def squares(run, given):
        leaves = [t.detach().requires_grad_() for t in given.values()]
        y, after = run(**dict(zip(given, leaves, strict=True)))
        return y, after, *torch.autograd.grad(y.square().sum(), leaves)

    for found, exact in zip(squares(fused, given), squares(plain, double(given)), strict=True):
        assert_close(found, exact, 2e-5)


@pytest.mark.gpu
def test_modes_that_never_decay_stay_in_phase_over_a_million_tokens_on_the_gpu():
    """An impulse at the start against float64's cosine, and the state that is left."""
    length, phases = 1 << 20, torch.tensor([0.3, 1.1, 2.5], device="cuda")[:, None]
    u = torch.zeros(1, 3, length, device="cuda")
    u[..., 0] = 1
    with torch.no_grad():
        y, after = fused(u, 1j * phases, torch.ones_like(phases) + 0j)
    at = torch.arange(length, dtype=torch.float64, device="cuda")
    assert (y[0] - torch.cos(phases.double() * at)).abs().max() < 1e-4
    assert (after[0] - torch.exp(1j * phases.double() * (length - 1))).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [_tiling.PROGRAMS, 1])
def test_logarithms_in_float64_keep_slow_modes_in_phase_over_a_million_tokens_on_the_gpu(monkeypatch, programs):
    """In short pieces, and in 16 long ones as where there are many channels."""
    monkeypatch.setattr(_tiling, "PROGRAMS", programs)
    assert_in_phase(slow(1 << 20, 3, "cuda"), 1e-4)


@pytest.mark.gpu
def test_a_million_tokens_and_their_gradients_on_the_gpu():
    given = rounded(case(1, 2, 1 << 20, 7, layout="HBL"), torch.bfloat16, "cuda")
    for name, error in errors(results(fused, given), results(plain, double(given))).items():
        assert error < 2e-2, (name, error)


@pytest.mark.gpu
def test_it_says_why_it_cannot_take_a_call_on_the_gpu():
    u = torch.zeros(1, 2, 5, device="cuda")
    assert backend.refusal(u, torch.zeros(2, 256)) is None
    assert "257 modes are more than 256" in backend.refusal(u, torch.zeros(2, 257))
    assert "float64" in backend.refusal(u.double(), torch.zeros(2, 3))
