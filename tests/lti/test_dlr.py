"""DLR against the numbers of its authors' code (tests/golden/dlr_*), and against its equation written plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

from hippodrome.lti._base import Diagonal
from hippodrome.lti.dlr import DLR, MANY
from hippodrome.mixers.ssm import SSM
from hippodrome.ops.long_conv import long_conv
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error

VARIANTS = (
    DLR.Config(d_state=5, readout="product", init="random"),
    DLR.Config(d_state=9, readout="sum", init="random", skip=False),
    DLR.Config(d_state=6, readout="imag", real_weights=True),
    DLR.Config(d_state=6, eigenvalues="real"),
    DLR.Config(d_state=MANY + 1),
)

KERNELS = cases("dlr_kernel")
BLOCKS = [name for name in cases("dlr_block_uni") + cases("dlr_block_bi") if "klen" not in name and "channels" not in name]
CUT, DOUBLED = (cases(f"dlr_block_*_{word}") for word in ("klen20", "channels2"))
READOUTS = {"real": "real", "imag": "imag", "sum": "sum", "prod": "product"}
# Our parameter -> theirs. Their name says log; it is a square root.
NAMES = {"root_decay": "Lambda_log_neg_re", "omega": "Lambda_im", "W": "W"}


def settings(name):
    """What a case's name says of the version: Lambda_real_W_real and its like."""
    eigenvalues = next((kind for kind in ("imag", "real") if f"Lambda_{kind}" in name), "complex")
    return {"eigenvalues": "imaginary" if eigenvalues == "imag" else eigenvalues, "real_weights": "W_real" in name}


def copy(system, golden, prefix, direction):
    with torch.no_grad():
        for ours, theirs in NAMES.items():
            if f"{prefix}{theirs}" in golden:
                value = golden[f"{prefix}{theirs}"]
                parameter = getattr(system, ours)
                parameter.copy_((value[direction] if ours == "W" else value).reshape(parameter.shape))


def kernels(name):
    """Every read-out of a case, one system a kernel channel of theirs."""
    golden = load(name)
    copies, channels, n_state = golden["param.W"].shape[:3]
    for theirs, ours in READOUTS.items():
        if f"out64.kernel.{theirs}.L64" in golden:
            config = DLR.Config(d_state=n_state, readout=ours, skip=False, **settings(name))
            systems = [config.build(channels) for _ in range(copies)]
            for i, system in enumerate(systems):
                copy(system, golden, "param.", i)
            yield theirs, systems, golden


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_the_authors(name):
    for readout, systems, golden in kernels(name):
        for length, noise in ((64, 1e-4), (1000, 1e-3)):
            found = torch.stack([system.kernel(length) for system in systems])
            assert relative_error(found, golden[f"out64.kernel.{readout}.L{length}"]) < 2e-6
            assert relative_error(found, golden[f"out.kernel.{readout}.L{length}"]) < noise


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_the_authors(name):
    seen = 0
    for readout, systems, golden in kernels(name):
        if f"grad.{readout}.param.W" not in golden:
            continue
        seen += 1
        (torch.stack([system.kernel(64) for system in systems]) * golden["in.cotangent"]).sum().backward()
        for ours, theirs in NAMES.items():
            if f"param.{theirs}" not in golden:
                assert getattr(systems[0], ours).grad is None
                continue
            grads = [getattr(system, ours).grad for system in systems]
            found = torch.stack(grads) if ours == "W" else sum(grads)
            expected = golden[f"grad.{readout}.param.{theirs}"]
            assert relative_error(found.reshape(expected.shape), expected) < 3e-4, (readout, ours)
    assert seen >= 2


@pytest.mark.parametrize("name", KERNELS)
def test_the_recurrence_answers_with_the_authors_kernel(name):
    """Through the state: of N modes, or for the product of N (N + 1) / 2."""
    for readout, systems, golden in kernels(name):
        expected = golden[f"out64.kernel.{readout}.L64"]
        for system, kernel in zip(systems, expected, strict=True):
            state, answer = system.init_state(1), []
            for t in range(64):
                y, state = system.step(torch.full((1, len(kernel)), float(t == 0)), state)
                answer.append(y[0])
            assert relative_error(torch.stack(answer, -1), kernel) < 2e-5, readout


