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
from hippodrome.mixers.attention import Attention, frequencies, rotate
from hippodrome.mixers.h3 import H3
from hippodrome.model import BlockConfig, Embed
from hippodrome.models.perceiver_ar import PerceiverAR
from hippodrome.part import BadInput
from hippodrome.patterns import Window
from hippodrome.positions import Rotary
from hippodrome.readouts.positions import Positions
from hippodrome.task import IGNORE, Batch
from tests.golden_files import FOLDER, load, relative_error
from tests.support import assert_close, assert_gradients

ROOT = "perceiver_ar/~/"
PASSES = [
    "par_rotary",
    "par_rotary_shorter_than_latents",
    "par_rotary_positions_from_data",
    "par_rotary_negative_positions",
    "par_rotary_quarter",
    "par_absolute_sinusoidal",
    "par_absolute_learned_from_data",
    "par_absolute_learned_2d_positions",
    "par_two_latents_per_position",
    "par_extra_cross_attend",
    "par_query_offset",
]
ROLLED = "par_cache_fixed_size_from_scratch"
STRIDES = [{"stride": stride} for stride in (0, 1, 3, 4, 6)]
OPTIONS = [
    {"latents_per_position": 2},
    {"cross_after": (0, 1)},
    {"query_offset": 1},
    {"latents_per_position": 3, "cross_after": (0,), "query_offset": -1},
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
    per_position, offset = how.get("num_latents_per_position", 1), int(how.get("initial_query_offsetting", False))
    base = float(how["max_wavelength"]) + offset
    mixer = Attention.Config(n_head=n_head, position=Rotary(rotated(how, d_model // n_head), base, closed=True))
    channel = Mlp.Config(d_ff=d_model * how["transformer_widening_factor"], activation="relu2")
    return PerceiverAR.Config(
        d_model=d_model,
        d_input=how["input_embed_dim"],
        blocks=(BlockConfig(mixer=mixer, channel=channel),) * how["num_transformers_per_block"],
        embed=_Vectors.Config(),
        readout=Positions.Config(classes=how["num_classes"]),
        latents=how["z_index_dim"] // per_position if latents is None else latents,
        latents_per_position=per_position,
        stride=stride,
        crop=None,
        n_head=how["num_cross_attend_heads"],
        cross_after=tuple(how.get("additional_cross_attend_after_layers", ())),
        # The authors' positions count from the end, and what is later for them is earlier for us.
        query_offset=-offset if counts_backwards(how) else offset,
        rotary=how["fraction_to_rotate"] if how["position_encoding_type"] == "rotary" else 0.0,
        wavelength=base,
        channel=Mlp.Config(d_ff=d_model * how["cross_attend_widening_factor"], activation="relu2"),
    ).build()


def counts_backwards(how):
    return not how.get("use_positions_from_data") and not how.get("use_negative_rotary_positions")


def ordered(weight, n_head, dim, backwards):
    """Output channels of a query or key map from interleaved pairs to halves; positions that count backwards swap a pair."""
    d_head = weight.shape[0] // n_head
    pairs = torch.arange(dim).view(-1, 2)
    first, second = (1, 0) if backwards else (0, 1)
    order = torch.cat([pairs[:, first], pairs[:, second], torch.arange(dim, d_head)])
    return weight.unflatten(0, (n_head, d_head))[:, order].flatten(0, 1)


def converted(case, how, kind="param"):
    """Our names -> the authors' weights, or gradients."""
    backwards = counts_backwards(how)

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
    if how.get("num_latents_per_position", 1) > 1:
        found["latent_place"] = get("~/z_pos_enc", "pos_embs")
    heads = how["num_cross_attend_heads"]
    for number, name in enumerate(["cross", *(f"more_cross.{i}" for i in how.get("additional_cross_attend_after_layers", ()))]):
        path = "~/cross_attention" + (f"_{number}" if number else "")
        norm(f"{name}.query_norm", f"{path}/layer_norm")
        norm(f"{name}.key_norm", f"{path}/layer_norm_1")
        norm(f"{name}.channel_norm", f"{path}/layer_norm_2")
        put(f"{name}.Wq", turned(f"{path}/attention/linear", heads))
        keys, values = turned(f"{path}/attention/linear_1", heads), linear(f"{path}/attention/linear_2")
        put(f"{name}.Wkv", [torch.cat(pair) for pair in zip(keys, values, strict=True)])
        put(f"{name}.out_proj", linear(f"{path}/attention/linear_3"))
        put(f"{name}.channel.fc1", linear(f"{path}/dense/linear"))
        put(f"{name}.channel.fc2", linear(f"{path}/dense/linear_1"))
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
        where = case["in.positions"].long() if "in.positions" in case else (lengths - 1 - at).clamp(min=0)[..., None]
        for axis in range(where.shape[-1]):
            x = x + case[f"param.{ROOT}embed_{axis + 1}/embeddings"][where[..., axis]]
    return x, table


def of_case(name, **protocol):
    case, how = load(name), settings(name)
    model = built(how, **protocol)
    model.load_state_dict(converted(case, how))
    return case, how, model.eval()


def plain(weights, how, x, at, latents, window=None):
    """Logits (N, V) of the last tokens of one row, x (T, E) at positions `at`: the authors' pass over again, in their layout.

    Written for its gradients, where theirs are not given. `window`: how many latents one sees in a block; None: all before it.
    """
    per_position, offset = how.get("num_latents_per_position", 1), int(how.get("initial_query_offsetting", False))
    latent = torch.arange(len(x) - latents, len(x)).repeat_interleave(per_position)
    turns = how["position_encoding_type"] == "rotary"

    def get(path, of):
        return weights[f"param.perceiver_ar/{path}/{of}"]

    def linear(path, x):
        return x @ get(path, "w") + get(path, "b")

    def norm(path, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], get(path, "scale"), get(path, "offset"))

    def heads(x, n_head, at):
        x = x.unflatten(-1, (n_head, -1)).transpose(0, 1)
        if at is None or not turns:
            return x
        dim = rotated(how, x.shape[-1])
        rates = (how["max_wavelength"] + offset) ** -torch.linspace(0, 1, dim // 2, dtype=x.dtype)
        turn = torch.polar(torch.ones_like(rates), at[:, None] * rates)
        pairs = torch.view_as_complex(x[..., :dim].unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., dim:]], -1)

    def attend(path, n_head, q, kv, k_at, seen):
        q = heads(linear(f"{path}/linear", q), n_head, at[latent] + offset)
        k, v = heads(linear(f"{path}/linear_1", kv), n_head, k_at), heads(linear(f"{path}/linear_2", kv), n_head, None)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return linear(f"{path}/linear_3", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def dense(path, x):
        return linear(f"{path}/dense/linear_1", linear(f"{path}/dense/linear", x).relu() ** 2)

    def cross(z, number):
        path, seen = "~/cross_attention" + (f"_{number}" if number else ""), torch.arange(len(x)) <= latent[:, None]
        q, kv = norm(f"{path}/layer_norm", z), norm(f"{path}/layer_norm_1", x)
        z = z + attend(f"{path}/attention", how["num_cross_attend_heads"], q, kv, at, seen)
        return z + dense(path, norm(f"{path}/layer_norm_2", z))

    z = linear("~/linear", x[latent])
    if per_position > 1:
        z = z + get("~/z_pos_enc", "pos_embs").repeat(latents, 1)
    z = cross(z, 0)
    apart = latent[:, None] - latent
    seen = (apart >= 0) if window is None else (apart >= 0) & (apart < window)
    for i in range(how["num_transformers_per_block"]):
        path = "~/self_attention" + (f"_{i}" if i else "")
        normed = norm(f"{path}/layer_norm", z)
        z = z + attend(f"{path}/attention", how["num_transformer_heads"], normed, normed, at[latent] + offset, seen)
        z = z + dense(path, norm(f"{path}/layer_norm_1", z))
        if i in how.get("additional_cross_attend_after_layers", ()):
            z = cross(z, 1 + how["additional_cross_attend_after_layers"].index(i))
    return linear("~/logits", norm("layer_norm", z)).unflatten(0, (-1, per_position)).mean(1)


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


def test_positions_of_two_axes_are_the_authors():
    """Their case gives its coordinates, which are those of tokens from a place on."""
    case, how, model = of_case("par_absolute_learned_2d_positions")
    axes = tuple(how["input_idx_size"])
    embed = Tokens.Config(vocab_size=how["num_classes"], pad_to_multiple=1, axes=axes).build(how["input_embed_dim"])
    names = ["table", *(f"axes.{axis}" for axis in range(len(axes)))]
    tables = [case[f"param.{ROOT}embed{f'_{i}' if i else ''}/embeddings"] for i in range(len(names))]
    embed.load_state_dict({f"{name}.weight": table for name, table in zip(names, tables, strict=True)})
    where = case["in.positions"].long()
    first = where[:, 0, 0] * axes[1] + where[:, 0, 1]
    x = embed(case["in.tokens"].long(), first)
    assert_close(x, vectors(case, how, case["in.tokens"].long())[0])
    assert_close(model.last(x), case["out.z8.logits"], 3e-5)


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
    if how["position_encoding_type"] == "absolute":
        # Sines are not learned.
        assert not case[f"grad.param.{ROOT}embed_1/embeddings"].any()


@pytest.mark.parametrize("name", [*(name for name in PASSES if "in.cotangent" not in load(name)), ROLLED])
def test_gradients_that_the_authors_do_not_give_are_of_a_plain_copy_of_their_pass(name):
    case, how, model = of_case(name, **({"stride": 0} if name == ROLLED else {}))
    tokens = case["in.tokens"].long()
    lengths, x = (tokens != 0).sum(1), vectors(case, how, tokens)[0].detach()
    weights = {key: value.double().requires_grad_() for key, value in case.items() if key.startswith("param.")}
    n = tokens.shape[1] if name == ROLLED else model.latents
    golden = case["step.logits"] if name == ROLLED else case[f"out.z{how['z_index_dim']}.logits"]
    expected = []
    for row, length in enumerate(lengths.tolist()):
        at = torch.arange(length) if not counts_backwards(how) else torch.arange(length - 1, -1, -1)
        expected.append(plain(weights, how, x[row, :length].double(), at, n, how["z_index_dim"] if name == ROLLED else None))
    expected = torch.stack(expected)
    assert_close(expected, golden, 3e-5)
    found = model(x).logits if name == ROLLED else model.last(x, lengths=lengths)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (expected * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    wanted = converted({f"grad.{key}": value.grad for key, value in weights.items()}, how, "grad.param")
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for label, parameter in model.named_parameters():
        error = (parameter.grad - wanted[label]).abs().max()
        assert error <= 3e-4 * max(float(wanted[label].abs().max()), 1e-3 * largest), label


def assert_remembers(state, case, how, which):
    """The keys and values of a state are those of the authors' memory."""
    for number, ours in enumerate([state.cross[0], *state.blocks]):
        k, v = (case[f"state.{which}.layer{number}.{of}"].transpose(1, 2) for of in "kv")
        mask = case.get(f"state.{which}.layer{number}.memory_mask")
        n = k.shape[2] if mask is None else int(mask[0].sum())
        slots = torch.arange(n) + int(ours.position[0]) - n
        dim = rotated(how, k.shape[-1])
        k, v = k[:, :, -n:], v[:, :, -n:]
        if dim:
            # Theirs turn when they are read.
            order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2), torch.arange(dim, k.shape[-1])])
            k = rotate(k[..., order], slots[None], dim, float(how["max_wavelength"]), closed=True)
        slots = slots % ours.k.shape[2]
        assert_close(ours.k[:, :, slots], k, 1e-5)
        assert_close(ours.v[:, :, slots], v, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["par_cache_kv_after_prefill", "par_cache_kv_after_prefill_absolute"])
def test_decoding_after_a_prefill_is_the_authors_and_one_pass_with_as_many_latents(name):
    # The pass that scores token 11 begins at 8, so it has 4 latents then, and 10 at token 17.
    case, how, model = of_case(name, latents=10, stride=8)
    x, _ = vectors(case, how, case["in.tokens"].long())
    assert_close(model.last(x[:, :12], 4), case["out.prefill.logits"], 3e-5)
    assert_close(model.last(x, 10), case["out.uncached_growing.logits"], 3e-5)
    logits, state = model.prefill(x[:, :12], model.init_state(2, 18))
    assert_close(logits, case["out.prefill.logits"][:, -1], 3e-5)
    assert_remembers(state, case, how, "prefill")
    for t in range(12, 18):
        logits, state = model.step(x[:, t], state)
        assert_close(logits, case["step.logits"][:, t - 12], 3e-5)
        assert_close(logits, case["out.uncached_growing.logits"][:, t - 8], 3e-5)


@torch.no_grad()
def test_latents_that_roll_are_the_authors_memory_of_fixed_size():
    case, how, model = of_case(ROLLED, stride=0)
    x, _ = vectors(case, how, case["in.tokens"].long())
    assert "6 latents that roll" in model.protocol
    assert_close(model(x).logits, case["step.logits"], 3e-5)
    state = model.init_state(2, 14)
    for t in range(14):
        logits, state = model.step(x[:, t], state)
        assert_close(logits, case["step.logits"][:, t], 3e-5)
        if t + 1 in (6, 9):
            assert_remembers(state, case, how, f"t{t + 1}")


@torch.no_grad()
def test_steps_with_resets_are_the_authors_sampler():
    name = "par_cache_official_sampler_with_resets"
    case, how, model = of_case(name, stride=settings(name)["z_index_dim"] // 2 + 1)
    prompt, events = 4, case["out.events"].long()
    token, state = case["in.tokens"][:, 0].long(), model.init_state(2, 16)
    for t, was_reset in enumerate(case["step.was_reset"].tolist()):
        assert bool(model._begins(torch.tensor(t))) == bool(was_reset)
        logits, state = model.step(vectors(case, how, token[:, None])[0].squeeze(1), state)
        assert_close(logits, case["step.logits"][:, t], 3e-5)
        token = case["in.tokens"][:, t + 1].long() if t + 1 < prompt else logits.argmax(-1)
        assert torch.equal(token, events[:, t + 1])


def test_the_rotary_table_has_both_ends_and_the_sines_are_the_authors():
    case = load("par_tables")
    for wavelength in (32, 8192):
        found = frequencies(8, float(wavelength), torch.device("cpu"), closed=True)
        assert (found - case[f"out.inv_freq.w{wavelength}"]).abs().max() <= 1e-5
        for name, dim in (("full", 8), ("half", 4)):
            order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2), torch.arange(dim, 8)])
            # (B, T, H, K): the authors' heads come after the length.
            x, expected = (t[..., order].transpose(1, 2) for t in (case["in.x"], case[f"out.rotated_{name}.w{wavelength}"]))
            turned = rotate(x, case["in.positions"].long(), dim, float(wavelength), closed=True)
            assert (turned - expected).abs().max() <= 1e-5
    embed = Tokens.Config(vocab_size=8, sines=10000.0).build(16)
    torch.nn.init.zeros_(embed.table.weight)
    assert (embed(torch.zeros(1, 20, dtype=torch.int64))[0] - case["out.sinusoidal"]).abs().max() <= 1e-5


