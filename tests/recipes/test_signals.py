"""The signal recipes: any system by name, and every task from its files to its scores."""

import json

import pytest
import torch

from hippodrome.mixers.ssm import SSM
from hippodrome.part import BadInput, names
from hippodrome.patterns import Full
from hippodrome.positions import Rotary
from hippodrome.recipes._systems import mixer_named
from hippodrome.recipes.signals import Body, image, waveform
from tests.commands import run
from tests.tasks import test_dna, test_image, test_waveform

TINY = ["--n-layer", 1, "--d-model", 8, "--steps", 2, "--batch-size", 4, "--eval-batches", 1, "--device", "cpu"]
FILES = {"image": test_image.tiny, "waveform": test_waveform.tiny, "dna": test_dna.tiny}
MORE = {"image": ["--permuted"], "waveform": ["--length", 20], "dna": ["--length", 40]}


@pytest.mark.parametrize("name", FILES)
def test_from_files_to_scores(tmp_path, name):
    values = FILES[name](tmp_path / "data") if (tmp_path / "data").mkdir() is None else {}
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    result = run("train", f"signals.{name}", *words, *MORE[name], *TINY, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 <= report["scores"]["test"]["accuracy"] <= 1
    assert "(commonest class)" in result.out
    again = run("eval", tmp_path / "run", "--device", "cpu")
    assert again.code == 0, again.err
    if name != "image":
        assert len(json.loads((tmp_path / "run" / "classes.json").read_text())) == 2


@pytest.mark.parametrize("name", [*names("mixers"), *names("lti")])
def test_any_system_by_name(name):
    config = image(body=Body(system=name, n_layer=1, d_model=16))
    torch.manual_seed(0)
    assert config.model.build()(torch.randn(2, 20, 1)).logits.shape == (2, 10)


def test_systems_know_the_length_and_attention_its_positions():
    assert waveform(length=500, body=Body(system="s4")).model.blocks[0].mixer.system.length == 500
    attention = image(body=Body(system="attention", d_model=64)).model.blocks[0].mixer
    assert attention.position == Rotary()


def test_both_ways():
    def of(name):
        return mixer_named(name, d_model=16, length=20, bidirectional=True)

    assert of("dlr") == SSM.Config(system=of("dlr").system, bidirectional=True)
    assert of("attention").pattern == Full()
    assert not of("linear_attention").causal
    with pytest.raises(BadInput, match="h3 looks one way only"):
        of("h3")


def test_blocks_have_what_the_body_says():
    (block,) = image(body=Body(n_layer=1, d_ff=32, order="post", dropout=0.3)).model.blocks
    assert (block.channel.d_ff, block.order, block.dropout) == (32, "post", 0.3)
    assert image().model.blocks[0].channel is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"system": "s4dd"}, "did you mean 's4d'"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"d_ff": -1}, "d_ff -1"),
        ({"system": "attention", "d_model": 9}, "d_model is 9"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(body, message):
    with pytest.raises(BadInput, match=message):
        image(body=Body(**body))
