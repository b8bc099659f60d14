"""diagonal_ssm: the reference against the recurrence itself, the CPU backend over blocks of channels and over long inputs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hippodrome.ops._op import use_backend
from hippodrome.ops.diagonal_ssm import cpu, diagonal_ssm, mode_kernel, mode_powers, mode_states
from tests.golden_files import as_complex, cases, load
from tests.support import assert_close

CHANNELS, MODES = 5, 3


def system(channels=CHANNELS, modes=MODES, dtype=torch.complex128):
    dice = torch.Generator().manual_seed(0)
    draw = torch.randn(4, channels, modes, generator=dice, dtype=torch.float64)
    return torch.complex(-0.1 * draw[0].abs(), draw[1]).to(dtype), torch.complex(draw[2], draw[3]).to(dtype)


def signals(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17])
def test_reference_is_the_recurrence(length):
    log_modes, weights = system()
    u, pre, post = signals(3, 2, CHANNELS, length)
    skip = signals(1, CHANNELS)[0]
    z = state = torch.complex(*signals(2, 2, CHANNELS, MODES))
    steps = []
    for t in range(length):
        v = (pre * u)[..., t]
        z = torch.exp(log_modes) * z + v.unsqueeze(-1)
        steps.append(post[..., t] * ((weights * z).real.sum(-1) + skip * v))
    gates = {"skip": skip, "pre_gate": pre, "post_gate": post}
    y, after = diagonal_ssm.reference(u, log_modes, weights, **gates, state=state, return_state=True)
    assert_close(y, torch.stack(steps, -1), 1e-12)
    assert_close(after, z, 1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 10, 64])
def test_kernel_and_states_are_sums_of_powers(length):
    log_modes, weights = system()
    steps = torch.arange(length)
    powers = torch.exp(log_modes.unsqueeze(-1) * steps)
    u = signals(1, 2, CHANNELS, length)[0]
    assert_close(mode_powers(log_modes, length), powers, 1e-12)
    assert_close(mode_kernel(log_modes, weights, length), (weights.unsqueeze(-1) * powers).sum(1).real, 1e-12)
    assert_close(mode_states(log_modes, u), torch.einsum("bhl,hnl->bhn", u + 0j, powers.flip(-1)), 1e-12)


@pytest.mark.parametrize("name", cases("sskernel_diag"))
def test_kernel_is_the_authors(name):
    """Discretised as they do it, in float64: what is compared is the sum of powers."""
    golden = load(name)
    dt = golden["param/kernel.log_dt"].double().exp().unsqueeze(-1)
    a = torch.complex(-golden["param/kernel.inv_A_real"].double().exp(), golden["param/kernel.A_imag"].double())
    b, c = as_complex(golden["param/kernel.B"].double()), as_complex(golden["param/kernel.C"][0].double())
    if "zoh" in name:
        log_modes, weights = dt * a, 2 * b * c * (torch.exp(dt * a) - 1) / a
    else:
        log_modes = torch.log((1 + dt * a / 2) / (1 - dt * a / 2))
        weights = 2 * b * c * dt / (1 - dt * a / 2)
    expected = golden["out/kernel"][0]
    found = mode_kernel(log_modes.to(torch.complex64), weights.to(torch.complex64), expected.shape[-1])
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("chunk", [2, 16, 64])
@pytest.mark.parametrize("wide", [1, 1 << 30])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_channels_and_groups_of_chunks_are_the_whole(chunk, wide, gated, monkeypatch):
    """5 channels in blocks of 2, 2 and 1; a recurrence cut into groups, twice at chunks of 2, or not at all."""
    length, batch = 8450 if chunk == 2 else 1100, 2
    monkeypatch.setattr(cpu, "CHUNKS", ((0, chunk),))
    monkeypatch.setattr(cpu, "WIDE", wide)
    monkeypatch.setattr(cpu, "WORKSPACE", 2 * batch * -(-length // chunk) * (chunk + 2 * MODES))
    log_modes, weights = system()
    u, pre, post, d_y = signals(4, batch, CHANNELS, length)
    skip = signals(1, CHANNELS)[0]
    state, d_after = torch.complex(*signals(2, 2 * batch, CHANNELS, MODES)).chunk(2)
    leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, skip, state, *([pre, post] if gated else []))]
    found = {}
    for backend in ("reference", "cpu"):
        gates = dict(zip(("pre_gate", "post_gate"), leaves[5:], strict=False))
        with use_backend(backend):
            y, after = diagonal_ssm(*leaves[:3], skip=leaves[3], state=leaves[4], return_state=True, **gates)
        found[backend] = [y, after, *torch.autograd.grad([y, after], leaves, [d_y, d_after])]
    for ours, theirs in zip(found["cpu"], found["reference"], strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("backend", diagonal_ssm.backends)
@pytest.mark.parametrize("given", [(), ("skip",), ("pre_gate",), ("post_gate", "state")])
def test_gradients_against_finite_differences(backend, given):
    length = 5
    log_modes, weights = system(2, 2)
    u, pre, post = signals(3, 1, 2, length)
    extra = {"skip": signals(1, 2)[0], "pre_gate": pre, "post_gate": post, "state": torch.complex(*signals(2, 1, 2, 2))}
    leaves = [t.clone().requires_grad_() for t in (u, log_modes, weights, *(extra[name] for name in given))]

    def call(*t):
        with use_backend(backend):
            return diagonal_ssm(*t[:3], **dict(zip(given, t[3:], strict=True)), return_state=True)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("backend", diagonal_ssm.backends)
def test_any_axes_before_the_channels(backend, lead):
    log_modes, weights = system()
    u = signals(1, 6, CHANNELS, 40)[0][: max(1, torch.Size(lead).numel())].reshape(*lead, CHANNELS, 40)
    with use_backend(backend):
        y, after = diagonal_ssm(u, log_modes, weights, return_state=True)
        rows = [diagonal_ssm(row, log_modes, weights)[0] for row in u.reshape(-1, CHANNELS, 40)]
    assert after.shape == (*lead, CHANNELS, MODES)
    assert_close(y, torch.stack(rows).reshape(u.shape), 1e-12)


@pytest.mark.parametrize(("backend", "wide"), [("reference", 0), ("cpu", 1), ("cpu", 1 << 30)])
def test_modes_that_never_decay_stay_in_phase_over_a_million_tokens(backend, wide, monkeypatch):
    """An impulse at the start, seen until the end: float32 against float64's cosine, and the state that is left."""
    monkeypatch.setattr(cpu, "WIDE", wide)
    length, phases = 1 << 20, torch.tensor([0.3, 1.1, 2.5], dtype=torch.float32)[:, None]
    u = torch.zeros(1, len(phases), length)
    u[..., 0] = 1
    with use_backend(backend), torch.no_grad():
        y, after = diagonal_ssm(u, 1j * phases, torch.ones_like(phases) + 0j, return_state=True)
    at = torch.tensor([0, 1, 1000, 65_537, 777_777, length - 1])
    assert (y[0, :, at] - torch.cos(phases.double() * at)).abs().max() < 1e-4
    assert (after[0] - torch.exp(1j * phases.double() * (length - 1))).abs().max() < 1e-4


def test_chunks_hold_no_more_than_the_input_and_the_workspace(monkeypatch):
    """Neither N x L powers nor the 2 L of an FFT exist, forward or backward."""
    monkeypatch.setattr(cpu, "WORKSPACE", 1 << 16)
    batch, channels, modes, length = 2, 8, 32, 16_384
    log_modes, weights = system(channels, modes, torch.complex64)
    u = signals(1, batch, channels, length)[0].float()
    chunk = cpu.CHUNKS[0][1]
    with torch.no_grad():
        tables = cpu._tables(log_modes, weights, None, chunk, torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch(), torch.no_grad():
        # Below the dispatcher, where a mode sees what happens inside the leaf.
        y, after = cpu._chunks._init_fn(u, None, None, *tables, None)
        cpu._chunks_backward._init_fn(y, after, u, None, None, *tables, None)
    assert largest <= u.nbytes
