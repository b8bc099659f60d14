"""Retrieval: do two documents belong together? Each is read byte by byte, by the same model and apart from the other.

    FOLDER/*{train,eval,test}.tsv      label, id, id, text, text: the published new_aan_pairs.train.tsv and its two fellows
    FILE.tsv, .csv, .jsonl             a label, text1 and text2 a record

Long Range Arena's task of that name (Tay et al., ICLR 2021): papers of the ACL Anthology Network, the label says whether one
cites the other; 147,086, 18,090 and 17,437 pairs, cut at 4000 bytes. All are held in memory: at most 1.5 GB, and twice that
while they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from hippodrome.part import BadInput
from hippodrome.tasks._documents import read_records, split_files
from hippodrome.tasks._labelled import Parts, _Labelled, found_path

_NAMES = ("label", "text1", "text2")


class Retrieval(_Labelled):
    """Classification of pairs. Inputs (B, 2, L) int64 are bytes + 1, padded with 0, lengths (B, 2); one label a row."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Labelled.Config):
        """The published setting."""

        pairs: str = "tsv_data"
        """A folder or a file; see above. In one file documents of several pairs may lie on both sides of a split."""
        length: int = 4000

    config: Config

    @property
    def source(self) -> str:
        return self.config.pairs

    def read(self) -> Parts:
        path = found_path(self.source, "a folder or a file of pairs", "--pairs")
        if not path.is_dir():
            return {"train": list(read_records(path, _NAMES, self.config.length))}
        files = split_files(path)
        if not files:
            raise BadInput(f"{path} has no pairs: wanted are files whose names end in train, eval and test, as .tsv or .jsonl")
        return {split: list(read_records(file, _NAMES, self.config.length)) for split, file in files.items()}
