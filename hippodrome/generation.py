"""Generation: prefill the prompts in chunks, then one token a row and step.

`stream` is the one loop; `generate` collects it and `stream_text` turns it into text. Rows are independent: row i draws from
its own generator, seeded with `sampling.seed + i`, so that a prompt in a batch gives what it gives alone with that seed, and
the same on every device (up to rounding of the logits). What follows from the weights alone is computed once, and on a CUDA
device a step is one graph: the weights must not change before the last token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hippodrome.decoder import Decoder, EagerDecoder, GraphDecoder, GreedyGraphDecoder, How
from hippodrome.model import Model, ModelState
from hippodrome.part import BadInput
from hippodrome.sampling import Sampling
from hippodrome.stop_strings import StopBytes, text_before_stop

if TYPE_CHECKING:
    from hippodrome.tokenizer import Tokenizer

Prompts = Sequence[Sequence[int]] | Sequence[str] | Tensor

PREFILL_CHUNK = 8192
"""Tokens of a prompt that go through the model at once unless asked otherwise: what bounds the memory of a prefill."""


def generate(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graph: bool | None = None,
    state_dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, at most `max_new_tokens` of them. Arguments as in `stream`."""
    steps = stream(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        stop=stop,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
        cuda_graph=cuda_graph,
        state_dtype=state_dtype,
    )
    rows: list[list[int]] = [[] for _ in range(len(prompts))]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graph: bool | None = None,
    state_dtype: torch.dtype | None = None,
) -> Iterator[list[int | None]]:
    """Yield, a step at a time, the new id of each row; None for a row that has ended.

    prompts: lists of ids, of different lengths if need be, or ids (B, L), or with a tokenizer strings; an empty one starts
    from the tokenizer's end-of-document token. Where the model answers a prompt instead of continuing it, the id that ends
    prompts (`Model.prompt_end`) is added to one that lacks it, and ends a row. A row ends before one of `stop_ids` (which is
    not yielded) or with the token that completes one of the strings `stop` (which need a tokenizer). vocab_size: ids from
    there on are padding of the vocabulary and never drawn; by default the tokenizer's size. cuda_graph: whether a step is
    replayed as one CUDA graph; None: on CUDA devices, but under autocast. Rows that have ended are then computed on and
    ignored. state_dtype: how states that are rewritten every step are stored, such as torch.bfloat16; None: as computed. Bad
    arguments raise `BadInput` here, not at the first step.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if prefill_chunk < 1:
        raise BadInput(f"prefill_chunk is {prefill_chunk}: it must be at least 1")
    if not model.causal:
        raise BadInput("this model is not causal: it sees the future and cannot generate")
    if vocab_size is not None and vocab_size < 1:
        raise BadInput(f"vocab_size is {vocab_size}: it must be at least 1")
    if stop and tokenizer is None:
        raise BadInput("stop strings need a tokenizer; ids are given as stop_ids")
    if "" in stop:
        raise BadInput("a stop string is empty: it would stop at once")
    graph = with_graph(model, cuda_graph)
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise BadInput(f"state_dtype is {state_dtype}: it must be a floating-point dtype, or none")
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    ends = [StopBytes(stop, tokenizer) for _ in range(len(prompts))]
    rows = _as_ids(prompts, tokenizer)
    table, largest = getattr(model.embed, "weight", None), max(map(max, rows))
    if isinstance(table, Tensor) and largest >= len(table):
        raise BadInput(f"a prompt holds the id {largest}: the model's vocabulary ends at {len(table) - 1}")
    how = How(sampling or Sampling(), vocab_size, prefill_chunk, graph, state_dtype)
    stops, end = set(stop_ids), model.prompt_end
    if end is not None:
        rows, stops = [row if end in row else [*row, end] for row in rows], {*stops, end}
    return _decode(model, rows, max_new_tokens, stops, ends, how)


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    vocab_size: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graph: bool | None = None,
    state_dtype: torch.dtype | None = None,
) -> Iterator[str]:
    """Yield what the model writes after `prompt`, in pieces of whole characters, up to but without a stop string.

    Bytes that are no UTF-8 become U+FFFD. Text that may turn out to begin a stop string is held back until it is decided.
    """
    steps = stream(
        model,
        [prompt],
        max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        stop=stop,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
        cuda_graph=cuda_graph,
        state_dtype=state_dtype,
    )
    return text_before_stop(steps, tokenizer, stop)


def _decode(
    model: Model, prompts: list[list[int]], max_new_tokens: int, stop_ids: set[int], ends: list[StopBytes], how: How
) -> Iterator[list[int | None]]:
    was_training = model.training
    model.eval()
    try:
        decoder = _decoder(model, prompts, max_new_tokens, how)
        live = list(range(len(prompts)))
        for left in reversed(range(max_new_tokens)):
            tokens = decoder.draw()
            new: list[int | None] = [None] * len(prompts)
            stay: list[int] = []
            for slot, (row, token) in enumerate(zip(live, tokens, strict=True)):
                if token not in stop_ids:
                    new[row] = token
                    if not ends[row].reached(token):
                        stay.append(slot)
            if any(token is not None for token in new):
                yield new
            if not stay or not left:
                return
            if len(stay) < len(live):
                decoder.keep(stay)
            live = [live[slot] for slot in stay]
            decoder.feed([tokens[slot] for slot in stay])
    finally:
        model.train(was_training)


def _decoder(model: Model, prompts: list[list[int]], max_new_tokens: int, how: How) -> Decoder:
    """The prompts' rows, prefilled."""
    logits, state = _prefill(model, prompts, max_new_tokens, how.prefill_chunk)
    stepper = model.stepper(how.state_dtype)
    state = stepper.begin(state)
    penalised = how.sampling.repetition_penalty != 1
    if how.cuda_graph and how.sampling.temperature == 0 and not penalised:
        return GreedyGraphDecoder(stepper, state, logits[:, : how.vocab_size], max_new_tokens - 1)
    seen = _seen(prompts, logits, how.vocab_size) if penalised else None
    kind = GraphDecoder if how.cuda_graph else EagerDecoder
    return kind(stepper, state, logits, seen, how)


