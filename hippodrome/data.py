"""A text as tokens: documents are split into train, valid and test, encoded, and cached as memory-mapped shards.

$HIPPODROME_CACHE (or ~/.cache/hippodrome) / NAME-KEY /
    manifest.json      sources with hashes, tokenizer hash, how the hold-out was split off, documents, tokens and bytes a split
    tokenizer.json
    train.bin valid.bin test.bin      ids, little-endian uint16 or uint32, nothing else

A shard is one end-of-document id, then every document followed by one: each of its ids but the first is somebody's target.
A cache whose sources, settings or vocabulary differ is built anew; whoever reads sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hippodrome.documents import Piece, Source, find_source, glance
from hippodrome.files import replacing, write_json
from hippodrome.part import BadInput, nearest
from hippodrome.task import Split
from hippodrome.tokenizer import Kind, Tokenizer

_FORMAT = 1
_SPLITS: tuple[Split, ...] = get_args(Split)
_SLICE = 1 << 22
"""Bytes of text that are encoded at once."""


@dataclass(frozen=True)
class Corpus:
    """A prepared text: a folder of the cache, its manifest (see above) and the vocabulary of its ids."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    def tokens(self, split: Split) -> np.ndarray:
        """Ids of a split (n,) uint16 or uint32, memory-mapped: an end-of-document id, then documents that end with one."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")


def prepare(
    text: str,
    *,
    tokenizer: Kind = "bpe",
    vocab_size: int = 4096,
    holdout: float = 0.02,
    separator: str | None = None,
    field: str = "text",
) -> Corpus:
    """The corpus that `text` names (see `documents.find_source`), from the cache if its sources did not change.

    `vocab_size` counts for a trained BPE only. `holdout` is the share of the text in test, and again in valid.
    """
    if tokenizer not in get_args(Kind):
        raise BadInput(f"no tokenizer is called {tokenizer!r}: {nearest(tokenizer, get_args(Kind))}")
    if not 0 < holdout <= 0.3:
        raise BadInput(f"holdout is {holdout}: the share of valid and of test must be above 0 and at most 0.3")
    source = find_source(text, separator=separator, field=field)
    settings = {
        "text": source.name,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "holdout": holdout,
        "separator": source.separator,
        "field": field,
    }
    key = hashlib.sha256(json.dumps([_FORMAT, settings]).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", Path(source.name).name)[:40]
    folder = cache_root() / f"{stem}-{tokenizer}-{key}"
    corpus = _cached(folder, source)
    if corpus is None:
        with alone(folder):
            # Another process may have built it while this one waited.
            corpus = _cached(folder, source) or _build(folder, source, settings)
    return corpus


def cache_root() -> Path:
    """Where prepared data is kept: $HIPPODROME_CACHE, or ~/.cache/hippodrome."""
    return Path(os.environ.get("HIPPODROME_CACHE") or "~/.cache/hippodrome").expanduser()


def _cached(folder: Path, source: Source) -> Corpus | None:
    """The corpus in `folder` if it is whole and of today's sources: equal sizes and times, or else equal hashes."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.load(folder)
        item = np.dtype(manifest["dtype"]).itemsize
        whole = all((folder / f"{split}.bin").stat().st_size == manifest["tokens"][split] * item for split in _SPLITS)
        known = manifest["sources"]
        if not whole or tokenizer.hash != manifest["tokenizer"]["sha256"]:
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not source.files or [glance(path) for path in source.files] != [_without(entry, "sha256") for entry in known]:
        found = source.fingerprints()
        if [_without(entry, "mtime_ns") for entry in found] != [_without(entry, "mtime_ns") for entry in known]:
            return None
        # Touched, not changed: remember the new times, so that the next look is cheap again.
        manifest["sources"] = found
        write_json(folder / "manifest.json", manifest)
    return Corpus(folder, manifest, tokenizer)


def _without(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != name}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time builds a folder of the cache. What a killed one left beside it is swept away."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: two builders do double work, no harm
            pass
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _build(folder: Path, source: Source, settings: dict[str, Any]) -> Corpus:
    """Three passes over the source: sizes, vocabulary, ids."""
    with _progress() as watch:
        sources = source.fingerprints()
        sizes = _document_sizes(watch("reading", None, source.pieces()))
        total = sum(sizes)
        if total == 0:
            raise BadInput(f"the corpus {source.name} is empty: it has no text")
        split = _split(sizes, settings["holdout"])

        def parts(doing: str) -> Iterator[tuple[Split, Piece]]:
            return split.assign(watch(doing, total, source.pieces()))

        train_texts = (text for name, (text, _) in parts("learning the vocabulary") if name == "train")
        tokenizer = _tokenizer(settings["tokenizer"], train_texts, settings["vocab_size"])
        with replacing(folder) as beside:
            beside.mkdir()
            tokenizer.save(beside)
            counts = _write_shards(beside, tokenizer, parts("encoding"))
            if 0 in counts["bytes"].values():
                raise BadInput(f"the corpus {source.name} has {total} bytes: too few to hold any out")
            manifest = {
                "format": _FORMAT,
                "settings": settings,
                "sources": sources,
                "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.hash},
                "split": split.statement,
                "dtype": _dtype(tokenizer).str,
                **counts,
            }
            write_json(beside / "manifest.json", manifest)
    return Corpus(folder, manifest, tokenizer)


