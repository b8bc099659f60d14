"""The recipes with attention: how far it looks and its positions are arguments of the command."""

import pytest

from hippodrome.mixers.attention import Attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Chunk, Window
from hippodrome.positions import Alibi, Rotary, T5Bias
from hippodrome.recipes.h3 import h3
from hippodrome.recipes.transformer import transformer
from tests.commands import TINY, run, write_text


def attentions(config):
    return [block.mixer for block in config.model.blocks if isinstance(block.mixer, Attention.Config)]


@pytest.mark.parametrize("recipe", [h3, transformer])
def test_patterns(recipe):
    for arguments, pattern in (({}, Causal()), ({"window": 9}, Window(size=9)), ({"chunk": 8}, Chunk(size=8))):
        found = attentions(recipe(**arguments))
        assert found
        assert all(mixer.pattern == pattern for mixer in found)
    with pytest.raises(BadInput, match="window is 3 and chunk is 4: give one"):
        recipe(window=3, chunk=4)


def test_positions():
    for name, position in (("alibi", Alibi()), ("t5", T5Bias()), ("rotary", Rotary()), ("learned", None)):
        assert all(mixer.position == position for mixer in attentions(transformer(positions=name)))


@pytest.mark.parametrize(
    "arguments",
    [
        "h3 --window 8 --attention-layers 1",
        "h3 --chunk 8 --attention-layers 1",
        "transformer --positions alibi --window 8",
        "transformer --positions t5 --chunk 8",
    ],
)
def test_they_train_and_sample_by_command(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    write_text(text)
    trained = run("train", *arguments.split(), "--text", text, *TINY, "--out", tmp_path / "run")
    assert trained.code == 0, trained.err
    sampled = run("generate", tmp_path / "run", "--prompt", "The", "--max-new-tokens", "20", "--device", "cpu")
    assert sampled.code == 0, sampled.err
