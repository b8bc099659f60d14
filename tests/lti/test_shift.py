"""Shift against the numbers of H3's SSKernel (tests/golden/sskernel_shift_*), and against its recurrence written plainly."""

import pytest
import torch

from hippodrome.lti.shift import Shift, ShiftState
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error, shift_register

VARIANTS = (Shift.Config(d_state=1), Shift.Config(d_state=5, skip=False))


def randomised(d_state, channels, **settings):
    """A shift whose B is not the first unit vector, so that a mistaken order shows."""
    torch.manual_seed(0)
    system = Shift.Config(d_state=d_state, **settings).build(channels)
    with torch.no_grad():
        system.B.normal_()
    return system


@pytest.mark.parametrize("name", cases("sskernel_shift"))
def test_kernel_gradients_and_step_are_the_authors(name):
    golden = load(name)
    channels, d_state = golden["param/kernel.B"].shape
    system = Shift.Config(d_state=d_state, skip=False).build(channels)
    with torch.no_grad():
        system.B.copy_(golden["param/kernel.B"])
        system.C.copy_(golden["param/kernel.C"][0])
    kernel = system.kernel(golden["out/kernel"].shape[-1])
    assert relative_error(kernel, golden["out/kernel"][0]) < 2e-5
    (kernel * golden["in/g"][0]).sum().backward()
    assert relative_error(system.B.grad, golden["grad/param/kernel.B"]) < 1e-4
    assert relative_error(system.C.grad, golden["grad/param/kernel.C"][0]) < 1e-4

    # The authors start from an arbitrary register; what it still owes is linear, so rest plus register is the whole answer.
    register, u = golden["in/state"], golden["in/u"]
    y, after = system.step(u[..., 0], system.init_state(2))
    owed = (system.C[:, 1:] * register[..., :-1]).sum(-1)
    assert relative_error(y + owed, golden["out/step_y"][:, 0]) < 2e-5
    moved = torch.nn.functional.pad(register[..., :-1], (1, 0))
    assert relative_error(shift_register(system.B, after.inputs) + moved, golden["out/step_state"]) < 2e-5
    _, after = system.convolve(u, system.init_state(2))
    moved = torch.zeros_like(register)
    length = u.shape[-1]
    moved[..., length:] = register[..., : max(0, d_state - length)]
    assert relative_error(shift_register(system.B, after.inputs) + moved, golden["out/forward_state"]) < 2e-5


def test_starts_as_a_plain_filter_of_uniform_taps():
    torch.manual_seed(0)
    system = Shift.Config(d_state=16).build(200)
    assert relative_error(system.kernel(16), system.C) < 1e-6
    assert system.C.abs().max() <= 0.25
    assert system.C.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("length", [1, 3, 7, 8, 20])
def test_equals_the_register_written_plainly(length):
    system = randomised(8, 3)
    u = torch.randn(2, 3, length)
    y, state = system.convolve(u, system.init_state(2))
    x = torch.zeros(2, 3, 8)
    for t in range(length):
        x = torch.cat([torch.zeros(2, 3, 1), x[..., :-1]], -1) + system.B * u[..., t, None]
        torch.testing.assert_close(y[..., t], (system.C * x).sum(-1) + system.D * u[..., t], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(shift_register(system.B, state.inputs), x, rtol=2e-5, atol=2e-5)


def test_state_is_the_last_inputs_oldest_first():
    system = randomised(3, 1)
    u = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]], [[1.0, 2.0, 3.0, 4.0, 5.0]]])
    before = ShiftState(torch.tensor([[[-3.0, -2.0, -1.0]], [[-3.0, -2.0, -1.0]]]))
    _, after = system.convolve(u, before, lengths=torch.tensor([2, 4]))
    assert after.inputs.tolist() == [[[-1.0, 1.0, 2.0]], [[2.0, 3.0, 4.0]]]


def test_a_shift_without_taps_is_refused():
    with pytest.raises(BadInput, match="d_state 0"):
        Shift.Config(d_state=0)
