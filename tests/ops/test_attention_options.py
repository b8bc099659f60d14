"""The attention op's options: the generator, packs, bias, slopes, softcap, lse, dropout, merge, golden vectors, errors."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hippodrome.ops.attention as module
from hippodrome.ops._op import use_backend
from hippodrome.ops.attention import attention, merge
from hippodrome.ops.attention._philox import kept, philox, uniform
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Causal, Full, Pattern, Window
from tests.ops.test_attention import inputs
from tests.support import assert_close, interpreted

FOLDER = Path(__file__).parents[1] / "golden"

VECTORS = (
    ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
"""Counter, key and bits as the generator's authors publish them (Random123's kat_vectors)."""


def words(text):
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "seed", "bits"), VECTORS)
def test_philox_gives_its_authors_bits(counter, seed, bits):
    assert list(philox(seed, *words(counter))) == words(bits)
    assert list(philox(torch.tensor(seed), *words(counter))) == words(bits)


def test_uniforms_lie_in_the_unit_interval_and_dropout_keeps_its_share():
    ends = uniform(torch.tensor([0, (1 << 31) - 1, 1 << 31, 0xFFFFFFFF]))
    assert ends.min() == 0
    assert ends.max() < 1
    mask = kept(7, 0.25, torch.arange(400)[:, None], torch.arange(500), torch.tensor(3))
    assert abs(float(mask.float().mean()) - 0.75) < 0.005


@dataclass(frozen=True)
class Around(Pattern):
    """`left` keys before and `right` after; None: all."""

    left: int | None
    right: int | None

    causal = False

    def visible(self, head, q, k):
        near = (k == k) & (q == q)
        near = near if self.left is None else near & (k >= q - self.left)
        return near if self.right is None else near & (k <= q + self.right)


@dataclass(frozen=True)
class Tiles(Pattern):
    """Tiles of 16 x 256 that a layout marks."""

    layout: tuple[tuple[int, ...], ...]

    causal = False

    def visible(self, head, q, k):
        return torch.tensor(self.layout, dtype=torch.bool)[q // 16, k // 256]


GOLDENS = {
    "attn_causal_large_norm": Causal(),
    "attn_causal_sq_gt_sk_masked_rows": Causal(),
    "attn_causal_sq_lt_sk": Causal(),
    "attn_causal_square_gqa": Causal(),
    "attn_full_mha": Full(),
    "attn_padding_causal": Causal(),
    "attn_softcap_causal": Causal(),
    "attn_window_causal_sq_gt_sk": Window(size=7),
    "attn_window_left_only": Around(4, None),
    "attn_window_noncausal": Around(5, 3),
    "blocksparse_v1_grain_random": None,
}


def golden(name):
    """q, k, v (B, H, L, K), the pattern and options of a call, which queries are real, and all the file holds."""
    file = load_file(FOLDER / f"{name}.safetensors")
    if name.startswith("blocksparse"):
        given = [t.transpose(1, 2) for t in file["in.qkv"].unbind(2)]
        real = file["in.attn_mask"]
        options = {"k_position": torch.where(real, torch.arange(real.shape[1]), -1)}
        return given, Tiles(tuple(map(tuple, file["in.layout"].tolist()))), options, real, file
    given = [file[f"in.{t}"].transpose(1, 2) for t in "qkv"]
    real, options = torch.ones(given[0].shape[0], given[0].shape[2], dtype=torch.bool), {}
    if "padding" in name:
        real, keys = file["in.query_padding_mask"], file["in.key_padding_mask"]
        behind = keys.sum(1, keepdim=True) - real.sum(1, keepdim=True)
        options["k_position"] = torch.where(keys, torch.arange(keys.shape[1]), -1)
        # A padded query stands before all keys.
        options["q_position"] = torch.where(real, torch.arange(real.shape[1]) + behind, -1)
    if "softcap" in name:
        options["softcap"] = 3.0
    return given, GOLDENS[name], options, real, file


def ran(name, dtype, backend):
    """Output, gradients of q, k, v and (of the reference) the lse, over real queries, beside the golden ones."""
    given, pattern, options, real, file = golden(name)
    leaves = [t.to(dtype).requires_grad_() for t in given]
    lse = None
    with use_backend(backend):
        if backend == "reference":
            y, lse = attention(*leaves, pattern, **options, return_lse=True)
        else:
            y = attention(*leaves, pattern, **options)
    if "grad.qkv" in file:
        expected = [t.transpose(1, 2) for t in file["grad.qkv"].unbind(2)]
    else:
        expected = [file[f"grad.{t}"].transpose(1, 2) for t in "qkv"]
    expected = [file["out.out"].transpose(1, 2), *expected]
    if lse is not None:
        expected.append(file["out.lse"].transpose(1, 2)[real])
    return with_gradients(y, lse, leaves, real, file), expected


def with_gradients(y, lse, leaves, real, file):
    """[y, gradients of the leaves, lse if there is one], of the file's loss over real queries."""
    y = y * real[:, None, :, None]
    loss = (y * file["cot.out"].transpose(1, 2).to(y.dtype)).sum()
    if "cot.lse" in file:
        loss = loss + (lse * file["cot.lse"].to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    rows = [] if lse is None else [lse.detach().transpose(1, 2)[real]]
    return [y.detach(), *gradients, *rows]


def largest_error(found, expected):
    """Of the rows that see anything; the lse of the others must be -inf in both."""
    hidden = expected == -torch.inf
    assert torch.equal(found == -torch.inf, hidden)
    return float((found.double() - expected.double())[~hidden].abs().max())


def largest(expected):
    return float(expected[expected > -torch.inf].abs().max())


def can(name, backend):
    return backend == "reference" or not ("softcap" in name or name == "attn_causal_square_gqa")


CASES = [(name, backend) for name in GOLDENS for backend in ("reference", "sdpa") if can(name, backend)]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_equals_the_published_reference_in_float64(name, backend):
    """Up to the rounding of the stored values."""
    for found, expected in zip(*ran(name, torch.float64, backend), strict=True):
        assert largest_error(found, expected) <= 1e-6 * largest(expected)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_equals_the_published_reference_in_float32(name, backend):
    for i, (found, expected) in enumerate(zip(*ran(name, torch.float32, backend), strict=True)):
        # The second to the fourth are gradients, which large logits make harder.
        limit = 5e-5 if "large_norm" in name and i in (1, 2, 3) else 2e-5
        assert largest_error(found, expected) <= limit * max(1.0, largest(expected))


def naive(q, k, v, mask, softcap):
    """Output and lse, every step in the dtype of q."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    blind = ~mask.any(-1)
    return scores.softmax(-1).masked_fill(~mask, 0) @ v, scores.logsumexp(-1).masked_fill(blind, -torch.inf)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(name, backend):
    given, pattern, options, real, file = golden(name)
    leaves = [t.bfloat16().requires_grad_() for t in given]
    places = {key: value for key, value in options.items() if key != "softcap"}
    mask = module.visible(pattern, *given[:2], **places)
    plain = with_gradients(*naive(*leaves, mask, options.get("softcap")), leaves, real, file)
    found, expected = ran(name, torch.bfloat16, backend)
    for ours, theirs, truth in zip(found, plain, expected, strict=backend == "reference"):
        assert largest_error(ours, truth) <= 2 * largest_error(theirs, truth)


@pytest.mark.parametrize("option", ["plain", "softcap", "bias", "slopes", "dropout", "pack", "count"])
def test_slices_of_queries_are_the_whole_in_values_and_gradients(option, monkeypatch):
    results = []
    for scores in (1 << 25, 3 * 8 * 12):
        monkeypatch.setattr(module, "_SCORES", scores)
        batch = 1 if option == "pack" else 2
        q, k, v = inputs(12, 12, batch=batch, dtype=torch.float64)
        bias, slopes = (torch.linspace(0.1, 1, n, dtype=torch.float64, requires_grad=True) for n in (144, 4))
        options = {
            "plain": {},
            "softcap": {"softcap": 0.5},
            "bias": {"bias": bias.view(12, 12)},
            "slopes": {"slopes": slopes},
            "dropout": {"dropout": 0.4, "seed": 5},
            "pack": {"offsets": torch.tensor([0, 3, 3, 12])},
            "count": {},
        }[option]
        y, lse = attention.reference(q, k, v, Twice() if option == "count" else Causal(), **options, return_lse=True)
        leaves = [q, k, v, *([bias] if option == "bias" else [slopes] if option == "slopes" else [])]
        results.append([y, lse, *torch.autograd.grad(y.square().sum() + lse.sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-12)


@dataclass(frozen=True)
class Twice(Causal):
    """Every third key counts twice."""

    def count(self, head, q, k):
        return 1 + (k % 3 == 0).long()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_key_that_counts_twice_is_two_keys(backend):
    q, k, v = inputs(6, 6)
    with use_backend(backend):
        y = attention(q, k, v, Twice())
    at = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
    again = attention.reference(q, k[:, :, at], v[:, :, at], Causal(), q_position=torch.arange(6)[None], k_position=at[None])
    assert_close(y, again, 1e-6)


@dataclass(frozen=True)
class Blindfold(Causal):
    """Causal, but every third query sees nothing."""

    def visible(self, head, q, k):
        return (k <= q) & (q % 3 != 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(backend, dtype):
    q, k, v = inputs(8, 8, dtype=dtype)
    with use_backend(backend):
        y = attention(q, k, v, Blindfold())
    gradients = torch.autograd.grad((y + 1).square().sum(), [q, k, v])
    blind = torch.arange(8) % 3 == 0
    for t in (y, gradients[0]):
        assert not t[:, :, blind].any()
        assert t[:, :, ~blind].any(-1).all()
    # The others and all keys are as if the blind rows were not there.
    at = torch.arange(8)[~blind][None]
    rest = attention.reference(q[:, :, ~blind], k, v, Causal(), q_position=at)
    expected = torch.autograd.grad((rest + 1).square().sum(), [q, k, v])
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for found, right in zip([y[:, :, ~blind], *gradients], [rest, *expected], strict=True):
        assert_close(found, right, tolerance)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("why", ["no key at a position", "bias", "a document without keys", "all keys after the queries"])
def test_whatever_hides_every_key_gives_zeros(why, backend):
    q, k, v = inputs(4, 4, batch=1)
    options = {
        "no key at a position": {"k_position": torch.full((1, 4), -1)},
        "bias": {"bias": torch.full((4, 4), -torch.inf)},
        "a document without keys": {"offsets": torch.tensor([0, 4, 4]), "k_offsets": torch.tensor([0, 0, 4])},
        "all keys after the queries": {"q_position": torch.zeros(1, 4).long(), "k_position": torch.ones(1, 4).long()},
    }[why]
    with use_backend(backend):
        y = attention(q, k, v, Causal(), **options)
    for t in (y, *torch.autograd.grad((y + 1).square().sum(), [q, k, v])):
        assert not t.any()
    _, lse = attention.reference(q, k, v, Causal(), **options, return_lse=True)
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_pack_is_its_documents_one_by_one(backend):
    q, k, v = inputs(11, 14, batch=1)
    offsets, k_offsets = torch.tensor([0, 4, 4, 11]), torch.tensor([0, 2, 5, 14])
    slopes = torch.linspace(0.1, 1, 4)
    with use_backend(backend):
        y = attention(q, k, v, Window(size=4), offsets=offsets, k_offsets=k_offsets, slopes=slopes)
    for i in (0, 2):
        some, keys = slice(offsets[i], offsets[i + 1]), slice(k_offsets[i], k_offsets[i + 1])
        alone = attention.reference(q[:, :, some], k[:, :, keys], v[:, :, keys], Window(size=4), slopes=slopes)
        assert_close(y[:, :, some], alone, 1e-6)


def test_sdpa_equals_the_reference_with_bias_and_slopes():
    results = []
    for backend in ("reference", "sdpa"):
        q, k, v = inputs(5, 7)
        bias = torch.linspace(-1, 1, 140).view(1, 4, 5, 7).clone()
        bias[0, 1, 2, :] = -torch.inf
        bias.requires_grad_()
        with use_backend(backend):
            y = attention(q, k, v, Causal(), bias=bias, slopes=torch.linspace(0.1, 1, 4))
        assert not y[:, 1, 2].any()
        results.append([y, *torch.autograd.grad(y.square().sum(), [q, k, v, bias])])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-5)


def test_dropout_of_a_seed_is_one_mask():
    q, k, v = inputs(40, 40)
    draws = [attention(q, k, v, Full(), dropout=0.5, seed=seed) for seed in (3, torch.tensor(3), 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    ones = attention(q, k, torch.ones_like(v), Full(), dropout=0.5, seed=3)
    assert abs(float(ones.detach().mean()) - 1) < 0.05


def test_merge_joins_attentions_over_disjoint_keys():
    q, k, v = inputs(6, 9, dtype=torch.float64)
    whole = attention(q, k, v, Causal(), return_lse=True)
    at = torch.arange(6)[None] + 3
    parts = [
        attention(
            q, k[:, :, some], v[:, :, some], Causal(), q_position=at, k_position=torch.arange(9)[None, some], return_lse=True
        )
        for some in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    joined = merge(*(torch.stack(t) for t in zip(*parts, strict=True)))
    for found, expected in zip(joined, whole, strict=True):
        assert_close(found, expected, 1e-12)
    leaf = torch.ones(2, 3, 4, requires_grad=True)
    output, lse = merge(leaf, torch.full((2, 3), -torch.inf))
    assert not output.any()
    assert (lse == -torch.inf).all()
    assert not torch.autograd.grad(output.sum(), leaf)[0].any()


def test_long_sequences_fit_memory():
    q, k, v = inputs(9000, 9000, batch=1, heads=1, groups=1, width=4)
    y = attention.reference(q, k, v, Window(size=2))
    y.sum().backward()
    assert_close(y[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"offsets": torch.tensor([0, 3])}, "ends at 3: a pack of 4 tokens ends at 4"),
        ({"offsets": torch.tensor([1, 4])}, "begins with 1"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "falls from 3 to 2"),
        ({"offsets": torch.tensor([0.0, 4.0])}, "int32 or int64"),
        ({"offsets": torch.tensor([0, 9])}, "ends at 9: a pack of 4 tokens ends at 4"),
        ({"offsets": torch.tensor([0, 4]), "k_offsets": torch.tensor([0, 3])}, "k_offsets ends at 3: a pack of 4"),
        ({"offsets": torch.tensor([0, 4]), "k_offsets": torch.tensor([0, 2, 4])}, "1 documents of queries and 2 of keys"),
        ({"k_offsets": torch.tensor([0, 4])}, "k_offsets without offsets"),
        ({"k_lengths": torch.tensor([4, 4])}, r"k_lengths is torch.int64 \(2,\): it must be int32 or int64 and \(1,\)"),
        ({"k_lengths": torch.tensor([4]), "offsets": torch.tensor([0, 4])}, "k_lengths of a pack"),
        ({"q_position": torch.zeros(1, 3, dtype=torch.int64)}, r"must be \(1, 4\)"),
        ({"k_position": torch.zeros(1, 4)}, "must be int64"),
        ({"bias": torch.zeros(3, 4, 4)}, "must broadcast"),
        ({"slopes": torch.zeros(3)}, "one a head"),
        ({"seed": torch.zeros(2)}, "the seed is"),
        ({"seed": 2**63}, "64 bits"),
        ({"seed": 1.5, "dropout": 0.5}, r"the seed is 1\.5: it must be an int"),
        ({"offsets": [0, 4]}, r"offsets is \[0, 4\]: it must be a tensor"),
        ({"slopes": [1.0] * 4}, "it must be a tensor, or None"),
        ({"bias": torch.ones(4, 4, dtype=torch.bool)}, "bias is torch.bool: it must be floating point"),
        ({"bias": torch.zeros(4, 4, dtype=torch.complex64)}, "bias is torch.complex64: it must be floating point"),
    ],
)
def test_bad_options_are_one_line(options, message):
    q, k, v = inputs(4, 4, batch=1)
    with pytest.raises(BadInput, match=message) as raised:
        attention(q, k, v, Causal(), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["k", "v", "q_position", "k_position", "offsets", "k_offsets", "k_lengths", "bias", "slopes", "seed"]
)
def test_tensors_on_two_devices_are_one_line(name):
    q, k, v = inputs(4, 4, batch=1)
    places, ends = torch.arange(4)[None], torch.tensor([0, 4])
    given = {"k": k, "v": v, "q_position": places, "k_position": places, "offsets": ends, "k_offsets": ends}
    given |= {"bias": torch.zeros(4, 4), "slopes": torch.zeros(4), "seed": torch.tensor(0), "k_lengths": torch.tensor([4])}
    given[name] = given[name].to("meta")
    with pytest.raises(BadInput, match=f"^{name} is on meta, q on cpu: all tensors of an attention must be on one device$"):
        attention(q, pattern=Causal(), **given)


@pytest.mark.parametrize("pattern", ["causal", None, Causal])
def test_what_is_no_pattern_is_named(pattern):
    q, k, v = inputs(4, 4)
    with pytest.raises(BadInput, match=r"the pattern is .*: it must be one of hippodrome.patterns"):
        attention(q, k, v, pattern)


def test_what_no_backend_takes_is_not_explained_as_taken():
    q, k, v = inputs(4, 4)
    with pytest.raises(BadInput, match="one shape"):
        attention.explain(q, k, v[:, :, 1:], Causal())


def test_bad_shapes_are_one_line():
    q, k, v = inputs(4, 4)
    for given, message in (
        ((q[0], k, v), "four dimensions"),
        ((q.long(), k, v), "floating point"),
        ((q, k, v[:, :, 1:]), "one shape"),
        ((q[:1], k, v), "batch of 1"),
        ((q[..., :3], k, v), "3 wide"),
        ((q[:, :3], k, v), "do not divide"),
    ):
        with pytest.raises(BadInput, match=message):
            attention(*given, Causal())
    with pytest.raises(BadInput, match="a pack with a batch of 2"):
        attention(q, k, v, Causal(), offsets=torch.tensor([0, 4]))


def test_sdpa_says_what_it_cannot_do():
    q, k, v = inputs(4, 4)
    half = [t.bfloat16() for t in (q, k, v)]
    for given, options, reason in (
        ((q, k, v), {"return_lse": True}, "lse"),
        ((q, k, v), {"softcap": 1.0}, "softcap"),
        ((q, k, v), {"dropout": 0.1, "seed": 1}, "seed"),
        (half, {"slopes": torch.ones(4)}, "rounded"),
        (half, {"bias": torch.ones(4, 4)}, "rounded"),
    ):
        assert reason in attention.explain(*given, Causal(), **options)["sdpa"]


def test_a_mask_of_many_heads_is_left_to_the_reference():
    """Slopes and patterns that differ by head write a mask a head, which must not fill the memory."""
    q = torch.empty(1).expand(1, 12, 1 << 15, 8)
    slopes = torch.ones(12)
    assert attention.choose(q, q, q, Causal(), slopes=slopes) == "reference"
    assert attention.choose(q, q, q, BigBird()) == "reference"
    assert attention.choose(q, q, q, Causal()) == "sdpa"
    with use_backend("sdpa"), pytest.raises(BadInput, match=r"a mask of 48\.0 GiB does not fit memory"):
        attention(q, q, q, Causal(), slopes=slopes)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_padding_is_keys_at_negative_positions(backend):
    q, k, v = inputs(9, 9)
    lengths = torch.tensor([9, 4])[: len(q)]
    at = torch.where(torch.arange(9) < lengths[:, None], torch.arange(9), -1)
    with use_backend(backend):
        assert_close(attention(q, k, v, Full(), k_lengths=lengths), attention.reference(q, k, v, Full(), k_position=at))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_may_be_negative_or_zero(scale):
    q, k, v = inputs(9, 9)
    with use_backend("sdpa"):
        assert_close(attention(q, k, v, Causal(), scale=scale), attention.reference(q, k, v, Causal(), scale=scale))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_key_and_no_sequence_are_no_trouble(backend):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8)
    with use_backend(backend):
        assert torch.equal(attention(q, k, k, Full()), torch.zeros_like(q))
        assert attention(q[:0], k[:0], k[:0], Full()).shape == (0, 4, 3, 8)


@interpreted
def test_philox_is_tritons():
    import triton
    import triton.language as tl

    @triton.jit
    def program(bits, uniforms, seed, n: tl.constexpr):
        at = tl.arange(0, n)
        word, _, _, _ = tl.philox(
            seed, at.to(tl.uint32), (at * 7).to(tl.uint32), (at * 0 + 5).to(tl.uint32), (at * 0).to(tl.uint32)
        )
        tl.store(bits + at, word.to(tl.int64))
        tl.store(uniforms + at, tl.random.uint_to_uniform_float(word))

    at, seed = torch.arange(64), 0x299F31D0A4093822
    bits, uniforms = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    program[(1,)](bits, uniforms, seed, 64)
    word = philox(seed, at, at * 7, at * 0 + 5, at * 0)[0]
    assert torch.equal(bits, word)
    assert torch.equal(uniforms, uniform(word))
