"""What every mixer in hippodrome/mixers keeps to.

The yardstick is the whole sequence in one call without a state. A mixer that sees the future says so with `causal = False`
and is excused from remembering; that it then refuses a state is tested.
"""

import pytest
import torch

from hippodrome.model import BlockConfig, Embed, Mixer, ModelConfig, Readout
from hippodrome.part import BadInput
from tests.support import (
    assert_builds_on_meta,
    assert_close,
    assert_gradients,
    assert_rules_name_parameters,
    assert_survives_json,
    build,
    every,
)

D = 16
BATCH = 3
LENGTHS = (1, 3, 13, 70)
"""A single token, odd lengths, shorter and longer than the 64 taps of the shift and the slots of small windows."""


def vectors(length, batch=BATCH, seed=1):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed))


def rows(*numbers):
    return torch.tensor(numbers)


def causal(config):
    """The mixer, built and stirred, if it can remember."""
    mixer = build(config, D).eval()
    if not mixer.causal:
        pytest.skip("not causal: it has no state")
    return mixer


def fed(mixer, x, sizes, state=None):
    """The outputs of x in chunks of these sizes, and the state after them."""
    state = mixer.init_state(len(x)) if state is None else state
    outputs = []
    for chunk in x.split(sizes, dim=1):
        y, state = mixer(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def stepped(mixer, x, state):
    outputs = []
    for token in x.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@every(Mixer)
@pytest.mark.parametrize("length", LENGTHS)
def test_shape_and_no_state_unless_asked_for(config, length):
    y, state = build(config, D)(vectors(length))
    assert y.shape == (BATCH, length, D)
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert state is None


@every(Mixer)
@pytest.mark.parametrize("length", LENGTHS)
def test_any_two_chunks_give_the_whole(config, length):
    mixer, x = causal(config), vectors(length)
    whole = mixer(x)[0]
    for first in range(0, length, 1 if length < 20 else 23):
        y, _ = fed(mixer, x, [first, length - first] if first else [length])
        assert_close(y, whole)


@every(Mixer)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fixed", [False, True])
def test_token_by_token_gives_the_whole(config, length, fixed):
    mixer, x = causal(config), vectors(length)
    y, _ = stepped(mixer, x, mixer.init_state(BATCH, length if fixed else None))
    assert_close(y, mixer(x)[0])


@every(Mixer)
def test_a_chunk_after_steps_and_steps_after_a_chunk(config):
    mixer, x = causal(config), vectors(13)
    first, state = stepped(mixer, x[:, :4], mixer.init_state(BATCH, 13))
    second, state = mixer(x[:, 4:11], state)
    third, _ = stepped(mixer, x[:, 11:], state)
    assert_close(torch.cat([first, second, third], 1), mixer(x)[0])


@every(Mixer)
@pytest.mark.parametrize("fixed", [False, True])
def test_a_stepper_steps_between_chunks_of_ragged_rows(config, fixed):
    """Its outputs and the states it hands back are those of `step`, whatever the form between; rows may be reordered."""
    mixer, x = causal(config), vectors(90)
    first, order = rows(70, 3, 9), rows(2, 0)
    with torch.no_grad():
        _, state = mixer(x[:, :70], mixer.init_state(BATCH, 90 if fixed else None), lengths=first)
        expected, plain = stepped(mixer, x[:, 70:75], state.clone())
        stepper, position, outputs = mixer.stepper(), first.clone(), []
        state = stepper.begin(state, position)
        for token in x[:, 70:75].unbind(1):
            y, state = stepper.step(token, state, position)
            outputs.append(y)
            position += 1
        assert_close(torch.stack(outputs, 1), expected)
        assert stepper.traffic(state, position) > 0
        state, position = state.reorder(order), position[order]
        y, _ = stepper.step(x[order, 75], state.clone(), position)
        assert_close(y, mixer.step(x[order, 75], plain.reorder(order).clone())[0])
        again, _ = mixer(x[order, 75:80], stepper.end(state, position))
        assert_close(again, mixer(x[order, 75:80], plain.reorder(order))[0])


@every(Mixer)
def test_a_half_precision_stepper_gives_the_steps(config):
    mixer, x = causal(config).to(torch.bfloat16), vectors(13).bfloat16()
    with torch.no_grad():
        expected, _ = stepped(mixer, x, mixer.init_state(BATCH, 13))
        stepper, position, outputs = mixer.stepper(), torch.zeros(BATCH, dtype=torch.int64), []
        state = stepper.begin(mixer.init_state(BATCH, 13), position)
        for token in x.unbind(1):
            y, state = stepper.step(token, state, position)
            outputs.append(y)
            position = position + 1
        assert y.dtype == torch.bfloat16
        assert_close(torch.stack(outputs, 1).float(), expected.float(), 1e-2)


@every(Mixer)
def test_half_precision_chunks_and_steps_give_the_whole(config):
    mixer, x = causal(config).to(torch.bfloat16), vectors(13).bfloat16()
    whole = mixer(x)[0]
    assert whole.dtype == torch.bfloat16
    for y in (fed(mixer, x, [5, 8])[0], stepped(mixer, x, mixer.init_state(BATCH))[0]):
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), whole.float(), 3e-2)


