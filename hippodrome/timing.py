"""How long generation takes: a prefill, and the greedy steps after it."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from hippodrome.cuda_graph import GraphedDecode
from hippodrome.generation import PREFILL_CHUNK, fill, with_graph
from hippodrome.model import Model, ModelState
from hippodrome.part import BadInput
from hippodrome.stepper import ModelStepper


@torch.no_grad()
def time_generation(
    model: Model,
    prompt_len: int,
    new_tokens: int,
    batch: int = 1,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graph: bool | None = None,
    state_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Seconds of a prefill of `batch` prompts of `prompt_len` tokens and of the greedy steps after it.

    prefill_s, and what `time_steps` gives. Kernels are warmed up before; the model is timed as it stands (device, dtype).
    """
    if min(prompt_len, new_tokens, batch) < 1:
        raise BadInput(f"prompt_len {prompt_len}, new_tokens {new_tokens} and batch {batch} must be at least 1")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        vocabulary = getattr(model.embed, "weight", torch.empty(1)).shape[0]
        ids = torch.randint(vocabulary, (batch, prompt_len), generator=torch.Generator().manual_seed(0)).to(device)
        if model.prompt_end is not None:
            ids[:, -1] = model.prompt_end
        counts = torch.full((batch,), prompt_len, device=device)
        # On a GPU the kernels of a chunk depend on its shape, and the first call of each is no measurement.
        warm = min(prompt_len, prefill_chunk if device.type == "cuda" else 16)
        fill(model, ids[:, :warm], counts.clamp(max=warm), 0, prefill_chunk)
        begin = _now(device)
        _, state = fill(model, ids, counts, new_tokens + _UNCOUNTED, prefill_chunk)
        prefill_s = _now(device) - begin
        times = time_steps(model, state, new_tokens, cuda_graph=cuda_graph, state_dtype=state_dtype)
    finally:
        model.train(was_training)
    return {"prompt_len": prompt_len, "prefill_s": prefill_s, **times}


_UNCOUNTED = 2
"""Steps before the first that counts: one warms up, the next captures a graph."""


@torch.no_grad()
def time_steps(
    model: Model,
    state: ModelState,
    new_tokens: int,
    *,
    cuda_graph: bool | None = None,
    state_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Seconds of greedy steps from `state`, which is consumed and needs room for two more than `new_tokens`.

    begin_s (until the first step that counts: constants, warm-up, capture), step_s (one step of the whole batch),
    tokens_per_s (of the steps, all rows together), state_bytes (of the whole batch at the end), step_bytes (weights and
    states that a step has to read and write, on average).
    """
    device, batch = state.position.device, len(state.position)
    begin = _now(device)
    stepper = model.stepper(state_dtype)
    state = stepper.begin(state)
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    step: GraphedDecode | _Steps
    if with_graph(model, cuda_graph):
        step = GraphedDecode(stepper, state, tokens, lambda logits: logits.argmax(-1))
    else:
        step = _Steps(stepper, state, tokens)
    for _ in range(_UNCOUNTED):
        step()
    first = _now(device)
    for _ in range(new_tokens):
        step()
    step_s = (_now(device) - first) / new_tokens
    half_way = dataclasses.replace(step.state, position=step.state.position - new_tokens // 2)
    return {
        "new_tokens": new_tokens,
        "batch": batch,
        "begin_s": first - begin,
        "step_s": step_s,
        "tokens_per_s": batch / step_s,
        "state_bytes": step.state.nbytes,
        "step_bytes": _weight_bytes(model) + stepper.traffic(half_way),
    }


class _Steps:
    """Greedy steps launched kernel by kernel."""

    def __init__(self, stepper: ModelStepper, state: ModelState, tokens: Tensor) -> None:
        self.stepper, self.state, self.tokens = stepper, state, tokens

    def __call__(self) -> None:
        logits, self.state = self.stepper.step(self.tokens, self.state)
        self.tokens = logits.argmax(-1)


def _weight_bytes(model: Model) -> int:
    """Bytes of the weights that every step reads: all but the rows of an embedding that no token asks for."""
    looked_up = {id(weight) for weight in model.embed.parameters()}
    read: dict[int, Tensor] = {id(weight): weight for weight in model.parameters() if id(weight) not in looked_up}
    table = getattr(model.readout, "weight", None)
    if isinstance(table, Tensor):
        read[id(table)] = table
    return sum(weight.nbytes for weight in read.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
