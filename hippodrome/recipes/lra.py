"""Long Range Arena (Tay et al., ICLR 2021): its tasks on trees and on documents, for any of the mixers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hippodrome.readouts.pair import Pair
from hippodrome.readouts.pool import Pool
from hippodrome.recipes._lra import PAPER_BUDGET, PAPER_SIZE, Budget, Name, Rows, Size, classifier
from hippodrome.run import RunConfig
from hippodrome.tasks.listops import ListOps
from hippodrome.tasks.retrieval import Retrieval
from hippodrome.tasks.text import Text


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Which trees, and how many."""

    folder: str | None = ListOps.Config.folder
    """Where the published basic_train.tsv, basic_val.tsv and basic_test.tsv lie; by default trees are drawn."""
    max_depth: int = ListOps.Config.max_depth
    max_args: int = ListOps.Config.max_args
    min_length: int = ListOps.Config.min_length
    """Tokens of a row lie strictly between these two."""
    max_length: int = ListOps.Config.max_length
    train_rows: int = ListOps.Config.train_rows
    test_rows: int = ListOps.Config.test_rows
    """Rows of the test split, and of the valid split."""


PUBLISHED = Trees()


def listops(
    *, mixer: Name = "s4d", trees: Trees = PUBLISHED, size: Size = PAPER_SIZE, budget: Budget = PAPER_BUDGET
) -> RunConfig:
    """ListOps: what a tree of operators comes to. The operator at its root alone scores 36.5 %.

    Args:
        mixer: What moves along the sequence.
    """
    task = ListOps.Config(**vars(trees))
    rows = Rows(vocab_size=ListOps.vocab_size, length=task.max_length, readout=Pool.Config(classes=ListOps.classes))
    return classifier(mixer, task, "listops", rows, size, budget)


def text(
    *,
    mixer: Name = "s4d",
    documents: str = Text.Config.documents,
    classes: int = Text.Config.classes,
    length: int = Text.Config.length,
    valid: Literal["holdout", "test"] = Text.Config.valid,
    holdout: float = Text.Config.holdout,
    pad: Literal["longest", "length"] = Text.Config.pad,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Classification of documents byte by byte: Long Range Arena's "text" if they are IMDB's reviews.

    Args:
        mixer: What moves along the sequence.
        documents: The folder aclImdb or its archive; or a folder of a folder a class, or a .tsv, .csv or .jsonl.
        classes: How many labels there are.
        length: Bytes at which a document is cut.
        valid: Validation held out of training, or the test split, as published.
        holdout: Share of training that is validation; where there is no test split, also of all that is test.
        pad: How wide batches are: as their longest row, or always length, which a CUDA graph needs.
    """
    task = Text.Config(documents=documents, classes=classes, length=length, valid=valid, holdout=holdout, pad=pad)
    rows = Rows(vocab_size=Text.vocab_size, length=length, readout=Pool.Config(classes=classes))
    return classifier(mixer, task, "text", rows, size, budget)


def retrieval(
    *,
    mixer: Name = "s4d",
    pairs: str = Retrieval.Config.pairs,
    classes: int = Retrieval.Config.classes,
    length: int = Retrieval.Config.length,
    holdout: float = Retrieval.Config.holdout,
    pad: Literal["longest", "length"] = Retrieval.Config.pad,
    size: Size = PAPER_SIZE,
    budget: Budget = PAPER_BUDGET,
) -> RunConfig:
    """Do two documents belong together? Two towers over bytes: Long Range Arena's "retrieval" if they are the papers of AAN.

    Args:
        mixer: What moves along the sequence.
        pairs: The folder of new_aan_pairs.train.tsv and its fellows; or a .tsv, .csv or .jsonl of pairs.
        classes: How many labels there are.
        length: Bytes at which a document is cut.
        holdout: Share of training that is validation where the source has none; of one file also the share that is test.
        pad: How wide batches are: as their longest row, or always length, which a CUDA graph needs.
    """
    task = Retrieval.Config(pairs=pairs, classes=classes, length=length, holdout=holdout, pad=pad)
    rows = Rows(vocab_size=Retrieval.vocab_size, length=length, readout=Pair.Config(classes=classes))
    return classifier(mixer, task, "retrieval", rows, size, budget)
