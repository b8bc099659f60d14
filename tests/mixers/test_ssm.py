"""The S4D layer against the authors' (tests/golden/s4d_*): kernel, outputs, gradients, chunks and steps.

S4's version 4 has the other sign of A's imaginary part; conjugating B and C makes up for it.
"""

import pytest
import torch

from hippodrome.lti._base import DiagonalState
from hippodrome.lti.s4 import S4
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.ssm import SSM
from hippodrome.part import BadInput
from tests.golden_files import as_complex, cases, load, relative_error

VARIANTS = (
    SSM.Config(system=S4D.Config(d_state=8, init="inv", disc="bilinear"), glu=False),
    SSM.Config(system=S4D.Config(d_state=8), bidirectional=True),
    SSM.Config(system=S4D.Config(d_state=4), bidirectional=True, lag=0),
    SSM.Config(system=S4.Config(d_state=8, length=32), glu=False),
)

CONJUGATE = torch.tensor([1.0, -1.0])
VERSION_4 = cases("s4d_diag")
CAUSAL = [name for name in VERSION_4 if "_bi_" not in name]


def conjugated(pairs):
    return pairs * CONJUGATE


def build(name):
    """The layer with the golden weights. In the bidirectional case the authors' two directions share all but C."""
    golden = load(name)
    init, disc = name.split("_")[2:4]
    copies, half = golden["param/layer.kernel.A_imag"].shape
    channels = golden["param/layer.D"].shape[1]
    system = S4D.Config(d_state=2 * half, init=init, disc=disc, n_ssm=copies)
    mixer = SSM.Config(system=system, bidirectional="_bi_" in name).build(channels)
    with torch.no_grad():
        for direction, target in enumerate(systems(mixer)):
            target.log_dt.copy_(golden["param/layer.kernel.inv_dt"][:, 0])
            target.log_A_real.copy_(golden["param/layer.kernel.A_real"])
            target.A_imag.copy_(golden["param/layer.kernel.A_imag"])
            target.B.copy_(conjugated(golden["param/layer.kernel.B"][0]))
            target.C.copy_(conjugated(golden["param/layer.kernel.C"][direction]))
        mixer.system.D.copy_(golden["param/layer.D"][0])
        mixer.output_linear.weight.copy_(golden["param/output_linear.0.weight"])
        mixer.output_linear.bias.copy_(golden["param/output_linear.0.bias"])
    return mixer, golden


def systems(mixer):
    return [mixer.system] if mixer.backward_system is None else [mixer.system, mixer.backward_system]


def gradients(mixer):
    """Ours under the authors' names and shapes."""
    both = systems(mixer)

    def shared(name):
        return sum(getattr(system, name).grad for system in both)

    return {
        "layer.D": mixer.system.D.grad[None],
        "layer.kernel.inv_dt": shared("log_dt")[:, None],
        "layer.kernel.A_real": shared("log_A_real"),
        "layer.kernel.A_imag": shared("A_imag"),
        "layer.kernel.B": conjugated(shared("B"))[None],
        "layer.kernel.C": conjugated(torch.stack([system.C.grad for system in both])),
        "output_linear.0.weight": mixer.output_linear.weight.grad,
        "output_linear.0.bias": mixer.output_linear.bias.grad,
    }


@pytest.mark.parametrize("name", VERSION_4)
def test_kernels_are_the_authors(name):
    mixer, golden = build(name)
    for direction, system in enumerate(systems(mixer)):
        length = golden["out/kernel"].shape[-1]
        assert relative_error(system.kernel(length), golden["out64/kernel"][direction]) < 1e-5
        for case, rate in (("kernel", 1.0), ("kernel_short", 1.0), ("kernel_2L", 1.0), ("kernel_rate2", 2.0)):
            expected = golden[f"out/{case}"][direction]
            assert relative_error(system.kernel(expected.shape[-1], rate=rate), expected) < 2e-5, case


@pytest.mark.parametrize("name", VERSION_4)
def test_outputs_and_gradients_are_the_authors(name):
    mixer, golden = build(name)
    x = golden["in/x"].requires_grad_()
    y, _ = mixer(x)
    assert relative_error(y, golden["out64/y"]) < 1e-5
    (y * golden["in/g"]).sum().backward()
    assert relative_error(x.grad, golden["grad/x"]) < 1e-4
    for theirs, found in gradients(mixer).items():
        assert relative_error(found, golden[f"grad/param/{theirs}"]) < 1e-4, theirs