def small(**how):
    torch.manual_seed(0)
    block = BlockConfig(mixer=Attention.Config(n_head=2, position=Rotary(4, closed=True)), channel=Mlp.Config())
    config = PerceiverAR.Config(
        d_model=16,
        embed=Tokens.Config(vocab_size=24),
        readout=Positions.Config(classes=24),
        n_head=2,
        **{"blocks": (block, block), "latents": 6, **how},
    )
    model = config.build().eval()
    torch.nn.init.normal_(model.readout.linear.weight)
    return model


def tokens(length, rows=3):
    return torch.randint(24, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("how", [*STRIDES, *({"stride": 4, **how} for how in OPTIONS)], ids=str)
def test_scoring_chunks_prefill_and_steps_agree(how):
    model, x = small(**how), tokens(23)
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
@pytest.mark.parametrize("how", [{"stride": 4}, {"stride": 0}, {"stride": 4, **OPTIONS[-1]}], ids=str)
def test_ragged_rows_are_as_alone(how):
    model, x = small(**how), tokens(20)
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


@pytest.mark.parametrize("how", [{"stride": 2}, {"stride": 0}, {"stride": 2, **OPTIONS[-1]}], ids=str)
def test_it_is_saved_loaded_and_sampled_from_and_says_its_protocol(tmp_path, how):
    model = small(eval_latents=5, **how)
    save(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    assert again.protocol == model.protocol
    assert ("5 latents, stride 2" if how["stride"] else "5 latents that roll") in again.protocol
    prompts = [[1, 2, 3], [4] * 9]
    said = generate(again, prompts, 12, sampling=Sampling(temperature=0))
    row = list(prompts[1])
    for token in said[1]:
        assert token == int(model(torch.tensor([row])).logits[0, -1].argmax())
        row.append(token)


@pytest.mark.parametrize("how", [{}, {"stride": 0}, *OPTIONS], ids=str)
def test_options_train_in_bfloat16(how):
    model, x = small(**how), tokens(20)
    batch = Batch(x[:, :-1], x[:, 1:])
    exact = model.loss(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(batch).total
    assert abs(float((rounded - exact).detach())) <= 2e-2 * float(exact.detach())
    rounded.backward()
    assert_gradients(model)


def test_the_protocol_may_change_to_latents_that_roll_and_back():
    model, x = small(stride=4), tokens(23)
    before = model(x).logits
    model.score_with(stride=0)
    rolled = model(x).logits
    # Past the first N tokens what a latent knows goes further back than its pass did.
    assert_close(rolled[:, :6], before[:, :6])
    assert (rolled[:, 12:] - before[:, 12:]).abs().max() > 1e-3
    model.score_with(stride=4)
    assert torch.equal(model(x).logits, before)


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
    with pytest.raises(BadInput, match="latents_per_position is 0: it must be at least 1"):
        small(latents_per_position=0)
    with pytest.raises(BadInput, match=r"cross_after is \(2,\): it must name blocks from 0 to 1"):
        small(cross_after=(2,))
    with pytest.raises(BadInput, match="each once, in order"):
        small(cross_after=(1, 1))
    with pytest.raises(BadInput, match="query_offset is 1 and rotary 0"):
        small(query_offset=1, rotary=0.0)
    with pytest.raises(BadInput, match="stride is 0 at 2 latents a position"):
        small(latents_per_position=2).score_with(stride=0)
    other = (BlockConfig(mixer=Attention.Config(n_head=2, pattern=Window(4))), BlockConfig(mixer=H3.Config()))
    with pytest.raises(BadInput, match=r"stride is 0: .* under Causal\(\) in every block, but block 0 has .*Window"):
        small(blocks=other).score_with(stride=0)
    with pytest.raises(BadInput, match=r"latents_per_position is 2: .* but block 0 has H3"):
        small(blocks=other[1:], latents_per_position=2)
