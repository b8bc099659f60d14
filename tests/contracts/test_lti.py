"""What every linear system in hippodrome/lti keeps to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hippodrome.lti._base import LTI
from tests.support import (
    assert_builds_on_meta,
    assert_close,
    assert_gradients,
    assert_rules_name_parameters,
    assert_survives_json,
    build,
    every,
)

CHANNELS = 4
BATCH = 3


def signal(length, *axes, seed=1):
    return torch.randn(*(axes or (BATCH,)), CHANNELS, length, generator=torch.Generator().manual_seed(seed))


def past(system, length=9):
    """A state that remembers something."""
    return system.convolve(signal(length, seed=2), system.init_state(BATCH))[1]


def assert_same_state(found, expected, tolerance=2e-5):
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert_close(ours, theirs, tolerance)


@every(LTI)
@pytest.mark.parametrize("length", [1, 6, 70])
def test_kernel_is_the_unrolled_answer_to_an_impulse(config, length):
    system = build(config, CHANNELS)
    expected = system.kernel(length)
    assert expected.shape == (CHANNELS, length)
    impulse = torch.zeros(1, CHANNELS, length)
    impulse[..., 0] = 1.0
    skip = torch.zeros(CHANNELS) if system.D is None else system.D
    answer = system.convolve(impulse)[0][0]
    assert_close(answer, expected + skip[:, None] * impulse[0])
    state, steps = system.init_state(1), []
    for token in impulse.unbind(-1):
        y, state = system.step(token, state)
        steps.append(y)
    assert_close(torch.stack(steps, -1)[0], answer)


@every(LTI)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6), gated=st.booleans())
def test_any_chunking_gives_the_whole(config, chunks, gated):
    system = build(config, CHANNELS)
    u, pre, post = (signal(sum(chunks), seed=seed) for seed in (3, 4, 5))
    gates = {"pre_gate": pre, "post_gate": post} if gated else {}
    whole, after_whole = system.convolve(u, past(system), **gates)
    state, outputs, start = past(system), [], 0
    for size in chunks:
        part = {name: gate[..., start : start + size] for name, gate in gates.items()}
        y, state = system.convolve(u[..., start : start + size], state, **part)
        outputs.append(y)
        start += size
    assert_close(torch.cat(outputs, -1), whole)
    assert_same_state(state, after_whole)


@every(LTI)
def test_no_state_means_rest(config):
    system = build(config, CHANNELS)
    u = signal(11)
    forgetful, nothing = system.convolve(u)
    assert nothing is None
    assert_close(system.convolve(u, system.init_state(BATCH))[0], forgetful)


@every(LTI)
def test_gates_multiply_what_goes_in_and_what_comes_out(config):
    system = build(config, CHANNELS)
    u, pre, post = (signal(11, seed=seed) for seed in (3, 4, 5))
    assert_close(system.convolve(u, pre_gate=pre, post_gate=post)[0], post * system.convolve(pre * u)[0])
    y, after = system.convolve(u, past(system), pre_gate=pre, post_gate=post)
    plain, expected = system.convolve(pre * u, past(system))
    assert_close(y, post * plain)
    assert_same_state(after, expected)


@every(LTI)
def test_step_is_a_chunk_of_one(config):
    system = build(config, CHANNELS)
    state = past(system)
    for token in signal(5).unbind(-1):
        expected, after = system.convolve(token.unsqueeze(-1), state)
        y, state = system.step(token, state)
        assert_close(y, expected.squeeze(-1))
        assert_same_state(state, after)


@every(LTI)
def test_outputs_are_what_the_input_does_and_what_the_past_owes(config):
    system = build(config, CHANNELS)
    u, state = signal(10), past(system)
    whole, after = system.convolve(u, state)
    assert_close(system.convolve(u)[0] + system.response(state, 10), whole)
    assert_same_state(system.advance(u, state), after)


@every(LTI)
@pytest.mark.parametrize("gated", [False, True])
def test_padding_leaves_no_trace_in_the_state(config, gated):
    system = build(config, CHANNELS)
    u, before = signal(10), past(system)
    lengths = torch.tensor([10, 4, 0])
    padded = torch.where(torch.arange(10) < lengths[:, None, None], u, 5.0)
    gates = {"pre_gate": signal(10, seed=4), "post_gate": signal(10, seed=5)} if gated else {}
    y, after = system.convolve(padded, before, lengths=lengths, **gates)
    for row, length in enumerate(lengths.tolist()):
        state = before.reorder(torch.tensor([row]))
        if length:
            part = {name: gate[row : row + 1, :, :length] for name, gate in gates.items()}
            alone, state = system.convolve(u[row : row + 1, :, :length], state, **part)
            assert_close(y[row, :, :length], alone[0])
        assert_same_state(after.reorder(torch.tensor([row])), state)
    if not gated:
        assert_same_state(system.advance(padded, before, lengths), after)


@every(LTI)
def test_axes_between_batch_and_channels_share_the_systems(config):
    system = build(config, CHANNELS)
    u = signal(7, BATCH, 2)
    y, after = system.convolve(u, system.init_state(BATCH, 2))
    for i in range(2):
        alone, state = system.convolve(u[:, i], system.init_state(BATCH))
        assert_close(y[:, i], alone)
        assert_same_state(after.map(lambda tensor, i=i: tensor[:, i]), state)


@every(LTI)
def test_the_answer_dies_away(config):
    torch.manual_seed(0)
    kernel = config.build(CHANNELS).kernel(30_000)
    assert kernel[:, -1000:].abs().max() < 1e-3 * kernel.abs().max()


@every(LTI)
def test_gradients_reach_every_parameter_through_chunks_as_through_the_whole(config):
    system, u, g = build(config, CHANNELS), signal(12), signal(12, seed=6)
    (system.convolve(u)[0] * g).sum().backward()
    assert_gradients(system)
    whole = {name: p.grad.clone() for name, p in system.named_parameters() if p.requires_grad}
    system.zero_grad()
    first, state = system.convolve(u[..., :5], system.init_state(BATCH))
    second, _ = system.convolve(u[..., 5:], state)
    (torch.cat([first, second], -1) * g).sum().backward()
    for name, expected in whole.items():
        assert_close(system.get_parameter(name).grad, expected, 1e-4)


@every(LTI)
def test_it_is_an_island_of_fp32(config):
    system = build(config, CHANNELS)
    kernel, before = system.kernel(40), past(system)
    u = signal(12).bfloat16()
    expected, after = system.convolve(u.float(), before)
    system = system.to(torch.bfloat16)
    assert {parameter.dtype for parameter in system.parameters()} == {torch.float32}
    assert torch.equal(system.kernel(40), kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = system.convolve(u, before)
        stepped, _ = system.step(u[..., 0], before)
    assert y.dtype == stepped.dtype == torch.bfloat16
    # One rounding to bf16, at the very end.
    assert_close(y.float(), expected, 2**-8)
    assert_close(stepped.float(), expected[..., 0], 2**-8)
    assert_same_state(state, after)


@every(LTI)
def test_config_survives_json(config):
    assert_survives_json(LTI, config)


@every(LTI)
def test_builds_on_meta(config):
    assert_builds_on_meta(config, CHANNELS)


@every(LTI)
def test_optimiser_rules_name_parameters(config):
    assert_rules_name_parameters(config.build(CHANNELS))