@every(Mixer)
@pytest.mark.parametrize("at", [0, 1, 6, 12])
def test_the_future_does_not_leak(config, at):
    mixer, x = causal(config), vectors(13)
    other = x.clone()
    other[:, at] += vectors(1, seed=2)[:, 0]
    with torch.no_grad():
        before, after = mixer(x)[0], mixer(other)[0]
    moved = (after - before).abs().amax((0, 2)) / before.abs().max()
    # Convolutions by FFT mix the whole row, and leave their rounding everywhere.
    assert moved[:at].sum() <= 1e-6
    assert moved[at] > 1e-4


@every(Mixer)
def test_rows_are_independent(config):
    mixer, x = build(config, D).eval(), vectors(9)
    together = mixer(x)[0]
    for row in range(BATCH):
        assert_close(mixer(x[row : row + 1])[0][0], together[row])


@every(Mixer)
def test_reordering_rows_and_mixing_commute(config):
    mixer, x = causal(config), vectors(13)
    order = rows(2, 0, 0, 1)
    expected = mixer(x)[0][order]
    _, state = mixer(x[:, :6], mixer.init_state(BATCH))
    y, state = mixer(x[order, 6:9], state.reorder(order))
    assert_close(y, expected[:, 6:9])
    assert_close(stepped(mixer, x[order, 9:], state)[0], expected[:, 9:])


@every(Mixer)
def test_a_reset_row_has_seen_nothing_and_the_others_go_on(config):
    mixer, x, g = causal(config), vectors(13), vectors(6, seed=2)
    anew = rows(False, True, False)
    _, state = mixer(x[:, :7], mixer.init_state(BATCH))
    y, state = mixer(x[:, 7:], state.detach().reset(anew, mixer.init_state(BATCH)))
    whole, alone = mixer(x)[0][:, 7:], mixer(x[:, 7:])[0]
    assert_close(y, torch.where(anew[:, None, None], alone, whole))
    # Only the row that starts anew has a gradient to what a mixer learns of its start.
    (y[1] * g[1]).sum().backward()
    found = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.requires_grad}
    mixer.zero_grad()
    (mixer(x[1:2, 7:])[0][0] * g[1]).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in mixer.parameters() if p.grad is not None)
    for name, grad in found.items():
        assert torch.allclose(grad, mixer.get_parameter(name).grad, atol=1e-4 * largest, rtol=1e-3), name
    expected = stepped(mixer, torch.cat([x, x[:, :2]], 1), mixer.init_state(BATCH))[0][:, 13:]
    expected[1] = stepped(mixer, torch.cat([x[1:2, 7:], x[1:2, :2]], 1), mixer.init_state(1))[0][0, 6:]
    assert_close(stepped(mixer, x[:, :2], state)[0], expected)


