"""Sampling: what the next token is drawn from, and the draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.part import BadInput

NOT_FINITE = "the model's logits are not finite: its weights are damaged or its training diverged"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. In this order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to at least p."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in the row are divided by it if positive, multiplied if negative (CTRL, Keskar et al. 2019)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"top_k is {self.top_k}: it must be at least 1, or none")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p is {self.min_p}: it must be between 0 and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"repetition_penalty is {self.repetition_penalty}: it must be above 0; 1 is none")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"seed is {self.seed}: it must be 0 or more, and below 2^63")


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """What the next token is drawn from: logits (B, V) -> probabilities (B, V), fp32; one-hot when temperature is 0.

    seen (B, V) bool: the tokens that the repetition penalty counts.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    best, at = logits.max(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, at, 1.0)
    # The maximum goes first, so that a temperature near zero gives -inf and never inf - inf.
    logits = (logits - best) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter_(-1, kept.indices, kept.values)
    if sampling.top_p < 1:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token stays while the likelier ones before it do not yet add up to p: the first always does.
        goes = ranked.cumsum(-1) - ranked >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(goes).scatter(-1, order, goes), -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits.softmax(-1)


def draw(logits: Tensor, sampling: Sampling, seen: Tensor | None, dice: list[torch.Generator]) -> list[int]:
    """One token a row of logits (B, V): where its cumulative probability passes a uniform number of the row's own generator.

    Raises `BadInput` for logits that are not finite.
    """
    # Not all logits, as -inf is how a model forbids a token.
    if not logits.amax(-1).isfinite().all():
        raise BadInput(NOT_FINITE)
    odds = probabilities(logits, sampling, seen)
    if sampling.temperature == 0:
        return odds.argmax(-1).tolist()
    uniform = torch.cat([torch.rand(1, generator=die, dtype=torch.float64) for die in dice]).to(logits.device)
    reached = odds.double().cumsum(-1)
    # Strictly above, so that a token of probability zero is never where the sum passes.
    return (reached > uniform[:, None] * reached[:, -1:]).int().argmax(-1).tolist()
