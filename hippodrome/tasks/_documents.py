"""Labelled documents as bytes: files of records, and what is held out of them.

    .tsv      the label, anything, then the texts, parted by tabs and never quoted; a first line "label ..." names the columns
    .csv      columns by name, quoted as usual
    .jsonl    an object a line, fields by name

Ids are byte + 1, and 0 is padding: 257 of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hippodrome.part import BadInput
from hippodrome.task import Split
from hippodrome.tasks._rows import padded

VOCAB_SIZE = 257
SUFFIXES = (".tsv", ".csv", ".jsonl")

Record = tuple[str, tuple[bytes, ...]]
"""A label, and one or two texts."""


def cut(text: bytes, length: int) -> bytes:
    """The first bytes of a text. An empty one is a space: a row of nothing has no mean, and no model an answer to it."""
    return text[:length] or b" "


def read_records(path: Path, names: Sequence[str], length: int) -> Iterator[Record]:
    """The records of a file, texts cut at `length` bytes. `names`: fields, the label first; a .tsv ends with the texts."""
    reader = {".tsv": _tab_separated, ".csv": _comma_separated, ".jsonl": _json_lines}.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path} is no file of labelled texts: known are {', '.join(SUFFIXES)}")
    found = False
    try:
        for label, *texts in reader(path, names):
            found = True
            yield label, tuple(cut(text.encode(), length) for text in texts)
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no UTF-8 text: a binary file, or another encoding") from None
    if not found:
        raise BadInput(f"{path} has no documents")


def _tab_separated(path: Path, names: Sequence[str]) -> Iterator[list[str]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.rstrip("\r\n").split("\t")
            if number == 1 and cells[0].lower() == names[0]:
                continue
            if len(cells) < len(names):
                raise BadInput(f"line {number} of {path} has {len(cells)} columns: wanted are {', '.join(names)}")
            yield [cells[0], *cells[1 - len(names) :]]


def _comma_separated(path: Path, names: Sequence[str]) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_names(names, reader.fieldnames or (), str(path))
        for row in reader:
            if any(row[name] is None for name in names):
                raise BadInput(f"line {reader.line_num} of {path} is too short: wanted are {', '.join(names)}")
            yield [row[name] for name in names]


def _json_lines(path: Path, names: Sequence[str]) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadInput(f"{where} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise BadInput(f"{where} is no object: wanted are {', '.join(names)}")
            _check_names(names, row, where)
            yield [str(row[name]) for name in names]


def _check_names(names: Sequence[str], given: Iterable[str], where: str) -> None:
    lacking = [name for name in names if name not in given]
    if lacking:
        raise BadInput(
            f"{where} has no {' and no '.join(map(repr, lacking))}: it has {', '.join(map(repr, given)) or 'nothing'}"
        )


@dataclass(frozen=True)
class Documents:
    """Documents one after the other, each a label and G texts.

    data: bytes, uint8. ends (rows G + 1,): where each text ends. labels (rows,): numbers of the sorted label names.
    """

    data: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    texts: int

    @classmethod
    def of(cls, records: Sequence[Record], names: Sequence[str]) -> Documents:
        """`names`: the sorted labels."""
        number = {name: n for n, name in enumerate(names)}
        pieces = [text for _, texts in records for text in texts]
        ends = np.cumsum([0, *map(len, pieces)])
        labels = np.array([number[label] for label, _ in records], np.int64)
        return cls(np.frombuffer(b"".join(pieces), np.uint8), ends, labels, len(pieces) // len(records))

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, rows: Sequence[int], width: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, W) and lengths (B,), or of several texts a row (B, G, W) and (B, G). width None: that of the longest."""
        places = [row * self.texts + text for row in rows for text in range(self.texts)]
        ids, lengths = padded(self.data, self.ends, places, width, shift=1)
        if self.texts == 1:
            return ids, lengths
        return ids.reshape(len(rows), self.texts, -1), lengths.reshape(len(rows), self.texts)

    @property
    def sha256(self) -> str:
        """Of texts, where they end, and labels."""
        return hashlib.sha256(self.data.tobytes() + self.ends.tobytes() + self.labels.tobytes()).hexdigest()


def without_repeats(records: Iterable[Record]) -> list[Record]:
    """The first record of each text: a text that is met again is no test of anything."""
    first: dict[tuple[bytes, ...], Record] = {}
    for record in records:
        first.setdefault(record[1], record)
    return list(first.values())


def held_out(records: Sequence[Record], share: float, what: str) -> tuple[list[Record], list[Record]]:
    """The records without a random share of them, in order, and that share. Always the same one."""
    count = round(share * len(records))
    if not 0 < count < len(records):
        raise BadInput(f"holdout {share} of {len(records)} documents leaves none for {'training' if count else what}")
    chosen = np.zeros(len(records), bool)
    chosen[np.random.default_rng(0).permutation(len(records))[:count]] = True
    rest = [record for record, out in zip(records, chosen, strict=True) if not out]
    return rest, [record for record, out in zip(records, chosen, strict=True) if out]


def split_files(folder: Path) -> dict[Split, Path]:
    """The files of a folder that are splits, by what their names say; none: it is no such folder."""
    words: dict[Split, tuple[str, ...]] = {"train": ("train",), "valid": ("valid", "val", "eval", "dev"), "test": ("test",)}
    found: dict[Split, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        for split, known in words.items():
            if path.stem.replace("-", ".").replace("_", ".").split(".")[-1].lower() in known:
                if split in found:
                    raise BadInput(f"{folder} has two files of the {split} split: {found[split].name} and {path.name}")
                found[split] = path
    if found and "train" not in found:
        raise BadInput(f"{folder} has {', '.join(path.name for path in found.values())} and no train file")
    return found
