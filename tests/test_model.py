"""The whole model: one call for training, chunks, steps and prompts of different lengths; what it starts from and adds up."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hippodrome.channels.glu import Glu
from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ChannelMixer, Model, ModelConfig
from hippodrome.norms import Fp32Parameters
from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import Full, Window
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.readouts.pool import Pool
from hippodrome.task import IGNORE, Batch
from tests import golden_files
from tests.support import assert_close, assert_gradients

VOCAB = 13

HYBRID = ModelConfig(
    d_model=16,
    blocks=(
        BlockConfig(mixer=H3.Config(d_state=8, head_dim=2), channel=Mlp.Config()),
        BlockConfig(mixer=Attention.Config(n_head=2, position=Rotary(4)), channel=Glu.Config(), norm="rms"),
        BlockConfig(mixer=SSM.Config(system=S4D.Config(d_state=8))),
        BlockConfig(mixer=Attention.Config(pattern=Window(size=4)), channel=Mlp.Config()),
    ),
    embed=Tokens.Config(vocab_size=VOCAB, positions=32),
    readout=Lm.Config(),
    init_std=0.2,
)
CLASSIFIER = dataclasses.replace(HYBRID, embed=Signal.Config(channels=2), readout=Pool.Config(classes=3))


def built(config: ModelConfig = HYBRID, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return config.build().eval()


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# One call


def test_no_state_is_returned_unless_one_is_given():
    model = built()
    assert model(ids(2, 5)).state is None
    assert model.loss(Batch(ids(2, 5), ids(2, 5))).state is None


@pytest.mark.parametrize("max_len", [None, 20])
@pytest.mark.parametrize("sizes", [[20], [7, 13], [1, 1, 10, 8], [1] * 20], ids=str)
def test_chunks_give_the_whole(sizes, max_len):
    model, x = built(), ids(2, 20)
    state, said = model.init_state(2, max_len), []
    with torch.no_grad():
        for chunk in x.split(sizes, 1):
            out = model(chunk, state)
            state = out.state
            said.append(out.logits)
        assert_close(torch.cat(said, 1), model(x).logits)
    assert state.position.tolist() == [20, 20]


@pytest.mark.parametrize("max_len", [None, 20])
def test_steps_give_the_whole(max_len):
    model, x = built(), ids(2, 20)
    state, said = model.init_state(2, max_len), []
    with torch.no_grad():
        for token in x.unbind(1):
            logits, state = model.step(token, state)
            said.append(logits)
        assert_close(torch.stack(said, 1), model(x).logits)


def test_prefill_gives_the_last_logits_of_each_row():
    model, x = built(), ids(3, 9)
    for lengths in (None, torch.tensor([9, 1, 4]), torch.tensor([[0, 9], [8, 9], [2, 6]])):
        logits, state = model.prefill(x, model.init_state(3), lengths=lengths)
        out = model(x, model.init_state(3), lengths=lengths)
        stop = [9] * 3 if lengths is None else (lengths if lengths.dim() == 1 else lengths[:, 1]).tolist()
        assert_close(logits, torch.stack([out.logits[row, n - 1] for row, n in enumerate(stop)]))
        assert state.position.tolist() == out.state.position.tolist()


@pytest.mark.parametrize(
    "spans", [[[0, 9], [0, 4], [0, 1]], [[0, 9], [5, 9], [8, 9]], [[2, 7], [0, 9], [3, 4]], [[3, 8]]], ids=str
)
def test_padding_on_any_side_changes_nothing(spans):
    model, x = built(), ids(len(spans), 9)
    out = model(x, model.init_state(len(spans)), lengths=torch.tensor(spans))
    again = model(x, lengths=torch.tensor(spans))
    assert torch.isfinite(out.logits).all()
    token = ids(len(spans), 1, seed=2)
    following, _ = model.step(token[:, 0], out.state)
    for row, (start, stop) in enumerate(spans):
        alone = model(torch.cat([x[row : row + 1, start:stop], token[row : row + 1]], 1)).logits[0]
        assert_close(out.logits[row, start:stop], alone[:-1])
        assert_close(again.logits[row, start:stop], alone[:-1])
        assert_close(following[row], alone[-1])


def test_right_padding_is_the_same_as_lengths_or_spans():
    model, x, lengths = built(), ids(3, 9), torch.tensor([9, 2, 5])
    spans = torch.stack([torch.zeros_like(lengths), lengths], 1)
    by_lengths, by_spans = model(x, lengths=lengths).logits, model(x, lengths=spans).logits
    for row, n in enumerate(lengths.tolist()):
        assert_close(by_spans[row, :n], by_lengths[row, :n])


def test_a_classifier_of_signals_honours_padding():
    model, x = built(CLASSIFIER), torch.randn(3, 9, 2)
    spans = torch.tensor([[0, 9], [4, 9], [2, 3]])
    logits = model(x, lengths=spans).logits
    assert logits.shape == (3, 3)
    for row, (start, stop) in enumerate(spans.tolist()):
        assert_close(logits[row], model(x[row : row + 1, start:stop]).logits[0])
    batch = Batch(x, torch.tensor([0, 2, 1]), spans)
    assert_close(model.loss(batch).total, F.cross_entropy(logits, batch.targets))


# Norms


def stack(norm, order, **settings):
    """Two blocks whose norms have weights of their own, and statistics where they keep any."""
    block = BlockConfig(mixer=H3.Config(d_state=8), channel=Mlp.Config(), norm=norm, order=order, **settings)
    model = built(dataclasses.replace(HYBRID, blocks=(block, block)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


NORMS = {
    "layer": lambda x, m: F.layer_norm(x, x.shape[-1:], m.weight, m.bias),
    "rms": lambda x, m: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.weight,
    "scale": lambda x, m: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight[0],
    "scalar": lambda x, m: m.scale * (x - x.mean(-1, keepdim=True) + m.shift) / x.std(-1, correction=0, keepdim=True),
    "batch": lambda x, m: (x - m.running_mean) / (m.running_var + 1e-5).sqrt() * m.weight + m.bias,
}


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_stand_before_the_maps_or_behind_the_sums(norm, order):
    model, by = stack(norm, order), NORMS[norm]
    x = expected = model.embed(ids(2, 9))
    for block in model.blocks:
        for part, scale in ((block.mixer, block.mixer_norm), (block.channel, block.channel_norm)):
            total = expected + part(by(expected, scale) if order == "pre" else expected)[0]
            expected = total if order == "pre" else by(total, scale)
        x = block(x, None, None)[0]
    assert_close(x, expected)
    if order == "pre":
        expected = by(expected, model.final_norm)
    assert_close(model(ids(2, 9)).logits, model.readout(expected))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("norm", NORMS)
def test_whole_is_chunks_and_steps_under_every_norm(norm, order):
    model, x = stack(norm, order), ids(2, 12)
    with torch.no_grad():
        first = model(x[:, :5], model.init_state(2))
        state, said = first.state, [first.logits]
        for token in x[:, 5:].unbind(1):
            logits, state = model.step(token, state)
            said.append(logits[:, None])
        assert_close(torch.cat(said, 1), model(x).logits)


@pytest.mark.parametrize("case", golden_files.cases("dlr_transposedln"))
def test_the_scalar_norm_is_the_authors(case):
    golden = golden_files.load(case)
    norm = stack("scalar", "post").blocks[0].mixer_norm
    norm.load_state_dict({"scale": golden["param.s"], "shift": golden["param.m"]})
    x = golden["in.x"].transpose(1, 2).requires_grad_()
    y = norm(x)
    (y * golden["in.cotangent"].transpose(1, 2)).sum().backward()
    assert_close(y.transpose(1, 2), golden["out.y"], 1e-5)
    assert_close(x.grad.transpose(1, 2), golden["grad.in.x"], 1e-4)
    assert_close(norm.scale.grad, golden["grad.param.s"], 1e-4)
    assert_close(norm.shift.grad, golden["grad.param.m"], 1e-4)


def test_the_scalar_norm_of_equal_channels_is_finite():
    norm, x = stack("scalar", "post").blocks[0].mixer_norm, torch.ones(2, 3, 4, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(norm(x)).all()
    assert torch.isfinite(x.grad).all()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_a_batch_norm_in_training_takes_all_positions_and_remembers_them():
    norm = stack("batch", "pre").train().blocks[0].mixer_norm
    x = 3 + 2 * torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    before, rows = norm.running_mean.clone(), x.reshape(28, 16)
    expected = (x - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    assert_close(norm(x), expected)
    assert_close(norm.running_mean, 0.9 * before + 0.1 * rows.mean(0))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32


@pytest.mark.parametrize("order", ["pre", "post"])
def test_dropout_falls_on_what_a_block_adds(order):
    """Of everything dropped, the input and its norms are left."""
    model = stack("scale", order, dropout=1.0).train()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    block = model.blocks[0]
    expected = x if order == "pre" else block.channel_norm(block.mixer_norm(x))
    assert_close(block(x, None, None)[0], expected)


# Loss


def test_loss_is_the_cross_entropy_of_the_logits():
    model, x = built(), ids(2, 9)
    targets = ids(2, 9, seed=2)
    targets[0, :3] = IGNORE
    loss = model.loss(Batch(x, targets))
    assert_close(loss.total, F.cross_entropy(model(x).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
    nats, count = loss.parts["loss"]
    assert count == 15
    assert not nats.requires_grad
    assert_close(nats / count, loss.total)


def test_loss_of_nothing_asked_is_zero_and_not_nan():
    model, x = built(), ids(2, 5)
    loss = model.loss(Batch(x, torch.full_like(x, IGNORE)))
    assert loss.total == 0
    loss.total.backward()
    assert_gradients(model)


def test_loss_continues_from_a_state():
    model, x, targets = built(), ids(2, 12), ids(2, 12, seed=2)
    whole = model.loss(Batch(x, targets)).parts["loss"][0]
    first = model.loss(Batch(x[:, :5], targets[:, :5]), model.init_state(2))
    second = model.loss(Batch(x[:, 5:], targets[:, 5:]), first.state.detach())
    assert_close(first.parts["loss"][0] + second.parts["loss"][0], whole)


class Talkative(ChannelMixer):
    """A channel mixer with an extra loss and a gauge."""

    def __init__(self, config, d_model):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * 0, {"loss/extra": self.scale**2, "load": self.scale * 10}


def test_extra_losses_of_all_blocks_are_added_and_gauges_are_not():
    block = BlockConfig(mixer=Attention.Config(), channel=Talkative.Config())
    model = built(dataclasses.replace(HYBRID, blocks=(block, block)))
    x = ids(2, 5)
    loss = model.loss(Batch(x, x))
    nats, count = loss.parts["loss"]
    assert_close(loss.total, nats / count + 8.0)
    assert loss.parts["loss/extra"][0] == 8
    assert loss.parts["load"][0] == 40
    assert model(x).aux["load"] == 40
    loss.total.backward()
    assert all(block.channel.scale.grad == 4 for block in model.blocks)


# Training


def gradients(model: Model, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model.loss(batch).total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4])], ids=["whole", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(lengths, dropout):
    blocks = tuple(dataclasses.replace(block, dropout=dropout) for block in HYBRID.blocks)
    model = built(dataclasses.replace(HYBRID, blocks=blocks)).train()
    batch = Batch(ids(2, 9), ids(2, 9, seed=2), lengths)
    plain = gradients(model, batch)
    model.activation_checkpointing = True
    for name, found in gradients(model, batch).items():
        assert_close(found, plain[name], 1e-6)


def test_activation_checkpointing_runs_blocks_again_in_training_only():
    model = built()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    batch = Batch(ids(2, 9), ids(2, 9))
    model.loss(batch).total.backward()
    assert len(calls) == 1
    model.train().loss(batch).total.backward()
    assert len(calls) == 3


def test_every_parameter_has_a_finite_gradient():
    model = built()
    model.loss(Batch(ids(2, 9), ids(2, 9, seed=2))).total.backward()
    assert_gradients(model)


def test_dropout_acts_on_what_joins_the_residual_stream():
    blocks = tuple(dataclasses.replace(block, dropout=0.5) for block in HYBRID.blocks)
    model, x = built(dataclasses.replace(HYBRID, blocks=blocks)), ids(2, 9)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


# What it starts from


def test_weights_start_as_gpt2s():
    block = BlockConfig(mixer=Attention.Config(), channel=Mlp.Config())
    config = ModelConfig(d_model=128, blocks=(block,) * 8, embed=Tokens.Config(vocab_size=1000), readout=Lm.Config(tied=False))
    model = built(config)
    for name, parameter in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif parameter.dim() == 1:
            assert not parameter.any(), name
        else:
            narrow = name.endswith(("out_proj.weight", "fc2.weight"))
            expected = 0.02 / math.sqrt(16) if narrow else 0.02
            assert float(parameter.std()) == pytest.approx(expected, rel=0.05), name
            assert abs(float(parameter.mean())) < expected / 20, name


def test_the_same_seed_gives_the_same_weights():
    one, two, other = built(), built(), built(seed=1)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.embed.table.weight, other.embed.table.weight)


def test_blocks_of_one_config_have_their_own_weights():
    block = BlockConfig(mixer=Attention.Config(), channel=Mlp.Config())
    model = built(dataclasses.replace(HYBRID, blocks=(block, block)))
    assert not torch.equal(model.blocks[0].mixer.Wqkv.weight, model.blocks[1].mixer.Wqkv.weight)


def test_builds_on_meta():
    with torch.device("meta"):
        ghost = HYBRID.build()
    real = built()
    assert {name: t.shape for name, t in ghost.state_dict().items()} == {name: t.shape for name, t in real.state_dict().items()}
    ghost.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(ghost.eval()(ids(2, 9)).logits, real(ids(2, 9)).logits)


def test_half_precision_keeps_the_state_spaces_in_fp32():
    model, x = built(), ids(2, 9)
    expected = model(x).logits
    half = built().to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        island = ".shift." in name or ".diagonal." in name or ".system." in name
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), name
    for name, parameter in model.named_parameters():
        if ".diagonal." in name:
            assert torch.equal(half.get_parameter(name), parameter), f"{name} was rounded on the way"
    assert half(x).logits.dtype == torch.bfloat16
    assert_close(half(x).logits.float(), expected, 5e-2)
    assert_close(half(x, half.init_state(2)).logits.float(), expected, 5e-2)
    assert {parameter.dtype for parameter in half.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("config", [HYBRID, CLASSIFIER], ids=["hybrid", "classifier"])
def test_config_survives_json(config):
    again = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert built(again).state_dict().keys() == built(config).state_dict().keys()


def test_the_tied_embedding_is_saved_once():
    names = list(built().state_dict())
    assert [name for name in names if "readout" in name] == []
    assert len(names) == len(set(names))


# What it refuses


def test_a_model_that_sees_the_future_has_no_state():
    blocks = (HYBRID.blocks[0], BlockConfig(mixer=Attention.Config(pattern=Full())))
    model = built(dataclasses.replace(HYBRID, blocks=blocks))
    assert not model.causal
    assert built().causal
    with pytest.raises(BadInput, match="sees the future"):
        model.init_state(2)


@pytest.mark.parametrize("change", [{"d_model": 0}, {"d_model": -4}, {"blocks": ()}])
def test_a_model_of_nothing_is_refused(change):
    with pytest.raises(BadInput, match="a model needs d_model >= 1 and at least one block"):
        dataclasses.replace(HYBRID, **change).build()


def test_sizes_that_do_not_fit_the_width_are_named_by_the_part():
    with pytest.raises(BadInput, match="4 heads do not divide d_model 18"):
        dataclasses.replace(HYBRID, d_model=18).build()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (5, 1)])
def test_small_batches_and_lengths(batch, length):
    model, x = built(), ids(batch, length)
    out = model(x, model.init_state(batch))
    assert out.logits.shape == (batch, length, 16)
    assert_close(out.logits, model(x).logits)


def test_only_the_own_parameters_of_an_fp32_island_keep_their_precision():
    class Island(Fp32Parameters):
        def __init__(self):
            super().__init__()
            self.decay = nn.Parameter(torch.ones(2))
            self.map = nn.Linear(2, 2)

    island = Island().to(torch.bfloat16)
    assert island.decay.dtype == torch.float32
    assert island.map.weight.dtype == torch.bfloat16
