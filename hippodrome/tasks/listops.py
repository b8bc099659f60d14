"""ListOps of Long Range Arena (Nangia and Bowman, 2018; Tay et al., ICLR 2021): what does a tree of operators come to?

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]  ->  5        MIN, MAX, MED (rounded down), SM (sum modulo 10); ten classes

Trees of depth 10 at most with 2 to 10 arguments, between 500 and 2000 tokens long, 1032 on average. Drawn here by the published
law, or read from the published files. The operator at the root, the first token, says much of the answer: a model that learned
nothing else scores what `floors` says, and most of the published Transformers score no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hippodrome.part import BadInput
from hippodrome.task import Batch, Split
from hippodrome.tasks._labels import commonest, label_scores
from hippodrome.tasks._listops import CLOSE, DIGIT, _TreeTask, encode
from hippodrome.tasks._rows import padded

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
_FILES: dict[Split, str] = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}


class ListOps(_TreeTask):
    """Ten-way classification of trees. Inputs (B, max_length) int64, padded on the right with 0; one label a row."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_TreeTask.Config):
        """The published setting."""

        folder: str | None = None
        """Where the published basic_train.tsv, basic_val.tsv and basic_test.tsv lie; None: trees are drawn.

        Rows of files are cut at max_length.
        """

        @property
        def drawn(self) -> bool:
            return self.folder is None

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._found: dict[Split, Found] = {}

    def found(self, split: Split) -> Found:
        """Tokens of all rows (n,) uint8, where each ends (rows + 1,), and the answers (rows,) uint8."""
        if split not in self._found:
            if self.config.folder is not None:
                self._found[split] = _read(Path(self.config.folder).expanduser() / _FILES[split])
            else:
                trees = self.trees(split)
                self._found[split] = trees.tokens, trees.ends, trees.roots
        return self._found[split]

    def batch(self, split: Split, index: int, size: int) -> Batch:
        tokens, ends, answers = self.found(split)
        rows = self.rows(split, index, size)
        ids, lengths = padded(tokens, ends, rows, self.config.max_length)
        return Batch(torch.from_numpy(ids), torch.from_numpy(answers[rows].astype(np.int64)), torch.from_numpy(lengths))

    def size(self, split: Split) -> int:
        return super().size(split) if self.config.drawn else len(self.found(split)[2])

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Accuracy and cross entropy."""
        return label_scores(logits, batch.targets)

    def floors(self) -> Mapping[str, float]:
        """The commonest answer of the test split, and the commonest one to each operator at the root."""
        tokens, ends, answers = self.found("test")
        roots = tokens[ends[:-1]]
        by_root = sum(commonest(answers[roots == root]) for root in np.unique(roots))
        return {"majority class": commonest(answers) / len(answers), "root operator alone": by_root / len(answers)}


def _read(path: Path) -> Found:
    """Tokens, ends and answers of a published file: a header, then a tree and its value a line, parted by a tab."""
    if not path.is_file():
        raise BadInput(
            f"no file {path}: a folder of ListOps has {', '.join(_FILES.values())}; without a folder trees are drawn"
        )
    trees, answers = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            source, _, answer = line.rstrip().partition("\t")
            if number == 1 and answer == "Target":
                continue
            tree = _tree(source, f"line {number} of {path}")
            if not (len(answer) == 1 and answer.isdigit()):
                raise BadInput(f"line {number} of {path} has the value {answer[:20]!r}: wanted is a tree, a tab and a digit")
            trees.append(tree)
            answers.append(int(answer))
    if not trees:
        raise BadInput(f"{path} has no trees")
    ends = np.cumsum([0, *map(len, trees)])
    return np.concatenate(trees), ends, np.array(answers, np.uint8)


def _tree(source: str, where: str) -> np.ndarray:
    try:
        tree = encode(source)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if not len(tree) or not (DIGIT <= tree[0] < CLOSE):
        raise BadInput(f"{where} has no tree before the tab")
    return tree