def with_graph(model: Model, wanted: bool | None) -> bool:
    """Whether steps are replayed as a CUDA graph."""
    on_cuda = next(model.parameters()).device.type == "cuda"
    if wanted and not on_cuda:
        raise BadInput("cuda_graph is asked for, but the model is not on a CUDA device")
    if wanted and not model.one_graph:
        raise BadInput(f"cuda_graph is asked for, but the steps of {type(model).__name__} are not all alike")
    # Autocast would cast every weight again in each replay.
    return on_cuda and model.one_graph and not torch.is_autocast_enabled("cuda") if wanted is None else wanted


def _prefill(model: Model, prompts: list[list[int]], room: int, chunk: int) -> tuple[Tensor, ModelState]:
    """Logits (B, V) after each prompt and the state, with room for `room` more tokens."""
    return fill(model, *_padded(prompts, next(model.parameters()).device), room, chunk)


def _padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, L) padded on the right, and the real ones of each row (B,)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    return ids, torch.tensor([len(prompt) for prompt in prompts], device=device)


@torch.no_grad()
def fill(model: Model, ids: Tensor, counts: Tensor, room: int, chunk: int) -> tuple[Tensor, ModelState]:
    """Logits (B, V) after the first `counts` (B,) of ids (B, L), and the state, with room for `room` more tokens."""
    longest = ids.shape[1]
    state = model.init_state(len(ids), longest + room)
    ragged = bool((counts != longest).any())
    logits = None
    for start in range(0, longest, chunk):
        piece = ids[:, start : start + chunk]
        lengths = (counts - start).clamp(0, piece.shape[1]) if ragged else None
        said, state = model.prefill(piece, state, lengths=lengths)
        # A row whose prompt ended in an earlier chunk keeps what was said then.
        logits = said if logits is None or lengths is None else torch.where((lengths > 0)[:, None], said, logits)
    assert logits is not None
    return logits, state


def _seen(prompts: list[list[int]], logits: Tensor, vocab_size: int | None) -> Tensor:
    """Bool (B, V): the tokens of each prompt."""
    seen = torch.zeros(logits[:, :vocab_size].shape, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        ids = torch.tensor(prompt)
        row[ids[ids < seen.shape[1]]] = True
    return seen.to(logits.device)


def _as_ids(prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Prompts as non-empty lists of ids."""
    if isinstance(prompts, str):
        raise BadInput("prompts is one string: give a list of them")
    if len(prompts) == 0:
        raise BadInput("there is no prompt")
    rows: list[Any] = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    return [_one_prompt(row, tokenizer) for row in rows]


def _one_prompt(row: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise BadInput("a prompt is a string: that needs a tokenizer; without one prompts are lists of ids")
        row = tokenizer.encode(row)
    if not hasattr(row, "__iter__"):
        raise BadInput("prompts must be a batch: a list of lists of ids, or ids (B, L)")
    ids = [int(token) for token in row]
    if any(token < 0 for token in ids):
        raise BadInput(f"a prompt holds the id {min(ids)}: ids are 0 or more")
    if ids:
        return ids
    if tokenizer is None:
        raise BadInput("a prompt is empty: give at least one id, or a tokenizer whose end-of-document token starts it")
    return [tokenizer.end]
