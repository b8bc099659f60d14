"""Mega against the authors' own (tests/golden/mega_*, time first), and against its equations written plainly."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from hippodrome.channels.mlp import Mlp
from hippodrome.cuda_graph import GraphedDecode
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.ema import EMA
from hippodrome.mixers import _distance, _slices
from hippodrome.mixers.mega import Mega
from hippodrome.model import Block, BlockConfig, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.lm import Lm
from tests.golden_files import FOLDER, cases, load, relative_error
from tests.support import assert_close, build

VARIANTS = (
    Mega.Config(d_key=6, d_state=3, chunk=8, function="laplace", bias="simple"),
    Mega.Config(d_key=6, d_state=3, chunk=5, function="softmax", bias="simple", d_value=7),
    Mega.Config(d_key=6, d_state=3, function="relu2", bias="simple", max_positions=100),
    Mega.Config(d_key=6, d_state=3, function="laplace"),
    Mega.Config(d_key=6, d_state=3, bidirectional=True),
    Mega.Config(d_key=6, d_state=3, bidirectional=True, chunk=4, function="laplace", truncation=5),
)

LAYERS = cases("mega_attn")
STEPPED = [name for name in LAYERS if "step.y" in load(name)]
NORMS = {"layernorm": "layer", "rmsnorm": "rms", "scalenorm": "scale", "batchnorm": "batch"}
EMA_NAMES = {"delta": "delta", "alpha": "alpha", "beta": "beta", "gamma": "gamma", "D": "omega"}
PROJECTIONS = {"value_proj": "v_proj", "mix_proj": "mx_proj", "out_proj": "h_proj"}


def settings(name):
    """What the authors' class was built with."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["constructor"])


def block_config(how, channel=None):
    chunk = None if how["chunk_size"] < 0 else how["chunk_size"]
    mixer = Mega.Config(
        d_key=how["zdim"],
        d_value=how["hdim"],
        d_state=how["ndim"],
        function=how["attention_activation"],
        bias=how["rel_pos_bias"],
        max_positions=how["max_positions"],
        chunk=chunk,
        bidirectional=how["bidirectional"],
        truncation=how["truncation"],
    )
    return BlockConfig(mixer=mixer, channel=channel, norm=NORMS[how["norm_type"]], order="pre" if how["prenorm"] else "post")


def mixer_names(mixer, prefix):
    """Our parameters -> (theirs, which half of the rows; None: all of it)."""
    directions = 1 if mixer.causal else 2
    found = {"scale": ("gamma", None), "shift": ("beta", None)}
    for ours, theirs in PROJECTIONS.items():
        found |= {f"{ours}.{kind}": (f"{theirs}.{kind}", None) for kind in ("weight", "bias")}
    for ours, theirs in EMA_NAMES.items():
        for half, system in enumerate(("average", "backward_average")[:directions]):
            if ours != "D" or half == 0:
                found[f"{system}.{ours}"] = (f"move.{theirs}", None if directions == 1 or ours == "D" else half)
    if isinstance(mixer.bias, _distance.SimpleBias):
        found["bias.weight"] = ("rel_pos_bias.rel_pos_bias", None)
    else:
        found |= {f"bias.{name}": (f"rel_pos_bias.{name}", None) for name in ("alpha", "beta")}
    return {ours: (f"{prefix}{theirs}", half) for ours, (theirs, half) in found.items()}


def norm_names(ours, theirs, kind):
    if kind == "scalenorm":
        return {f"{ours}.weight": (f"{theirs}.norm.scalar", None)}
    found = {f"{ours}.weight": (f"{theirs}.norm.weight", None)}
    return found if kind == "rmsnorm" else found | {f"{ours}.bias": (f"{theirs}.norm.bias", None)}


def theirs(golden, kind, entry, like):
    name, half = entry
    tensor = golden[f"{kind}.{name}"]
    tensor = tensor if half is None else tensor.unflatten(0, (2, -1))[half]
    assert tensor.numel() == like.numel(), name
    return tensor.reshape(like.shape)


