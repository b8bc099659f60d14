"""Seq2seq: pairs of texts become rows, and a run on them answers prompts by command."""

import json

import pytest
import torch

from hippodrome.cli import main
from hippodrome.part import BadInput
from hippodrome.task import IGNORE
from hippodrome.tasks.seq2seq import Seq2Seq
from hippodrome.tokenizer import Tokenizer


def write(folder, count=60):
    pairs = [{"source": f"pair {n} of {count}: " + "abc" * (n % 7), "target": f"n {n}"} for n in range(count)]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def tiny(folder):
    """Pairs that are all of one length once they are cut, as contract tests want rows."""
    path = folder / "even.jsonl"
    pairs = [{"source": f"pair {n:02}" + "abc" * 9, "target": f"n {n:02}"} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return {"pairs": str(path), "tokenizer": "bytes", "length": 30, "holdout": 0.2}


def test_a_row_is_source_end_target_end(tmp_path):
    task = Seq2Seq.Config(pairs=str(write(tmp_path)), tokenizer="bytes", length=30, holdout=0.2).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [38, 10, 12]
    batch, end, cut = task.batch("train", 0, 38), task.tokenizer.end, 0
    for ids, targets, n in zip(batch.inputs, batch.targets, batch.lengths, strict=True):
        row = torch.cat([ids[:n], targets[n - 1 : n]]).tolist()
        middle = row.index(end)
        source, target = (task.tokenizer.decode(part) for part in (row[:middle], row[middle + 1 : -1]))
        number = int(target.removeprefix("n "))
        assert source == (f"pair {number} of 60: " + "abc" * (number % 7))[:30]
        cut += len(source) == 30
        assert row[-1] == end
        asked = [IGNORE] * middle + row[middle + 1 :]
        assert targets.tolist() == asked + [IGNORE] * (len(ids) - len(asked))
    assert cut > 0


def test_splits_and_names_of_their_own(tmp_path):
    for split, count in {"train": 20, "valid": 3, "test": 4}.items():
        lines = [json.dumps({"article": f"{split} {n} " * 3, "summary": f"{n}"}) for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    task = Seq2Seq.Config(pairs=str(tmp_path), source="article", target="summary", vocab_size=264).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [20, 3, 4]
    assert task.tokenizer.end == task.config.end == 263
    task.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == task.tokenizer.hash


def test_what_is_no_pair_is_refused(tmp_path):
    with pytest.raises(BadInput, match="name a file or a folder of pairs with --pairs"):
        Seq2Seq.Config(pairs=str(tmp_path / "none.jsonl")).build()
    with pytest.raises(BadInput, match="has no 'summary': it has 'source', 'target'"):
        Seq2Seq.Config(pairs=str(write(tmp_path)), target="summary").build()
    with pytest.raises(BadInput, match=r"vocab_size is 4096, but the pairs give only \d+ ids: set it to that"):
        Seq2Seq.Config(pairs=str(write(tmp_path))).build()
    with pytest.raises(BadInput, match="target_length is 0"):
        Seq2Seq.Config(target_length=0)


def test_a_run_on_pairs_answers_by_command(tmp_path, capsys):
    flags = f"--pairs {write(tmp_path)} --tokenizer bytes --length 40 --holdout 0.2 --n-layer 1 --n-decoder 1 --d-model 16"
    flags += f" --n-head 2 --tile 8 --steps 3 --batch-size 4 --eval-every 3 --device cpu --out {tmp_path / 'run'}"
    assert main(["train", "bigbird.seq2seq", *flags.split()]) == 0
    assert "token frequencies" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "pair 3: abc", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("pair 3: abc\n")
    command = ["generate", str(tmp_path / "run"), "--prompt", "one", "two, longer", "--max-new-tokens", "4", "--device", "cpu"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("one\n")