@every(Mixer)
def test_prompts_of_different_lengths_prefilled_apart_and_joined(config):
    mixer, x = causal(config), vectors(13)
    prompts = (9, 1, 4)
    states = [mixer(x[i : i + 1, :n], mixer.init_state(1))[1] for i, n in enumerate(prompts)]
    following = torch.stack([x[i, n : n + 4] for i, n in enumerate(prompts)])
    y, _ = stepped(mixer, following, type(states[0]).join(states))
    for i, n in enumerate(prompts):
        assert_close(y[i], mixer(x[i : i + 1, : n + 4])[0][0, n:])


@every(Mixer)
def test_every_parameter_has_a_finite_gradient(config):
    mixer, x = build(config, D), vectors(13).requires_grad_()
    (mixer(x)[0] * vectors(13, seed=2)).sum().backward()
    assert_gradients(mixer)
    assert torch.isfinite(x.grad).all()


@every(Mixer)
def test_gradients_through_a_carried_state_are_those_of_the_whole(config):
    mixer, x, g = causal(config), vectors(13), vectors(13, seed=2)
    (mixer(x)[0] * g).sum().backward()
    whole = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.requires_grad}
    mixer.zero_grad()
    (fed(mixer, x, [4, 9])[0] * g).sum().backward()
    largest = max(float(grad.abs().max()) for grad in whole.values())
    for name, expected in whole.items():
        # A gradient that is zero in exact arithmetic (a key's bias in attention) is rounding, and is compared to the others.
        scale = max(1.0, 1e-3 * largest / max(float(expected.abs().max()), 1e-30))
        assert_close(mixer.get_parameter(name).grad, expected, 1e-4 * scale)


@every(Mixer)
def test_padding_on_the_right_is_hidden(config):
    mixer, x = build(config, D).eval(), vectors(13, batch=4)
    lengths = rows(13, 5, 1, 12)
    padded = torch.where(torch.arange(13)[:, None] < lengths[:, None, None], x, 5.0)
    y, _ = mixer(padded, lengths=lengths)
    assert torch.isfinite(y).all()
    for row, length in enumerate(lengths.tolist()):
        assert_close(y[row, :length], mixer(x[row : row + 1, :length])[0][0])


