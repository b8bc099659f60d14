"""Dna: which class a stretch of DNA comes from, base by base, out of FASTA files (.fa, .fasta, .fna; packed too).

    label "folder"   a sub-folder a class (a species), whole files (strains) held out: never positions, since strains share most
    label "header"   the last word of a record's header, whole records held out

Records are cut into windows of `length` letters; a rest of less than half a window is left out, unless it is all there is.
A letter is its byte in ASCII, in capitals. Language models read the same files as text: train RECIPE --text FILE
--tokenizer bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hippodrome.documents import FASTA, fasta_records, files_of
from hippodrome.part import BadInput
from hippodrome.task import Split
from hippodrome.tasks._classified import _Classified, check_classes, hold_out, labelled_folders

SYMBOLS = 128
"""Ids: those of ASCII. 0 is padding."""


class Dna(_Classified):
    """Inputs (B, length) int64, labels (B,), lengths where some are shorter."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Classified.Config):
        """`data`: a folder, or with labels in the headers a file as well."""

        data: str = "genomes"
        label: Literal["folder", "header"] = "folder"
        classes: int = 2
        length: int = 1024
        """Letters a row."""
        holdout: float = 0.1
        """Share of the files or records of a class in the test split, and again in the valid split; one at least."""
        seed: int = 0
        """Draws what is held out and the order in training."""

        def __post_init__(self) -> None:
            for name, least in {"length": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.seed, self.length = config.seed, config.length
        folder = Path(config.data).expanduser()
        by_class = _files(folder, config.classes) if config.label == "folder" else _records(folder)
        check_classes(config.classes, len(by_class), str(folder))
        self.names = sorted(by_class)
        self._windows: dict[Split, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
        labels: dict[Split, list[int]] = {"train": [], "valid": [], "test": []}
        for label, name in enumerate(self.names):
            for split, units in hold_out(by_class[name], config.holdout, config.seed, f"class {name!r} of {folder}").items():
                windows = [window for unit in units for text in unit for window in _cut(text, config.length)]
                self._windows[split] += windows
                labels[split] += [label] * len(windows)
        for split, windows in self._windows.items():
            if not windows:
                raise BadInput(f"no letters of {folder} are left for {split}")
        for split, held in self._windows.items():
            if not held:
                raise BadInput(f"no letters of {folder} are left for {split}")
        self._labels = {split: torch.tensor(each, dtype=torch.int64) for split, each in labels.items()}

    def labels(self, split: Split) -> Tensor:
        return self._labels[split]

    def inputs(self, split: Split, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        windows = [self._windows[split][row] for row in rows.tolist()]
        lengths = torch.tensor([len(window) for window in windows])
        padded = np.stack([np.pad(window, (0, self.length - len(window))) for window in windows])
        return torch.from_numpy(padded.astype(np.int64)), None if (lengths == self.length).all() else lengths


def _files(folder: Path, classes: int) -> dict[str, list[list[str]]]:
    """Class -> file -> the letters of its records."""
    found = {path.name: _found(path) for path in labelled_folders(folder, classes)}
    return {name: [[text for _, text in fasta_records(file)] for file in files] for name, files in found.items()}


def _records(path: Path) -> dict[str, list[list[str]]]:
    """Class -> record -> its letters, the only ones."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for file in (path,) if path.is_file() else _found(path):
        for header, text in fasta_records(file):
            if len(header.split()) < 2:
                raise BadInput(f"a record of {file} is called {header!r}: wanted are a name, white space and its class")
            if text:
                found[header.split()[-1]].append([text])
    return found


def _found(folder: Path) -> Iterable[Path]:
    files = files_of(folder, FASTA) if folder.is_dir() else ()
    if not files:
        raise BadInput(f"there are no FASTA files in {folder}: wanted are {', '.join(FASTA)}, perhaps packed")
    return files


def _cut(text: str, length: int) -> Iterator[np.ndarray]:
    letters = np.frombuffer(text.encode("ascii"), np.uint8)
    for start in range(0, len(letters), length):
        window = letters[start : start + length]
        if start == 0 or 2 * len(window) >= length:
            yield window
