"""Perceiver AR against the authors' own (tests/golden/par_*), and its protocol: scoring, prefill and steps agree."""

import json

import pytest
import torch
from safetensors import safe_open

from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import load as load_model
from hippodrome.checkpoint import save
from hippodrome.embeds.tokens import Tokens
from hippodrome.generation import Sampling, generate
from hippodrome.mixers.attention import Attention, frequencies
from hippodrome.model import BlockConfig, Embed
from hippodrome.models.perceiver_ar import PerceiverAR
from hippodrome.part import BadInput
from hippodrome.positions import Rotary
from hippodrome.readouts.positions import Positions
from hippodrome.task import IGNORE, Batch
from tests.golden_files import FOLDER, load, relative_error
from tests.support import assert_close

ROOT = "perceiver_ar/~/"
PASSES = [
    "par_rotary",
    "par_rotary_shorter_than_latents",
    "par_rotary_positions_from_data",
    "par_rotary_negative_positions",
    "par_rotary_quarter",
    "par_absolute_sinusoidal",
    "par_absolute_learned_from_data",
]


class _Vectors(Embed):
    """Inputs that are embedded already, by the table of a case."""

    def __init__(self, config, d_model):
        super().__init__()

    def forward(self, inputs, position=None):
        return inputs


def settings(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["constructor"])


def rotated(how, d_head):
    return 2 * int(how["fraction_to_rotate"] * d_head / 2) if how["position_encoding_type"] == "rotary" else 0


