"""GSS against the public implementation of its pseudo-code (tests/golden/gss_*), and against its equations written plainly."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.mixers.gss import GSS
from hippodrome.part import BadInput
from tests.golden_files import cases, load, relative_error

VARIANTS = (
    GSS.Config(d_state=6, imag="plain", width=5, expansion=1),
    GSS.Config(d_state=6, init="lin"),
)

LAYERS = [name for name in cases("gss_layer") if "reverse" not in name]
SYSTEMS = cases("gss_dss")
# Our parameter -> theirs; C is stored in two halves.
SYSTEM = {"system.Lambda_re": "Lambda_real", "system.Lambda_im": "Lambda_imag", "system.D": "param_D"}
SYSTEM |= {"inner_norm.weight": "norm.weight", "inner_norm.bias": "norm.bias"}
AROUND = {"u_proj": "to_u.0", "v_proj": "to_v.0", "gate_proj": "to_gate", "output_linear": "to_out"}


def names(prefix, inner="dss."):
    """Our parameters, C apart, with the names theirs have."""
    found = {ours: f"{prefix}{inner}{theirs}" for ours, theirs in SYSTEM.items()}
    if inner:
        for ours, theirs in AROUND.items():
            found[f"{ours}.weight"] = f"{prefix}{theirs}.weight"
        found["output_linear.bias"] = f"{prefix}to_out.bias"
    return found


def build(golden, *, prefix="", inner="dss.", imag):
    path = f"param.{prefix}{inner}"
    width, d_state = golden[f"{path}C_real"].shape
    d_model, expansion = 8, 1
    if inner:
        wide, d_model = golden[f"param.{prefix}to_u.0.weight"].shape
        expansion = wide // d_model
    mixer = GSS.Config(d_state=d_state, width=width, expansion=expansion, imag=imag).build(d_model)
    with torch.no_grad():
        for ours, theirs in names(prefix, inner).items():
            mixer.get_parameter(ours).copy_(golden[f"param.{theirs}"])
        mixer.system.C.copy_(torch.stack([golden[f"{path}C_real"], golden[f"{path}C_imag"]], -1))
    return mixer


def assert_gradients(mixer, golden, prefix="", inner="dss."):
    for ours, theirs in names(prefix, inner).items():
        assert relative_error(mixer.get_parameter(ours).grad, golden[f"grad.param.{theirs}"]) < 3e-4, ours
    for part, half in (("C_real", 0), ("C_imag", 1)):
        assert relative_error(mixer.system.C.grad[..., half], golden[f"grad.param.{prefix}{inner}{part}"]) < 3e-4


def imag(name):
    return "plain" if "imagraw" in name else "exp"


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_theirs(name):
    golden = load(name)
    mixer = build(golden, inner="", imag=imag(name))
    x = golden["in.x"].requires_grad_()
    assert relative_error(mixer.system.kernel(x.shape[1]), golden["out64.kernel"]) < 2e-5
    y = mixer.system.convolve(mixer.inner_norm(x).transpose(1, 2))[0].transpose(1, 2)
    assert relative_error(y, golden["out64.y"]) < 2e-5
    if "in.cotangent" not in golden:
        return
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 3e-4
    assert_gradients(mixer, golden, inner="")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_theirs(name):
    """Theirs has the norm before and the residual around it inside."""
    golden = load(name)
    mixer = build(golden, imag=imag(name))
    x = golden["in.x"].requires_grad_()
    normed = F.layer_norm(x, x.shape[-1:], golden["param.norm.weight"], golden["param.norm.bias"])
    y = x + mixer(normed)[0]
    assert relative_error(y, golden["out64.y"]) < 2e-5
    if "in.cotangent" not in golden:
        return
    (y * golden["in.cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.in.x"]) < 3e-4
    assert_gradients(mixer, golden)


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_and_chunks_give_their_outputs(name):
    """Theirs knows no steps."""
    golden = load(name)
    mixer, x = build(golden, imag=imag(name)), golden["in.x"]
    normed = F.layer_norm(x, x.shape[-1:], golden["param.norm.weight"], golden["param.norm.bias"])
    first, state = mixer(normed[:, :20], mixer.init_state(len(x)))
    outputs = [first]
    for token in normed[:, 20:].unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y[:, None])
    assert relative_error(x + torch.cat(outputs, 1), golden["out64.y"]) < 2e-5


def test_read_backwards_it_is_theirs():
    golden = load("gss_layer_reverse_L37")
    mixer, x = build(golden, imag="exp"), golden["in.x"].flip(1)
    normed = F.layer_norm(x, x.shape[-1:], golden["param.norm.weight"], golden["param.norm.bias"])
    assert relative_error((x + mixer(normed)[0]).flip(1), golden["out64.y"]) < 2e-5


def test_the_language_model_is_theirs():
    """Layers without MLPs, no final norm, a head of its own."""
    golden = load("gss_lm_L33")
    mixers = [build(golden, prefix=f"layers.{i}.", imag="exp") for i in range(2)]
    x = golden["param.token_emb.weight"][golden["in.tokens"]]
    for i, mixer in enumerate(mixers):
        weight, bias = (golden[f"param.layers.{i}.norm.{name}"] for name in ("weight", "bias"))
        x = x + mixer(F.layer_norm(x, x.shape[-1:], weight, bias))[0]
    logits = x @ golden["param.to_logits.weight"].T
    assert relative_error(logits, golden["out.logits"]) < 1e-4
    loss = F.cross_entropy(logits.flatten(0, 1), golden["in.labels"].flatten())
    assert relative_error(loss, golden["out.loss"]) < 1e-5
    loss.backward()
    for i, mixer in enumerate(mixers):
        assert_gradients(mixer, golden, prefix=f"layers.{i}.")


@pytest.mark.parametrize("imag", ["exp", "plain"])
def test_equals_its_equations_in_float64(imag):
    torch.manual_seed(0)
    mixer = GSS.Config(d_state=3, width=2, expansion=2, imag=imag).build(4).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    system = mixer.system
    frequency = system.Lambda_im.exp() if imag == "exp" else system.Lambda_im
    rate = torch.complex(-system.Lambda_re.exp(), frequency)
    weights = torch.view_as_complex(system.C) * (rate.exp() - 1) / rate
    s = mixer.inner_norm(F.gelu(x @ mixer.v_proj.weight.T))[0]
    z, answers = torch.zeros(2, 3, dtype=torch.complex128), []
    for t in range(6):
        z = rate.exp() * z + s[t, :, None]
        answers.append((weights * z).sum(-1).real + system.D * s[t])
    expected = mixer.output_linear(F.gelu(mixer.u_proj(x[0])) * mixer.gate_proj(torch.stack(answers)))
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=1e-9, atol=1e-9)


def test_its_state_at_the_papers_size_is_a_mebibyte_a_row():
    with torch.device("meta"):
        mixer = GSS.Config().build(1024)
        assert mixer.init_state(2).nbytes == 2 * 2**20


def test_the_linear_start_remembers_longer_than_the_random_one():
    torch.manual_seed(0)
    rates = {init: GSS.Config(init=init).build(16).system.modes()[0][0] for init in ("random", "lin")}
    assert 1 / rates["random"].real.abs().min() < 100
    assert 1 / rates["lin"].real.abs().min() > 1000
    plain = GSS.Config(init="lin", imag="plain").build(16).system.modes()[0][0]
    torch.testing.assert_close(plain.imag, rates["lin"].imag)


@pytest.mark.parametrize("name", ["d_state", "width", "expansion"])
def test_bad_settings_are_one_clear_line(name):
    with pytest.raises(BadInput, match=f"{name} is 0"):
        GSS.Config(**{name: 0})
