"""Mega against the authors' own (tests/golden/mega_*, time first), and against its equations written plainly."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.ema import EMA
from hippodrome.mixers import _distance
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