def built(how, latents=None, stride=None):
    """Our model of a case's constructor."""
    d_model, n_head = how["num_z_channels"], how["num_transformer_heads"]
    base = float(how["max_wavelength"])
    mixer = Attention.Config(n_head=n_head, position=Rotary(rotated(how, d_model // n_head), base, closed=True))
    channel = Mlp.Config(d_ff=d_model * how["transformer_widening_factor"], activation="relu2")
    return PerceiverAR.Config(
        d_model=d_model,
        d_input=how["input_embed_dim"],
        blocks=(BlockConfig(mixer=mixer, channel=channel),) * how["num_transformers_per_block"],
        embed=_Vectors.Config(),
        readout=Positions.Config(classes=how["num_classes"]),
        latents=how["z_index_dim"] if latents is None else latents,
        stride=stride,
        crop=None,
        n_head=how["num_cross_attend_heads"],
        rotary=how["fraction_to_rotate"] if how["position_encoding_type"] == "rotary" else 0.0,
        wavelength=base,
        channel=Mlp.Config(d_ff=d_model * how["cross_attend_widening_factor"], activation="relu2"),
    ).build()


def ordered(weight, n_head, dim, backwards):
    """Output channels of a query or key map from interleaved pairs to halves; positions that count backwards swap a pair."""
    d_head = weight.shape[0] // n_head
    pairs = torch.arange(dim).view(-1, 2)
    first, second = (1, 0) if backwards else (0, 1)
    order = torch.cat([pairs[:, first], pairs[:, second], torch.arange(dim, d_head)])
    return weight.unflatten(0, (n_head, d_head))[:, order].flatten(0, 1)


def converted(case, how, kind="param"):
    """Our names -> the authors' weights, or gradients."""
    backwards = not how.get("use_positions_from_data") and not how.get("use_negative_rotary_positions")

    def get(path, of):
        return case[f"{kind}.perceiver_ar/{path}/{of}"]

    def linear(path):
        return get(path, "w").T, get(path, "b")

    found = {}

    def put(name, pair):
        found[f"{name}.weight"], found[f"{name}.bias"] = pair

    def norm(name, path):
        put(name, (get(path, "scale"), get(path, "offset")))

    def turned(path, n_head):
        pair = linear(path)
        return tuple(ordered(t, n_head, rotated(how, len(t) // n_head), backwards) for t in pair)

    norm("final_norm", "layer_norm")
    put("latent_proj", linear("~/linear"))
    put("readout.linear", linear("~/logits"))
    cross, heads = "~/cross_attention", how["num_cross_attend_heads"]
    norm("cross.query_norm", f"{cross}/layer_norm")
    norm("cross.key_norm", f"{cross}/layer_norm_1")
    norm("cross.channel_norm", f"{cross}/layer_norm_2")
    put("cross.Wq", turned(f"{cross}/attention/linear", heads))
    keys, values = turned(f"{cross}/attention/linear_1", heads), linear(f"{cross}/attention/linear_2")
    put("cross.Wkv", [torch.cat(pair) for pair in zip(keys, values, strict=True)])
    put("cross.out_proj", linear(f"{cross}/attention/linear_3"))
    put("cross.channel.fc1", linear(f"{cross}/dense/linear"))
    put("cross.channel.fc2", linear(f"{cross}/dense/linear_1"))
    for i in range(how["num_transformers_per_block"]):
        path, heads = "~/self_attention" + (f"_{i}" if i else ""), how["num_transformer_heads"]
        norm(f"blocks.{i}.mixer_norm", f"{path}/layer_norm")
        norm(f"blocks.{i}.channel_norm", f"{path}/layer_norm_1")
        parts = [turned(f"{path}/attention/linear", heads), turned(f"{path}/attention/linear_1", heads)]
        parts.append(linear(f"{path}/attention/linear_2"))
        put(f"blocks.{i}.mixer.Wqkv", [torch.cat(pair) for pair in zip(*parts, strict=True)])
        put(f"blocks.{i}.mixer.out_proj", linear(f"{path}/attention/linear_3"))
        put(f"blocks.{i}.channel.fc1", linear(f"{path}/dense/linear"))
        put(f"blocks.{i}.channel.fc2", linear(f"{path}/dense/linear_1"))
    return found


def vectors(case, how, tokens):
    """The embedded tokens, and the table they come from."""
    table = case[f"param.{ROOT}embed/embeddings"].clone().requires_grad_()
    x = table[tokens]
    if how["position_encoding_type"] == "absolute":
        lengths = (tokens != 0).sum(1, keepdim=True)
        at = torch.arange(tokens.shape[1])
        where = case["in.positions"][..., 0].long() if "in.positions" in case else (lengths - 1 - at).clamp(min=0)
        x = x + case[f"param.{ROOT}embed_1/embeddings"][where]
    return x, table


def of_case(name, **protocol):
    case, how = load(name), settings(name)
    model = built(how, **protocol)
    model.load_state_dict(converted(case, how))
    return case, how, model.eval()


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_with_any_number_of_latents_is_the_authors(name):
    case, how, model = of_case(name)
    tokens = case["in.tokens"].long()
    lengths = (tokens != 0).sum(1)
    for key in (key for key in case if key.endswith(".logits")):
        expected, last = case[key], case[key.replace(".logits", ".latent_last_steps")].long()
        rows, n = len(expected), last.shape[1]
        ragged = lengths[:rows] if (lengths[:rows] < tokens.shape[1]).any() else None
        found = model.last(vectors(case, how, tokens[:rows])[0], n, lengths=ragged)
        for row in range(rows):
            real = last[row] >= 0
            assert_close(found[row, : int(real.sum())], expected[row, real], 3e-5)


@pytest.mark.parametrize("name", [name for name in PASSES if "in.cotangent" in load(name)])
def test_gradients_are_the_authors(name):
    case, how, model = of_case(name)
    tokens = case["in.tokens"].long()
    last = case[f"out.z{how['z_index_dim']}.latent_last_steps"].long()
    x, table = vectors(case, how, tokens)
    y = model.last(x, lengths=(tokens != 0).sum(1))
    loss = sum((y[row, : int(real.sum())] * case["in.cotangent"][row, real]).sum() for row, real in enumerate(last >= 0))
    loss.backward()
    expected = converted(case, how, "grad.param")
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for label, parameter in model.named_parameters():
        # The gradient of a key's bias is zero but for rounding, and is compared to the others.
        assert (parameter.grad - expected[label]).abs().max() <= 3e-4 * max(float(expected[label].abs().max()), 1e-3 * largest)
    assert relative_error(table.grad, case[f"grad.param.{ROOT}embed/embeddings"]) <= 3e-4


def test_decoding_after_a_prefill_is_the_authors_and_one_pass_with_as_many_latents():
    case, how, model = of_case("par_cache_kv_after_prefill", latents=10, stride=6)
    x, _ = vectors(case, how, case["in.tokens"].long())
    # The first pass is of 4 latents at token 11; the cache then grows to 10.
    assert_close(model.last(x[:, :12], 4), case["out.prefill.logits"], 3e-5)
    assert_close(model.last(x, 10), case["out.uncached_growing.logits"], 3e-5)
    assert_close(case["step.logits"], case["out.uncached_growing.logits"][:, 4:], 3e-5)


@torch.no_grad()
def test_steps_with_resets_are_the_authors_sampler():
    name = "par_cache_official_sampler_with_resets"
    case, how, model = of_case(name, stride=settings(name)["z_index_dim"] // 2 + 1)
    x, _ = vectors(case, how, case["out.events"][:, :-1].long())
    state = model.init_state(2, 16)
    for t, was_reset in enumerate(case["step.was_reset"].tolist()):
        assert bool(model._begins(torch.tensor(t))) == bool(was_reset)
        logits, state = model.step(x[:, t], state)
        assert_close(logits, case["step.logits"][:, t], 3e-5)


def test_the_rotary_table_has_both_ends_and_the_sines_are_the_authors():
    case = load("par_tables")
    for wavelength in (32, 8192):
        found = frequencies(8, float(wavelength), torch.device("cpu"), closed=True)
        assert (found - case[f"out.inv_freq.w{wavelength}"]).abs().max() <= 1e-5
    embed = Tokens.Config(vocab_size=8, sines=10000.0).build(16)
    torch.nn.init.zeros_(embed.table.weight)
    assert (embed(torch.zeros(1, 20, dtype=torch.int64))[0] - case["out.sinusoidal"]).abs().max() <= 1e-5


def small(**how):
    torch.manual_seed(0)
    block = BlockConfig(mixer=Attention.Config(n_head=2, position=Rotary(4, closed=True)), channel=Mlp.Config())
    config = PerceiverAR.Config(
        d_model=16,
        blocks=(block, block),
        embed=Tokens.Config(vocab_size=24),
        readout=Positions.Config(classes=24),
        n_head=2,
        **{"latents": 6, **how},
    )
    model = config.build().eval()
    torch.nn.init.normal_(model.readout.linear.weight)
    return model


def tokens(length, rows=3):
    return torch.randint(24, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 3, 4, 6])
def test_scoring_chunks_prefill_and_steps_agree(stride):
    model, x = small(stride=stride), tokens(23)
    whole = model(x).logits
    for t in (0, 5, 6, 11, 22):
        # A position's logits are those of one pass over what comes before it.
        n = t - int(model._start(torch.tensor(t))) + 1
        assert_close(whole[:, t], model.last(x[:, : t + 1], n)[:, -1])
    chunks = model.init_state(3)
    for piece in x.split([2, 9, 1, 11], 1):
        out = model(piece, chunks)
        chunks = out.state
        assert_close(out.logits, whole[:, int(chunks.position[0]) - piece.shape[1] : int(chunks.position[0])])
    state = model.init_state(3, 23)
    said, state = model.prefill(x[:, :13], state)
    assert_close(said, whole[:, 12])
    for t in range(13, 23):
        said, state = model.step(x[:, t], state)
        assert_close(said, whole[:, t])


@torch.no_grad()
def test_ragged_rows_are_as_alone():
    model, x = small(stride=4), tokens(20)
    counts = torch.tensor([3, 9, 14])
    said, state = model.prefill(x[:, :14], model.init_state(3, 20), lengths=counts)
    padded = model(x[:, :14], lengths=torch.stack([torch.zeros(3, dtype=torch.int64), counts], 1)).logits
    for row, n in enumerate(counts.tolist()):
        alone = model(x[row : row + 1]).logits[0]
        assert_close(said[row], alone[n - 1])
        assert_close(padded[row, :n], alone[:n])
    for i in range(6):
        said, state = model.step(torch.stack([x[row, n + i] for row, n in enumerate(counts.tolist())]), state)
        for row, n in enumerate(counts.tolist()):
            assert_close(said[row], model(x[row : row + 1, : n + i + 1]).logits[0, -1])


def test_the_loss_is_of_the_last_tokens_alone():
    model, x = small(crop=None), tokens(15)
    full = torch.full_like(x, IGNORE)
    full[:, -6:] = x[:, -6:]
    assert_close(model.loss(Batch(x, x)).total, model.loss(Batch(x, full)).total)
    lengths = torch.tensor([15, 4, 9])
    asked = x.where(torch.arange(15) < lengths[:, None], IGNORE)
    assert int(model.loss(Batch(x, asked, lengths)).parts["loss"][1]) == 6 + 4 + 6
    with pytest.raises(BadInput, match="carry_state"):
        model.loss(Batch(x, x), model.init_state(3))


def test_it_is_saved_loaded_and_sampled_from_and_says_its_protocol(tmp_path):
    model = small(eval_latents=5, stride=2)
    save(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    assert again.protocol == model.protocol
    assert "5 latents, stride 2" in again.protocol
    prompts = [[1, 2, 3], [4] * 9]
    said = generate(again, prompts, 12, sampling=Sampling(temperature=0))
    row = list(prompts[1])
    for token in said[1]:
        assert token == int(model(torch.tensor([row])).logits[0, -1].argmax())
        row.append(token)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="stride is 7"):
        small(stride=7)
    with pytest.raises(BadInput, match="3 heads do not divide"):
        PerceiverAR.Config(
            d_model=16,
            blocks=small().config.blocks,
            embed=Tokens.Config(vocab_size=8),
            readout=Positions.Config(classes=8),
            n_head=3,
        ).build()
