"""Bits per byte by position in the document: whether a model uses what lies far behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hippodrome.model import Model
from hippodrome.part import BadInput
from hippodrome.plots import Panel, draw
from hippodrome.task import Split, Task


def by_position(
    model: Model, task: Task, split: Split, *, chunk: int = 512, max_documents: int | None = None
) -> list[dict[str, Any]]:
    """Scores by position of the target: for every power of two that is reached, from half of it (0: the first) on.

    Each document is read from its start with the state carried on, in chunks of `chunk` tokens. Entries are first, stop
    (positions), tokens, bytes and bits_per_byte (None without bytes). Raises `BadInput` for a task that is no text, and a
    model that has no state.
    """
    if max_documents is not None and max_documents < 1:
        raise BadInput(f"max_documents is {max_documents}: it must be at least 1, or none")
    device, training = next(model.parameters()).device, model.training
    totals = torch.zeros(3, 64, dtype=torch.float64)
    model.eval()
    try:
        with torch.no_grad():
            for number, document in enumerate(task.whole_texts(split)):
                if number == max_documents:
                    break
                state, seen = model.init_state(1), 0
                for ids in document[:-1].split(chunk):
                    out = model(ids[None].to(device), state)
                    assert out.state is not None
                    state, targets = out.state, document[seen + 1 : seen + 1 + len(ids)]
                    nats = F.cross_entropy(out.logits[0].float(), targets.to(device), reduction="none").double().cpu()
                    position = torch.arange(seen, seen + len(ids))
                    bucket = torch.frexp(position.double()).exponent.long()
                    rows = torch.stack([torch.ones_like(nats), task.bytes_of(targets).double(), nats / math.log(2)])
                    totals.index_add_(1, bucket, rows)
                    seen += len(ids)
    finally:
        model.train(training)
    return [_entry(bucket, *column) for bucket, column in enumerate(totals.T.tolist()) if column[0]]


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
