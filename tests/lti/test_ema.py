"""EMA against Mega's own (tests/golden/mega_ema_*, time first), and against its equation written plainly."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.lti.ema import EMA
from hippodrome.mixers.ssm import SSM
from hippodrome.ops.long_conv import long_conv
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error

VARIANTS = (EMA.Config(d_state=3, skip=False),)

CASES = cases("mega_ema")
UNTRUNCATED = [name for name in CASES if "trunc" not in name]
NAMES = ("delta", "alpha", "beta", "gamma")


def build(name):
    """The forward system, and the backward one or None."""
    golden = load(name)
    channels, d_state = len(golden["param.omega"]), golden["param.gamma"].shape[1]
    systems = []
    for i in range(len(golden["param.gamma"]) // channels):
        system = EMA.Config(d_state=d_state, skip=i == 0).build(channels)
        with torch.no_grad():
            for ours in NAMES:
                getattr(system, ours).copy_(golden[f"param.{ours}"].reshape(-1, channels, d_state)[i])
            if i == 0:
                system.D.copy_(golden["param.omega"])
        systems.append(system)
    return systems, golden


def channels_first(x):
    return x.permute(1, 2, 0)


def answer(systems, u, lengths=None):
    """Mega's: padding is silence to the averages but not to the residual, and a silu at the end."""
    real = u
    if lengths is not None:
        real = u * (torch.arange(u.shape[-1]) < lengths[:, None, None])
    y = systems[0].convolve(real)[0] + systems[0].D[:, None] * (u - real)
    for system in systems[1:]:
        y = y + system.from_the_future(real, lag=0)
    return F.silu(y)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_authors(name):
    """Of the truncated ones, as far as they reach."""
    systems, golden = build(name)
    expected = golden["out.kernel"]
    found = torch.cat([system.kernel(expected.shape[1]) for system in systems])
    assert relative_error(found, expected) < 2e-5
    q = torch.cat([system.modes()[0].exp().real for system in systems])
    assert relative_error(q, golden["out.q"].reshape(q.shape)) < 1e-6


@pytest.mark.parametrize("name", UNTRUNCATED)
def test_outputs_and_gradients_are_the_authors(name):
    systems, golden = build(name)
    x = golden["in.x"].requires_grad_()
    y = answer(systems, channels_first(x), golden.get("in.lengths"))
    assert relative_error(y.permute(2, 0, 1), golden["out.y"]) < 2e-5
    (y.permute(2, 0, 1) * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 2e-4
    assert relative_error(systems[0].D.grad, golden["grad.param.omega"]) < 2e-4
    for ours in NAMES:
        found = torch.cat([getattr(system, ours).grad for system in systems])
        expected = golden[f"grad.param.{ours}"]
        assert relative_error(found.reshape(expected.shape), expected) < 2e-4, ours


def test_averages_cut_short_are_the_authors():
    """Of the op, which takes kernels of any length; a causal layer has all of its averages."""
    (system,), golden = build("mega_ema_uni_trunc8_L23")
    x = golden["in.x"].requires_grad_()
    y = F.silu(long_conv(channels_first(x), system.kernel(8), skip=system.D)).permute(2, 0, 1)
    assert relative_error(y, golden["out.y"]) < 2e-5
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 2e-4
    for ours, theirs in {"D": "omega", **dict(zip(NAMES, NAMES, strict=True))}.items():
        expected = golden[f"grad.param.{theirs}"]
        assert relative_error(system.get_parameter(ours).grad.reshape(expected.shape), expected) < 2e-4, ours


@pytest.mark.parametrize("name", ["mega_ema_uni_L23", "mega_ema_uni_L300"])
@pytest.mark.parametrize("mode", ["step", "blockstep"])
def test_tokens_and_blocks_are_the_authors(name, mode):
    (system,), golden = build(name)
    x, key = channels_first(golden["in.x"]), "state.h.t" if mode == "step" else "blockstate.h.t"
    ends = sorted(int(case.removeprefix(key)) for case in golden if case.startswith(key))
    sizes = [1] * x.shape[-1] if mode == "step" else [end - start for start, end in zip([0, *ends], ends, strict=False)]
    state, outputs, seen = system.init_state(len(x)), [], 0
    for chunk in x.split(sizes, -1):
        if mode == "step":
            y, state = system.step(chunk[..., 0], state)
            y = y.unsqueeze(-1)
        else:
            y, state = system.convolve(chunk, state)
        outputs.append(F.silu(y))
        seen += chunk.shape[-1]
        if seen in ends:
            assert relative_error(system.input_weights() * state.z.real, golden[f"{key}{seen}"]) < 1e-5
            assert not state.z.imag.any()
    assert seen in ends
    assert relative_error(torch.cat(outputs, -1).permute(2, 0, 1), golden[f"{mode}.y"]) < 2e-5


def test_equals_the_recurrence_in_float64():
    torch.manual_seed(0)
    system = EMA.Config(d_state=3).build(2).double()
    u = torch.randn(1, 2, 9, dtype=torch.float64)
    p = torch.sigmoid(system.delta)
    h, outputs = torch.zeros(2, 3), []
    for t in range(9):
        h = (1 - p * torch.sigmoid(system.alpha)) * h + p * system.beta * u[0, :, t, None]
        outputs.append((system.gamma * h).sum(-1) * 3**-0.5 + system.D * u[0, :, t])
    torch.testing.assert_close(system.convolve(u)[0][0], torch.stack(outputs, -1), rtol=1e-7, atol=1e-7)


def test_decays_near_one_and_zero_stay_themselves():
    """bfloat16 and even float32 would round q to one at the left, to zero at the right."""
    system = EMA.Config(d_state=2, skip=False).build(1)
    with torch.no_grad():
        system.delta.copy_(torch.tensor([[-18.0, 30.0]]))
        system.alpha.copy_(torch.tensor([[0.0, 30.0]]))
    log_q, _ = system.modes()
    expected = torch.log1p(-torch.sigmoid(torch.tensor(-18.0, dtype=torch.float64)) / 2)
    assert relative_error(log_q[0, :1].real, expected[None]) < 1e-6
    kernel = system.kernel(5)
    kernel.sum().backward()
    assert torch.isfinite(kernel).all()
    assert torch.isfinite(system.delta.grad).all()


def test_the_layer_in_both_directions_answers_the_present_token_twice():
    torch.manual_seed(0)
    mixer = SSM.Config(system=EMA.Config(d_state=3), bidirectional=True, lag=0, glu=False).build(2)
    x = torch.randn(1, 6, 2)
    forward, backward = mixer.system.kernel(6), mixer.backward_system.kernel(6)
    y = mixer.system.D * x
    for t in range(6):
        y[:, t] += sum(forward[:, t - s] * x[:, s] for s in range(t + 1))
        y[:, t] += sum(backward[:, s - t] * x[:, s] for s in range(t, 6))
    torch.testing.assert_close(mixer(x)[0], mixer.output_linear(F.gelu(y)), rtol=2e-5, atol=2e-5)


def test_an_average_of_no_dimension_is_bad_input():
    with pytest.raises(BadInput, match="d_state"):
        EMA.Config(d_state=0)
