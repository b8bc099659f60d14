import gzip
import json
import lzma
import sys
import types
from itertools import pairwise

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import hippodrome.documents
from hippodrome.documents import fasta_records, find_source
from hippodrome.part import BadInput
from hippodrome.tokenizer import Tokenizer

zstandard = pytest.importorskip("zstandard", reason="the extra for .zst files is not installed")

DOCUMENTS = ["One document.\nTwo lines.", "Zwei: döcument 😀.", "Three."]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def documents(source):
    """The documents of a source, their pieces joined."""
    found, held = [], ""
    for text, last in source.pieces():
        held += text
        if last:
            found.append(held)
            held = ""
    assert held == "", "the last piece does not end its document"
    return found


def read(path, **options):
    return documents(find_source(str(path), **options))


def contents(suffix, texts, folder):
    """The bytes of a file of `texts`."""
    if suffix == ".txt":
        return "<>".join(texts).encode()
    if suffix == ".jsonl":
        return "\n".join(json.dumps({"text": text, "n": 1}) for text in texts).encode()
    parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), folder / "table")
    return (folder / "table").read_bytes()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_format_in_every_packing(tmp_path, suffix, packing):
    path = tmp_path / f"corpus{suffix}{packing}"
    path.write_bytes(PACK[packing](contents(suffix, DOCUMENTS, tmp_path)))
    assert read(path, separator="<>") == DOCUMENTS


def test_a_text_file_is_one_document_without_a_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n\ntwo\n".encode())
    assert read(path) == ["one\r\n\n\ntwo\n"]


def test_a_file_of_another_name_is_text(tmp_path):
    (tmp_path / "README.md").write_text("# Title")
    assert read(tmp_path / "README.md") == ["# Title"]


def test_a_folder_is_read_by_path_without_hidden_and_foreign_files(tmp_path):
    for name, text in {"b.txt": "B", "a/z.txt": "A", ".hidden/x.txt": "H", ".x.txt": "H", "c.py": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl").write_text('{"text": "D"}\n\n')
    assert read(tmp_path) == ["A", "B", "D"]


def test_the_shipped_corpus_has_249_speeches():
    speeches = read("sotu")
    assert len(speeches) == 249
    assert speeches[0].startswith("Fellow-Citizens of the Senate")


def test_another_field_and_rows_without_a_value(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "no"}')
    parquet.write_table(pyarrow.table({"body": ["y", None]}), tmp_path / "b.parquet")
    assert read(tmp_path, field="body") == ["x", "y"]


def test_documents_of_white_space_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one||  \n||two||")
    assert read(tmp_path / "a.txt", separator="||") == ["one", "two"]


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_frames_follow_each_other(tmp_path, frames):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"abc " * 50_000) * frames)
    assert read(path) == ["abc " * 50_000 * frames]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab \n\r\t<>é\u2003", max_size=80),
    size=st.integers(1, 12),
    separator=st.sampled_from([None, "<>", "\n\n"]),
)
def test_pieces_of_any_size_are_the_same_text_cut_before_white_space(tmp_path_factory, text, size, separator):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    source = find_source(str(path), separator=separator)
    whole = [part for part in (text.split(separator) if separator else [text]) if part.strip()]
    assert documents(source) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hippodrome.documents, "_PIECE", size)
        pieces = list(source.pieces())
    joined = "".join(text for text, _ in pieces)
    assert "".join(joined.split()) == "".join("".join(whole).split())
    for (left, last), (right, _) in pairwise(pieces):
        if not last:
            assert not left[-1:].isspace()
            assert right == "" or right[0].isspace()


def test_a_long_document_comes_in_pieces_with_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = "It was the best of times,\r\n  it was the worst.\n\n\nAnd   so on \n" * 50
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(hippodrome.documents, "_PIECE", 100)
    pieces = list(find_source(str(tmp_path / "a.txt")).pieces())
    tokenizer = Tokenizer.train([text], 300)
    assert len(pieces) > 20
    assert [number for piece, _ in pieces for number in tokenizer.encode(piece)] == tokenizer.encode(text)