def layer(name):
    golden = load(name)
    copies, channels, n_state = golden["param.kernel.W"].shape[:3]
    readout = next((ours for theirs, ours in READOUTS.items() if f"_{theirs}_" in name.replace("Lambda_", "")), "real")
    if "Lambda" in name:
        readout = "real"
    system = DLR.Config(d_state=n_state, readout=readout, **settings(name))
    mixer = SSM.Config(system=system, bidirectional=copies == 2, glu="_glu_" in name or "lastdim" in name).build(channels)
    linear = "param.output_linear.0." if mixer.glu else "param.output_linear."
    systems = [mixer.system] if mixer.backward_system is None else [mixer.system, mixer.backward_system]
    for i, each in enumerate(systems):
        copy(each, golden, "param.kernel.", i)
    with torch.no_grad():
        mixer.system.D.copy_(golden["param.D"][0])
        mixer.output_linear.weight.copy_(golden[f"{linear}weight"])
        mixer.output_linear.bias.copy_(golden[f"{linear}bias"].flatten())
    return mixer, systems, golden


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_are_the_authors(name):
    """In both directions too: their backward tap j has lag -(j + 1), as in `mixers/ssm`."""
    mixer, systems, golden = layer(name)
    if "lastdim" in name:  # their other layout, which is ours
        assert relative_error(mixer(golden["in.u"])[0], golden["out64.y"]) < 2e-5
        return
    u = golden["in.u"].transpose(1, 2).requires_grad_()
    y, _ = mixer(u)
    assert relative_error(y.transpose(1, 2), golden["out64.y"]) < 2e-5
    if "in.cotangent" not in golden:
        return
    (y.transpose(1, 2) * golden["in.cotangent"]).sum().backward()
    assert relative_error(u.grad.transpose(1, 2), golden["grad.in.u"]) < 3e-4
    assert relative_error(mixer.system.D.grad[None], golden["grad.param.D"]) < 3e-4
    for ours in ("weight", "bias"):
        expected = golden[f"grad.param.output_linear.{'0.' if mixer.glu else ''}{ours}"]
        assert relative_error(mixer.output_linear.get_parameter(ours).grad.reshape(expected.shape), expected) < 3e-4, ours
    for ours, theirs in NAMES.items():
        grads = [getattr(system, ours).grad for system in systems]
        found = torch.stack(grads) if ours == "W" else sum(grads)
        assert relative_error(found, golden[f"grad.param.kernel.{theirs}"]) < 3e-4, ours


@pytest.mark.parametrize("name", CUT)
def test_kernels_cut_short_are_the_authors(name):
    """Of the op, which takes kernels of any length; the mixer has all of them."""
    mixer, (forward, *backward), golden = layer(name)
    # Their backward tap j has lag -(j + 1), the op's lag -j.
    rev = F.pad(backward[0].kernel(20), (1, 0)) if backward else None
    y = long_conv(golden["in.u"], forward.kernel(20), kernel_rev=rev, skip=forward.D)
    assert relative_error(mixer._mix_channels(y.transpose(1, 2)).transpose(1, 2), golden["out64.y"]) < 2e-5


@pytest.mark.parametrize("name", DOUBLED)
def test_two_kernels_a_channel_are_the_authors(name):
    """A layer of twice the channels that hears every signal twice, and a linear map back."""
    golden = load(name)
    copies, channels, n_state = golden["param.kernel.W"].shape[:3]
    mixer = SSM.Config(system=DLR.Config(d_state=n_state), bidirectional=copies == 4, glu=False).build(2 * channels)
    golden["param.kernel.W"] = golden["param.kernel.W"].reshape(-1, 2 * channels, n_state, 2)
    for i, system in enumerate([mixer.system, *([] if mixer.causal else [mixer.backward_system])]):
        copy(system, golden, "param.kernel.", i)
    mixer.output_linear = torch.nn.Linear(2 * channels, channels)
    with torch.no_grad():
        mixer.system.D.copy_(golden["param.D"].flatten())
        mixer.output_linear.weight.copy_(golden["param.output_linear.weight"])
        mixer.output_linear.bias.copy_(golden["param.output_linear.bias"].flatten())
        y, _ = mixer(golden["in.u"].repeat(1, 2, 1).transpose(1, 2))
    assert relative_error(y.transpose(1, 2), golden["out64.y"]) < 2e-5


