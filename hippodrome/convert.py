"""Convert the published checkpoints of H3 language models into runs.

A checkpoint is a plain state dict or a Lightning file around one, as .pt, .bin or .safetensors, in one of two vocabularies of
keys: the current one (`backbone.layers.0.norm1...`) and an older one (`s4seq.encoder.layers.0...`), whose norms are numbered
one later. Shapes hold every size but the number of attention heads, which the table of the published sizes or the caller gives.

Nothing is written until the converted model says, on a fixed prompt, what `reference_logits` computes from the file's own
tensors in float64.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import save
from hippodrome.embeds.tokens import Tokens
from hippodrome.files import replacing, write_json
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.model import BlockConfig, Model, ModelConfig
from hippodrome.part import BadInput
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.run import RunConfig, TrainConfig, provenance, write_config
from hippodrome.tasks import lm as tasks_lm
from hippodrome.tokenizer import Tokenizer

Weights = Mapping[str, Tensor]

PUBLISHED_HEADS = {(768, 12): 12, (1024, 24): 16, (2048, 24): 16, (2560, 32): 20}
"""(d_model, n_layer) of the published checkpoints (125M, 355M, 1.3B, 2.7B) -> attention heads."""

TOLERANCE = 1e-4
"""Largest difference of the logit check, relative to the largest logit: fp32 against float64 through up to 32 blocks."""

CHECK_TOKENS = 80
"""Length of the fixed prompt: more than the shift's 64 taps."""

_EMBEDDING = "backbone.embeddings.word_embeddings.weight"
_HEAD = "lm_head.weight"
_DIAGONAL = ("log_dt", "inv_A_real", "A_imag", "B", "C")
_INV_FREQ = "mixer.rotary_emb.inv_freq"


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
    if _EMBEDDING not in weights or not any(key.startswith("backbone.layers.0.mixer.") for key in weights):
        first = ", ".join(sorted(weights)[:3]) or "no tensors"
        raise BadInput(f"{path} is no checkpoint of an H3 language model: it has no {_EMBEDDING}, but {first}")
    return weights


def infer_layout(weights: Weights, n_head: int | None = None) -> Layout:
    """The sizes of a checkpoint from its shapes (values are not read). Missing, unknown and misshapen tensors are named."""
    numbers = [int(found[1]) for key in weights if (found := re.match(r"backbone\.layers\.(\d+)\.", key))]
    n_layer = 1 + max(numbers)
    attention = tuple(i for i in range(n_layer) if f"backbone.layers.{i}.mixer.Wqkv.weight" in weights)
    if len(attention) == n_layer:
        raise BadInput("this checkpoint has attention in every layer: it is no H3 language model")
    h3 = f"backbone.layers.{next(i for i in range(n_layer) if i not in attention)}"
    vocab_size, d_model = _shape(weights, _EMBEDDING, 2)
    frequencies = {weights[key].numel() for i in attention if (key := f"backbone.layers.{i}.{_INV_FREQ}") in weights}
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
        tied=_HEAD not in weights or _same(weights[_HEAD], weights[_EMBEDDING]),
    )
    _check(weights, expected_shapes(layout))
    return layout