@pytest.mark.parametrize("name", VERSION_4)
def test_padding_is_as_if_the_authors_had_cut_it(name):
    mixer, golden = build(name)
    x, expected = golden["in/x"], golden["out/y_lengths"]
    lengths = torch.tensor([x.shape[1] - 5] + [x.shape[1] // 3] * (len(x) - 1))
    y, _ = mixer(x, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        assert relative_error(y[row, :length], expected[row, :length]) < 2e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_chunks_are_the_authors(name):
    mixer, golden = build(name)
    b_bar = mixer.system.input_weights()
    half = golden["in/x"].shape[1] // 2
    state, outputs = mixer.init_state(len(golden["in/x"])), []
    for i, chunk in enumerate(golden["in/x"].split(half, dim=1), start=1):
        y, state = mixer(chunk, state)
        outputs.append(y)
        # Their state is the conjugate, as is their A.
        assert relative_error((b_bar * state.z).conj(), as_complex(golden[f"chunk/state{i}"])) < 2e-5
    assert relative_error(torch.cat(outputs, 1), golden["chunk/y"]) < 2e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_are_the_authors(name):
    mixer, golden = build(name)
    log_modes, _ = mixer.system.modes()
    b_bar = mixer.system.input_weights()
    assert relative_error(log_modes.exp().conj(), as_complex(golden["step_diag/dA"])) < 2e-5
    assert relative_error(b_bar.conj(), as_complex(golden["step_diag/dB"])) < 2e-5
    state, outputs = mixer.init_state(len(golden["in/x"])), []
    for t, token in enumerate(golden["in/x"].unbind(1)):
        y, state = mixer.step(token, state)
        outputs.append(y)
        if t == 0:
            assert relative_error((b_bar * state.z).conj(), as_complex(golden["step_diag/state1"])) < 2e-5
    assert relative_error(torch.stack(outputs, 1), golden["step_diag/y"]) < 2e-5
    assert isinstance(state, DiagonalState)
    assert relative_error((b_bar * state.z).conj(), as_complex(golden["step_diag/state"])) < 2e-5


def test_the_minimal_s4d_is_the_same_layer():
    golden = load("s4d_minimal")
    channels, half = golden["param/kernel.A_imag"].shape
    mixer = SSM.Config(system=S4D.Config(d_state=2 * half)).build(channels)
    ours = {
        "system.log_dt": "kernel.log_dt",
        "system.log_A_real": "kernel.log_A_real",
        "system.A_imag": "kernel.A_imag",
        "system.C": "kernel.C",
        "system.D": "D",
        "output_linear.weight": "output_linear.0.weight",
        "output_linear.bias": "output_linear.0.bias",
    }
    with torch.no_grad():
        for name, theirs in ours.items():
            parameter = mixer.get_parameter(name)
            parameter.copy_(golden[f"param/{theirs}"].reshape(parameter.shape))
    assert relative_error(mixer.system.kernel(70), golden["out64/kernel"]) < 1e-5
    x = golden["in/x"].requires_grad_()
    y, _ = mixer(x.transpose(1, 2))
    assert relative_error(y.transpose(1, 2), golden["out/y"]) < 2e-5
    (y.transpose(1, 2) * golden["in/g"]).sum().backward()
    assert relative_error(x.grad, golden["grad/x"]) < 1e-4
    for name, theirs in ours.items():
        expected = golden[f"grad/param/{theirs}"]
        assert relative_error(mixer.get_parameter(name).grad.reshape(expected.shape), expected) < 1e-4, theirs


def test_backwards_is_forwards_seen_from_the_end():
    """The second system answers the future with its kernel, the next token meeting the first tap."""
    torch.manual_seed(0)
    mixer = SSM.Config(system=S4D.Config(d_state=4), bidirectional=True, glu=False).build(3)
    assert not mixer.causal
    assert mixer.backward_system.D is None
    x = torch.randn(2, 7, 3)
    forward, backward = mixer.system.kernel(7), mixer.backward_system.kernel(7)
    y = torch.zeros(2, 7, 3)
    for t in range(7):
        y[:, t] = mixer.system.D * x[:, t]
        y[:, t] += sum(forward[:, t - s] * x[:, s] for s in range(t + 1))
        y[:, t] += sum((backward[:, s - t - 1] * x[:, s] for s in range(t + 1, 7)), torch.zeros(2, 3))
    expected = mixer.output_linear(torch.nn.functional.gelu(y))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=2e-5, atol=2e-5)


def test_a_bidirectional_layer_has_no_state():
    mixer = SSM.Config(bidirectional=True).build(4)
    with pytest.raises(BadInput, match="bidirectional"):
        mixer.init_state(2)
    with pytest.raises(BadInput, match="bidirectional"):
        mixer(torch.zeros(1, 3, 4), mixer.system.init_state(1))
    with pytest.raises(BadInput, match="bidirectional"):
        mixer.step(torch.zeros(1, 4), mixer.system.init_state(1))


def test_dropout_falls_between_the_system_and_the_linear_map():
    torch.manual_seed(0)
    mixer = SSM.Config(dropout=0.5).build(4)
    x = torch.randn(1, 6, 4)
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])