@pytest.mark.parametrize("length", [64, 1000])
def test_real_and_product_by_halves_are_the_authors(length):
    """Their fifth read-out, of two of ours: the first half of the channels answers with Re K, the second with Re K Im K."""
    found = {readout: [system.kernel(length) for system in systems] for readout, systems, _ in kernels("dlr_kernel_default")}
    expected = load("dlr_kernel_default")[f"out64.kernel.real-prod.L{length}"]
    half = expected.shape[1] // 2
    for i, kernel in enumerate(expected):
        assert relative_error(found["real"][i][:half], kernel[:half]) < 2e-6
        assert relative_error(found["prod"][i][half:], kernel[half:]) < 2e-6


@pytest.mark.parametrize("readout", list(READOUTS.values()))
def test_equals_the_recurrence_in_float64(readout):
    torch.manual_seed(0)
    system = DLR.Config(d_state=4, readout=readout, init="random").build(3).double()
    u = torch.randn(2, 3, 12, dtype=torch.float64)
    modes = torch.exp(torch.complex(-(system.root_decay**2), system.omega))
    answers, w = torch.zeros(3, 12, dtype=torch.complex128), torch.view_as_complex(system.W)
    for lag in range(12):
        answers[:, lag] = (w * modes**lag).sum(-1)
    kernel = {
        "real": answers.real,
        "imag": answers.imag,
        "sum": answers.real + answers.imag,
        "product": answers.real * answers.imag,
    }[readout]
    y, after = system.convolve(u, system.init_state(2))
    assert after.z.shape == (2, 3, 10 if readout == "product" else 4)
    for t in range(12):
        expected = sum(kernel[:, t - s] * u[..., s] for s in range(t + 1)) + system.D * u[..., t]
        torch.testing.assert_close(y[..., t], expected, rtol=1e-9, atol=1e-9)


def test_modes_that_never_decay_keep_their_phase_for_a_million_tokens():
    """Powers in float32 are wrong by a quarter of a radian there."""
    torch.manual_seed(0)
    length, late = 1 << 20, torch.tensor([1 << 16, 1 << 18, (1 << 20) - 1])
    system = DLR.Config(d_state=64, init="random", eigenvalues="imaginary", skip=False).build(1)
    angle = system.omega.double() * late[:, None].double()
    w = system.W[0].double()
    expected = (w[:, 0] * torch.cos(angle) - w[:, 1] * torch.sin(angle)).sum(-1)
    scale = system.W[0].double().norm()
    impulse = torch.zeros(1, 1, length)
    impulse[..., 0] = 1.0
    with torch.no_grad():
        for found in (system.kernel(length)[0], system.convolve(impulse)[0][0, 0]):
            assert (found[late] - expected).abs().max() < 1e-4 * scale


def test_starts_at_the_frequencies_of_the_fourier_transform():
    system = DLR.Config(d_state=8, dt_min=0.02, dt_max=0.02).build(3)
    torch.testing.assert_close(system.omega, 2 * math.pi * torch.arange(8) / 8)
    torch.testing.assert_close(system.root_decay, torch.full((8,), 0.1))
    random = DLR.Config(d_state=500, init="random").build(2)
    assert random.omega.min() >= 0
    assert random.omega.max() < 2 * math.pi
    assert abs(random.W.std() * 500 - 1) < 0.1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"d_state": 0}, "d_state"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"eigenvalues": "real", "real_weights": True, "readout": "product"}, "zero"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, word):
    with pytest.raises(BadInput, match=word) as caught:
        DLR.Config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("readout", ["real", "sum"])
def test_many_modes_take_one_kernel_for_all_rows(readout):
    """As the op has it that few modes take, in values and gradients."""
    torch.manual_seed(0)
    system = DLR.Config(d_state=MANY + 1, readout=readout).build(3)
    u, cotangent = torch.randn(2, 3, 100, requires_grad=True), torch.randn(2, 3, 100)
    found = []
    for convolve in (system.convolve, lambda u: Diagonal.convolve(system, u)):
        system.zero_grad()
        u.grad = None
        y = convolve(u)[0]
        (y * cotangent).sum().backward()
        found.append({"y": y, "u": u.grad, **{name: p.grad.clone() for name, p in system.named_parameters()}})
    for name, value in found[1].items():
        assert relative_error(found[0][name], value) < 2e-5, name
