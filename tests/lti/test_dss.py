"""DSS against the numbers of its authors' code (dlr_dsskernel_*, dlr_block_dss_*), and against its softmax written plainly."""

import pytest
import torch

from hippodrome.lti.dss import DSS
from hippodrome.mixers.ssm import SSM
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error

VARIANTS = (
    DSS.Config(d_state=6, version="softmax", length=70),
    DSS.Config(d_state=5, imag="exp", separate_dt=True, skip=False),
    DSS.Config(d_state=5, version="clip", scale=False),
    DSS.Config(d_state=3, imag="zero"),
    DSS.Config(d_state=4, init="lin"),
)

KERNELS = cases("dlr_dsskernel")
BLOCKS = cases("dlr_block_dss")


def settings(name, golden, prefix):
    version = next(kind for kind in ("softmax", "clip", "exp") if kind in name)
    imag = "exp" if f"{prefix}Lambda_log_im" in golden else "zero" if "real" in name else "plain"
    return {
        "d_state": golden[f"{prefix}W"].shape[2],
        "version": version,
        "imag": imag,
        "length": 64,
        "scale": "no-scale" not in name,
        "separate_dt": golden[f"{prefix}log_dt"].dim() == 2,
    }


def theirs(tensors, prefix, direction=0):
    """Their parameters, or gradients, under our names."""
    found = {"log_dt": tensors[f"{prefix}log_dt"], "W": tensors[f"{prefix}W"][direction]}
    if f"{prefix}Lambda" in tensors:
        found["Lambda_re"], found["Lambda_im"] = tensors[f"{prefix}Lambda"].unbind(-1)
    else:
        found["Lambda_re"] = tensors[f"{prefix}Lambda_log_neg_re"]
        for name in ("Lambda_im", "Lambda_log_im"):
            if f"{prefix}{name}" in tensors:
                found["Lambda_im"] = tensors[f"{prefix}{name}"]
    return found


def copy(system, values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(system, name).copy_(value)


def build(name):
    golden = load(name)
    system = DSS.Config(skip=False, **settings(name, golden, "param.")).build(golden["param.W"].shape[1])
    copy(system, theirs(golden, "param."))
    return system, golden


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_and_gradients_are_the_authors(name):
    system, golden = build(name)
    for case in (key for key in golden if key.startswith("out64.kernel")):
        length = int(case.rpartition("L")[2])
        assert relative_error(system.kernel(length), golden[case][0]) < 2e-5
        assert relative_error(system.kernel(length), golden[case.replace("out64", "out")][0]) < (1e-4 if length == 64 else 1e-3)
    (system.kernel(64) * golden["in.cotangent"][0]).sum().backward()
    for ours, expected in theirs(golden, "grad.real.param.").items():
        assert relative_error(getattr(system, ours).grad, expected) < 3e-4, ours


@pytest.mark.parametrize("name", KERNELS)
def test_the_recurrence_answers_with_the_authors_kernel(name):
    """Growing modes of the softmax, too, within its length."""
    system, golden = build(name)
    expected = golden["out64.kernel.real.L64"][0]
    state, answer = system.init_state(1), []
    for t in range(64):
        y, state = system.step(torch.full((1, len(expected)), float(t == 0)), state)
        answer.append(y[0])
    assert relative_error(torch.stack(answer, -1), expected) < 2e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_are_the_authors(name):
    golden = load(name)
    copies, channels = golden["param.kernel.W"].shape[:2]
    system = DSS.Config(**settings(name, golden, "param.kernel."))
    mixer = SSM.Config(system=system, bidirectional=copies == 2, glu="softmax" in name).build(channels)
    systems = [mixer.system] if mixer.backward_system is None else [mixer.system, mixer.backward_system]
    linear = "param.output_linear.0." if mixer.glu else "param.output_linear."
    for i, each in enumerate(systems):
        copy(each, theirs(golden, "param.kernel.", i))
    with torch.no_grad():
        mixer.system.D.copy_(golden["param.D"][0])
        mixer.output_linear.weight.copy_(golden[f"{linear}weight"])
        mixer.output_linear.bias.copy_(golden[f"{linear}bias"].flatten())
    u = golden["in.u"].transpose(1, 2).requires_grad_()
    y, _ = mixer(u)
    assert relative_error(y.transpose(1, 2), golden["out64.y"]) < 2e-5
    (y.transpose(1, 2) * golden["in.cotangent"]).sum().backward()
    assert relative_error(u.grad.transpose(1, 2), golden["grad.in.u"]) < 3e-4
    for i, each in enumerate(systems):
        assert relative_error(each.W.grad, golden["grad.param.kernel.W"][i]) < 3e-4
    assert relative_error(mixer.system.D.grad[None], golden["grad.param.D"]) < 3e-4
    for ours in ("weight", "bias"):
        expected = golden[f"grad.{linear}{ours}"]
        assert relative_error(mixer.output_linear.get_parameter(ours).grad.reshape(expected.shape), expected) < 3e-4, ours
    for ours, expected in theirs(golden, "grad.param.kernel.").items():
        if ours != "W":
            assert relative_error(sum(getattr(each, ours).grad for each in systems), expected) < 3e-4, ours


def test_the_softmax_of_a_mode_sums_to_one_over_its_length():
    torch.manual_seed(0)
    system = DSS.Config(d_state=4, version="softmax", length=37, skip=False).build(2).double()
    with torch.no_grad():
        system.Lambda_re.copy_(torch.tensor([-0.5, 0.3, -2.0, 1.5]))
        system.Lambda_im.uniform_(0.1, 2.0)
    rate = torch.complex(system.Lambda_re, system.Lambda_im)
    lags = torch.arange(37, dtype=torch.float64)
    share = torch.exp(system.log_dt.exp()[:, None, None] * rate[:, None] * lags)
    share = share / share.sum(-1, keepdim=True)
    expected = (torch.view_as_complex(system.W)[..., None] / rate[:, None] * share).sum(1).real
    assert relative_error(system.kernel(37), expected) < 1e-4


def test_lin_starts_at_s4ds_modes():
    system = DSS.Config(d_state=4, init="lin").build(2)
    torch.testing.assert_close(-system.Lambda_re.exp(), torch.full((4,), -0.5))
    torch.testing.assert_close(system.Lambda_im, torch.pi * torch.arange(4.0))


def test_starts_at_the_eigenvalues_of_hippo():
    system = DSS.Config(d_state=8).build(2)
    skew = torch.ones(16, 16).tril(-1) * torch.outer(*[(2 * torch.arange(16.0) + 1).sqrt()] * 2)
    expected = torch.linalg.eigvals((skew - skew.T) / 2).imag.sort(descending=True).values[:8]
    torch.testing.assert_close(system.Lambda_im, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(system.Lambda_re.exp(), torch.full((8,), 0.5))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"d_state": 0}, "d_state"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"version": "softmax", "scale": False}, "scale=True"),
        ({"init": "lin", "imag": "exp"}, "imag='plain'"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, word):
    with pytest.raises(BadInput, match=word) as caught:
        DSS.Config(**settings)
    assert "\n" not in str(caught.value)
