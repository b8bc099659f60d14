"""Language modelling: each token of a text from those before it, in windows of one length.

    loss = -sum_t log p(x_t | x_<t),    bits per byte = loss / (ln 2 * bytes of the text)

Bits per byte compare models of different vocabularies; perplexity is per token. The end of a document is a target too, and
counts no bytes. A window knows nothing of what lies before it, unless the run carries its state and `order` is "stream", where
documents follow each other in one stretch of text, or "documents", where each row reads a document from its start to its end
and then takes the next one, its state reset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hippodrome.data import prepare
from hippodrome.files import write_json
from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch, Split, Task, ordered_rows, shuffled_rows
from hippodrome.tasks._lanes import SideBySide
from hippodrome.tokenizer import Kind

Order = Literal["shuffled", "stream", "documents"]


class Lm(Task):
    """Predict the next token of a text. `tokenizer` and `vocab_size` (ids in use) are those of the prepared text."""

    headline = "bits_per_byte"
    higher_is_better = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        """`text`: a file, a folder, "sotu" (the shipped corpus) or a data set; see `documents.find_source`."""

        text: str = "sotu"
        tokenizer: Kind = "bpe"
        vocab_size: int = 4096
        """Ids of a trained BPE; the other tokenizers have their own number."""
        length: int = 512
        """Tokens a row."""
        holdout: float = 0.02
        """Share of the text in the test split, and again in the valid split."""
        separator: str | None = None
        """What parts the documents of a .txt file; None: a file is one document."""
        field: str = "text"
        """Where .jsonl and .parquet keep a document."""
        order: Order = "shuffled"
        """For runs that carry their state, a row continues the same row of the batch before. stream: through its own stretch of
        the text. documents: through one document after the other, each from its start; the last window of each is padded."""
        lanes: int | None = None
        """Rows that stream side by side, over all processes and micro-batches; None: as many as a batch has."""
        seed: int = 0

        def __post_init__(self) -> None:
            for name, least in {"length": 1, "seed": 0, "lanes": 1}.items():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise BadInput(f"{name} is {value}: it must be at least {least}")

        @property
        def ids(self) -> int:
            """How many ids the tokenizer can have: what a model's embedding must hold."""
            return {"bytes": 257, "bpe": self.vocab_size, "gpt2": 50257}[self.tokenizer]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.corpus = prepare(
            config.text,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            holdout=config.holdout,
            separator=config.separator,
            field=config.field,
        )
        self.tokenizer = self.corpus.tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self._bytes_of = torch.tensor([len(spelling) for spelling in self.tokenizer.token_bytes])
        self._ids = {split: self.corpus.tokens(split) for split in ("train", "valid", "test")}
        self._reading: dict[int, SideBySide] = {}
        if (longest := len(self._ids["train"]) - 1) < config.length:
            raise BadInput(
                f"length is {config.length}, but the training text of {config.text} has {longest + 1} tokens: "
                f"the largest length is {longest}"
            )

    def batch(self, split: Split, index: int, size: int) -> Batch:
        """Ids (B, L) and the ids after them (B, L), int64. The last window of valid and test is padded."""
        if split != "train":
            return self._scored(split, ordered_rows(self.size(split), index, size))
        read = {"shuffled": self._shuffled, "stream": self._streamed, "documents": self._by_document}
        return read[self.config.order](index, size)

    def size(self, split: Split) -> int:
        """Windows in a split; of train, those of one epoch."""
        targets, length = len(self._ids[split]) - 1, self.config.length
        if split != "train":
            return -(-targets // length)
        if self.config.order == "documents":
            return int(self._turns.sum())
        if self.config.order == "stream":
            lanes = self.config.lanes or 1
            return targets // lanes // length * lanes
        # Room is left for an epoch's offset, which is less than a window.
        return max(1, (targets - length + 1) // length)

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """loss: nats a token. bits_per_byte: bits a byte of the text that the targets stand for."""
        asked = batch.targets != IGNORE
        nats = F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        size = self.bytes_of(batch.targets.where(asked, self.tokenizer.end)).sum()
        return {"loss": (nats, asked.sum()), "bits_per_byte": (nats / math.log(2), size)}

    def report(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Loss and bits per byte, and the perplexity a token."""
        scores = super().report(totals)
        return {**scores, "perplexity": math.exp(min(scores["loss"], 700.0))}

    def whole_texts(self, split: Split) -> Iterator[Tensor]:
        """The documents of a split, each (n,) int64 from the end of the one before to its own end."""
        ids = self._ids[split]
        (ends,) = np.nonzero(ids == self.tokenizer.end)
        for start, stop in pairwise(ends.tolist()):
            yield torch.from_numpy(ids[start : stop + 1].astype(np.int64))

    def bytes_of(self, ids: Tensor) -> Tensor:
        """Bytes of text that each id stands for, int64."""
        self._bytes_of = self._bytes_of.to(ids.device)
        return self._bytes_of[ids]

    def save(self, folder: Path) -> None:
        """tokenizer.json, and data.json: what the text was and how it was split."""
        self.tokenizer.save(folder)
        write_json(folder / "data.json", self.corpus.manifest)

    def _windows(self, split: Split, starts: Sequence[int]) -> Tensor:
        """(B, L + 1) int64 ids of a split, from each start on."""
        ids, length = self._ids[split], self.config.length
        return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))

    def _shuffled(self, index: int, size: int) -> Batch:
        """Windows that do not overlap within an epoch, in an order and from an offset that the epoch's number draws."""
        rows, length = self.size("train"), self.config.length
        room = min(length, len(self._ids["train"]) - rows * length)
        starts = [
            self._offset((index * size + place) // rows, room) + row * length
            for place, row in enumerate(shuffled_rows(rows, index, size, self.config.seed).tolist())
        ]
        windows = self._windows("train", starts)
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _offset(self, epoch: int, room: int) -> int:
        return int(np.random.default_rng([self.config.seed, epoch]).integers(room))

    def _streamed(self, index: int, size: int) -> Batch:
        """Lane b reads its own stretch of the text from end to end, again and again; groups of lanes take turns."""
        lanes, length = self._lanes(size), self.config.length
        targets = len(self._ids["train"]) - 1
        chunks = targets // lanes // length
        if chunks < 1:
            raise BadInput(
                f"{lanes} lanes of {length} tokens need {lanes * length} tokens, the training text has {targets}: "
                f"the largest length is {targets // lanes}"
            )
        turn, group = divmod(index, lanes // size)
        chunk = turn % chunks
        first = group * size
        windows = self._windows("train", [lane * (targets // lanes) + chunk * length for lane in range(first, first + size)])
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), starts=torch.full((size,), chunk == 0))

    def _by_document(self, index: int, size: int) -> Batch:
        """Every lane reads a document, then the next one that no lane has begun; groups of lanes take turns."""
        lanes, length, ends = self._lanes(size), self.config.length, self._ends
        if lanes not in self._reading:
            self._reading[lanes] = SideBySide(self._turns.tolist(), lanes, self.config.seed)
        turn, group = divmod(index, lanes // size)
        read = [self._reading[lanes].at(lane, turn) for lane in range(group * size, (group + 1) * size)]
        begin = [int(ends[document]) + chunk * length for document, chunk in read]
        stop = [min(at + length, int(ends[document + 1])) for at, (document, _) in zip(begin, read, strict=True)]
        return self._padded("train", begin, stop, torch.tensor([chunk == 0 for _, chunk in read]))

    def _lanes(self, size: int) -> int:
        """Rows that go on side by side where a batch has `size` of them."""
        lanes = self.config.lanes or size
        if lanes % size:
            raise BadInput(f"{lanes} lanes cannot be shared out in batches of {size} rows: lanes must be a multiple of it")
        documents = len(self._turns) if self.config.order == "documents" else lanes
        if lanes > documents:
            raise BadInput(
                f"{lanes} lanes need as many documents, the training text of {self.config.text} has {documents}: take batches "
                f'of at most {documents} rows, order "stream", or a separator that parts a .txt file into documents'
            )
        return lanes

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where the end-of-document ids of the training text stand: the targets of document d lie behind d up to d + 1."""
        return np.flatnonzero(self._ids["train"] == self.tokenizer.end)

    @functools.cached_property
    def _turns(self) -> np.ndarray:
        """Windows of each training document."""
        return -(-np.diff(self._ends) // self.config.length)

    def _scored(self, split: Split, rows: Tensor) -> Batch:
        """Windows one after the other, so that every id but the first is a target once."""
        length, last = self.config.length, len(self._ids[split]) - 1
        begin = [row * length for row in rows.tolist()]
        return self._padded(split, begin, [min(at + length, last) for at in begin])

    def _padded(self, split: Split, begin: Sequence[int], stop: Sequence[int], starts: Tensor | None = None) -> Batch:
        """Windows of the ids begin ... stop - 1, padded at the right to the same length."""
        ids, shape = self._ids[split], (len(begin), self.config.length)
        inputs, targets = torch.full(shape, self.tokenizer.end), torch.full(shape, IGNORE)
        for row, (at, end) in enumerate(zip(begin, stop, strict=True)):
            piece = torch.from_numpy(ids[at : end + 1].astype(np.int64))
            inputs[row, : end - at], targets[row, : end - at] = piece[:-1], piece[1:]
        lengths = torch.tensor(stop) - torch.tensor(begin)
        return Batch(inputs, targets, None if (lengths == self.config.length).all() else lengths, starts)
