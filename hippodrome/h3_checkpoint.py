"""The published checkpoints of H3 language models: their tensors under current names, and the sizes that the shapes say.

A checkpoint is a plain state dict or a Lightning file around one, as .pt, .bin or .safetensors, in one of two vocabularies of
keys: the current one (`backbone.layers.0.norm1...`) and an older one (`s4seq.encoder.layers.0...`), whose norms are numbered
one later. Shapes hold every size but the number of attention heads, which the table of the published sizes or the caller gives.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hippodrome.part import BadInput

Weights = Mapping[str, Tensor]

PUBLISHED_HEADS = {(768, 12): 12, (1024, 24): 16, (2048, 24): 16, (2560, 32): 20}
"""(d_model, n_layer) of the published checkpoints (125M, 355M, 1.3B, 2.7B) -> attention heads."""

EMBEDDING = "backbone.embeddings.word_embeddings.weight"
HEAD = "lm_head.weight"
INV_FREQ = "mixer.rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the shapes of a checkpoint say. d_head: channels of an H3 head; n_head: attention heads, None without attention."""

    vocab_size: int
    d_model: int
    n_layer: int
    d_inner: int
    attention_layers: tuple[int, ...]
    n_head: int | None
    rotary_dim: int
    d_state: int
    d_head: int
    tied: bool


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their current names. Never unpickles more than tensors and plain containers."""
    data = _read(path)
    wrapped = data.get("state_dict")
    if isinstance(wrapped, Mapping):
        data = {key.removeprefix("model."): value for key, value in wrapped.items() if key.startswith("model.")}
    weights = {str(key): value for key, value in data.items() if isinstance(value, Tensor)}
    if any(key.startswith("s4seq.encoder.") for key in weights):
        weights = _current_names(weights)
    if EMBEDDING not in weights or not any(key.startswith("backbone.layers.0.mixer.") for key in weights):
        first = ", ".join(sorted(weights)[:3]) or "no tensors"
        raise BadInput(f"{path} is no checkpoint of an H3 language model: it has no {EMBEDDING}, but {first}")
    return weights


def infer_layout(weights: Weights, n_head: int | None = None) -> Layout:
    """The sizes of a checkpoint from its shapes (values are not read). Missing, unknown and misshapen tensors are named."""
    numbers = [int(found[1]) for key in weights if (found := re.match(r"backbone\.layers\.(\d+)\.", key))]
    n_layer = 1 + max(numbers)
    attention = tuple(i for i in range(n_layer) if f"backbone.layers.{i}.mixer.Wqkv.weight" in weights)
    if len(attention) == n_layer:
        raise BadInput("this checkpoint has attention in every layer: it is no H3 language model")
    h3 = f"backbone.layers.{next(i for i in range(n_layer) if i not in attention)}"
    vocab_size, d_model = _shape(weights, EMBEDDING, 2)
    frequencies = {weights[key].numel() for i in attention if (key := f"backbone.layers.{i}.{INV_FREQ}") in weights}
    if len(frequencies) > 1:
        raise BadInput(f"the attention layers have rotary embeddings of different widths: {sorted(frequencies)} frequencies")
    rotary_dim = 2 * max(frequencies, default=0)
    layout = Layout(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layer=n_layer,
        d_inner=_shape(weights, f"{h3}.mlp.fc1.weight", 2)[0],
        attention_layers=attention,
        n_head=_heads(d_model, n_layer, rotary_dim, n_head) if attention else None,
        rotary_dim=rotary_dim,
        d_state=_shape(weights, f"{h3}.mixer.ssm_k_kernel.kernel.B", 2)[1],
        d_head=d_model // _shape(weights, f"{h3}.mixer.D", 1)[0],
        tied=HEAD not in weights or _same(weights[HEAD], weights[EMBEDDING]),
    )
    _check(weights, expected_shapes(layout))
    return layout


def expected_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this layout."""
    d, inner, n, heads = layout.d_model, layout.d_inner, layout.d_state, layout.d_model // layout.d_head
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (layout.vocab_size, d)}

    def linear(at: str, out: int, into: int) -> None:
        shapes.update({f"{at}.weight": (out, into), f"{at}.bias": (out,)})

    def norm(at: str) -> None:
        shapes.update({f"{at}.weight": (d,), f"{at}.bias": (d,)})

    for i in range(layout.n_layer):
        at = f"backbone.layers.{i}"
        norm(f"{at}.norm1")
        norm(f"{at}.norm2")
        linear(f"{at}.mlp.fc1", inner, d)
        linear(f"{at}.mlp.fc2", d, inner)
        if i in layout.attention_layers:
            linear(f"{at}.mixer.Wqkv", 3 * d, d)
            linear(f"{at}.mixer.out_proj", d, d)
            if layout.rotary_dim:
                shapes[f"{at}.{INV_FREQ}"] = (layout.rotary_dim // 2,)
            continue
        for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
            linear(f"{at}.mixer.{name}", d, d)
        shapes[f"{at}.mixer.ssm_k_kernel.kernel.B"] = (d, n)
        shapes[f"{at}.mixer.ssm_k_kernel.kernel.C"] = (1, d, n)
        shapes[f"{at}.mixer.ssm_k_D"] = (d,)
        shapes[f"{at}.mixer.kernel.kernel.log_dt"] = (heads,)
        shapes[f"{at}.mixer.kernel.kernel.inv_A_real"] = (heads, n // 2)
        shapes[f"{at}.mixer.kernel.kernel.A_imag"] = (heads, n // 2)
        shapes[f"{at}.mixer.kernel.kernel.B"] = (heads, n // 2, 2)
        shapes[f"{at}.mixer.kernel.kernel.C"] = (1, heads, n // 2, 2)
        shapes[f"{at}.mixer.D"] = (heads,)
    norm("backbone.ln_f")
    shapes[HEAD] = (layout.vocab_size, d)
    return shapes


def _read(path: Path) -> Mapping[str, Any]:
    """What a checkpoint file holds at its top level."""
    if not path.is_file():
        raise BadInput(f"{path} is not there" if not path.exists() else f"{path} is a folder: give the checkpoint file in it")
    with path.open("rb") as file:
        head = file.read(9)
    try:
        data = load_file(path) if head[8:] == b"{" else _load_torch(path, mmap=head[:2] == b"PK")
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise BadInput(
            f"{path} is no file of tensors, or holds Python objects, which are never loaded. {reason}".rstrip()
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        # A damaged pickle fails in as many ways as it has bytes.
        raise BadInput(f"{path} is truncated or damaged: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
    if not isinstance(data, Mapping):
        raise BadInput(f"{path} is no checkpoint of an H3 language model: it holds a {type(data).__name__}")
    return data


def _load_torch(path: Path, mmap: bool) -> Any:
    with warnings.catch_warnings():
        # It warns of pickles that torch did not write; those it then refuses.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _current_names(weights: Weights) -> dict[str, Tensor]:
    """The older vocabulary in the current one: other prefixes, and norms named after the sublayer before them."""
    n_layer = 1 + max(int(found[1]) for key in weights if (found := re.match(r"s4seq\.encoder\.layers\.(\d+)\.", key)))
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        key = re.sub(r"^s4seq\.encoder\.", "backbone.", re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", key))
        if found := re.fullmatch(r"backbone\.(?:norm|ln_0)\.(weight|bias)", key):
            key = f"backbone.layers.0.norm1.{found[1]}"
        elif found := re.fullmatch(r"backbone\.layers\.(\d+)\.norm1\.(weight|bias)", key):
            key = f"backbone.layers.{found[1]}.norm2.{found[2]}"
        elif found := re.fullmatch(r"backbone\.layers\.(\d+)\.norm2\.(weight|bias)", key):
            after = int(found[1]) + 1
            key = f"backbone.layers.{after}.norm1.{found[2]}" if after < n_layer else f"backbone.ln_f.{found[2]}"
        named[key] = value
    return named


def _shape(weights: Weights, key: str, axes: int) -> tuple[int, ...]:
    if key not in weights:
        raise BadInput(f"this checkpoint of an H3 language model lacks {key}")
    if weights[key].dim() != axes:
        raise BadInput(f"{key} has shape {tuple(weights[key].shape)}: it must have {axes} axes")
    return tuple(weights[key].shape)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _heads(d_model: int, n_layer: int, rotary_dim: int, given: int | None) -> int:
    """Attention heads: as given, else from the table of the published sizes."""
    heads = PUBLISHED_HEADS.get((d_model, n_layer)) if given is None else given
    possible = [n for n in range(1, d_model + 1) if d_model % n == 0 and d_model // n >= rotary_dim]
    listed = ", ".join(map(str, possible))
    if heads is None:
        raise BadInput(
            f"the number of attention heads is not in a checkpoint, and d_model {d_model} with {n_layer} layers is no "
            f"published size: give --n-head, one of {listed}"
        )
    if heads not in possible:
        raise BadInput(f"--n-head is {heads}: with d_model {d_model} it must be one of {listed}")
    return heads


def _check(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is there, is known, and has its shape."""
    missing = [key for key in expected if key not in weights and key != HEAD]
    unknown = [key for key in weights if key not in expected]
    if missing:
        raise BadInput(f"this checkpoint of an H3 language model lacks {_few(missing)}")
    if unknown:
        raise BadInput(f"this checkpoint holds tensors that no H3 language model has: {_few(unknown)}")
    for key, value in weights.items():
        if tuple(value.shape) != expected[key]:
            raise BadInput(f"{key} has shape {tuple(value.shape)}: with the other tensors' sizes it must be {expected[key]}")


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(sorted(keys)[:3]) + more
