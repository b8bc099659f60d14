"""Bits per byte by position in the document: whether a model uses what lies far behind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hippodrome.model import Model, ModelState
from hippodrome.part import BadInput
from hippodrome.plots import Panel, draw
from hippodrome.task import IGNORE, Batch, Split, Task


def by_position(
    model: Model, task: Task, split: Split, *, chunk: int = 512, rows: int = 4, max_documents: int | None = None
) -> list[dict[str, Any]]:
    """Scores by position of the target: for every power of two that is reached, from half of it (0: the first) on.

    Each document is read from its start with the state carried on, in chunks of `chunk` tokens, `rows` of them side by side: a
    row that has come to an end takes the next document, its state reset. Entries are first, stop (positions), tokens, bytes
    and bits_per_byte (None without bytes). Raises `BadInput` for a task that is no text, and a model that has no state.
    """
    for name, value in {"max_documents": max_documents, "rows": rows, "chunk": chunk}.items():
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}: it must be at least 1" + (", or none" if name == "max_documents" else ""))
    device, training = next(model.parameters()).device, model.training
    totals = torch.zeros(3, 64, dtype=torch.float64)
    model.eval()
    try:
        with torch.no_grad():
            state: ModelState | None = None
            for batch, kept, position in _side_by_side(islice(task.whole_texts(split), max_documents), rows, chunk):
                state = _state_before(model, state, batch, kept)
                out = model(batch.inputs.to(device), state, lengths=None if batch.lengths is None else batch.lengths.to(device))
                state, asked = out.state, batch.asked
                logits, targets = out.logits[asked.to(device)].float(), batch.targets[asked]
                nats = F.cross_entropy(logits, targets.to(device), reduction="none").double().cpu()
                bucket = torch.frexp(position[asked].double()).exponent.long()
                values = torch.stack([torch.ones_like(nats), task.bytes_of(targets).double(), nats / math.log(2)])
                totals.index_add_(1, bucket, values)
    finally:
        model.train(training)
    return [_entry(bucket, *column) for bucket, column in enumerate(totals.T.tolist()) if column[0]]


def _state_before(model: Model, state: ModelState | None, batch: Batch, kept: Tensor) -> ModelState:
    """What the rows remember: of the rows `kept` of the batch before, nothing where a document begins."""
    assert batch.starts is not None
    if state is None or bool(batch.starts.all()):
        return model.init_state(len(kept))
    state = state if len(kept) == len(state.position) else state.reorder(kept)
    return (
        state.reset(batch.starts.to(state.position.device), model.init_state(len(kept))) if bool(batch.starts.any()) else state
    )


def _side_by_side(documents: Iterable[Tensor], rows: int, chunk: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches of documents (n,) of which every row reads one to its end and then the next, until there are none.

    With each come the rows (B,) of the batch before that its rows go on from, and the positions (B, L) of its targets. The last
    chunk of a document is padded; rows without a document are left out.
    """
    left = iter(documents)
    reading = [(document, 0) for document in islice(left, rows)]
    kept, starts = list(range(len(reading))), [True] * len(reading)
    while reading:
        pieces = [document[seen : seen + chunk + 1] for document, seen in reading]
        inputs = pad_sequence([piece[:-1] for piece in pieces], batch_first=True)
        targets = pad_sequence([piece[1:] for piece in pieces], batch_first=True, padding_value=IGNORE)
        lengths = torch.tensor([len(piece) - 1 for piece in pieces])
        seen = torch.tensor([seen for _, seen in reading])
        position = seen[:, None] + torch.arange(inputs.shape[1])
        padded = bool((lengths < inputs.shape[1]).any())
        yield Batch(inputs, targets, lengths if padded else None, torch.tensor(starts)), torch.tensor(kept), position
        after: list[tuple[Tensor, int]] = []
        kept, starts = [], []
        for row, (document, done) in enumerate(reading):
            ended = done + chunk + 1 >= len(document)
            following = next(left, None) if ended else document
            if following is not None:
                after.append((following, 0 if ended else done + chunk))
                kept.append(row)
                starts.append(ended)
        reading = after


def overall(entries: list[dict[str, Any]]) -> float:
    """Bits per byte of all positions together: of whole documents with the state carried. NaN without bytes."""
    scored = [entry for entry in entries if entry["bytes"]]
    size = sum(entry["bytes"] for entry in scored)
    return sum(entry["bits_per_byte"] * entry["bytes"] for entry in scored) / size if size else math.nan


def draw_positions(path: Path, entries: list[dict[str, Any]], title: str) -> None:
    """Write a PNG of what `by_position` found."""
    scored = [entry for entry in entries if entry["bits_per_byte"] is not None]
    curve = [float(entry["stop"]) for entry in scored], [entry["bits_per_byte"] for entry in scored]
    panel = Panel(
        title=title, x="token of the document, up to", y="bits per byte", curves={title: [curve]}, log_x=True, markers=True
    )
    draw(path, [panel], "Bits per byte by position in the document")


def _entry(bucket: int, tokens: float, size: float, bits: float) -> dict[str, Any]:
    first = 0 if bucket == 0 else 2 ** (bucket - 1)
    score = bits / size if size else None
    return {"first": first, "stop": 2**bucket, "tokens": int(tokens), "bytes": int(size), "bits_per_byte": score}