def expected_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this layout."""
    d, inner, n, heads = layout.d_model, layout.d_inner, layout.d_state, layout.d_model // layout.d_head
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (layout.vocab_size, d)}

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
                shapes[f"{at}.{_INV_FREQ}"] = (layout.rotary_dim // 2,)
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
    shapes[_HEAD] = (layout.vocab_size, d)
    return shapes


def model_config(layout: Layout) -> ModelConfig:
    """Our model of this layout."""
    mixer = H3.Config(head_dim=layout.d_head, d_state=layout.d_state)
    position = Rotary(layout.rotary_dim) if layout.rotary_dim else None
    attention = Attention.Config(n_head=layout.n_head or 1, position=position)
    channel = Mlp.Config(d_ff=layout.d_inner, activation="gelu_tanh")
    return ModelConfig(
        d_model=layout.d_model,
        blocks=tuple(
            BlockConfig(mixer=attention if i in layout.attention_layers else mixer, channel=channel)
            for i in range(layout.n_layer)
        ),
        embed=Tokens.Config(vocab_size=layout.vocab_size, pad_to_multiple=1),
        readout=Lm.Config(tied=layout.tied),
    )


def our_names(layout: Layout) -> dict[str, str]:
    """Name in a checkpoint -> name in our model, for every parameter."""
    parts = {
        "mixer.ssm_k_kernel.kernel.B": "mixer.shift.B",
        "mixer.ssm_k_kernel.kernel.C": "mixer.shift.C",
        "mixer.ssm_k_D": "mixer.shift.D",
        "mixer.kernel.kernel.log_dt": "mixer.diagonal.log_dt",
        "mixer.kernel.kernel.inv_A_real": "mixer.diagonal.log_A_real",
        "mixer.kernel.kernel.A_imag": "mixer.diagonal.A_imag",
        "mixer.kernel.kernel.B": "mixer.diagonal.B",
        "mixer.kernel.kernel.C": "mixer.diagonal.C",
        "mixer.D": "mixer.diagonal.D",
    }
    modules = {"norm1": "mixer_norm", "norm2": "channel_norm", "mlp.fc1": "channel.fc1", "mlp.fc2": "channel.fc2"}
    named = {_EMBEDDING: "embed.table.weight"}
    for key in expected_shapes(layout):
        if found := re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", key):
            name = found[2]
            module, _, kind = name.rpartition(".")
            if name != _INV_FREQ:
                named[key] = f"blocks.{found[1]}." + parts.get(name, f"{modules.get(module, module)}.{kind}")
        elif key.startswith("backbone.ln_f."):
            named[key] = key.replace("backbone.ln_f", "final_norm")
    return named if layout.tied else {**named, _HEAD: "readout.linear.weight"}


def convert_h3(checkpoint: str | Path, out: str | Path, *, n_head: int | None = None) -> dict[str, Any]:
    """Write the checkpoint of an H3 language model as the folder `out` and return what converted.json in it says.

    n_head: attention heads, which no checkpoint holds; None takes them from the table of the published sizes. The folder
    holds model.safetensors (fp32), config.json and, where the vocabulary is GPT-2's, its tokenizer.json. Raises `BadInput`
    when the file is no such checkpoint, is damaged, or when the converted model fails the logit check; `out` is then untouched.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"{out} is {'a file' if out.is_file() else 'not empty'}: give a new folder to write")
    weights = read_weights(checkpoint)
    layout = infer_layout(weights, n_head)
    model = _model(weights, layout)
    tokenizer = Tokenizer.gpt2() if 50257 <= layout.vocab_size <= 50264 else None
    report = {
        "source": {"file": checkpoint.name, "bytes": checkpoint.stat().st_size},
        "layout": {**asdict(layout), "attention_layers": list(layout.attention_layers)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer": "gpt2" if tokenizer else None,
        "check": logit_check(model, weights, layout),
        "provenance": provenance(),
    }
    with replacing(out) as beside:
        save(model, beside)
        if tokenizer:
            tokenizer.save(beside)
            task = tasks_lm.Lm.Config(tokenizer="gpt2", length=1024)
            write_config(beside, RunConfig(model=model.config, task=task, train=TrainConfig()))
        write_json(beside / "converted.json", report)
    return report


def logit_check(model: Model, weights: Weights, layout: Layout) -> dict[str, float]:
    """How far the model's logits on a fixed prompt are from `reference_logits`; raises `BadInput` if too far."""
    ids = torch.arange(CHECK_TOKENS) * 7919 % min(layout.vocab_size, 50257)
    wanted = reference_logits(weights, layout, ids)
    with torch.no_grad():
        said = model.eval()(ids[None]).logits[0].double()
    difference = ((said - wanted).abs().max() / wanted.abs().max()).item()
    # Written so that NaN fails as well.
    if not difference <= TOLERANCE:
        raise BadInput(
            f"the logit check failed: on {CHECK_TOKENS} tokens the converted model differs from the checkpoint's own formulas "
            f"by {difference:.1e} of the largest logit, {TOLERANCE:.0e} is allowed; nothing was written"
        )
    return {"tokens": CHECK_TOKENS, "difference": difference, "tolerance": TOLERANCE}


def _model(weights: Weights, layout: Layout) -> Model:
    with torch.device("meta"):
        model = model_config(layout).build()
    model.load_state_dict(_renamed(weights, layout), assign=True)
    return model


def _renamed(weights: Weights, layout: Layout) -> dict[str, Tensor]:
    """The tensors under our names, fp32, without the leading axis of one that the authors give C."""
    named = {ours: weights[theirs].float() for theirs, ours in our_names(layout).items()}
    return {name: tensor[0] if name.endswith((".shift.C", ".diagonal.C")) else tensor for name, tensor in named.items()}


def reference_logits(weights: Weights, layout: Layout, ids: Tensor) -> Tensor:
    """Logits (L, V) float64 of ids (L,): the authors' equations written plainly on the file's own tensors.

    Convolutions are sums over an explicit kernel, so this shares nothing with the model that it checks.
    """

    def get(name: str) -> Tensor:
        return weights[f"backbone.{name}"].double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def h3(x: Tensor, at: str) -> Tensor:
        q, k, v = (linear(x, f"{at}.{name}_proj").T for name in "qkv")
        shift = _shift_kernel(get(f"{at}.ssm_k_kernel.kernel.C")[0], get(f"{at}.ssm_k_kernel.kernel.B"), len(ids))
        k = _convolve(k, shift) + get(f"{at}.ssm_k_D")[:, None] * k
        log_dt, log_decay, a_imag, b, c = (get(f"{at}.kernel.kernel.{name}") for name in _DIAGONAL)
        kernel = _diagonal_kernel(log_dt, log_decay, a_imag, b, c, len(ids))[:, None, None]
        q, k, v = (signal.unflatten(0, (-1, layout.d_head)) for signal in (q, k, v))
        kv = k[:, :, None] * v[:, None]
        s = _convolve(kv, kernel) + get(f"{at}.D")[:, None, None, None] * kv
        return linear((q[:, :, None] * s).sum(1).flatten(0, 1).T, f"{at}.output_linear")

    def attention(x: Tensor, at: str) -> Tensor:
        assert layout.n_head is not None
        q, k, v = linear(x, f"{at}.Wqkv").unflatten(1, (3, layout.n_head, -1)).permute(1, 2, 0, 3)
        if layout.rotary_dim:
            frequency = get(f"{at}.rotary_emb.inv_freq")
            q, k = _rotate(q, frequency), _rotate(k, frequency)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return linear(mixed.transpose(0, 1).flatten(1), f"{at}.out_proj")

    x = weights[_EMBEDDING][ids].double()
    for i in range(layout.n_layer):
        at = f"layers.{i}"
        mix = attention if i in layout.attention_layers else h3
        x = x + mix(norm(x, f"{at}.norm1"), f"{at}.mixer")
        hidden = F.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"), approximate="tanh")
        x = x + linear(hidden, f"{at}.mlp.fc2")
    head = _EMBEDDING if layout.tied else _HEAD
    return norm(x, "ln_f") @ weights[head].double().T


def _convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """sum_(s<=t) kernel[t-s] u[s] along the last axis."""
    length = u.shape[-1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return torch.einsum("...ts,...s->...t", kernel[..., lag.clamp(min=0)] * (lag >= 0), u)


def _shift_kernel(c: Tensor, b: Tensor, length: int) -> Tensor:
    """K[i] = sum_n c[n+i] b[n]: what a shift register with input weights b and taps c answers to an impulse."""
    n = b.shape[1]
    kernel = torch.zeros(len(b), max(n, length), dtype=b.dtype)
    for i in range(n):
        kernel[:, i] = (c[:, i:] * b[:, : n - i]).sum(1)
    return kernel[:, :length]


def _diagonal_kernel(log_dt: Tensor, log_decay: Tensor, a_imag: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """K[l] = 2 Re sum_n C_n Bbar_n Abar_n^l with A = -exp(log_decay) + i a_imag, discretised by the bilinear rule."""
    half = log_dt.exp()[:, None] * torch.complex(-log_decay.exp(), a_imag) / 2
    step = (1 + half) / (1 - half)
    weight = torch.view_as_complex(c[0].contiguous()) * torch.view_as_complex(b.contiguous())
    weight = weight * log_dt.exp()[:, None] / (1 - half)
    powers = step[..., None] ** torch.arange(length)
    return 2 * (weight[..., None] * powers).sum(1).real


def _rotate(x: Tensor, frequency: Tensor) -> Tensor:
    """Rotary positions: channel j of (heads, L, K) turns with channel j + n by t frequency_j, for the n frequencies."""
    n = len(frequency)
    turn = torch.arange(x.shape[1])[:, None] * frequency
    left, right, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([left * turn.cos() - right * turn.sin(), left * turn.sin() + right * turn.cos(), rest], -1)


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
    missing = [key for key in expected if key not in weights and key != _HEAD]
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
