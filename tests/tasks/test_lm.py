import json
import math

import numpy as np
import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.task import IGNORE
from hippodrome.tasks.lm import Lm
from hippodrome.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    """100 documents of 40 ASCII characters."""
    path = tmp_path / "a.txt"
    path.write_text("|".join(f"the document of number {n:03} goes on here." for n in range(100)))
    return str(path)


@pytest.fixture
def make(text):
    def build(**options):
        return Lm.Config(**{"text": text, "tokenizer": "bytes", "separator": "|", "length": 64, **options}).build()

    return build


def starts_of(task, batch):
    """Where in the training ids each row begins: documents are numbered, so every window is found once."""
    ids = task.corpus.tokens("train")
    windows = np.lib.stride_tricks.sliding_window_view(ids, task.config.length)
    return [int(np.flatnonzero((windows == row.numpy()).all(1))[0]) for row in batch.inputs]


def test_targets_are_the_next_tokens(make):
    task = make()
    ids = task.corpus.tokens("train")
    batch = task.batch("train", 3, 5)
    assert batch.inputs.shape == batch.targets.shape == (5, 64)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    for start, targets in zip(starts_of(task, batch), batch.targets, strict=True):
        assert targets.tolist() == ids[start + 1 : start + 65].tolist()
    assert batch.starts is None
    assert batch.lengths is None


def test_an_epoch_is_a_permutation_of_windows_that_do_not_overlap(make):
    task = make()
    rows = task.size("train")
    orders = []
    for epoch in range(4):
        found = [starts_of(task, task.batch("train", epoch * rows + n, 1))[0] for n in range(rows)]
        offset = min(found)
        assert sorted(found) == [offset + 64 * n for n in range(rows)]
        assert offset < 64
        orders.append(tuple(found))
    assert len(set(orders)) == 4
    assert len({min(order) for order in orders}) > 1, "every epoch cuts the text at the same places"
    assert rows * 64 > len(task.corpus.tokens("train")) - 2 * 64


def test_a_batch_may_lie_across_epochs(make):
    task = make()
    rows = task.size("train")
    across = task.batch("train", 1, rows - 1)
    assert torch.equal(across.inputs[0], task.batch("train", rows - 1, 1).inputs[0])
    assert torch.equal(across.inputs[1:], torch.cat([task.batch("train", rows + n, 1).inputs for n in range(rows - 2)]))


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_every_token_held_out_is_a_target_once(make, split, size):
    task = make(holdout=0.05)
    rows, found, inputs = task.size(split), [], []
    for index in range(math.ceil(rows / size)):
        batch = task.batch(split, index, size)
        for row in range(len(batch.inputs)):
            asked = batch.targets[row] != IGNORE
            count = 64 if batch.lengths is None else int(batch.lengths[row])
            assert asked.tolist() == [True] * count + [False] * (64 - count)
            found += batch.targets[row, :count].tolist()
            inputs += batch.inputs[row, :count].tolist()
    ids = task.corpus.tokens(split).tolist()
    assert found == ids[1:]
    assert inputs == ids[:-1]
    with pytest.raises(IndexError):
        task.batch(split, math.ceil(rows / size), size)


@pytest.mark.parametrize("size", [2, 4])
def test_streams_go_on_where_the_batch_before_stopped(make, size):
    task = make(order="stream", lanes=4)
    groups = 4 // size
    stretch = (len(task.corpus.tokens("train")) - 1) // 4
    chunks = stretch // 64
    for lane in range(4):
        group, row = divmod(lane, size)
        ids = task.corpus.tokens("train")[lane * stretch :]
        for turn in range(2 * chunks):
            batch = task.batch("train", turn * groups + group, size)
            at = turn % chunks * 64
            assert batch.inputs[row].tolist() == ids[at : at + 64].tolist()
            assert batch.targets[row].tolist() == ids[at + 1 : at + 65].tolist()
            assert batch.starts[row] == (turn % chunks == 0)


@pytest.fixture
def uneven(tmp_path):
    """30 documents of 1 to 88 letters, an empty one and one of exactly two windows of 10."""
    path = tmp_path / "uneven.txt"
    path.write_text("|".join([chr(97 + n % 26) * (1 + 3 * n) for n in range(30)] + ["", "z" * 19]))
    return str(path)


@pytest.mark.parametrize(("lanes", "size"), [(3, 3), (6, 2), (None, 4)])
def test_every_lane_reads_whole_documents_one_after_the_other(make, uneven, lanes, size):
    """Each from its start, marked as such; padding behind its end alone; none twice before all have been begun."""
    task = make(text=uneven, order="documents", lanes=lanes, length=10, holdout=0.01)
    documents = [document.tolist() for document in task.whole_texts("train")]
    groups = (lanes or size) // size
    read: dict[tuple[int, int], list[list[int]]] = {}
    begun = []
    for index in range(groups * 60):
        batch = task.batch("train", index, size)
        counts = torch.full((size,), 10) if batch.lengths is None else batch.lengths
        for row, (count, anew) in enumerate(zip(counts.tolist(), batch.starts.tolist(), strict=True)):
            lane = read.setdefault((index % groups, row), [])
            assert anew == (not lane or lane[-1][-1] == task.tokenizer.end)
            assert (batch.targets[row] != IGNORE).tolist() == [True] * count + [False] * (10 - count)
            assert batch.inputs[row, 0] == (task.tokenizer.end if anew else lane[-1][-1])
            assert batch.inputs[row, 1:count].tolist() == batch.targets[row, : count - 1].tolist()
            if anew:
                lane.append([task.tokenizer.end])
                begun.append(lane[-1])
            lane[-1] += batch.targets[row, :count].tolist()
            assert count == 10 or lane[-1][-1] == task.tokenizer.end
    finished = [document for lane in read.values() for document in lane[:-1]]
    assert all(document in documents for document in finished)
    epoch = [document for document in begun[: len(documents)] if document in finished]
    assert len({tuple(document) for document in epoch}) == len(epoch) > 20


