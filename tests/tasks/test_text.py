"""Text: the layouts it reads, what is held out, and that validation is not the test."""

import io
import json
import tarfile

import pytest
import torch

from hippodrome.part import BadInput
from hippodrome.tasks.text import Text


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def imdb(root):
    """The published archive's folders, with its unlabelled reviews and other files."""
    files = {f"{split}/{label}/{n}_7.txt": f"{split} {label} {n}" for split in ("train", "test") for label in ("pos", "neg")
             for n in range(10)}  # fmt: skip
    files |= {"train/unsup/1_0.txt": "nobody knows", "README": "about", "train/urls_pos.txt": "http", "imdb.vocab": "the"}
    return write(root / "aclImdb", files)


def texts(task, split):
    """(text, label) of every row of a split, sorted."""
    size = task.size(split)
    batch = task.batch(split, 0, size)
    rows = zip(batch.inputs, batch.lengths, batch.targets, strict=True)
    return sorted((bytes((ids[:n] - 1).tolist()), task.labels[label]) for ids, n, label in rows)


def expected(split):
    return sorted((f"{split} {label} {n}".encode(), label) for label in ("pos", "neg") for n in range(10))


def test_reads_the_published_folder(tmp_path):
    task = Text.Config(documents=str(imdb(tmp_path))).build()
    assert texts(task, "test") == expected("test")
    assert sorted(texts(task, "train") + texts(task, "valid")) == expected("train")
    assert task.size("valid") == 2
    assert task.labels == ["neg", "pos"]


def test_reads_the_published_archive(tmp_path):
    folder = imdb(tmp_path)
    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as archive:
        archive.add(folder, "aclImdb")
    task, loose = (Text.Config(documents=str(path)).build() for path in (tmp_path / "aclImdb_v1.tar.gz", folder))
    for split in ("train", "valid", "test"):
        assert torch.equal(task.batch(split, 0, 2).inputs, loose.batch(split, 0, 2).inputs)
    assert texts(task, "test") == expected("test")


def test_validation_is_the_test_split_only_when_asked(tmp_path):
    folder = str(imdb(tmp_path))
    held, published = Text.Config(documents=folder).build(), Text.Config(documents=folder, valid="test").build()
    assert not set(texts(held, "valid")) & set(texts(held, "test"))
    assert not set(texts(held, "valid")) & set(texts(held, "train"))
    assert texts(published, "valid") == texts(published, "test")
    assert texts(published, "train") == expected("train")


def test_what_is_held_out_is_the_same_for_every_seed(tmp_path):
    folder = str(imdb(tmp_path))
    one, other = (Text.Config(documents=folder, seed=seed).build() for seed in (0, 1))
    assert texts(one, "valid") == texts(other, "valid")


def test_a_folder_a_class_is_split_without_repeats(tmp_path):
    files = {f"{label}/{n}.txt": f"{label} {n // 2}" for label in ("ham", "spam", "eggs") for n in range(40)}
    task = Text.Config(documents=str(write(tmp_path, files)), classes=3, holdout=0.2).build()
    rows = [texts(task, split) for split in ("train", "valid", "test")]
    assert [len(each) for each in rows] == [38, 10, 12]
    assert len({row for each in rows for row in each}) == 60
    assert "without repeats" in task.split


RECORDS = [(f"l{n % 2}", f'text "{n}", with marks') for n in range(30)]


@pytest.mark.parametrize("kind", ["tsv", "tsv with a header", "csv", "jsonl"])
def test_files_of_records(tmp_path, kind):
    if kind.startswith("tsv"):
        lines = ["label\ttext"] * (kind != "tsv") + [f"{label}\tanything\t{text}" for label, text in RECORDS]
    elif kind == "csv":
        lines = ["text,id,label"] + ['"{}",7,{}'.format(text.replace('"', '""'), label) for label, text in RECORDS]
    else:
        lines = [json.dumps({"text": text, "label": label, "id": 7}) for label, text in RECORDS]
    path = tmp_path / f"data.{kind[:5].strip(' w')}"
    path.write_text("\n".join(lines) + "\n")
    task = Text.Config(documents=str(path)).build()
    found = [row for split in ("train", "valid", "test") for row in texts(task, split)]
    assert sorted(found) == sorted((text.encode(), label) for label, text in RECORDS)


def test_a_folder_of_split_files_keeps_its_splits(tmp_path):
    for name, count in {"news.train.tsv": 12, "news-dev.tsv": 5, "news_test.tsv": 4}.items():
        (tmp_path / name).write_text("\n".join(f"{n % 2}\t{name} {n}" for n in range(count)))
    task = Text.Config(documents=str(tmp_path)).build()
    assert [task.size(split) for split in ("train", "valid", "test")] == [12, 5, 4]
    assert texts(task, "valid")[0] == (b"news-dev.tsv 0", "0")


