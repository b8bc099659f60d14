"""BigBird and block-sparse attention against the vectors of their authors' code and its port."""

import re

import numpy as np
import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers.attention import Attention
from hippodrome.model import Block, BlockConfig
from hippodrome.ops.attention import attention
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Butterfly
from hippodrome.patterns._google_tables import google_table
from tests.golden_files import cases, load, relative_error

SIZES = {"b16": 16, "b4": 4, "b8_r2": 8, "custom_table_collisions": 4, "eval_block0": 4, "nobias": 4, "s1024_b64": 64}


def given_table(case):
    return tuple(tuple(map(tuple, head)) for head in case["rand.table"].tolist())


def pattern_of(case, tile, length):
    table = given_table(case)
    return BigBird(tile=tile, n_random=len(table[0][0]), form="encoder", multiset=True, length=length, table=table)


def double(case):
    return {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in case.items()}


def keys_at(mask):
    at = torch.arange(mask.shape[1])
    return torch.where(mask.bool(), at, -1)


@pytest.mark.parametrize("name", cases("bigbird_google_tables_"))
def test_random_tiles_are_those_of_the_authors_and_no_global_stream_moves(name):
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    for key, table in load(name).items():
        length, tile, slots, heads, seed = map(int, re.findall(r"\d+", key))
        assert torch.equal(google_table(length // tile, tile, slots, heads, seed, "google").int(), table)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("kind", SIZES)
def test_attention_in_values_and_gradients(kind):
    case = double(load(f"bigbird_hf_attn_{kind}"))
    x, mask = case["in.x"], case["in.mask"]
    pattern = pattern_of(case, SIZES[kind], x.shape[1])
    heads = len(case["rand.table"])

    def projected(which):
        bias = case.get(f"param.{which}.bias")
        return torch.nn.functional.linear(x, case[f"param.{which}.weight"], bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = map(projected, ("query", "key", "value"))
    y = attention.reference(q, k, v, pattern, k_position=keys_at(mask))
    y = y.transpose(1, 2).flatten(2) * mask[..., None]
    assert relative_error(y, case["out.y"]) < 1e-6
    (y * case["cot.y"]).sum().backward()
    for name in [name for name in case if name.startswith("grad.")]:
        source = "in.x" if name == "grad.x" else name.removeprefix("grad.")
        error = (case[source].grad - case[name]).abs().max()
        # The gradient of a bias of all keys is zero.
        assert error < 1e-6 * max(1, case[name].abs().max()), name


def attended(call, x, case, dtype):
    """Output over real tokens and the gradients of x and of weights, in the names of the golden file."""
    leaves = {"x": x, **{name.removeprefix("param."): t for name, t in case.items() if name.startswith("param.")}}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    heads = len(case["rand.table"])
    q, k, v = (
        torch.nn.functional.linear(leaves["x"], leaves[f"{which}.weight"], leaves.get(f"{which}.bias"))
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for which in ("query", "key", "value")
    )
    y = call(q, k, v).transpose(1, 2).flatten(2) * case["in.mask"][..., None].to(dtype)
    (y * case["cot.y"].to(dtype)).sum().backward()
    # Of a bias of all keys the gradient is zero, and anything is as far from it as it happens to be.
    grads = {f"grad.param.{name}": leaf.grad for name, leaf in leaves.items() if name not in ("x", "key.bias")}
    return {"out.y": y.detach(), "grad.x": leaves["x"].grad, **grads}


def plainly(pattern, k_position):
    """Attention with every step in the dtype of q, over a mask."""

    def call(q, k, v):
        heads, at = torch.arange(q.shape[1])[None, :, None, None], torch.arange(q.shape[2])
        visible = pattern.visible(heads, at[:, None], at) & (k_position >= 0)[:, None, None]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + pattern.count(heads, at[:, None], at).log().to(q.dtype)
        return scores.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1) @ v

    return call


@pytest.mark.parametrize("kind", SIZES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(kind):
    case = load(f"bigbird_hf_attn_{kind}")
    x, keys = case["in.x"], keys_at(case["in.mask"])
    pattern = pattern_of(case, SIZES[kind], x.shape[1])

    def ours(q, k, v):
        return attention.reference(q, k, v, pattern, k_position=keys)

    found = attended(ours, x, case, torch.bfloat16)
    plain = attended(plainly(pattern, keys), x, case, torch.bfloat16)
    for name, t in found.items():
        error, allowed = ((each.double() - case[name].double()).abs().max() for each in (t, plain[name]))
        assert error <= 2 * allowed, name


@pytest.mark.parametrize("kind", SIZES)
def test_multiplicities_are_counted(kind):
    case, tile = load(f"bigbird_hf_attn_{kind}"), SIZES[kind]
    expected = case["out.multiplicity"]
    heads, n, _ = expected.shape
    pattern = pattern_of(case, tile, n * tile)
    head, i, j = torch.arange(heads)[:, None, None], torch.arange(n)[:, None] * tile, torch.arange(n) * tile
    assert torch.equal(pattern.visible(head, i, j) * pattern.count(head, i, j).int(), expected.int())
    kept = pattern.kept(n * tile, n * tile, tile // 2, head=1)
    assert len(kept.columns) == 4 * expected[1].sum()


def test_an_encoder_layer_in_values_and_gradients():
    case = double(load("bigbird_hf_encoder_layer"))
    x, mask = case["in.x"], case["in.mask"]
    mixer = Attention.Config(n_head=2, pattern=pattern_of(case, 4, x.shape[1]))
    block = Block(BlockConfig(mixer=mixer, channel=Mlp.Config(d_ff=32), order="post"), 16).double()
    for norm in (block.mixer_norm, block.channel_norm):
        norm.eps = 1e-12
    names = {
        "mixer.out_proj": "attention.output.dense",
        "mixer_norm": "attention.output.LayerNorm",
        "channel.fc1": "intermediate.dense",
        "channel.fc2": "output.dense",
        "channel_norm": "output.LayerNorm",
    }
    theirs = {f"{a}.{kind}": [f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        theirs[f"mixer.Wqkv.{kind}"] = [f"attention.self.{which}.{kind}" for which in ("query", "key", "value")]
    joined = {ours: torch.cat([case[f"param.{each}"].detach() for each in parts]) for ours, parts in theirs.items()}
    block.load_state_dict(joined)
    # The port zeroes what padded queries take; ours take something that nobody reads.
    block.mixer.out_proj.register_forward_pre_hook(lambda _, given: (given[0] * mask[..., None],))
    y = block(x, None, lengths=mask.sum(1))[0]
    assert relative_error(y, case["out.y"]) < 2e-6
    (y * case["cot.y"]).sum().backward()
    assert relative_error(x.grad, case["grad.x"]) < 2e-6
    gradients = dict(block.named_parameters())
    for ours, parts in theirs.items():
        expected = torch.cat([case[f"grad.param.{each}"] for each in parts])
        assert (gradients[ours].grad - expected).abs().max() < 2e-6 * expected.abs().max(), ours


@pytest.mark.parametrize("name", cases("blocksparse_butterfly_"))
def test_butterfly_attention_in_values_gradients_and_lse(name):
    case = double(load(name))
    layout = case["in.layout"].bool()
    tile = case["in.qkv"].shape[1] // len(layout)
    factors = 2 if name.endswith("nf2") else None
    pattern = Butterfly(tile=tile, n_factors=factors)
    length = case["in.qkv"].shape[1]
    assert torch.equal(pattern.tiles(length, length, tile), layout)
    assert torch.equal(layout, layout.T)
    q, k, v = (t.transpose(1, 2) for t in case["in.qkv"].unbind(2))
    y, lse = attention.reference(q, k, v, pattern, return_lse=True)
    y = y.transpose(1, 2)
    assert relative_error(y, case["out.out"]) < 1e-6
    assert relative_error(lse, case["out.lse"]) < 1e-6
    (y * case["cot.out"]).sum().backward()
    assert relative_error(case["in.qkv"].grad, case["grad.qkv"]) < 1e-6


def test_a_causal_row_draws_from_its_past_the_same_at_any_length():
    pattern = BigBird(tile=4, n_random=2)
    long, short = pattern.mask(80, 80), pattern.mask(40, 40)
    assert torch.equal(long[:40, :40], short)
    assert not long.triu(1).any()
    assert long[:, :4].tril().any(1).all()
    assert (pattern.tiles(80, 80, 4)[4:].sum(1) == 5).all(), "the first, the one before, its own and two drawn"
    assert not torch.equal(long, pattern.mask(80, 80, head=1))


def test_padding_never_leaks_and_lengths_need_not_be_multiples_of_a_tile():
    mixer = Attention.Config(n_head=2, pattern=BigBird(tile=8, n_random=1, form="encoder", length=53)).build(16)
    x = torch.randn(2, 53, 16)
    lengths = torch.tensor([53, 21])
    y = mixer(x, lengths=lengths)[0]
    other = x.clone()
    other[1, 21:] = 1e4
    assert torch.equal(mixer(other, lengths=lengths)[0][1, :21], y[1, :21])


def test_what_bigbird_refuses():
    with pytest.raises(BadInput, match="take 1024, or plan general"):
        google_table(20, 64, 3, 1, 0, "paper")
    with pytest.raises(BadInput, match="take plan uniform"):
        google_table(9, 4, 3, 1, 0, "general")
    with pytest.raises(BadInput, match="give it length"):
        BigBird(form="encoder").mask(8, 8)
    with pytest.raises(BadInput, match="give it length=70"):
        BigBird(form="encoder", length=60).sized(70, 1)
    with pytest.raises(BadInput, match="belong to form encoder"):
        BigBird(length=5)
    with pytest.raises(BadInput, match="it must have"):
        BigBird(tile=4, form="encoder", length=16, table=(((0,),),))


def test_the_authors_plans_are_constants_of_a_compiled_graph():
    torch._dynamo.reset()
    pattern = BigBird(tile=4, form="encoder", n_random=1, plan="general", length=48, seed=1)
    mixer = Attention.Config(n_head=2, pattern=pattern).build(16)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 45, 16)
    assert torch.equal(compiled(x)[0], mixer(x)[0])