@every(Mixer)
@pytest.mark.parametrize("fixed", [False, True])
def test_padding_leaves_no_trace_in_the_state(config, fixed):
    """Two padded chunks, the second of which holds nothing for one row, then tokens: every row as if alone."""
    mixer, x = causal(config), vectors(20, batch=3)
    first, second = rows(7, 2, 5), rows(3, 6, 0)
    state = mixer.init_state(3, 20 if fixed else None)
    taken = torch.zeros(3, dtype=torch.int64)
    for lengths, width in ((first, 7), (second, 6)):
        chunk = torch.full((3, width, D), 5.0)
        for row, length in enumerate(lengths.tolist()):
            chunk[row, :length] = x[row, taken[row] : taken[row] + length]
        y, state = mixer(chunk, state, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            seen = int(taken[row]) + length
            assert_close(y[row, :length], mixer(x[row : row + 1, :seen])[0][0, seen - length :])
        taken += lengths
    following = torch.stack([x[row, n : n + 3] for row, n in enumerate(taken.tolist())])
    y, _ = stepped(mixer, following, state)
    for row, n in enumerate(taken.tolist()):
        assert_close(y[row], mixer(x[row : row + 1, : n + 3])[0][0, n:])


@every(Mixer)
@pytest.mark.parametrize(
    "spans",
    [[[0, 9], [0, 4], [0, 1]], [[0, 9], [5, 9], [8, 9]], [[2, 7], [0, 9], [3, 4]], [[3, 9]], [[0, 5]]],
    ids=["right", "left", "mixed", "one-left", "one-right"],
)
def test_a_model_hides_padding_on_any_side(config, spans):
    model, x = around(config), vectors(9, batch=len(spans))
    columns = torch.arange(9)[:, None]
    spans = torch.tensor(spans)
    real = (columns >= spans[:, :1, None]) & (columns < spans[:, 1:, None])
    padded = torch.where(real, x, 5.0)
    state = model.init_state(len(spans)) if model.causal else None
    out = model(padded, state, lengths=spans)
    assert torch.isfinite(out.logits).all()
    for row, (start, stop) in enumerate(spans.tolist()):
        alone = x[row : row + 1, start:stop]
        assert_close(out.logits[row, start:stop], model(alone).logits[0])
    if out.state is not None:
        assert out.state.position.tolist() == (spans[:, 1] - spans[:, 0]).tolist()
        token = vectors(1, batch=len(spans), seed=3)
        y, _ = model.step(token[:, 0], out.state)
        for row, (start, stop) in enumerate(spans.tolist()):
            alone = torch.cat([x[row : row + 1, start:stop], token[row : row + 1]], 1)
            assert_close(y[row], model(alone).logits[0, -1])


@every(Mixer)
def test_autocast_to_half_precision_stays_near_fp32(config):
    mixer, x = build(config, D).eval(), vectors(13)
    expected = mixer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)[0]
        assert_close(y.float(), expected, 5e-2)
        if mixer.causal:
            steps, _ = stepped(mixer, x, mixer.init_state(BATCH))
            assert_close(steps.float(), expected, 5e-2)


@every(Mixer)
def test_compiles_into_one_graph(config):
    mixer, x = build(config, D).eval(), vectors(13)
    torch.compiler.reset()
    forward = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, _ = forward(x)
    assert_close(y, mixer(x)[0])
    (y * vectors(13, seed=2)).sum().backward()
    assert_gradients(mixer)


@every(Mixer)
def test_compiles_into_one_graph_with_a_state(config):
    mixer, x = causal(config), vectors(13)
    torch.compiler.reset()
    forward = torch.compile(mixer, fullgraph=True, backend="eager")
    with torch.no_grad():
        y, state = forward(x[:, :8], mixer.init_state(BATCH))
        assert_close(torch.cat([y, forward(x[:, 8:], state)[0]], 1), mixer(x)[0])


@every(Mixer)
def test_config_survives_json(config):
    assert_survives_json(Mixer, config)


@every(Mixer)
def test_builds_on_meta(config):
    assert_builds_on_meta(config, D)


@every(Mixer)
def test_optimiser_rules_and_residual_maps_exist(config):
    mixer = config.build(D)
    assert_rules_name_parameters(mixer)
    for name in mixer.residual_out:
        assert isinstance(mixer.get_submodule(name), torch.nn.Linear)


@every(Mixer)
def test_a_mixer_that_sees_the_future_has_no_state(config):
    mixer = config.build(D)
    if mixer.causal:
        assert mixer.init_state(2).tensors()[0].shape[0] == 2
    else:
        with pytest.raises(BadInput):
            mixer.init_state(2)


class _Vectors(Embed):
    """Inputs that are vectors already."""

    def __init__(self, config, d_model):
        super().__init__()

    def forward(self, inputs, position=None):
        return inputs


class _Hidden(Readout):
    """The hidden vectors themselves."""

    def __init__(self, config, d_model, embed):
        super().__init__()

    def forward(self, hidden, lengths=None):
        return hidden


def around(config):
    """A model of one block that is little but the mixer, its maps large enough to show beside the residual."""
    blocks = (BlockConfig(mixer=config),)
    torch.manual_seed(0)
    return ModelConfig(d_model=D, blocks=blocks, embed=_Vectors.Config(), readout=_Hidden.Config(), init_std=0.3).build().eval()