def test_documents_are_dealt_alike_whatever_was_asked_before(make, uneven):
    one, other = (make(text=uneven, order="documents", length=10, holdout=0.01) for _ in range(2))
    later = one.batch("train", 37, 4)
    for index in (0, 90, 36, 37):
        again = other.batch("train", index, 4)
    assert torch.equal(again.inputs, later.inputs)
    assert torch.equal(again.starts, later.starts)
    assert torch.equal(one.batch("train", 3, 4).inputs, other.batch("train", 3, 4).inputs)
    assert one.size("train") == sum(-(-(len(document) - 1) // 10) for document in one.whole_texts("train"))


def test_more_lanes_than_documents_are_refused(make):
    with pytest.raises(
        BadInput, match=r"97 lanes need as many documents, the training text of .* has 96: take batches of at most"
    ):
        make(order="documents").batch("train", 0, 97)


def test_lanes_default_to_the_rows_of_a_batch(make):
    one, other = make(order="stream"), make(order="stream", lanes=3)
    assert torch.equal(one.batch("train", 5, 3).inputs, other.batch("train", 5, 3).inputs)


def test_uniform_logits_cost_the_logarithm_of_their_number(make):
    task = make()
    batch = task.batch("test", 0, 2)
    scores = task.score(torch.zeros(2, 64, 300), batch)
    totals = {name: (float(total), float(count)) for name, (total, count) in scores.items()}
    asked = int((batch.targets != IGNORE).sum())
    ends = int((batch.targets == task.tokenizer.end).sum())
    assert totals["loss"] == (pytest.approx(asked * math.log(300)), asked)
    assert totals["bits_per_byte"] == (pytest.approx(asked * math.log2(300), rel=1e-5), asked - ends)
    report = task.report(totals)
    assert report["perplexity"] == pytest.approx(300, rel=1e-4)
    assert report["loss"] == pytest.approx(math.log(300))


def test_bytes_of_a_split_are_its_bytes_for_any_tokenizer(make):
    for kind in ("bytes", "bpe", "gpt2"):
        task = make(tokenizer=kind, vocab_size=280, length=16, holdout=0.05)
        batch = task.batch("test", 0, task.size("test"))
        _, size = task.score(torch.zeros(*batch.targets.shape, task.vocab_size), batch)["bits_per_byte"]
        assert size == task.corpus.manifest["bytes"]["test"] == 5 * 40


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_a_run_keeps_the_tokenizer_and_how_the_text_was_split(make, tmp_path, kind):
    task = make(tokenizer=kind, vocab_size=280, length=16)
    task.save(tmp_path / "run")
    assert Tokenizer.load(tmp_path / "run").hash == task.tokenizer.hash
    assert json.loads((tmp_path / "run" / "data.json").read_text())["split"].startswith(
        "by document: of 100 the last 2 are test"
    )
    assert task.vocab_size == task.tokenizer.vocab_size == task.config.ids


def test_a_text_shorter_than_a_window_says_what_fits(make):
    tokens = len(make().corpus.tokens("train"))
    assert make(length=tokens - 1).batch("train", 0, 2).inputs.shape == (2, tokens - 1)
    with pytest.raises(
        BadInput,
        match=f"length is {tokens}, but the training text of .* has {tokens} tokens: the largest length is {tokens - 1}",
    ):
        make(length=tokens)


def test_lanes_that_do_not_fit_are_refused(make):
    with pytest.raises(BadInput, match="4 lanes cannot be shared out in batches of 3 rows"):
        make(order="stream", lanes=4).batch("train", 0, 3)
    with pytest.raises(BadInput, match=r"100 lanes of 64 tokens need 6400 tokens, the training text has 3936: .* length is 39"):
        make(order="stream", lanes=100).batch("train", 0, 10)


@pytest.mark.parametrize(("name", "value"), [("length", 0), ("length", -3), ("lanes", 0), ("seed", -1)])
def test_bad_numbers_are_named(name, value):
    with pytest.raises(BadInput, match=f"{name} is {value}: it must be at least"):
        Lm.Config(**{name: value})


def test_the_shipped_corpus_by_default(tmp_path):
    task = Lm.Config(tokenizer="bytes").build()
    assert task.corpus.manifest["documents"] == {"train": 237, "valid": 7, "test": 5}
    assert task.tokenizer.decode(task.batch("test", 0, 1).targets[0, :13].tolist()) == "The President"