def _tokenizer(kind: Kind, train_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    if kind == "bytes":
        return Tokenizer.bytes()
    return Tokenizer.gpt2() if kind == "gpt2" else Tokenizer.train(train_texts, vocab_size)


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _document_sizes(pieces: Iterable[Piece]) -> array[int]:
    """UTF-8 bytes of every document."""
    sizes, size = array("Q"), 0
    for text, last in pieces:
        size += len(text.encode())
        if last:
            sizes.append(size)
            size = 0
    return sizes


@dataclass(frozen=True)
class _Assignment:
    """The byte offsets of the text at which valid and test begin, and how that was decided.

    An offset inside a document moves back, by `slack` characters at most, to the end of a paragraph, a line or a word.
    """

    valid: int
    test: int
    statement: str
    slack: int = 0

    def assign(self, pieces: Iterable[Piece]) -> Iterator[tuple[Split, Piece]]:
        """Every piece with its split. A piece that an offset falls into is cut, and its document ends there."""
        offset, bounds, names = 0, [self.valid, self.test], list(_SPLITS)
        for text, last in pieces:
            while bounds and offset + len(text.encode()) > bounds[0]:
                left, text = _cut(text, bounds.pop(0) - offset, self.slack)
                if left:
                    yield names[0], (left, True)
                    offset += len(left.encode())
                names.pop(0)
            offset += len(text.encode())
            yield names[0], (text, last)


def _cut(text: str, size: int, slack: int) -> tuple[str, str]:
    """A text in two, the first of about `size` bytes and no more."""
    stop = len(text.encode()[: max(size, 0)].decode("utf-8", errors="ignore"))
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(stop - slack, 0), stop)
        if found >= 0:
            return text[: found + len(mark)], text[found + len(mark) :]
    return text[:stop], text[stop:]


def _split(sizes: array[int], holdout: float) -> _Assignment:
    """What is held out: of three documents and more whole ones, else ends of the text."""
    total, count = sum(sizes), len(sizes)
    if count < 3:
        share = round(holdout * total) or 1
        few = "2 documents are" if count == 2 else "1 document is"
        return _Assignment(
            total - 2 * share,
            total - share,
            f"within the text, since {few} too few to hold out whole ones: at paragraph or line breaks about the last "
            f"{holdout:.1%} are test, as much before it valid, the rest train",
            slack=share // 2,
        )
    test = _tail(sizes, count, holdout * total, kept=2)
    valid = _tail(sizes, test, holdout * total, kept=1)
    return _Assignment(
        sum(sizes[:valid]),
        sum(sizes[:test]),
        f"by document: of {count} the last {count - test} are test ({sum(sizes[test:]) / total:.1%} of the text), "
        f"the {test - valid} before valid ({sum(sizes[valid:test]) / total:.1%}), the first {valid} train",
    )


def _tail(sizes: array[int], stop: int, goal: float, kept: int) -> int:
    """Where the last documents before `stop` begin that together come nearest to `goal` bytes: one at least, `kept` left."""
    first, taken = stop - 1, sizes[stop - 1]
    while first > kept and taken + sizes[first - 1] / 2 <= goal:
        first -= 1
        taken += sizes[first]
    return first


def _write_shards(folder: Path, tokenizer: Tokenizer, parts: Iterable[tuple[Split, Piece]]) -> dict[str, dict[Split, int]]:
    """The three .bin files, and documents, tokens and bytes of text by split."""
    dtype = _dtype(tokenizer)
    documents: dict[Split, int] = dict.fromkeys(_SPLITS, 0)
    tokens, size = dict(documents), dict(documents)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _SPLITS}

        def put(name: Split, ids: np.ndarray) -> None:
            files[name].write(ids.astype(dtype).tobytes())
            tokens[name] += len(ids)

        end = np.array([tokenizer.end])
        whole = dict.fromkeys(_SPLITS, True)
        for name in _SPLITS:
            put(name, end)
        for group in _slices(parts):
            texts = [text for _, (text, _) in group]
            for (name, (text, last)), ids in zip(group, tokenizer.encode_batch(texts), strict=True):
                put(name, ids)
                size[name] += len(text.encode())
                whole[name] = last
                if last:
                    put(name, end)
                    documents[name] += 1
        # A document that was cut exactly between two pieces.
        for name in _SPLITS:
            if not whole[name]:
                put(name, end)
                documents[name] += 1
    return {"documents": documents, "tokens": tokens, "bytes": size}


def _slices(parts: Iterable[tuple[Split, Piece]]) -> Iterator[list[tuple[Split, Piece]]]:
    """Pieces in groups of a few megabytes."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part[1][0])
        if size >= _SLICE:
            yield group
            group, size = [], 0
    yield group


Watch = Callable[[str, int | None, Iterator[Piece]], Iterator[Piece]]


@contextmanager
def _progress() -> Iterator[Watch]:
    """What shows a bar, on a terminal, while pieces go by: (doing, bytes in all, pieces) -> the same pieces."""
    if not sys.stderr.isatty():
        yield lambda doing, total, pieces: pieces
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:

        def watched(doing: str, total: int | None, pieces: Iterator[Piece]) -> Iterator[Piece]:
            bar = bars.add_task(doing, total=total)
            for text, last in pieces:
                yield text, last
                bars.advance(bar, len(text.encode()))
            bars.remove_task(bar)

        yield watched