def test_ids_are_bytes_and_rows_are_cut_and_padded(tmp_path):
    lines = ["a\t\xe9\x7f", "b\tlong enough", "a\t", "b\tshort"] * 5
    (tmp_path / "d.tsv").write_text("\n".join(f"{line}{'!' * n}" for n, line in enumerate(lines)))
    folder = write(
        tmp_path / "split", {"train.tsv": (tmp_path / "d.tsv").read_text(), "test.tsv": "a\t\xe9z\nb\tlong enough\na\t"}
    )
    task = Text.Config(documents=str(folder), length=6).build()
    batch = task.batch("test", 0, 3)
    assert batch.inputs.tolist() == [
        [0xC3 + 1, 0xA9 + 1, ord("z") + 1, 0, 0, 0],
        [ord(letter) + 1 for letter in "long e"],
        [ord(" ") + 1, 0, 0, 0, 0, 0],
    ]
    assert batch.lengths.tolist() == [3, 6, 1]
    assert task.batch("test", 0, 1).inputs.shape == (1, 3)
    assert Text.Config(documents=str(folder), length=6, pad="length").build().batch("test", 0, 1).inputs.shape == (1, 6)


def test_the_run_keeps_what_was_read(tmp_path):
    task = Text.Config(documents=str(imdb(tmp_path))).build()
    task.save(tmp_path)
    kept = json.loads((tmp_path / "data.json").read_text())
    assert kept["labels"] == ["neg", "pos"]
    assert kept["source"].endswith("aclImdb")
    assert {name: split["documents"] for name, split in kept["splits"].items()} == {"train": 18, "valid": 2, "test": 20}
    assert "at random" in kept["split"]


def test_the_floor_is_the_majority(tmp_path):
    write(tmp_path, {"train.tsv": "a\tx\nb\ty\na\tz\nb\tw", "test.tsv": "a\tx1\na\ty1\nb\tz1\na\tw1"})
    assert Text.Config(documents=str(tmp_path), holdout=0.3).build().floors() == {"majority class": 0.75}


@pytest.mark.parametrize(
    ("files", "settings", "complaint"),
    [
        ({}, {}, "no documents"),
        ({"notes/deep/er/x.txt": "x"}, {}, "no documents"),
        ({f"{n}/x.txt": f"{n}" for n in range(9)}, {}, "9 labels .*, \\.\\.\\.\\), not 2: set classes"),
        ({"a/1.txt": "x", "b/2.txt": "y"}, {}, "leaves none for test"),
        ({"test.tsv": "a\tx"}, {}, "no train file"),
        ({"a.train.tsv": "a\tx", "b.train.tsv": "a\tx"}, {}, "two files of the train split"),
        ({"train.tsv": "a\tx\nb"}, {}, "line 2 .* has 1 columns"),
        ({"train.tsv": ""}, {}, "has no documents"),
        ({"train.tsv": b"a\t\xff\xfe"}, {}, "no UTF-8"),
        ({"train.jsonl": '{"label": "a"}'}, {}, "line 1 .* has no 'text'"),
        ({"train.jsonl": "{"}, {}, "line 1 .* is no JSON"),
        ({"train.jsonl": "[1]"}, {}, "is no object"),
        ({"train.csv": "label,words\na,b"}, {}, "has no 'text'"),
        ({"train.csv": "label,text\na"}, {}, "too short"),
        ({"a/1.txt": "x", "b/2.txt": "y"}, {"valid": "test"}, "no test split"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, files, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        Text.Config(documents=str(write(tmp_path, files)), **settings).build()


def test_a_file_of_another_kind_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"known are \.tsv, \.csv, \.jsonl"):
        Text.Config(documents=str(tmp_path / "x.parquet")).build()
    with pytest.raises(BadInput, match="--documents"):
        Text.Config(documents=str(tmp_path / "nothing")).build()


def test_an_archive_of_plain_classes(tmp_path):
    with tarfile.open(tmp_path / "news.tar", "w") as archive:
        for n in range(20):
            text = f"story {n}".encode()
            entry = tarfile.TarInfo(f"{'sport' if n % 2 else 'trade'}/{n}.txt")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    task = Text.Config(documents=str(tmp_path / "news.tar")).build()
    assert task.labels == ["sport", "trade"]
    assert sum(task.size(split) for split in ("train", "valid", "test")) == 20


@pytest.mark.parametrize("bad", [{"length": 0}, {"classes": 1}, {"holdout": 0.0}, {"holdout": 0.6}, {"seed": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        Text.Config(**bad)
