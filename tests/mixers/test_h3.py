"""H3 against the authors' layer (tests/golden/h3_layer_*): outputs, gradients, states and steps."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hippodrome.lti.s4d import S4D
from hippodrome.lti.shift import Shift
from hippodrome.mixers.h3 import H3
from hippodrome.part import BadInput
from tests.golden_files import as_complex, cases, load, relative_error, shift_register

VARIANTS = (
    H3.Config(head_dim=4, d_state=8),
    H3.Config(head_dim=2, d_state=4, use_shift=False),
    H3.Config(shift=Shift.Config(d_state=3), diagonal=S4D.Config(d_state=6, init="inv", n_ssm=1, skip=False)),
)

# Our parameter -> the authors'.
NAMES = {
    **{
        f"{linear}.{kind}": f"{linear}.{kind}"
        for linear in ("q_proj", "k_proj", "v_proj", "output_linear")
        for kind in ("weight", "bias")
    },
    "shift.B": "ssm_k_kernel.kernel.B",
    "shift.C": "ssm_k_kernel.kernel.C",
    "shift.D": "ssm_k_D",
    "diagonal.log_dt": "kernel.kernel.log_dt",
    "diagonal.log_A_real": "kernel.kernel.inv_A_real",
    "diagonal.A_imag": "kernel.kernel.A_imag",
    "diagonal.B": "kernel.kernel.B",
    "diagonal.C": "kernel.kernel.C",
    "diagonal.D": "D",
}
LAYERS = [name for name in cases("h3_layer") if not name.endswith("_step")]


def build(name):
    golden = load(name)
    d_model, d_state = golden["param/ssm_k_kernel.kernel.B"].shape
    mixer = H3.Config(head_dim=d_model // len(golden["param/D"]), d_state=d_state).build(d_model)
    shapes = {name: parameter.shape for name, parameter in mixer.named_parameters()}
    assert set(shapes) == set(NAMES)
    mixer.load_state_dict({ours: golden[f"param/{theirs}"].reshape(shapes[ours]) for ours, theirs in NAMES.items()})
    return mixer, golden


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_the_authors(name):
    mixer, golden = build(name)
    x = golden["in/x"].requires_grad_()
    y, state = mixer(x)
    assert state is None
    assert relative_error(y, golden["out/y"]) < 1e-5
    (y * golden["in/g"]).sum().backward()
    assert relative_error(x.grad, golden["grad/x"]) < 1e-4
    for ours, theirs in NAMES.items():
        parameter = mixer.get_parameter(ours)
        assert relative_error(parameter.grad, golden[f"grad/param/{theirs}"].reshape(parameter.shape)) < 1e-4, ours


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_the_authors_on_the_gpu(name):
    mixer, golden = build(name)
    mixer.cuda()
    x = golden["in/x"].cuda().requires_grad_()
    y, _ = mixer(x)
    (y * golden["in/g"].cuda()).sum().backward()
    assert relative_error(y.cpu(), golden["out/y"]) < 1e-4
    assert relative_error(x.grad.cpu(), golden["grad/x"]) < 1e-4
    for ours, theirs in NAMES.items():
        parameter = mixer.get_parameter(ours)
        assert relative_error(parameter.grad.cpu(), golden[f"grad/param/{theirs}"].reshape(parameter.shape)) < 1e-4, ours


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases("h3_layer_?_step"))
def test_segments_and_steps_are_the_authors_on_the_gpu(name):
    """A prompt, steps by the stepper, and what is left as a segment from the state that the stepper leaves."""
    mixer, golden = build(name.removesuffix("_step"))
    mixer.cuda()
    x, prompt = golden["in/x"].cuda(), load(name)["prefill/y"].shape[1]
    with torch.no_grad():
        y, state = mixer(x[:, :prompt], mixer.init_state(len(x)))
        outputs, stepper = [y], mixer.stepper()
        position = torch.full((len(x),), prompt, device="cuda")
        steps = stepper.begin(state, position)
        for t in range(prompt, prompt + 2):
            y, steps = stepper.step(x[:, t], steps, position)
            outputs.append(y.unsqueeze(1))
            position = position + 1
        y, _ = mixer(x[:, prompt + 2 :], stepper.end(steps, position))
    assert relative_error(torch.cat([*outputs, y], 1).cpu(), golden["out/y"]) < 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_float64_confirms_that_the_rest_is_rounding(name):
    mixer, golden = build(name)
    exact, _ = mixer.double()(golden["in/x"].double())
    single, _ = mixer.float()(golden["in/x"])
    assert relative_error(exact, golden["out/y"]) < 1e-5
    assert relative_error(single, exact) < 5.7e-6  # the authors' own


@pytest.mark.parametrize("name", cases("h3_layer_?_step"))
def test_states_and_steps_are_the_authors(name):
    mixer, golden = build(name.removesuffix("_step"))
    expected = load(name)
    prompt = expected["prefill/y"].shape[1]

    def agrees(state, when):
        register = shift_register(mixer.shift.B, state.shift.inputs)
        assert relative_error(register, expected[f"{when}/shift_state"]) < 2e-5
        theirs = as_complex(expected[f"{when}/diag_state"])
        assert relative_error((mixer.diagonal.input_weights() * state.diagonal.z).reshape(theirs.shape), theirs) < 2e-5

    x = golden["in/x"]
    with torch.no_grad():
        y, state = mixer(x[:, :prompt], mixer.init_state(len(x)))
        assert relative_error(y, expected["prefill/y"]) < 2e-5
        agrees(state, "prefill")
        outputs = []
        for t in range(prompt, x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y)
            if t == prompt:
                agrees(state, "step1")
        assert relative_error(torch.stack(outputs, 1), expected["step/y"]) < 2e-5
        agrees(state, "final")


def test_the_released_unfused_code_orders_channels_otherwise():
    """It numbers the output channels j H + h where the fused kernel, and we, number them h p + j."""
    mixer, golden = build("h3_layer_headdim4")
    weight = mixer.output_linear.weight
    with torch.no_grad():
        weight.copy_(weight.unflatten(1, (mixer.head_dim, -1)).transpose(1, 2).flatten(1))
    assert relative_error(mixer(golden["in/x"])[0], golden["out/y_released_order"]) < 1e-5


def test_without_its_shift_the_keys_are_what_they_are():
    torch.manual_seed(0)
    mixer = H3.Config(use_shift=False, d_state=4).build(6)
    assert not any(name.startswith("shift") for name, _ in mixer.named_parameters())
    x = torch.randn(2, 9, 6)
    q, k, v = (linear(x).transpose(1, 2) for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    s, _ = mixer.diagonal.convolve(k * v)
    torch.testing.assert_close(mixer(x)[0], mixer.output_linear((q * s).transpose(1, 2)))


def test_systems_stay_in_fp32_in_a_half_precision_model():
    mixer = H3.Config(d_state=8).build(8).to(torch.bfloat16)
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for part in (mixer.shift, mixer.diagonal) for p in part.parameters()} == {torch.float32}
    y, state = mixer(torch.randn(2, 5, 8).bfloat16(), mixer.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state.shift.inputs.dtype == torch.float32
    assert state.diagonal.z.dtype == torch.complex64


@pytest.mark.parametrize("config", [H3.Config(), *VARIANTS])
def test_activation_checkpointing_gives_equal_gradients(config):
    torch.manual_seed(0)
    mixer = config.build(8)
    x = torch.randn(2, 70, 8, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    plain = torch.autograd.grad(mixer(x)[0].square().sum(), wanted)
    again = torch.autograd.grad(checkpoint(lambda x: mixer(x)[0], x, use_reentrant=False).square().sum(), wanted)
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("config", [H3.Config(), *VARIANTS])
def test_under_autocast_products_are_half_precision_and_systems_are_not(config):
    torch.manual_seed(0)
    mixer = config.build(8)
    x = torch.randn(2, 70, 8)
    exact, after = mixer(x, mixer.init_state(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, mixer.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state.diagonal.z.dtype == torch.complex64
    assert (y - exact).norm() < 2e-2 * exact.norm()
    assert (state.diagonal.z - after.diagonal.z).norm() < 2e-2 * after.diagonal.z.norm()
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_slow_modes_keep_their_phase_for_a_million_tokens(device):
    """The systems and gates of a layer answer an impulse like float64's kernel, as one row and as two halves."""
    torch.manual_seed(0)
    mixer = H3.Config(use_shift=False, diagonal=S4D.Config(init="quad", disc="bilinear", skip=False)).build(1).to(device)
    length, late = 1 << 20, torch.tensor([1 << 16, 1 << 18, (1 << 20) - 1])
    with torch.no_grad():
        mixer.diagonal.log_dt.fill_(-4.6)
        mixer.diagonal.log_A_real.fill_(-9.2)
        exact, scale = copy.deepcopy(mixer.diagonal).double().kernel(length)[0], mixer.diagonal.modes()[1].norm()
        gate, impulse = torch.ones(1, 1, length, device=device), torch.zeros(1, 1, length, device=device)
        impulse[..., 0] = 1.0
        whole, _ = mixer._mix(gate, impulse, gate, None, None)
        state, halves = mixer.init_state(1), []
        for q, k, v in zip(*(signal.chunk(2, -1) for signal in (gate, impulse, gate)), strict=True):
            y, state = mixer._mix(q, k, v, state, None)
            halves.append(y)
    for found in (whole, torch.cat(halves, -1)):
        assert (found[0, 0, late] - exact[late]).abs().max() < (1e-5 if device == "cpu" else 1e-4) * scale


@pytest.mark.parametrize(("head_dim", "near"), [(3, 2), (0, 1), (-2, 1), (7, 8)])
def test_a_head_that_does_not_fit_is_refused(head_dim, near):
    with pytest.raises(BadInput, match=f"head_dim {head_dim} does not divide d_model 16: take {near}"):
        H3.Config(head_dim=head_dim).build(16)
