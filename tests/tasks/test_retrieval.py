"""Retrieval: pairs stay pairs, whatever file they come from."""

import dataclasses
import json

import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.evaluate import evaluate
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.pair import Pair
from hippodrome.tasks._documents import VOCAB_SIZE
from hippodrome.tasks.retrieval import Retrieval
from hippodrome.train import train
from tests.tiny import tiny_run


def aan(folder):
    """The published files: label, two ids, two texts, no header and no quotes."""
    for name, count in {"train": 24, "eval": 8, "test": 6}.items():
        lines = [f'{n % 2}.0\tP0{n}\tP1{n}\tthe "first" {n}\tsecond{" and more" * (n % 3)} {n}' for n in range(count)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def pair_model():
    block = BlockConfig(mixer=SSM.Config(), channel=Mlp.Config())
    return ModelConfig(d_model=16, blocks=(block,), embed=Tokens.Config(vocab_size=VOCAB_SIZE), readout=Pair.Config())


def test_reads_the_published_files(tmp_path):
    task = Retrieval.Config(pairs=str(aan(tmp_path)), length=14).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [24, 8, 6]
    assert task.labels == ["0.0", "1.0"]
    batch = task.batch("test", 0, 6)
    assert batch.inputs.shape == (6, 2, 14)
    assert batch.targets.tolist() == [0, 1] * 3
    said = [[bytes((ids[:n] - 1).tolist()) for ids, n in zip(*row, strict=True)]
            for row in zip(batch.inputs, batch.lengths, strict=True)]  # fmt: skip
    assert said[0] == [b'the "first" 0', b"second 0"]
    assert said[1] == [b'the "first" 1', b"second and mor"]
    assert not (batch.inputs != 0).logical_and(torch.arange(14) >= batch.lengths[..., None]).any()


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "csv"])
def test_one_file_of_pairs_is_split(tmp_path, kind):
    rows = [(str(n % 2), f"one {n}", f"two {n}") for n in range(40)]
    lines = {
        "tsv": ["\t".join(row) for row in rows],
        "jsonl": [json.dumps(dict(zip(("label", "text1", "text2"), row, strict=True))) for row in rows],
        "csv": ["label,text1,text2", *(",".join(row) for row in rows)],
    }[kind]
    (tmp_path / f"pairs.{kind}").write_text("\n".join(lines))
    task = Retrieval.Config(pairs=str(tmp_path / f"pairs.{kind}"), holdout=0.2).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [26, 6, 8]
    seen = {
        tuple(bytes((ids[ids > 0] - 1).tolist()) for ids in row)
        for split in ("train", "valid", "test")
        for row in task.batch(split, 0, task.size(split)).inputs
    }
    assert seen == {(one.encode(), two.encode()) for _, one, two in rows}


def test_gradient_accumulation_parts_no_pair(tmp_path):
    """Micro-batches of one row, of three and of all give the same losses."""
    config = tiny_run(Retrieval.Config(pairs=str(aan(tmp_path)), length=14), pair_model(), steps=3, batch_size=6)
    losses = []
    for micro in (1, 3, 6):
        run = tmp_path / f"micro{micro}"
        settings = dataclasses.replace(config.train, micro_batch=micro)
        report = train(dataclasses.replace(config, train=settings), run)
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
        assert report["scores"]["test"]["accuracy"] <= 1.0
        assert report["floors"] == {"majority class": 0.5}
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_scores_do_not_depend_on_the_batch(tmp_path):
    task = Retrieval.Config(pairs=str(aan(tmp_path)), length=14).build()
    torch.manual_seed(0)
    model = pair_model().build()
    scores = [evaluate(model, task, "test", batch_size=size) for size in (1, 4, 6)]
    assert scores[0] == pytest.approx(scores[2])
    assert scores[1] == pytest.approx(scores[2])


def test_what_holds_no_pairs_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--pairs"):
        Retrieval.Config(pairs=str(tmp_path / "nothing")).build()
    with pytest.raises(BadInput, match="has no pairs"):
        Retrieval.Config(pairs=str(tmp_path)).build()
    (tmp_path / "x.tsv").write_text("1\tonly one text")
    with pytest.raises(BadInput, match="has 2 columns: wanted are label, text1, text2"):
        Retrieval.Config(pairs=str(tmp_path / "x.tsv")).build()
