import json
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hippodrome.data
import hippodrome.documents
from hippodrome.data import prepare
from hippodrome.part import BadInput
from hippodrome.task import Split
from hippodrome.tokenizer import Tokenizer

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPODROME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def lines(tmp_path):
    """A file of 50 documents of equal length."""
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"this is document {n:02}\n"}) for n in range(50)))
    return path


@pytest.fixture
def builds(monkeypatch):
    """The folders built, one entry a build."""
    seen = []
    build = hippodrome.data._build

    def noting(folder, source, settings):
        seen.append(folder)
        return build(folder, source, settings)

    monkeypatch.setattr(hippodrome.data, "_build", noting)
    return seen


def texts(corpus, split):
    """The documents of a shard, taken apart again."""
    ids = corpus.tokens(split)
    ends = np.flatnonzero(ids == corpus.tokenizer.end)
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(ids[start + 1 : stop]) for start, stop in pairwise(ends)]


def everything(corpus):
    """The documents of all splits in order."""
    return [text for split in SPLITS for text in texts(corpus, split)]


def document(n):
    return f"this is document {n:02}\n"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_the_last_documents_are_held_out(lines, kind):
    corpus = prepare(str(lines), tokenizer=kind, vocab_size=270, holdout=0.1)
    assert texts(corpus, "train") == [document(n) for n in range(40)]
    assert texts(corpus, "valid") == [document(n) for n in range(40, 45)]
    assert texts(corpus, "test") == [document(n) for n in range(45, 50)]
    assert corpus.manifest["split"] == (
        "by document: of 50 the last 5 are test (10.0% of the text), the 5 before valid (10.0%), the first 40 train"
    )
    assert corpus.manifest["documents"] == {"train": 40, "valid": 5, "test": 5}
    assert corpus.manifest["bytes"] == {"train": 800, "valid": 100, "test": 100}
    assert corpus.manifest["tokens"] == {split: len(corpus.tokens(split)) for split in SPLITS}


def test_a_bpe_learns_from_the_training_documents_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("|".join(["abab " * 30] * 8 + ["xyzxyz " * 30] * 2))
    tokenizer = prepare(str(path), tokenizer="bpe", vocab_size=300, holdout=0.1, separator="|").tokenizer
    assert tokenizer.hash == Tokenizer.train(["abab " * 30] * 8, 300).hash
    assert len(tokenizer.encode("xyz")) == 3


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=3, max_size=30), holdout=st.floats(0.001, 0.3))
def test_every_split_has_a_document_and_none_is_lost(tmp_path_factory, sizes, holdout):
    folder = tmp_path_factory.mktemp("split")
    parts = ["x" * size for size in sizes]
    (folder / "a.txt").write_text("|".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(folder / "cache"))
        corpus = prepare(str(folder / "a.txt"), tokenizer="bytes", holdout=holdout, separator="|")
    assert all(corpus.manifest["documents"].values())
    assert everything(corpus) == parts


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_cut_at_line_breaks(tmp_path, count):
    text = "".join(f"line {n:04}\n" for n in range(1000))
    half = len(text) // 20 * 10
    parts = [text] if count == 1 else [text[:half], text[half:]]
    (tmp_path / "a.txt").write_text("|".join(parts))
    corpus = prepare(str(tmp_path / "a.txt"), tokenizer="bytes", separator="|")
    assert "".join(everything(corpus)) == text
    assert corpus.manifest["bytes"] == {"train": 9600, "valid": 200, "test": 200}
    few = "1 document is" if count == 1 else "2 documents are"
    assert corpus.manifest["split"].startswith(f"within the text, since {few} too few to hold out whole ones: at paragraph")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé😀 \n", min_size=20, max_size=300).filter(str.strip), piece=st.sampled_from([7, 1 << 20]))
def test_a_cut_document_loses_nothing(tmp_path_factory, text, piece):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPODROME_CACHE", str(folder / "cache"))
        patch.setattr(hippodrome.documents, "_PIECE", piece)
        patch.setattr(hippodrome.data, "_SLICE", 20)
        corpus = prepare(str(folder / "a.txt"), tokenizer="bytes", holdout=0.2)
    assert "".join(everything(corpus)) == text
    assert sum(corpus.manifest["bytes"].values()) == len(text.encode())
    assert sum(corpus.manifest["documents"].values()) == len(everything(corpus))


def test_the_manifest_says_what_the_text_was(lines):
    corpus = prepare(str(lines), tokenizer="bytes")
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest == corpus.manifest
    (source,) = manifest["sources"]
    digest = subprocess.run(["sha256sum", lines], capture_output=True, text=True, check=True).stdout.split()[0]
    assert (source["path"], source["bytes"], source["sha256"]) == (str(lines), lines.stat().st_size, digest)
    assert manifest["tokenizer"] == {"vocab_size": 257, "sha256": Tokenizer.bytes().hash}
    assert manifest["dtype"] == "<u2"


def test_shards_are_memory_mapped_and_wide_enough(lines, monkeypatch):
    assert isinstance(prepare(str(lines), tokenizer="bytes").tokens("train"), np.memmap)
    wide = Tokenizer.bytes()
    wide.vocab_size = 70_000
    assert hippodrome.data._dtype(wide) == np.uint32


