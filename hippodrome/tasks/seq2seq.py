"""Seq2seq: write a target from a source, for pairs of texts in files: summaries, translations, answers.

    FILE.jsonl, .csv                      a source and a target a record, by name
    FOLDER/{train,valid,test}.jsonl       the same with its own splits

    source, end, target, end              the row: `end` is the tokenizer's end of a document, which no text holds

Sources and targets are cut at a number of tokens. All pairs are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hippodrome.files import write_json
from hippodrome.part import BadInput
from hippodrome.task import IGNORE, Batch, Split, Task, accuracy, ordered_rows, shuffled_rows
from hippodrome.tasks._documents import held_out, read_records, split_files, without_repeats
from hippodrome.tokenizer import Kind, Tokenizer

_LONGEST = 1 << 40
"""Bytes at which no document is cut: tokens are."""


class Seq2Seq(Task):
    """Inputs and targets (B, L) int64, L that of the batch's longest row, and lengths (B,).

    `bits_per_byte` is of the targets and their ends, each token after the right ones; `solved` the share of rows that greedy
    decoding writes exactly. `tokenizer` is trained on the training split's sources and targets where it is a BPE.
    """

    headline = "bits_per_byte"
    higher_is_better = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Task.Config):
        pairs: str = "pairs.jsonl"
        """A file or a folder; see above."""
        source: str = "source"
        """Field of the sources."""
        target: str = "target"
        tokenizer: Kind = "bpe"
        vocab_size: int = 4096
        """Ids of a trained BPE; the other tokenizers have their own number."""
        length: int = 3072
        """Tokens at which a source is cut."""
        target_length: int = 256
        holdout: float = 0.05
        """Share of the pairs that is test where there are no splits, and of what is left that is valid."""
        seed: int = 0

        def __post_init__(self) -> None:
            for name, least in {"length": 1, "target_length": 1, "seed": 0}.items():
                if getattr(self, name) < least:
                    raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
            if not 0 < self.holdout <= 0.5:
                raise BadInput(f"holdout is {self.holdout}: it is a share above 0 and at most 0.5")

        @property
        def ids(self) -> int:
            """How many ids the tokenizer can have: what a model's embedding must hold."""
            return {"bytes": 257, "bpe": self.vocab_size, "gpt2": 50257}[self.tokenizer]

        @property
        def end(self) -> int:
            """The id between source and target, and behind it: a tokenizer's last."""
            return self.ids - 1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        texts = _read(config)
        self.tokenizer = _tokenizer(config, [text for pair in texts["train"] for text in pair])
        self.vocab_size = self.tokenizer.vocab_size
        self._bytes_of = torch.tensor([len(spelling) for spelling in self.tokenizer.token_bytes])
        self._rows = {split: [self._encoded(*pair) for pair in pairs] for split, pairs in texts.items()}

    def _encoded(self, source: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        one, other = self.tokenizer.encode_batch([source, target])
        return one[: self.config.length], other[: self.config.target_length]

    def batch(self, split: Split, index: int, size: int) -> Batch:
        count = self.size(split)
        rows = shuffled_rows(count, index, size, self.config.seed) if split == "train" else ordered_rows(count, index, size)
        pairs, end = [self._rows[split][row] for row in rows.tolist()], self.tokenizer.end
        lengths = torch.tensor([len(source) + 1 + len(target) for source, target in pairs])
        inputs = torch.full((len(pairs), int(lengths.max())), end)
        targets = torch.full_like(inputs, IGNORE)
        for place, (source, target) in enumerate(pairs):
            ids = torch.from_numpy(np.concatenate([source, [end], target, [end]]).astype(np.int64))
            inputs[place, : len(ids) - 1] = ids[:-1]
            targets[place, len(source) : len(ids) - 1] = ids[len(source) + 1 :]
        return Batch(inputs, targets, lengths)

    def size(self, split: Split) -> int:
        return len(self._rows[split])

    def score(self, logits: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        asked = batch.targets != IGNORE
        nats = F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        size = self.bytes_of(batch.targets.where(asked, self.tokenizer.end)).sum()
        counted = asked.any(-1)
        right = ((logits.argmax(-1) == batch.targets) | ~asked).all(-1) & counted
        scores = {"loss": (nats, asked.sum()), "bits_per_byte": (nats / math.log(2), size)}
        return {**scores, "accuracy": accuracy(logits, batch.targets), "solved": (right.sum(), counted.sum())}

    def floors(self) -> Mapping[str, float]:
        """Each token by how often it is in the targets of training, one added to each count."""
        counts = self._target_counts("train") + 1
        test = self._target_counts("test")
        bits = -(test * np.log2(counts / counts.sum())).sum()
        return {"token frequencies": float(bits / max(1, (test * self._bytes_of.numpy()).sum()))}

    def _target_counts(self, split: Split) -> np.ndarray:
        """How often each id is a target (V,)."""
        ids = np.concatenate([target for _, target in self._rows[split]]).astype(np.int64)
        counts = np.bincount(ids, minlength=self.vocab_size)
        counts[self.tokenizer.end] += len(self._rows[split])
        return counts

    def bytes_of(self, ids: Tensor) -> Tensor:
        """Bytes of text that each id stands for, int64."""
        self._bytes_of = self._bytes_of.to(ids.device)
        return self._bytes_of[ids]

    def save(self, folder: Path) -> None:
        """tokenizer.json, and data.json: what was read and how many pairs each split has."""
        self.tokenizer.save(folder)
        sizes: dict[str, Any] = {split: len(rows) for split, rows in self._rows.items()}
        write_json(folder / "data.json", {"pairs": self.config.pairs, "splits": sizes})


def _read(config: Seq2Seq.Config) -> dict[Split, list[tuple[str, str]]]:
    """(source, target) of each split; what the files do not part is held out of training."""
    path = Path(config.pairs).expanduser()
    if not path.exists():
        raise BadInput(f"there is no {path}: name a file or a folder of pairs with --pairs")
    files: dict[Split, Path] = split_files(path) if path.is_dir() else {"train": path}
    if not files:
        raise BadInput(f"{path} has no pairs: wanted are files whose names end in train, valid and test, as .jsonl")
    names = (config.target, config.source)
    records = {split: list(read_records(file, names, _LONGEST)) for split, file in files.items()}
    if "test" not in records:
        records["train"], records["test"] = held_out(without_repeats(records["train"]), config.holdout, "test")
    if "valid" not in records:
        records["train"], records["valid"] = held_out(records["train"], config.holdout, "validation")
    return {split: [(texts[0].decode(), target) for target, texts in found] for split, found in records.items()}


def _tokenizer(config: Seq2Seq.Config, texts: list[str]) -> Tokenizer:
    if config.tokenizer == "bpe":
        trained = Tokenizer.train(texts, config.vocab_size)
        # A model is built for the id that its tokenizer ends with before there is a tokenizer.
        if trained.end != config.end:
            raise BadInput(
                f"vocab_size is {config.vocab_size}, but the pairs give only {trained.vocab_size} ids: set it to that"
            )
        return trained
    return Tokenizer.bytes() if config.tokenizer == "bytes" else Tokenizer.gpt2()