def spoiled(data):
    """The same bytes, wrong in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 8]) + data[middle + 8 :]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], spoiled, lambda data: b"plain text, not packed"])
def test_a_damaged_packing_is_named(tmp_path, packing, damage):
    path = tmp_path / f"a.txt{packing}"
    noise = "".join(chr(33 + n * n % 89) for n in range(20_000))
    path.write_bytes(damage(PACK[packing](noise.encode())))
    with pytest.raises(BadInput, match=r"a\.txt\..* is truncated or damaged: ."):
        read(path)


BAD_FILES = {
    "nul bytes": ("a.txt", b"abc\0def", r"a\.txt is a binary file: it has NUL bytes"),
    "latin-1": ("a.txt", "é".encode("latin-1") * 9, r"a\.txt is no UTF-8 text"),
    "utf-16": ("a.txt", "hello".encode("utf-16"), r"a\.txt is no UTF-8 text"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 of .*a\.jsonl is no JSON"),
    "no object": ("a.jsonl", b"[1, 2]", r"line 1 of .*a\.jsonl is no JSON object but '\[1, 2\]'"),
    "no field": ("a.jsonl", b'{"body": "a", "id": 3}', r"line 1 of .* has no field 'text': it has 'body', 'id'"),
    "no string": ("a.jsonl", b'{"text": 3}', r"field 'text' of line 1 of .* is no string but '3'"),
    "binary json": ("a.jsonl", b"\xff\xfe\x00", r"a\.jsonl is no UTF-8 text"),
    "no parquet": ("a.parquet", b"PAR1 but not really", r"a\.parquet is no parquet file, or a damaged one"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, case):
    name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(contents(".parquet", DOCUMENTS, tmp_path)[:-20])
    with pytest.raises(BadInput, match=r"a\.parquet is no parquet file, or a damaged one"):
        read(tmp_path / "a.parquet")


def test_a_column_that_is_missing_or_no_text_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [7]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"has no column 'text': it has 'body', 'id'"):
        read(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"field 'id' of .*a\.parquet is no string but '7'"):
        read(tmp_path / "a.parquet", field="id")


def test_a_missing_file_has_a_nearest_name(tmp_path):
    (tmp_path / "speeches.txt").write_text("x")
    with pytest.raises(BadInput, match=r"no file or folder .*speechs\.txt: did you mean 'speeches\.txt'\?$"):
        find_source(str(tmp_path / "speechs.txt"))
    with pytest.raises(BadInput, match=r"there is no folder .*nowhere"):
        find_source(str(tmp_path / "nowhere" / "a.txt"))


def test_a_folder_without_text_and_an_empty_separator_are_refused(tmp_path):
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(BadInput, match=r"the folder .* has no text: wanted are \.txt, \.jsonl"):
        find_source(str(tmp_path))
    with pytest.raises(BadInput, match="the separator is empty"):
        find_source("sotu", separator="")


@pytest.mark.parametrize(
    ("name", "library", "extra"), [("a.parquet", "pyarrow", "parquet"), ("a.txt.zst", "zstandard", "zstd")]
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, library, extra):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=rf"pip install 'hippodrome\[{extra}\]'"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["hf:owner/corpus", "wikitext", "sout"])
def test_a_data_set_name_needs_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'hippodrome\[datasets\]'") as caught:
        find_source(name)
    assert ("did you mean 'sotu'?" in str(caught.value)) == (name == "sout")


class Rows(list):
    info = types.SimpleNamespace(version="1.0.0")


def known_only(name, split):
    assert split == "train"
    if name != "owner/corpus":
        raise RuntimeError(f"no data set {name}\nand a long tale")
    return Rows({"text": text, "id": 1} for text in DOCUMENTS)


def test_a_data_set_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=known_only))
    for name in ("hf:owner/corpus", "owner/corpus"):
        source = find_source(name)
        assert documents(source) == DOCUMENTS
        assert source.fingerprints() == [{"data_set": name, "rows": 3, "version": "1.0.0"}]
    with pytest.raises(BadInput, match=r"the data set 'nothing' cannot be loaded: no data set nothing$"):
        find_source("nothing")
    with pytest.raises(BadInput, match=r"no file or folder speeches\.txt"):
        find_source("speeches.txt")


RECORDS = ">chr1 Some species\nACGT\nacgtNN\n\n; a comment\n>chr2\nGGG*\n>empty\n>chr3\r\nT-T\r\n"


@pytest.mark.parametrize("packing", PACK)
def test_every_record_of_a_fasta_file_is_a_document(tmp_path, packing):
    path = tmp_path / f"genome.fna{packing}"
    path.write_bytes(PACK[packing](RECORDS.encode()))
    assert read(path) == ["ACGTACGTNN", "GGG*", "T-T"]
    assert read(tmp_path) == ["ACGTACGTNN", "GGG*", "T-T"], "found in a folder"
    named = [("chr1 Some species", "ACGTACGTNN"), ("chr2", "GGG*"), ("empty", ""), ("chr3", "T-T")]
    assert list(fasta_records(path)) == named


def test_a_long_record_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hippodrome.documents, "_PIECE", 8)
    path = tmp_path / "long.fa"
    path.write_text(">a\n" + "ACGTA\n" * 5 + ">b\nACGTACGT\n")
    pieces = list(find_source(str(path)).pieces())
    assert [text for text, _ in pieces] == ["ACGTAACGTA", "ACGTAACGTA", "ACGTA", "ACGTACGT", ""]
    assert [last for _, last in pieces] == [False, False, True, False, True]
    assert list(fasta_records(path)) == [("a", "ACGTA" * 5), ("b", "ACGTACGT")]


@pytest.mark.parametrize("text", ["ACGT\n", ">a\nAC GT\n", ">a\nAC1\n"])
def test_what_is_no_fasta_is_named(tmp_path, text):
    path = tmp_path / "bad.fa"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"line \d of .*bad\.fa is no FASTA"):
        read(path)


def test_a_binary_fasta_file_is_named(tmp_path):
    path = tmp_path / "bad.fa"
    path.write_bytes(b">a\n\xff\xfe\n")
    with pytest.raises(BadInput, match="is no UTF-8 text"):
        list(fasta_records(path))
