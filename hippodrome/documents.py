"""Sources of text: a file, a folder of files, the shipped corpus or a data set by name, read as a stream of documents.

    .txt       one document a file, or one between separators (any other file named outright is read as text too)
    .jsonl     one document a line, the string in one field
    .parquet   one document a row, the string in one column
    .fasta     one document a record, its letters in capitals and without line breaks (.fa .fna .ffn .faa too)
    + .gz .xz .zst

Nothing is held whole: a document longer than a megabyte comes in pieces, cut where no byte-level BPE can merge across.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from hippodrome.part import BadInput
from hippodrome.tokenizer import valid_unicode

Piece = tuple[str, bool]
"""Some text, and whether its document ends with it."""

SHIPPED = {"sotu": (Path(__file__).parent / "assets" / "sotu.txt.xz", "\n\n\n")}
"""Corpora that come with the package, by name: path and separator."""

FASTA = (".fasta", ".fa", ".fna", ".ffn", ".faa")
"""Suffixes of FASTA files."""

_FORMATS = (".txt", ".jsonl", ".ndjson", ".parquet", *FASTA)
_PACKED = (".gz", ".xz", ".zst")
_PIECE = 1 << 20
_LETTERS = re.compile(r"[A-Za-z*-]+")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a text is read from. `separator` parts the documents of .txt files; `field` names a field or column."""

    name: str
    files: tuple[Path, ...] = ()
    data_set: Any = None
    separator: str | None = None
    field: str = "text"

    def pieces(self) -> Iterator[Piece]:
        """All documents in order, in pieces. Documents of nothing but white space are left out."""
        fresh = True
        for text, last in self._raw_pieces():
            if not (fresh and last and not text.strip()):
                yield text, last
            fresh = last

    def fingerprints(self) -> list[dict[str, Any]]:
        """What tells this source from a changed one: path, size, time and SHA-256 of every file."""
        if self.data_set is not None:
            return [{"data_set": self.name, "rows": len(self.data_set), "version": str(self.data_set.info.version)}]
        return [{**glance(path), "sha256": _sha256(path)} for path in self.files]

    def _raw_pieces(self) -> Iterator[Piece]:
        if self.data_set is not None:
            yield from _strings(self.data_set, self.field, self.name)
        for path in self.files:
            kind = _suffixes(path)[0]
            with _problems_of(path):
                if kind in (".jsonl", ".ndjson"):
                    yield from _json_lines(path, self.field)
                elif kind == ".parquet":
                    yield from _parquet(path, self.field)
                elif kind in FASTA:
                    yield from ((text, last) for _, text, last in _fasta(path))
                else:
                    yield from _plain(path, self.separator)


def find_source(text: str, *, separator: str | None = None, field: str = "text") -> Source:
    """The source that `text` names: a shipped corpus, a file, a folder, or a data set (`hf:NAME`, or an unknown name)."""
    if separator == "":
        raise BadInput("the separator is empty: give the text between two documents, or none for one document a file")
    if text in SHIPPED:
        path, parting = SHIPPED[text]
        return Source(name=text, files=(path,), separator=separator or parting)
    path = Path(text).expanduser()
    if not text.startswith("hf:") and path.exists():
        files = _files_of(path) if path.is_dir() else (path,)
        return Source(name=str(path.resolve()), files=files, separator=separator, field=field)
    return Source(name=text, data_set=_data_set(text, path), field=field)


def files_of(folder: Path, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """Every file below `folder` with one of the suffixes, packed or not, by path; hidden ones are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and _suffixes(path)[0] in suffixes)
    return tuple(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def fasta_records(path: Path) -> Iterator[tuple[str, str]]:
    """(header without its >, letters) of every record of a FASTA file."""
    parts: list[str] = []
    with _problems_of(path):
        for header, text, last in _fasta(path):
            parts.append(text)
            if last:
                yield header, "".join(parts)
                parts = []


def glance(path: Path) -> dict[str, Any]:
    """Path, size and time of change of a file: the cheap part of its fingerprint."""
    found = path.stat()
    return {"path": str(path.resolve()), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _suffixes(path: Path) -> tuple[str, str]:
    """Format and packing by the file's name: (".txt", ".gz")."""
    suffix = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), suffix) if suffix in _PACKED else (suffix, "")


def _files_of(folder: Path) -> tuple[Path, ...]:
    """Every file of a known format below `folder`, by path; hidden ones are left out."""
    files = files_of(folder, _FORMATS)
    if not files:
        raise BadInput(f"the folder {folder} has no text: wanted are {', '.join(_FORMATS)}, perhaps with {', '.join(_PACKED)}")
    return files


def _data_set(text: str, path: Path) -> Any:
    """A data set of the `datasets` package, all of its train split."""
    name = text.removeprefix("hf:")
    named = text.startswith("hf:")
    looks_like_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and _suffixes(path)[0] not in _FORMATS
    if not named and (not looks_like_name or ("/" in text and path.parent.is_dir())):
        raise BadInput(_missing(path))
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        hint = "a data set by name needs pip install 'hippodrome[datasets]'"
        raise BadInput(f"no data set {name!r} can be loaded: {hint}" if named else f"{_missing(path)}; {hint}") from None
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the package raises errors of many libraries
        raise BadInput(f"the data set {name!r} cannot be loaded: {_first_line(error)}") from None