def test_a_cache_is_used_again(lines, builds):
    first = prepare(str(lines), tokenizer="bytes")
    second = prepare(str(lines), tokenizer="bytes")
    assert len(builds) == 1
    assert second.folder == first.folder
    assert second.manifest == first.manifest


def test_a_touched_source_is_hashed_not_built(lines, builds, monkeypatch):
    first = prepare(str(lines), tokenizer="bytes")
    os.utime(lines, ns=(1, 1))
    again = prepare(str(lines), tokenizer="bytes")
    assert len(builds) == 1
    assert again.manifest["sources"][0]["mtime_ns"] == 1
    assert again.manifest["sources"][0]["sha256"] == first.manifest["sources"][0]["sha256"]
    # The new time is remembered: no third look at the contents.
    monkeypatch.setattr(hippodrome.documents, "_sha256", lambda path: pytest.fail("hashed again"))
    prepare(str(lines), tokenizer="bytes")


def test_a_changed_source_is_built_anew(lines, builds):
    prepare(str(lines), tokenizer="bytes")
    lines.write_text(lines.read_text().replace("document 00", "changed! 00"))
    corpus = prepare(str(lines), tokenizer="bytes")
    assert len(builds) == 2
    assert texts(corpus, "train")[0] == "this is changed! 00\n"


def test_a_file_more_in_a_folder_is_a_change(tmp_path, builds):
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}")
    prepare(str(tmp_path / "texts"), tokenizer="bytes")
    (tmp_path / "texts" / "d.txt").write_text("text d")
    assert texts(prepare(str(tmp_path / "texts"), tokenizer="bytes"), "test") == ["text d"]
    assert len(builds) == 2


@pytest.mark.parametrize("other", [{"tokenizer": "bpe", "vocab_size": 260}, {"holdout": 0.2}, {"separator": "\n"}])
def test_other_settings_are_another_cache(lines, other):
    plain: dict[str, Any] = {"tokenizer": "bytes"}
    assert prepare(str(lines), **plain).folder != prepare(str(lines), **(plain | other)).folder


@pytest.mark.parametrize("name", ["train.bin", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: os.truncate(path, 7)])
def test_a_damaged_cache_is_built_anew(lines, builds, name, harm):
    harm(prepare(str(lines), tokenizer="bytes").folder / name)
    assert texts(prepare(str(lines), tokenizer="bytes"), "train")[0] == document(0)
    assert len(builds) == 2


def test_a_failed_build_leaves_the_old_cache_and_no_litter(lines, cache, monkeypatch):
    corpus = prepare(str(lines), tokenizer="bytes")
    before = {path.name: path.read_bytes() for path in corpus.folder.iterdir()}
    lines.write_text(lines.read_text().replace("document", "DOCUMENT"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hippodrome.data, "_slices", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(lines), tokenizer="bytes")
    assert {path.name: path.read_bytes() for path in corpus.folder.iterdir()} == before
    assert {path.name for path in cache.iterdir()} == {corpus.folder.name, f"{corpus.folder.name}.lock"}


def test_what_a_killed_build_left_is_swept_away(lines, cache):
    folder = prepare(str(lines), tokenizer="bytes").folder
    (cache / f".{folder.name}.abc123").mkdir()
    os.truncate(folder / "train.bin", 7)
    prepare(str(lines), tokenizer="bytes")
    assert not (cache / f".{folder.name}.abc123").exists()


def test_two_processes_build_once(lines):
    script = (
        "import sys, time, hippodrome.data as data\n"
        "build = data._build\n"
        "def noting(*args):\n    print('built')\n    time.sleep(1)\n    return build(*args)\n"
        "data._build = noting\n"
        "data.prepare(sys.argv[1], tokenizer='bpe', vocab_size=270)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, lines], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert "".join(process.communicate(timeout=60)[0] for process in both) == "built\n"


def test_an_empty_corpus_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n ")
    with pytest.raises(BadInput, match=r"the corpus .*a\.txt is empty"):
        prepare(str(tmp_path / "a.txt"), tokenizer="bytes")
    (tmp_path / "b.txt").write_text("é")
    with pytest.raises(BadInput, match=r"the corpus .*b\.txt has 2 bytes: too few to hold any out"):
        prepare(str(tmp_path / "b.txt"), tokenizer="bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "gpt3"}, "no tokenizer is called 'gpt3': did you mean 'gpt2'"),
        ({"tokenizer": "bpe", "vocab_size": -5}, "vocab_size is -5: a BPE needs at least 257"),
        ({"holdout": 0.0}, r"holdout is 0\.0: .* above 0 and at most 0\.3"),
        ({"holdout": 0.5}, r"holdout is 0\.5: .* above 0 and at most 0\.3"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(lines, cache, options, message):
    with pytest.raises(BadInput, match=message):
        prepare(str(lines), **options)
    assert not cache.exists() or all(path.suffix == ".lock" for path in cache.iterdir())


def test_an_unwritable_cache_says_so(lines, cache, monkeypatch):
    cache.write_text("a file, not a folder")
    with pytest.raises(OSError, match="cache"):
        prepare(str(lines), tokenizer="bytes")


def test_a_bar_shows_on_a_terminal_only(lines, capsys, monkeypatch):
    prepare(str(lines), tokenizer="bytes")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    corpus = prepare(str(lines), tokenizer="bpe", vocab_size=270)
    assert texts(corpus, "train")[0] == document(0)
    assert "encoding" in capsys.readouterr().err
