"""Long Range Arena by command: train, floors beside scores, and two mixers raced on one recipe."""

import json
import re
from pathlib import Path

import pytest

from hippodrome.tasks.retrieval import Retrieval
from hippodrome.tasks.text import Text
from tests.commands import run

SHORT = ["--min-length", 5, "--max-length", 30, "--max-depth", 4, "--max-args", 4, "--train-rows", 64, "--test-rows", 40]
TINY = ["--n-layer", 1, "--d-model", 16, "--steps", 2, "--batch-size", 8, "--eval-every", 2, "--log-every", 1]
TINY += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_listops_trains_by_command_and_prints_its_floors(place):
    result = run("train", "lra.listops", "--mixer", "s4", *SHORT, *TINY)
    assert result.code == 0, result.err
    floors = json.loads((place / "runs" / "lra.listops" / "report.json").read_text())["floors"]
    assert set(floors) == {"majority class", "root operator alone"}
    assert re.search(rf"\(root operator alone\)\W+{floors['root operator alone']:.4f}", result.out)


def test_two_mixers_race_on_one_recipe(place):
    racers = ["lra.listops+mixer=s4d", "lra.listops+mixer=transformer"]
    words = [*SHORT, *TINY, "--n-head", 2, "--d-state", 4, "--no-match-parameters", "--out", "race"]
    result = run("compare", *racers, *words)
    assert result.code == 0, result.err
    report = json.loads((place / "race" / "report.json").read_text())
    assert list(report["results"]) == racers
    assert "root operator alone" in report["floors"]
    assert "root operator alone" in result.out


def test_text_and_retrieval_train_by_command(place):
    for kind, columns in {"documents": 1, "pairs": 2}.items():
        lines = ["\t".join([str(n % 2), *["word " * (n % 7 + 1) + str(n)] * columns]) for n in range(80)]
        (place / f"{kind}.tsv").write_text("\n".join(lines))
    for recipe, source in {"lra.text": ("--documents", "documents.tsv"), "lra.retrieval": ("--pairs", "pairs.tsv")}.items():
        result = run("train", recipe, *source, "--length", 24, *TINY, "--micro-batch", 4, "--out", recipe)
        assert result.code == 0, result.err
        assert "majority class" in result.out
        assert json.loads((place / recipe / "data.json").read_text())["labels"] == ["0", "1"]


def test_subtrees_train_by_command_and_tell_accuracy_by_height(place):
    words = [*SHORT, *TINY, "--d-state", 8]
    result = run("train", "listops_subtrees", *words)
    assert result.code == 0, result.err
    scores = json.loads((place / "runs" / "listops_subtrees" / "report.json").read_text())["scores"]["test"]
    assert {"accuracy", "loss", "above_height_2", "height_1", "height_2", "height_3"} == set(scores)


def test_missing_documents_are_one_line(place):
    result = run("train", "lra.text", *TINY)
    assert result.code == 2
    assert "aclImdb" in result.complaint
    assert "--documents" in result.complaint


def blocks():
    """The stand-ins' programs, as printed in docs/lra.md."""
    page = (Path(__file__).parent.parent / "docs" / "lra.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_spam_of_the_page_becomes_a_task(place):
    for folder, text in {"easy-ham-1": "buy milk", "hard-ham-1": "buy oats", "spam-2": "buy pills"}.items():
        for n in range(20):
            path = place / "package" / "data" / folder / f"{n}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"Received: from {folder}\nSubject: hi\n\n{text} {n} \xff\n\nbye\n".encode("latin-1"))
    exec(blocks()[0], {})
    task = Text.Config(documents="spam-or-ham.jsonl").build()
    assert task.labels == ["ham", "spam"]
    assert sum(task.size(split) for split in ("train", "valid", "test")) == 60
    assert task.floors()["majority class"] >= 0.5
    first = bytes((task.batch("test", 0, 1).inputs[0] - 1).tolist())
    assert first.startswith(b"buy ")
    assert first.endswith(b"bye\n")


def test_the_neighbours_of_the_page_become_a_task(place):
    exec(blocks()[1], {})
    task = Retrieval.Config(pairs="neighbours", length=2000).build()
    assert task.labels == ["follows", "stranger"]
    assert task.floors() == {"majority class": 0.5}
    assert task.size("train") > 8000
    assert min(task.size("valid"), task.size("test")) > 500
    first, second = (
        {bytes((ids - 1).tolist())[:100] for ids in task.batch(split, 0, 400).inputs[:, 0]} for split in ("train", "test")
    )
    assert not first & second