def _missing(path: Path) -> str:
    """Why there is nothing at `path`, and what there is."""
    folder = path.parent
    if not folder.is_dir():
        return f"no file or folder {path}: there is no folder {folder}"
    close = difflib.get_close_matches(path.name, [*(entry.name for entry in folder.iterdir()), *SHIPPED], n=1, cutoff=0.5)
    return f"no file or folder {path}" + (f": did you mean {close[0]!r}?" if close else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _problems_of(path: Path) -> Iterator[None]:
    """What can be wrong with a file's bytes, in one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no UTF-8 text: a binary file, or another encoding") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, _BrokenZstd) as error:
        raise BadInput(f"{path} is truncated or damaged: {error}") from None


class _BrokenZstd(Exception):
    """What zstandard says of a file, and that it ends too early, which zstandard does not say."""


class _Zstd(io.RawIOBase):
    """The contents of a .zst file, of any number of frames."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise BadInput(f"{path}: .zst files need pip install 'hippodrome[zstd]'") from None
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._ready = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._new_frame(), False
            packed = packed or self._file.read(1 << 16)
            if not packed:
                if self._inside:
                    raise _BrokenZstd("it ends in the middle of a frame")
                return 0
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise _BrokenZstd(error) from None
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(path: Path) -> IO[bytes]:
    packing = _suffixes(path)[1]
    if packing == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    if packing == ".xz":
        return lzma.open(path)
    return io.BufferedReader(_Zstd(path), 1 << 17) if packing == ".zst" else path.open("rb")


def _plain(path: Path, separator: str | None) -> Iterator[Piece]:
    """Documents of a text file; each is followed by a separator or the end of the file."""
    held = ""
    with _unpacked(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as reader:
        while block := reader.read(_PIECE):
            if "\0" in block:
                raise BadInput(f"{path} is a binary file: it has NUL bytes")
            held += block
            if separator is not None:
                *whole, held = held.split(separator)
                yield from ((text, True) for text in whole)
            if len(held) >= _PIECE and (cut := _safe_cut(held, len(held) - len(separator or ""))):
                yield held[:cut], False
                held = held[cut:]
    yield held, True


def _safe_cut(text: str, stop: int) -> int:
    """The last place before `stop` where white space with a line break begins: every BPE here parts words there. Else 0."""
    cut = max(text.rfind("\n", 0, stop), 0)
    while cut > 0 and text[cut - 1].isspace():
        cut -= 1
    return cut


def _fasta(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(header, some letters, whether the record ends with them) in pieces."""
    header: str | None = None
    held, size = list[str](), 0
    with _unpacked(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if line.startswith(">"):
                if header is not None:
                    yield header, "".join(held), True
                header, held, size = line[1:].strip(), [], 0
            elif line and not line.startswith(";"):
                if header is None or not _LETTERS.fullmatch(line):
                    raise BadInput(f"line {number} of {path} is no FASTA: {line[:40]!r}, not a > and a name or letters")
                held.append(line.upper())
                size += len(line)
                if size >= _PIECE:
                    yield header, "".join(held), False
                    held, size = [], 0
    if header is not None:
        yield header, "".join(held), True


def _json_lines(path: Path, field: str) -> Iterator[Piece]:
    with _unpacked(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _string(_parsed(line, path, number), field, f"line {number} of {path}"), True


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadInput(f"line {number} of {path} is no JSON: {error}") from None


def _string(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise BadInput(f"{where} is no JSON object but {str(row)[:40]!r}: wanted is {{{field!r}: ...}}")
    if field not in row:
        raise BadInput(f"{where} has no field {field!r}: it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[field], str):
        raise BadInput(f"field {field!r} of {where} is no string but {str(row[field])[:40]!r}")
    return valid_unicode(row[field])


def _parquet(path: Path, field: str) -> Iterator[Piece]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"{path}: .parquet files need pip install 'hippodrome[parquet]'") from None
    with _unpacked(path) as file:
        # A packed file cannot seek cheaply, and the index of parquet lies at its end.
        seekable = io.BytesIO(file.read()) if _suffixes(path)[1] else file
        try:
            table = parquet.ParquetFile(seekable)
            columns = table.schema_arrow.names
            if field not in columns:
                raise BadInput(f"{path} has no column {field!r}: it has {', '.join(map(repr, columns))}")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                yield from _strings(batch.to_pylist(), field, str(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise BadInput(f"{path} is no parquet file, or a damaged one: {_first_line(error)}") from None


def _strings(rows: Any, field: str, where: str) -> Iterator[Piece]:
    """Documents of rows; a row without a value is no document."""
    for row in rows:
        if row.get(field, "") is not None:
            yield _string(row, field, where), True
