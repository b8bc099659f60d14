"""Dna: windows of records, and files or records held out whole."""

import gzip
import random

import pytest

from hippodrome.part import BadInput
from hippodrome.tasks.dna import Dna
from hippodrome.tasks.lm import Lm

SPECIES = ("coli", "pylori")


def letters(count, seed):
    return "".join(random.Random(seed).choices("ACGT", k=count))


def write_genomes(folder, strains=5, size=100):
    """Two chromosomes a strain, in a packed file each."""
    for s, name in enumerate(SPECIES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(strains):
            records = [f">chr{c} {name} strain {i}\n{letters(size, 100 * s + 10 * i + c)}\n" for c in range(2)]
            (folder / name / f"strain{i}.fasta.gz").write_bytes(gzip.compress("".join(records).lower().encode()))


def write_labelled(path, per_class=5, size=30):
    records = [f">id{i} {name}\n{letters(size, 10 * s + i)}\n" for s, name in enumerate(SPECIES) for i in range(per_class)]
    path.write_text("".join(records))


def tiny(folder):
    write_genomes(folder)
    return {"data": str(folder)}


def task_of(folder, **values):
    return Dna.Config(**({"data": str(folder), "length": 40} | values)).build()


def text(row, length=None):
    return bytes(row[:length].tolist()).decode()


def test_windows_are_the_letters_of_whole_strains(tmp_path):
    write_genomes(tmp_path)
    task = task_of(tmp_path)
    # A chromosome of 100 letters is two windows of 40 and a rest of 20, half a window.
    assert [task.size(split) for split in ("train", "valid", "test")] == [36, 12, 12]
    assert task.names == list(SPECIES)
    seen = {}
    for split in ("train", "valid", "test"):
        batch = task.batch(split, 0, task.size(split))
        lengths = batch.lengths.tolist()
        for row, label, length in zip(batch.inputs, batch.targets.tolist(), lengths, strict=True):
            assert not row[length:].any()
            seen[text(row, length)] = split, label
    for s in range(2):
        for i in range(5):
            whole = [letters(100, 100 * s + 10 * i + c) for c in range(2)]
            found = {seen[chromosome[start : start + 40]] for chromosome in whole for start in (0, 40, 80)}
            assert len(found) == 1, "a strain lies in one split"
            assert next(iter(found))[1] == s
    assert len(seen) == 60


def test_short_rests_are_left_out_and_short_records_are_not(tmp_path):
    for s, name in enumerate(SPECIES):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.fa").write_text(f">a\n{letters(49, 10 * s + i)}\n>b\n{letters(7, 10 * s + i + 5)}\n")
    batch = task_of(tmp_path, length=30).batch("test", 0, 9)
    assert batch.lengths.tolist() == [30, 19, 7] * 2
    batch = task_of(tmp_path, length=40).batch("test", 0, 9)
    assert batch.lengths.tolist() == [40, 7] * 2


@pytest.mark.parametrize("as_folder", [True, False])
def test_labels_out_of_headers(tmp_path, as_folder):
    write_labelled(tmp_path / "all.fa")
    task = task_of(tmp_path if as_folder else tmp_path / "all.fa", label="header", length=30)
    assert [task.size(split) for split in ("train", "valid", "test")] == [6, 2, 2]
    known = {letters(30, 10 * s + i): s for s in range(2) for i in range(5)}
    batch = task.batch("train", 0, 6)
    assert batch.lengths is None
    assert [known[text(row)] for row in batch.inputs] == batch.targets.tolist()


def test_the_same_files_are_text_for_a_language_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    write_genomes(tmp_path / "genomes")
    task = Lm.Config(text=str(tmp_path / "genomes"), tokenizer="bytes", length=20, holdout=0.1).build()
    batch = task.batch("train", 0, 4)
    assert set(batch.inputs.unique().tolist()) <= {*b"ACGT", task.tokenizer.end}
    assert task.corpus.manifest["documents"] == {"train": 16, "valid": 2, "test": 2}


def test_what_cannot_be_read_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="there is no folder"):
        task_of(tmp_path / "none")
    with pytest.raises(BadInput, match="there are no FASTA files"):
        task_of(tmp_path / "none", label="header")
    write_genomes(tmp_path, strains=2)
    with pytest.raises(BadInput, match=r"class 'coli' of .* has 2 to learn from"):
        task_of(tmp_path)
    with pytest.raises(BadInput, match=r"classes is 3, but .* has 2"):
        task_of(tmp_path, classes=3)
    (tmp_path / "bad.fa").write_text(">id\nACGT\n")
    with pytest.raises(BadInput, match="a name, white space and its class"):
        task_of(tmp_path / "bad.fa", label="header")
    for wrong in ({"length": 0}, {"seed": -1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Dna.Config(**wrong)
