"""Text: which class is a document of, read byte by byte? Long Range Arena's "text" where the documents are IMDB's reviews.

    aclImdb/{train,test}/{neg,pos}/*.txt      the published archive, unpacked or as the .tar.gz
    FOLDER/CLASS/*.txt                        one folder a class (or the same in a .tar, .tgz, .tar.gz)
    FILE.tsv, .csv, .jsonl                    a label and a text a record
    FOLDER/{train,valid,test}.tsv             and so on: with its own splits

Published: 25,000 and 25,000 reviews, bytes, cut at 4096 (the authors' config says 1000), and the test split is the validation
split too. Here validation is held out of training unless `valid="test"`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hippodrome.part import BadInput
from hippodrome.task import Split
from hippodrome.tasks._documents import Record, cut, read_records, split_files
from hippodrome.tasks._labelled import Parts, _Labelled, found_path

_NAMES = ("label", "text")


class Text(_Labelled):
    """Classification of documents. Inputs (B, L) int64 are bytes + 1, padded on the right with 0; one label a row."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Labelled.Config):
        """The published setting, but for validation."""

        documents: str = "aclImdb"
        """A folder, an archive or a file; see above."""
        valid: Literal["holdout", "test"] = "holdout"
        """Validation: the source's own or else held out of training, or the test split, as published."""

    config: Config

    @property
    def source(self) -> str:
        return self.config.documents

    def read(self) -> Parts:
        path = found_path(self.source, "a folder, an archive or a file of labelled documents", "--documents")
        parts = _read(path, self.config.length)
        if self.config.valid == "test":
            if "test" not in parts:
                raise BadInput(f"{path} has no test split that validation could be: leave valid at 'holdout'")
            parts["valid"] = parts["test"]
        return parts


def _read(path: Path, length: int) -> Parts:
    if path.is_dir():
        files = split_files(path)
        if files:
            return {split: list(read_records(file, _NAMES, length)) for split, file in files.items()}
        return _by_class(_below(path), path, length)
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            return _by_class(_inside(archive), path, length)
    return {"train": list(read_records(path, _NAMES, length))}


Entry = tuple[tuple[str, ...], Callable[[], bytes]]
"""The names of the folders and of the file, and what reads it."""


def _below(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*.txt")):
        yield path.relative_to(folder).parts, path.read_bytes


def _inside(archive: tarfile.TarFile) -> Iterator[Entry]:
    """The files of an archive, without the folder that holds all of it."""
    members = sorted((member for member in archive if member.isfile() and member.name.endswith(".txt")), key=lambda m: m.name)
    names = [Path(member.name).parts for member in members]
    outer = 1 if len({parts[0] for parts in names}) == 1 and min(map(len, names), default=0) > 1 else 0

    def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
        return lambda: archive.extractfile(member).read()  # type: ignore[union-attr]

    for member, parts in zip(members, names, strict=True):
        yield parts[outer:], reader(member)


def _by_class(entries: Iterator[Entry], path: Path, length: int) -> Parts:
    """Documents whose folder is their class, below train/ and test/ if there are such folders."""
    known = list(entries)
    splits: tuple[Split, Split] = ("train", "test")
    given = {split: [entry for entry in known if len(entry[0]) == 3 and entry[0][0] == split] for split in splits}
    if not all(given.values()):
        plain = [_record(entry, length) for entry in known if len(entry[0]) == 2]
        if not plain:
            raise BadInput(f"{path} has no documents: wanted are CLASS/*.txt, or train/CLASS/*.txt and test/CLASS/*.txt")
        return {"train": plain}
    # IMDB's train/ holds unlabelled reviews too: a class is what test/ has.
    classes = {names[1] for names, _ in given["test"]}
    return {split: [_record(entry, length) for entry in given[split] if entry[0][1] in classes] for split in splits}


def _record(entry: Entry, length: int) -> Record:
    names, read = entry
    return names[-2], (cut(read(), length),)
