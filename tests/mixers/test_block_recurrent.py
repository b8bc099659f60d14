"""The block-recurrent layer against the authors' own (tests/golden/brt_*), and what their decoder cannot do."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers._recurrent_cell import unit
from hippodrome.mixers._t5_bias import BUCKETS, T5Bias
from hippodrome.mixers.block_recurrent import BlockRecurrent
from hippodrome.model import Block, BlockConfig
from hippodrome.ops.attention import attention, visible
from hippodrome.part import BadInput
from hippodrome.patterns import Full, Window
from tests.golden_files import FOLDER, cases, load, relative_error
from tests.support import assert_close, build

VARIANTS = (
    BlockRecurrent.Config(window=4, n_state=3),
    BlockRecurrent.Config(window=3, n_state=5, cell="dual", gate="lstm", n_head=2, d_head=5, d_ff=7),
    BlockRecurrent.Config(window=5, n_state=2, cell="single", state_ids=False),
    BlockRecurrent.Config(window=2, n_state=3, gate="lstm", reset_every=6),
    BlockRecurrent.Config(window=1, n_state=2),
)

LAYERS = [name for name in cases("brt_") if "unit" not in name]
UNITS = cases("brt_unit")
KINDS = {(True, False): "single", (False, True): "skip", (False, False): "dual"}


def settings(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["constructor"])


def block_config(how):
    kind = (how.get("recurrent_single_gate", False), how.get("recurrent_skip_ffn", False))
    mixer = BlockRecurrent.Config(
        n_head=how["num_heads"],
        d_head=how["head_size"],
        window=how["window_length"],
        n_state=how.get("recurrent_num_states", 0),
        cell=KINDS[kind],
        gate="lstm" if how.get("recurrent_gate_type") == "lstm" else "fixed",
        d_ff=how["mlp_dim"],
    )
    return BlockConfig(mixer=mixer, channel=Mlp.Config(d_ff=how["mlp_dim"], activation="relu"), norm="rms")


def gate_names(ours, theirs):
    gates = [f"{theirs}/{gate}_gate" for gate in ("forget", "input")]
    return {
        f"{ours}.bias": [[f"{theirs}/gate_bias"], [f"{gate}/bias" for gate in gates]],
        f"{ours}.weight": [[f"{gate}/kernel" for gate in gates]],
    }


def names():
    """Our parameters -> the tensors of theirs that they are made of, by possibility."""
    projections = [f"_kvq/{kind}_layer/kernel" for kind in ("keys", "values", "queries", "queries2")]
    side = "recurrent_tbase"
    return {
        "mixer_norm.weight": [["tbase/_kvq/pre_attn_layernorm/scale"]],
        "mixer.proj.weight": [[f"tbase/{p}" for p in projections], [f"tbase/{p}" for p in projections[:3]]],
        "mixer.scale": [["tbase/_kvq/attention_scale", "tbase/attention_scale2"], ["tbase/_kvq/attention_scale"]],
        "mixer.out_proj.weight": [["tbase/post_attn_mlp/output_layer/kernel"]],
        "mixer.bias.weight": [["relative_positions/rel_embedding"]],
        "channel_norm.weight": [["tbase/pre_ffn_layernorm/scale"]],
        "channel.fc1.weight": [["tbase/ffn/hidden0/kernel"]],
        "channel.fc2.weight": [["tbase/ffn/output_layer/kernel"]],
        "mixer.cell.initial": [["recurrent_initial_state"]],
        "mixer.cell.ids": [[f"{side}/_kvq/position_embeddings"]],
        "mixer.cell.norm": [[f"{side}/_kvq/pre_attn_layernorm/scale"]],
        "mixer.cell.scale": [[f"{side}/_kvq/attention_scale", f"{side}/attention_scale2"]],
        "mixer.cell.proj.weight": [[f"{side}/{p}" for p in projections]],
        "mixer.cell.out_proj.weight": [[f"{side}/post_attn_mlp/output_layer/kernel"]],
        "mixer.cell.fc1.weight": [[f"{side}/ffn/hidden0/kernel"]],
        "mixer.cell.fc2.weight": [[f"{side}/ffn/output_layer/kernel"]],
        "mixer.cell.ffn_norm": [[f"{side}/pre_ffn_layernorm/scale"]],
        **gate_names("mixer.cell.gate", f"{side}/post_attn_mlp"),
        **gate_names("mixer.cell.ffn_gate", f"{side}/ffn"),
    }


def theirs(golden, kind, name, like):
    found = next(parts for parts in names()[name] if all(f"param.{part}" in golden for part in parts))
    tensors = [golden[f"{kind}.{part}"] for part in found]
    if "kernel" in found[0]:
        tensors = [tensor.T for tensor in tensors]
    return torch.stack(tensors).reshape(like.shape) if len(tensors) > 1 else tensors[0].reshape(like.shape)


def build_block(name, dtype=torch.float32):
    """Their layer as a block, and the tensors of the case."""
    golden, how = load(name), settings(name)
    golden = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.items()}
    block = Block(block_config(how), how["embedding_size"]).to(dtype)
    taken = set()
    with torch.no_grad():
        for ours, parameter in block.named_parameters():
            if ours.startswith("channel.") and ours.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(theirs(golden, "param", ours, parameter))
                taken |= {part for parts in names()[ours] for part in parts}
    assert {key.removeprefix("param.") for key in golden if key.startswith("param.")} <= taken
    return block, golden


def assert_state(state, golden, prefix):
    """Their cache is our last block; positions are whole blocks here."""
    window = state.memory.k.shape[2] // 2
    slots = (state.memory.position[:, None] - window + torch.arange(window)) % (2 * window)
    for found, name in ((state.memory.k, "keys"), (state.memory.v, "values")):
        rows = torch.stack([row[:, slot].transpose(0, 1) for row, slot in zip(found, slots, strict=True)])
        assert_close(rows, golden[f"{prefix}.prev_{name}"])
    if f"{prefix}.recurrent_state" in golden:
        assert_close(state.vectors, golden[f"{prefix}.recurrent_state"])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments_are_the_authors(name, dtype):
    """Values, states window by window, and gradients; a document that begins in the second segment resets its row."""
    block, golden = build_block(name, dtype)
    window, x = block.mixer.window, golden["in.xs1"].requires_grad_()
    state = block.mixer.init_state(2)
    assert_state(state, golden, "state.initial")
    y, after, _ = block(x, state.clone(), None)
    assert relative_error(y, golden["out.ys1"]) < 2e-5
    assert_state(after, golden, "state.after_segment1")
    for number, chunk in enumerate(x.split(window, 1), 1):
        _, state, _ = block(chunk, state, None)
        assert_state(state, golden, f"state.after_window{number}")

    total = (y * golden["in.cotangent"]).sum()
    if "in.cotangent_state" in golden:
        total = total + (after.vectors * golden["in.cotangent_state"]).sum()
    total.backward()
    assert relative_error(x.grad, golden["grad.in.xs1"]) < 3e-4
    for ours, parameter in block.named_parameters():
        if not (ours.startswith("channel.") and ours.endswith("bias")):
            assert relative_error(parameter.grad, theirs(golden, "grad.param", ours, parameter)) < 3e-4, ours

    with torch.no_grad():
        carried = after.detach().reset(golden["in.start2"].bool(), block.mixer.init_state(2))
        y, end, _ = block(golden["in.xs2"], carried.clone(), None)
        assert relative_error(y, golden["out.ys2"]) < 2e-5
        assert_state(end, golden, "state.after_segment2")
        # Ours are right after the first window too, where the authors' decoder keeps the old states.
        position = torch.zeros(2, dtype=torch.int64)
        stepper, outputs = block.mixer.stepper(), []
        state = stepper.begin(carried, position)
        for token in golden["in.xs2"].unbind(1):
            total, delta, state = block.step(token, None, state, position, stepper)
            outputs.append(total if delta is None else total + delta)
        outputs = torch.stack(outputs, 1)
        assert relative_error(outputs[:, :window], golden["step.ys2_window1"]) < 2e-5
        assert relative_error(outputs, golden["out.ys2"]) < 2e-5
        assert_state(stepper.end(state, position), golden, "state.after_segment2")


@pytest.mark.parametrize("name", UNITS)
def test_biases_and_lengths_are_the_authors(name):
    golden = load(name)
    distances = torch.arange(400)
    assert torch.equal(BUCKETS.bucket(distances, torch.zeros_like(distances)), golden["out.bucket_of_distance"].long())
    assert relative_error(unit(golden["in.raw"]), golden["out.normalized_raw"]) < 1e-5
    bias = T5Bias(2)
    with torch.no_grad():
        bias.weight.copy_(golden["param.rel_embedding"])
    queries, keys = golden["out.bias"].shape[2:]
    distance = keys - queries + torch.arange(queries)[:, None] - torch.arange(keys)
    assert relative_error(bias(distance.clamp(min=0))[None], golden["out.bias"]) < 1e-5


@pytest.mark.parametrize("name", UNITS)
def test_attention_is_the_authors(name):
    """Theirs of one window over the one before it and itself: by the op, with the bias, the scale and without the last key."""
    golden = load(name)
    q, k, v = (golden[f"in.{kind}"].transpose(1, 2) for kind in ("queries", "keys", "values"))
    window, before = q.shape[2], k.shape[2] - q.shape[2]
    scale = golden["in.scale_factor"].abs()[:, None, None]
    plain = attention(q * scale, k, v, Full(), scale=1.0)
    assert relative_error(plain.transpose(1, 2), golden["out.attention_nomask_nobias"]) < 1e-5
    seen = visible(Window(window), q, k[:, :, :-1])[0, 0]
    assert torch.equal(F.pad(seen, (0, 1)), golden["out.causal_mask"].bool())
    assert before in (0, window)
    bias = (scale * golden["out.bias"][0])[..., :-1]
    y = attention(q * scale, k[:, :, :-1], v[:, :, :-1], Window(window), bias=bias, scale=1.0)
    assert relative_error(y.transpose(1, 2), golden["out.attention"]) < 1e-5


def test_states_carry_what_no_window_reaches():
    """A token far beyond the reach of windows is felt, until the states forget it or start anew."""
    x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 2] += 1
    for config, felt in (
        (BlockRecurrent.Config(window=4, n_state=3), True),
        (BlockRecurrent.Config(window=4, n_state=3, reset_every=8), False),
        (BlockRecurrent.Config(window=4, n_state=3, reset_every=4), False),
        (BlockRecurrent.Config(window=4, n_state=0), False),
    ):
        mixer = build(config, 16)
        moved = (mixer(other)[0] - mixer(x)[0]).abs().amax((0, 2))
        assert bool(moved[16:].max() > 1e-6) == felt
        assert moved[3:7].min() > 1e-6


def test_gradients_go_through_the_blocks_of_a_segment():
    mixer = build(BlockRecurrent.Config(window=4, n_state=3), 16)
    x = torch.randn(1, 24, 16).requires_grad_()
    mixer(x)[0][:, -1].sum().backward()
    assert (x.grad.abs().amax((0, 2)) > 0).all()


def test_a_sliding_window_is_the_layer_without_states():
    mixer = build(BlockRecurrent.Config(window=3, n_state=0), 16).eval()
    x = torch.randn(2, 11, 16)
    whole = mixer(x)[0]
    state, outputs = mixer.init_state(2), []
    first, state = mixer(x[:, :5], state)
    stepper, position = mixer.stepper(), torch.full((2,), 5)
    state = stepper.begin(state, position)
    for token in x[:, 5:].unbind(1):
        y, state = stepper.step(token, state, position)
        outputs.append(y)
    assert_close(torch.cat([first, torch.stack(outputs, 1)], 1), whole)
    assert not whole[:, 0].any()


def test_the_states_stay_fp32_in_half_precision():
    mixer = BlockRecurrent.Config(window=4, n_state=3).build(16).to(torch.bfloat16)
    y, state = mixer(torch.randn(2, 9, 16).bfloat16(), mixer.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state.vectors.dtype == torch.float32
    assert state.memory.k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "d_model", "message"),
    [
        ({"window": 0}, 16, "window is 0"),
        ({"n_state": -1}, 16, "n_state is -1"),
        ({"n_head": 3}, 16, "take 2"),
        ({"window": 8, "reset_every": 12}, 16, "take 16"),
        ({"dropout": 1.0}, 16, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_built_is_said(fields, d_model, message):
    with pytest.raises(BadInput, match=message):
        BlockRecurrent.Config(**fields).build(d_model)
