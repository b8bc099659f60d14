"""Bits per byte by position in the document."""

import math

import pytest
import torch
import torch.nn.functional as F

from hippodrome.by_position import by_position, draw_positions
from hippodrome.part import BadInput
from hippodrome.recipes._lm import Text
from hippodrome.recipes.block_recurrent import block_recurrent
from tests.tiny import Double, tiny_model


def test_buckets_are_those_of_whole_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n\n".join(chr(97 + i % 26) * (13 + i) for i in range(30)))
    text = Text(text=str(tmp_path / "text.txt"), tokenizer="bytes", length=10, separator="\n\n", holdout=0.2)
    config = block_recurrent(n_layer=2, d_model=16, n_head=2, window=4, n_state=3, text=text)
    task, model = config.task.build(), config.model.build()
    entries = by_position(model, task, "test", chunk=10)
    documents = list(task.whole_texts("test"))
    assert sum(entry["tokens"] for entry in entries) == sum(len(document) - 1 for document in documents)
    nats = torch.cat([F.cross_entropy(model(d[None, :-1]).logits[0], d[1:], reduction="none")[8:16] for d in documents])
    found = next(entry for entry in entries if entry["first"] == 8)
    assert found["stop"] == 16
    assert found["bits_per_byte"] == pytest.approx(float(nats.detach().sum()) / math.log(2) / found["bytes"], rel=1e-5)
    draw_positions(tmp_path / "positions.png", entries, "tiny")
    assert (tmp_path / "positions.png").is_file()


def test_what_has_no_documents_is_refused():
    with pytest.raises(BadInput, match="Double"):
        by_position(tiny_model().build(), Double.Config().build(), "test")