def build_block(name):
    """Their layer, or layer and feed-forward network, as a block; and the names of its parameters."""
    golden, how = load(name), settings(name)
    whole = "ffn" in how
    ffn = how.get("ffn", {})
    how = how.get("attn", how)
    channel = Mlp.Config(d_ff=ffn["ffn_hidden_dim"], activation="silu") if whole else None
    block = Block(block_config(how, channel), how["embed_dim"])
    prefix = "mega_layer." if whole else ""
    names = {f"mixer.{ours}": theirs for ours, theirs in mixer_names(block.mixer, prefix).items()}
    names |= norm_names("mixer.norm" if how["prenorm"] else "mixer_norm", f"{prefix}norm", how["norm_type"])
    if whole:
        names |= norm_names("channel_norm", "nffn.norm", ffn["norm_type"])
        names |= {f"channel.{fc}.{kind}": (f"nffn.{fc}.{kind}", None) for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert set(names) == {ours for ours, _ in block.named_parameters()}
    with torch.no_grad():
        for ours, entry in names.items():
            block.get_parameter(ours).copy_(theirs(golden, "param", entry, block.get_parameter(ours)))
    if how["norm_type"] == "rmsnorm":
        block.mixer.norm.eps = 1e-5
    if how["norm_type"] == "batchnorm":
        for statistic in ("running_mean", "running_var"):
            block.mixer.norm.get_buffer(statistic).copy_(golden[f"param.norm.norm.{statistic}"])
        block.eval()
    return block, golden, names


def batch_first(x):
    return x.transpose(0, 1)


def assert_gradients(module, golden, names):
    for ours, entry in names.items():
        parameter = module.get_parameter(ours)
        expected = theirs(golden, "grad.param", entry, parameter)
        assert relative_error(parameter.grad, expected) < 3e-4, ours


@pytest.mark.parametrize("name", [*LAYERS, "mega_block_softmax_uni_chunk8"])
def test_layers_are_the_authors(name):
    block, golden, names = build_block(name)
    x = golden["in.x"].requires_grad_()
    y = batch_first(block(batch_first(x), None, golden.get("in.lengths"))[0])
    assert relative_error(y, golden["out.y"]) < 2e-5
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 3e-4
    assert_gradients(block, golden, names)


@pytest.mark.parametrize("name", cases("mega_ema_bi"))
def test_averages_in_both_directions_are_the_authors(name):
    """As far as their kernels reach, the truncated ones too."""
    golden = load(name)
    taps = golden["out.kernel"].shape[1]
    config = Mega.Config(d_state=4, bidirectional=True, truncation=taps if "trunc" in name else None)
    mixer = config.build(len(golden["param.omega"]))
    names = {ours: entry for ours, entry in mixer_names(mixer, "").items() if "average" in ours}
    names = {ours: (theirs.removeprefix("move."), half) for ours, (theirs, half) in names.items()}
    with torch.no_grad():
        for ours, entry in names.items():
            mixer.get_parameter(ours).copy_(theirs(golden, "param", entry, mixer.get_parameter(ours)))
    x = golden["in.x"].requires_grad_()
    y = F.silu(mixer._both_ways(x.permute(1, 2, 0), mixer.backward_average, golden.get("in.lengths"))).permute(2, 0, 1)
    assert relative_error(y, golden["out.y"]) < 2e-5
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 2e-4
    assert_gradients(mixer, golden, names)


@pytest.mark.parametrize("name", LAYERS)
def test_attention_weights_and_biases_are_the_authors(name):
    block, golden, _ = build_block(name)
    mixer, expected = block.mixer, golden["out.attn_weights"]
    size = expected.shape[-1]
    table = mixer.bias.table(size)
    assert relative_error(_slices.by_distance(table, 0, size, size), golden["out.rel_pos_bias"]) < 2e-5
    q, k, lengths = *queries_and_keys(block, batch_first(golden["in.x"]), golden.get("in.lengths")), golden.get("in.lengths")
    chosen = torch.eye(size).repeat(len(q), expected.shape[1], 1)
    weights = mixer._attend_all(q, k, chosen, lengths).unflatten(1, (-1, size))
    assert relative_error(weights, expected) < 2e-5


def queries_and_keys(block, x, lengths):
    """What the layer attends with, caught on its way."""
    caught = []
    project = block.mixer._project
    block.mixer._project = lambda *inputs: caught.append(project(*inputs)) or caught[0]
    block(x, None, lengths)
    return caught[0][:2]


@pytest.mark.parametrize("name", STEPPED)
def test_steps_and_their_states_are_the_authors(name):
    block, golden, _ = build_block(name)
    mixer, x, chunk = block.mixer, batch_first(golden["in.x"]), block.mixer.config.chunk
    state, outputs, compared = mixer.init_state(len(x), x.shape[1]), [], 0
    with torch.no_grad():
        for t, token in enumerate(x.unbind(1), start=1):
            y, state = mixer.step(token, state)
            outputs.append(token + y)
            if f"state.ema_h.t{t}" in golden:
                # Theirs is p beta z, and they drop a chunk that is full, where ours waits to be written over.
                h = mixer.average.input_weights() * state.average.z.real
                assert relative_error(h, golden[f"state.ema_h.t{t}"]) < 1e-5
                kept = t if chunk is None else t % chunk
                for ours, theirs in ((state.memory.k, "key"), (state.memory.v, "value")):
                    expected = golden[f"state.prev_{theirs}.t{t}"]
                    assert expected.shape[1] == kept
                    if kept:
                        assert relative_error(ours[:, 0, :kept], expected) < 1e-5
                compared += 1
    assert compared == sum(key.startswith("state.ema_h") for key in golden) > 1
    assert relative_error(torch.stack(outputs), golden["step.y"]) < 2e-5


@pytest.mark.parametrize("name", cases("mega_ffn"))
def test_feed_forward_networks_are_the_authors(name):
    """The second half of a block."""
    golden, how = load(name), settings(name)
    channel = Mlp.Config(d_ff=how["ffn_hidden_dim"], activation="silu")
    order = "pre" if how["prenorm"] else "post"
    block = Block(BlockConfig(mixer=Mega.Config(), channel=channel, norm=NORMS[how["norm_type"]], order=order), 12)
    names = norm_names("channel_norm", "norm", how["norm_type"])
    names |= {f"channel.{fc}.{kind}": (f"{fc}.{kind}", None) for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    with torch.no_grad():
        for ours, entry in names.items():
            block.get_parameter(ours).copy_(theirs(golden, "param", entry, block.get_parameter(ours)))
    x = golden["in.x"].requires_grad_()
    y = block._mix_channels(x)[0]
    assert relative_error(y, golden["out.y"]) < 2e-5
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 3e-4
    assert_gradients(block, golden, names)


FUNCTIONS = {
    "laplace": lambda score: 0.5 * (1 + torch.erf((score - math.sqrt(0.5)) / math.sqrt(2 / (4 * math.pi)))),
    "relu2": lambda score: score.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("function", ["softmax", *FUNCTIONS])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_equals_its_equations_in_float64(function, bias, chunk):
    config = Mega.Config(d_key=4, d_value=5, d_state=2, function=function, bias=bias, max_positions=9, chunk=chunk)
    mixer = build(config, 3).double()
    x = torch.randn(1, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    averaged = F.silu(mixer.average.convolve(x.transpose(1, 2))[0].transpose(1, 2))[0]
    u, s, r, c = mixer.mix_proj(averaged).split([3, 4, 5, 3], -1)
    q, k = (F.silu(s) * mixer.scale[i] + mixer.shift[i] for i in range(2))
    v, rows = F.silu(mixer.value_proj(x[0])), []
    for i in range(7):
        first = 0 if chunk is None else i // chunk * chunk
        seen = range(first, i + 1)
        biases = torch.stack([distance_bias(mixer, j - i) for j in seen])
        products = torch.stack([q[i] @ k[j] for j in seen])
        if function == "softmax":
            weights = torch.softmax(products / 2 + biases, 0)
        else:
            weights = FUNCTIONS[function](products / len(seen) + biases)
        rows.append(weights @ v[first : i + 1])
    h = F.silu(c + mixer.out_proj(torch.stack(rows) * F.silu(r)))
    expected = torch.sigmoid(u) * (h - x[0])
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=1e-7, atol=1e-7)


def distance_bias(mixer, distance):
    if mixer.config.bias == "simple":
        return mixer.bias.weight[len(mixer.bias.weight) // 2 + distance]
    (a, b), (c, d) = mixer.bias.alpha.view(2, -1), mixer.bias.beta.view(2, -1)
    angle = distance * 10000.0 ** (-torch.arange(2) / 2)
    return (a * (c * angle.cos() - d * angle.sin()) + b * (d * angle.cos() + c * angle.sin())).sum()


@pytest.mark.parametrize("config", VARIANTS)
def test_slices_of_the_queries_change_nothing(config, monkeypatch):
    mixer, x = build(config, 16), torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))

    def answers():
        mixer.zero_grad()
        y = mixer(x, lengths=torch.tensor([20, 11]))[0]
        if mixer.causal:
            first, state = mixer(x[:, :6], mixer.init_state(2))
            y = torch.cat([y, first, mixer(x[:, 6:], state)[0]], 1)
        y.square().sum().backward()
        return [y, *(parameter.grad for parameter in mixer.parameters())]

    whole = answers()
    monkeypatch.setattr(_slices, "SCORES", 40)
    calls = []
    monkeypatch.setattr(_slices, "checkpoint", lambda *a, **k: calls.append(a) or torch.utils.checkpoint.checkpoint(*a, **k))
    for found, expected in zip(answers(), whole, strict=True):
        assert_close(found, expected, 1e-4)
    assert len(calls) > 3


@pytest.mark.parametrize("function", ["softmax", *FUNCTIONS])
def test_memory_for_the_gradient_is_linear_in_the_length(function, monkeypatch):
    """Numbers kept between forward and backward; all scores at once would be four times as many."""
    monkeypatch.setattr(_slices, "SCORES", 2**10)
    mixer = build(Mega.Config(d_state=2, function=function), 4)

    def kept(length):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            mixer(torch.randn(1, length, 4))
        return sum(numbers)

    assert kept(512) < 2.2 * kept(256)
    monkeypatch.setattr(_slices, "SCORES", 2**25)
    assert kept(512) > 3 * kept(256)


def test_slices_computed_anew_drop_the_same_weights(monkeypatch):
    monkeypatch.setattr(_slices, "SCORES", 40)
    mixer, x = build(Mega.Config(attention_dropout=0.5), 16), torch.randn(2, 20, 16)

    def gradient():
        torch.manual_seed(0)
        mixer.zero_grad()
        mixer(x)[0].square().sum().backward()
        return mixer.value_proj.weight.grad

    anew = gradient()
    monkeypatch.setattr(_slices, "checkpoint", lambda some, *at, **how: some(*at))
    assert_close(anew, gradient())


def matmul_flops(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("function", ["softmax", "laplace"])
def test_with_chunks_twice_the_tokens_are_twice_the_work(function):
    """Also where a prompt goes on in the middle of a chunk; and without chunks it is more."""
    mixer = Mega.Config(d_state=2, chunk=16, function=function).build(8).eval()
    short, long = torch.randn(1, 256, 8), torch.randn(1, 512, 8)

    def after_some_tokens(x):
        return lambda: mixer(x, mixer(x[:, :5], mixer.init_state(1))[1])

    assert matmul_flops(lambda: mixer(long)) == 2 * matmul_flops(lambda: mixer(short))
    assert matmul_flops(after_some_tokens(long)) < 2 * matmul_flops(after_some_tokens(short))
    full = Mega.Config(d_state=2, function=function).build(8).eval()
    assert matmul_flops(lambda: full(long)) > 2.5 * matmul_flops(lambda: full(short))


@pytest.mark.parametrize("function", ["softmax", *FUNCTIONS])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_hidden_from_scores_that_matter(function, chunk, bidirectional):
    """At the start scores are small, and dividing them by too many keys would hardly show."""
    mixer = build(Mega.Config(d_key=4, function=function, chunk=chunk, bidirectional=bidirectional), 8)
    with torch.no_grad():
        mixer.shift.fill_(0.5)  # so that every key is liked
    x, lengths = torch.randn(4, 13, 8, generator=torch.Generator().manual_seed(1)), [13, 5, 1, 12]
    padded = torch.where(torch.arange(13)[:, None] < torch.tensor(lengths)[:, None, None], x, 5.0)
    y = mixer(padded, lengths=torch.tensor(lengths))[0]
    assert torch.isfinite(y).all()
    for row, length in enumerate(lengths):
        assert_close(y[row, :length], mixer(x[row : row + 1, :length])[0][0])


def test_a_chunk_bounds_the_state():
    mixer = Mega.Config(chunk=8, d_key=4, d_value=6).build(5)
    state = mixer(torch.randn(2, 50, 5), mixer.init_state(2))[1]
    assert state.memory.k.shape == (2, 1, 8, 4)
    assert state.memory.v.shape == (2, 1, 8, 6)
    assert mixer.init_state(2, 1000).memory.k.shape[2] == 8
    assert Mega.Config().build(5).init_state(2, 1000).memory.k.shape[2] == 1000


def test_a_layer_has_the_authors_parameters():
    """Theirs at the size of LRA's ListOps, with its norm: 71,683."""
    config = Mega.Config(d_key=64, d_value=160, bias="simple", max_positions=2002, bidirectional=True)
    block = Block(BlockConfig(mixer=config, order="post"), 80)
    assert sum(parameter.numel() for parameter in block.parameters()) == 71_683


def test_the_block_leaves_norm_and_dropout_to_the_layer():
    """In training half of h is dropped, not of u (h - x): where it is, the output is (1 - u) x."""
    torch.manual_seed(0)
    block = Block(BlockConfig(mixer=Mega.Config(), dropout=0.5), 64)
    assert isinstance(block.mixer.norm, torch.nn.LayerNorm)
    assert isinstance(block.mixer_norm, torch.nn.Identity)
    x = torch.randn(2, 9, 64)
    caught = []
    gated = block.mixer._gated
    block.mixer._gated = lambda x, y, u, r, c: caught.append(u) or gated(x, y, u, r, c)
    y = block(x, None, None)[0]
    dropped = torch.isclose(y, (1 - caught[0]) * x, rtol=1e-5, atol=1e-6).float().mean()
    assert 0.45 < dropped < 0.55
    dropped = block.mixer.dropout(torch.ones(1000)).eq(0).float().mean()
    assert 0.4 < dropped < 0.6


@pytest.mark.parametrize("where", ["attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("function", ["softmax", "laplace"])
def test_weights_and_values_are_dropped_in_training_alone(where, function):
    mixer = build(Mega.Config(function=function, **{where: 0.5}), 16)
    x = torch.randn(2, 9, 16)
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])


def test_decays_stay_fp32_in_a_half_precision_model():
    mixer = Mega.Config(bidirectional=True).build(8).bfloat16()
    assert {p.dtype for m in (mixer.average, mixer.backward_average) for p in m.parameters()} == {torch.float32}
    assert mixer.scale.dtype == torch.bfloat16
    assert isinstance(mixer.average, EMA)


@pytest.mark.parametrize("norm", ["layer", "rms", "scale", "batch"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_in_a_model_steps_are_the_whole_under_every_norm(norm, order):
    torch.manual_seed(0)
    block = BlockConfig(mixer=VARIANTS[0], channel=Mlp.Config(activation="silu"), norm=norm, order=order)
    model = language_model(block).eval()
    ids = torch.randint(0, 50, (2, 19))
    with torch.no_grad():
        first = model(ids[:, :11], model.init_state(2))
        stepper, said = model.stepper(), [first.logits]
        state = stepper.begin(first.state)
        for t in range(11, 19):
            logits, state = stepper.step(ids[:, t], state)
            said.append(logits[:, None])
        assert_close(torch.cat(said, 1), model(ids).logits)


def test_weights_fit_larger_chunks():
    """Of a rotary layer, whose bias knows no chunk: within the first chunk of old it answers as it did."""
    small, large = (Mega.Config(chunk=chunk).build(16) for chunk in (4, 9))
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(0))
    assert_close(large(x)[0][:, :4], small(x)[0][:, :4])
    assert relative_error(large(x)[0][:, 4:9], small(x)[0][:, 4:9]) > 1e-4


def test_a_simple_bias_ends_where_its_numbers_do():
    mixer = Mega.Config(bias="simple", max_positions=6).build(8)
    x = torch.randn(1, 7, 8)
    message = "7 tokens are more than the simple bias has numbers for, 6: raise max_positions"
    with pytest.raises(BadInput, match=message):
        mixer(x)
    with pytest.raises(BadInput, match=message):
        mixer.init_state(1, 7)
    _, state = mixer(x[:, :6], mixer.init_state(1))
    with pytest.raises(BadInput, match=message):
        mixer.step(x[:, 6], state)
    _, state = mixer(x[:, :3], mixer.init_state(1))
    with pytest.raises(BadInput, match=message):
        mixer(x[:, 3:], state)
    Mega.Config(bias="simple", max_positions=6, chunk=3).build(8)(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_key": 0}, "d_key is 0: it must be at least 1"),
        ({"d_key": 7}, "d_key is 7: it must be even, take 8"),
        ({"chunk": 0}, "chunk is 0: it must be at least 1"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0: it must be at least 0 and below 1"),
        ({"truncation": 5}, "truncation is for bidirectional layers"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(BadInput, match=message):
        Mega.Config(**settings)


def test_a_layer_that_sees_the_future_takes_no_state():
    state = Mega.Config().build(8).init_state(1)
    with pytest.raises(BadInput, match="build it with bidirectional=False"):
        Mega.Config(bidirectional=True).build(8)(torch.randn(1, 3, 8), state)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Mega.Config(), *VARIANTS])
@pytest.mark.parametrize("sliced", [False, True])
def test_on_a_gpu_values_and_gradients_are_the_cpus(config, sliced, monkeypatch):
    if sliced:
        monkeypatch.setattr(_slices, "SCORES", 2**10)
    here = build(config, 32)
    there = build(config, 32).cuda()
    x, g = (torch.randn(3, 75, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    lengths = torch.tensor([75, 40, 3])
    real = (torch.arange(75) < lengths[:, None])[..., None]
    ours, theirs = here(x, lengths=lengths)[0], there(x.cuda(), lengths=lengths.cuda())[0]
    assert_close(theirs.cpu() * real, ours * real, 1e-4)
    (ours * g * real).sum().backward()
    (theirs * (g * real).cuda()).sum().backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert relative_error(b.grad.cpu(), a.grad) < 1e-3, name
    with torch.autocast("cuda", torch.bfloat16):
        rough = there(x.cuda(), lengths=lengths.cuda())[0]
    assert_close(rough.float().cpu() * real, ours * real, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Mega.Config(), *VARIANTS[:4]])
def test_on_a_gpu_graphed_steps_are_the_whole(config):
    """Tokens fed from the host through one CUDA graph a step, beginning in the middle of a chunk."""
    torch.manual_seed(0)
    model = language_model(BlockConfig(mixer=config, channel=Mlp.Config(activation="silu"))).cuda().eval()
    ids = torch.randint(0, 50, (3, 60), device="cuda")
    with torch.no_grad():
        whole = model(ids).logits
        stepper = model.stepper()
        decode = GraphedDecode(stepper, stepper.begin(model(ids[:, :19], model.init_state(3, 60)).state), ids[:, 19])
        for t in range(19, 60):
            decode.tokens.copy_(ids[:, t])
            torch.testing.assert_close(decode(), whole[:, t], rtol=1e-4, atol=1e-4)


def language_model(block):
    embed = Tokens.Config(vocab_size=50)
    return ModelConfig(d_model=16, blocks=(block,) * 2, embed=embed, readout=Lm.Config(), init_std=0.3).build()
