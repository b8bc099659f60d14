"""What a GPU must agree on with the CPU: the parts, whole and in steps, and their gradients."""

import json
import subprocess
import sys

import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.dlr import DLR
from hippodrome.lti.dss import DSS
from hippodrome.lti.ema import EMA
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.gss import GSS
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.patterns import Chunk, Window
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.task import Batch

pytestmark = pytest.mark.gpu

MIXERS = {
    "h3": H3.Config(),
    "h3 with heads of 4": H3.Config(head_dim=4),
    "ssm": SSM.Config(),
    "attention": Attention.Config(position=Rotary(4)),
    "window": Attention.Config(pattern=Window(size=7)),
    "chunks": Attention.Config(pattern=Chunk(size=7)),
    "gss": GSS.Config(),
    "dlr": SSM.Config(system=DLR.Config()),
    "dlr, one kernel": SSM.Config(system=DLR.Config(d_state=300)),
    "dlr, product": SSM.Config(system=DLR.Config(d_state=8, readout="product")),
    "dss": SSM.Config(system=DSS.Config(version="softmax")),
    "ema": SSM.Config(system=EMA.Config()),
}


def models(mixer):
    config = ModelConfig(
        d_model=32,
        blocks=(BlockConfig(mixer=mixer, channel=Mlp.Config()),) * 2,
        embed=Tokens.Config(vocab_size=50),
        readout=Lm.Config(),
    )
    torch.manual_seed(0)
    here = config.build()
    there = config.build()
    there.load_state_dict(here.state_dict())
    return here, there.cuda()


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_loss_and_gradients_equal_the_cpu(mixer):
    here, there = models(mixer)
    ids = torch.randint(0, 50, (3, 301))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    losses = [here.loss(batch).total, there.loss(batch.to("cuda")).total]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        scale = a.grad.abs().max().clamp(min=1e-6)
        assert (a.grad - b.grad.cpu()).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_whole_equals_chunks_and_steps(mixer):
    _, model = models(mixer)
    model.eval()
    ids = torch.randint(0, 50, (2, 70), device="cuda")
    with torch.no_grad():
        whole = model(ids).logits
        for max_len in (None, 70):
            first = model(ids[:, :33], model.init_state(2, max_len))
            rest, state = [first.logits], first.state
            for t in range(33, 70):
                logits, state = model.step(ids[:, t], state)
                rest.append(logits[:, None])
            torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_bf16_autocast_is_close(mixer):
    _, model = models(mixer)
    ids = torch.randint(0, 50, (2, 129), device="cuda")
    exact = model(ids).logits
    with torch.autocast("cuda", torch.bfloat16):
        rough = model(ids).logits
    assert (rough - exact).norm() < 3e-2 * exact.norm()


def test_a_run_trains_in_a_process_of_its_own(tmp_path):
    """Where nothing has touched the device before."""
    command = [sys.executable, "-m", "hippodrome", "train", "h3.synthetic", "--epochs", "1", "--rows", "64", "--device", "cuda"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 2
