"""Bits per byte by position in the document."""

import math

import pytest
import torch
import torch.nn.functional as F

from hippodrome.by_position import by_position, draw_positions, overall
from hippodrome.embeds.tokens import Tokens
from hippodrome.model import BlockConfig, Mixer, ModelConfig
from hippodrome.part import BadInput, find
from hippodrome.readouts.lm import Lm
from hippodrome.tasks.lm import Lm as LmTask
from tests.support import variants
from tests.tiny import Double, tiny_model


@pytest.mark.parametrize("name", ["block_recurrent", "h3", "ssm", "attention"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_buckets_are_those_of_whole_documents(tmp_path, monkeypatch, name, rows):
    """Whatever reads them side by side: what a row holds of the document before is gone."""
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n\n".join(chr(97 + i % 26) * (13 + i * 7 % 30) for i in range(30)))
    where = {"text": str(tmp_path / "text.txt"), "tokenizer": "bytes", "separator": "\n\n", "holdout": 0.2}
    task = LmTask.Config(**where, length=10).build()
    block = BlockConfig(mixer=(*variants("mixers", name), find(Mixer, name).Config())[0])
    model = ModelConfig(d_model=16, blocks=(block,), embed=Tokens.Config(vocab_size=257), readout=Lm.Config()).build()
    entries = by_position(model, task, "test", chunk=10, rows=rows)
    documents = list(task.whole_texts("test"))
    assert len(documents) > 4
    assert sum(entry["tokens"] for entry in entries) == sum(len(document) - 1 for document in documents)
    for first in (0, 8, 16):
        stop = max(1, 2 * first)
        nats = [F.cross_entropy(model(d[None, :-1]).logits[0], d[1:], reduction="none")[first:stop] for d in documents]
        found = next(entry for entry in entries if entry["first"] == first)
        assert found["stop"] == stop
        assert found["bits_per_byte"] == pytest.approx(
            float(torch.cat(nats).detach().sum()) / math.log(2) / found["bytes"], rel=1e-5
        )
    whole = sum(float(F.cross_entropy(model(d[None, :-1]).logits[0], d[1:], reduction="sum").detach()) for d in documents)
    assert overall(entries) == pytest.approx(whole / math.log(2) / sum(len(d) - 2 for d in documents), rel=1e-5)
    draw_positions(tmp_path / "positions.png", entries, "tiny")
    assert (tmp_path / "positions.png").is_file()


@pytest.mark.parametrize("bad", ["chunk", "rows", "max_documents"])
def test_bad_numbers_are_named(bad):
    with pytest.raises(BadInput, match=f"{bad} is 0: it must be at least 1"):
        by_position(tiny_model().build(), Double.Config().build(), "test", **{bad: 0})


def test_what_has_no_documents_is_refused():
    with pytest.raises(BadInput, match="Double"):
        by_position(tiny_model().build(), Double.Config().build(), "test")
