import math

import pytest
import torch

from hippodrome import evaluate as module
from hippodrome.evaluate import evaluate
from hippodrome.part import BadInput
from hippodrome.tasks.induction import Induction
from tests.tiny import Double, tiny_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model(dropout=0.5).build()


@pytest.fixture
def task():
    return Induction.Config(length=8, train_rows=8, test_rows=23).build()


def expected(model, task, rows):
    batch = task.batch("test", 0, rows)
    model.eval()
    with torch.no_grad():
        logits = model(batch.inputs).logits
    return {name: float(total) / float(count) for name, (total, count) in task.score(logits, batch).items()}


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_every_row_counts_once_whatever_the_batch(model, task, batch_size):
    assert evaluate(model, task, "test", batch_size=batch_size) == pytest.approx(expected(model, task, 23), abs=1e-6)


def test_only_the_first_batches(model, task):
    scores = evaluate(model, task, "test", batch_size=5, max_batches=2)
    assert scores == pytest.approx(expected(model, task, 10), abs=1e-6)


def test_the_mode_comes_back_also_after_an_error(model, task, monkeypatch):
    model.train()
    evaluate(model, task, "test")
    assert model.training
    monkeypatch.setattr(task, "score", lambda logits, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, task, "test")
    assert model.training
    model.eval()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, task, "test")
    assert not model.training


def test_scoring_leaves_no_gradient_and_allows_training_after(model, task):
    evaluate(model, task, "valid")
    batch = task.batch("train", 0, 4)
    model.loss(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_logits_are_held_a_few_rows_at_a_time(model, task, monkeypatch):
    rows = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(output.logits.shape[0]))
    whole = evaluate(model, task, "test", batch_size=23)
    assert rows == [1, 22]
    rows.clear()
    one = 9 * 24
    monkeypatch.setattr(module, "_LOGITS", {"cpu": 4 * one + 5})
    assert evaluate(model, task, "test", batch_size=12) == pytest.approx(whole, abs=1e-6)
    assert rows == [1, 4, 4, 3, 4, 4, 3]


def test_progress_is_told(model, task):
    seen = []
    evaluate(model, task, "test", batch_size=10, on_batch=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_split_without_end_needs_a_number_of_batches(model):
    task = Double.Config(endless=True).build()
    with pytest.raises(BadInput, match="valid split of Double never ends"):
        evaluate(model, task, "valid")
    assert 0 <= evaluate(model, task, "valid", max_batches=2)["accuracy"] <= 1


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_batches": 0}])
def test_sizes_below_one_are_refused(model, task, wrong):
    with pytest.raises(BadInput, match="must be at least 1"):
        evaluate(model, task, "test", **wrong)


def test_half_precision_scores_are_close(model, task):
    half, full = (evaluate(model, task, "test", precision=precision)["loss"] for precision in ("bf16", "fp32"))
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_an_untrained_model_scores_chance(model, task):
    assert evaluate(model, task, "test")["loss"] == pytest.approx(math.log(24), abs=0.1)


def test_shares_of_two_processes_add_up(model, task, monkeypatch):
    """Each of two pretended processes scores its share; what they would exchange is recorded and given to both."""
    shares = []
    monkeypatch.setattr(module.devices, "world", lambda: 2)
    monkeypatch.setattr(module.devices, "gathered", lambda totals: shares.append(totals) or shares)
    for number in (0, 1):
        monkeypatch.setattr(module.devices, "rank", lambda number=number: number)
        scores = evaluate(model, task, "test", batch_size=4)
    assert [share["accuracy"][1] for share in shares] == [12, 11]
    assert scores == pytest.approx(expected(model, task, 23), abs=1e-6)
