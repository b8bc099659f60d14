"""Convert published weights of Vision Transformers into a saved model.

Two vocabularies are known: that of the authors' JAX code, as the published .npz files have it
(`Transformer/encoderblock_0/...`), and timm's (`blocks.0.attn.qkv.weight`). A file is an .npz, whose pickled contents are never
loaded, or a .safetensors. Everything is brought into the current JAX names first; the published files number the layers of a
block differently.

Nothing is written until the converted model says, of a fixed picture, what `reference_logits` computes from the file's tensors
in float64.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import save
from hippodrome.embeds.patches import Patches, resized_positions
from hippodrome.files import replacing, write_json
from hippodrome.mixers.attention import Attention
from hippodrome.model import BlockConfig, Model, ModelConfig
from hippodrome.part import BadInput
from hippodrome.patterns import Full
from hippodrome.readouts.pool import Pool
from hippodrome.run import provenance

Weights = Mapping[str, Tensor]
Activation = Literal["gelu_tanh", "gelu"]

PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""d_model of Ti, S, B, L and H -> attention heads, which timm's files do not hold."""

TOLERANCE = 1e-4
"""Largest difference of the check, relative to the largest logit: fp32 against float64."""

_EPS = 1e-6
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_BLOCK = "Transformer/encoderblock_{}"
_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
_OLDER = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": _ATTENTION, "MlpBlock_3": _MLP}
"""In the published files the layers of a block share one count."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the shapes say. positions: learned vectors of patches; d_hidden: width of pre_logits, None without it."""

    d_model: int
    n_layer: int
    n_head: int
    d_ff: int
    patch: int
    channels: int
    classes: int
    positions: int
    token: bool
    d_hidden: int | None


def read_weights(path: Path, n_head: int | None = None) -> tuple[dict[str, Tensor], Activation]:
    """The tensors in the current JAX names, fp32, and the activation of the code that the file's names are of."""
    weights = _read(path)
    if "patch_embed.proj.weight" in weights:
        return _from_timm(weights, n_head), "gelu"
    if "embedding/kernel" not in weights or _POSITIONS not in weights:
        first = ", ".join(sorted(weights)[:3]) or "no tensors"
        raise BadInput(
            f"{path} is no Vision Transformer of JAX or timm: it has no embedding/kernel and {_POSITIONS}, but {first}"
        )
    return _current_names(weights), "gelu_tanh"


def infer_layout(weights: Weights, n_head: int | None = None) -> Layout:
    """The sizes from the shapes. Missing, unknown and misshapen tensors are named."""
    numbers = [int(found[1]) for key in weights if (found := re.match(r"Transformer/encoderblock_(\d+)/", key))]
    if not numbers:
        raise BadInput("this Vision Transformer has no Transformer/encoderblock_0")
    block = _BLOCK.format(0)
    patch, _, channels, d_model = _shape(weights, "embedding/kernel", 4)
    heads = _shape(weights, f"{block}/{_ATTENTION}/query/kernel", 3)[1]
    if n_head is not None and n_head != heads:
        raise BadInput(f"--n-head is {n_head}, but the file has {heads} heads")
    if "head/kernel" not in weights:
        raise BadInput("this Vision Transformer has no head: give a file with one, fine-tuned or not")
    token = "cls" in weights
    layout = Layout(
        d_model=d_model,
        n_layer=1 + max(numbers),
        n_head=heads,
        d_ff=_shape(weights, f"{block}/{_MLP}/Dense_0/kernel", 2)[1],
        patch=patch,
        channels=channels,
        classes=_shape(weights, "head/kernel", 2)[1],
        positions=_shape(weights, _POSITIONS, 3)[1] - token,
        token=token,
        d_hidden=_shape(weights, "pre_logits/kernel", 2)[1] if "pre_logits/kernel" in weights else None,
    )
    _check(weights, expected_shapes(layout))
    return layout


def expected_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Vision Transformer of this layout."""
    d, heads, inner, p = layout.d_model, layout.n_head, layout.d_ff, layout.patch
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(at: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> None:
        shapes.update({f"{at}/kernel": kernel, f"{at}/bias": bias})

    dense("embedding", (p, p, layout.channels, d), (d,))
    shapes[_POSITIONS] = (1, layout.positions + layout.token, d)
    if layout.token:
        shapes["cls"] = (1, 1, d)
    for i in range(layout.n_layer):
        at = _BLOCK.format(i)
        for name in ("query", "key", "value"):
            dense(f"{at}/{_ATTENTION}/{name}", (d, heads, d // heads), (heads, d // heads))
        dense(f"{at}/{_ATTENTION}/out", (heads, d // heads, d), (d,))
        dense(f"{at}/{_MLP}/Dense_0", (d, inner), (inner,))
        dense(f"{at}/{_MLP}/Dense_1", (inner, d), (d,))
    norms = [f"{_BLOCK.format(i)}/LayerNorm_{n}" for i in range(layout.n_layer) for n in (0, 1)]
    for at in (*norms, "Transformer/encoder_norm"):
        shapes.update({f"{at}/scale": (d,), f"{at}/bias": (d,)})
    if layout.d_hidden is not None:
        dense("pre_logits", (d, layout.d_hidden), (layout.d_hidden,))
    dense("head", (layout.d_hidden or d, layout.classes), (layout.classes,))
    return shapes


def grids(layout: Layout, image_size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Patches (down, across) of the pictures it was trained on, and of those of `image_size` pixels; () asks for the same."""
    if len(image_size) > 2 or min(image_size, default=layout.patch) < layout.patch or any(n % layout.patch for n in image_size):
        said = " ".join(map(str, image_size))
        raise BadInput(f"image-size is {said}: give a side, or height and width, in multiples of the patch, {layout.patch}")
    side = math.isqrt(layout.positions)
    square = (side, side) if side**2 == layout.positions else None
    if not image_size:
        if square is None:
            raise BadInput(
                f"{layout.positions} positions are no square of patches: give the pictures' --image-size HEIGHT WIDTH"
            )
        return square, square
    new = (image_size[0] // layout.patch, image_size[-1] // layout.patch)
    old = new if math.prod(new) == layout.positions else square
    if old is None:
        raise BadInput(
            f"{layout.positions} positions are no square of patches, nor {new[0]} x {new[1]}: only a square is resized"
        )
    return old, new


def model_config(layout: Layout, grid: tuple[int, int], activation: Activation) -> ModelConfig:
    """Our model of this layout, for pictures of a `grid` of patches."""
    block = BlockConfig(
        mixer=Attention.Config(n_head=layout.n_head, pattern=Full(), init="xavier"),
        channel=Mlp.Config(d_ff=layout.d_ff, activation=activation, init="xavier"),
        norm_eps=_EPS,
    )
    embed = Patches.Config(
        height=grid[0] * layout.patch,
        width=grid[1] * layout.patch,
        channels=layout.channels,
        patch=layout.patch,
        token=layout.token,
    )
    how: Literal["first", "mean"] = "first" if layout.token else "mean"
    readout = Pool.Config(classes=layout.classes, how=how, d_hidden=layout.d_hidden, init="zeros")
    return ModelConfig(d_model=layout.d_model, blocks=(block,) * layout.n_layer, embed=embed, readout=readout)


def our_weights(weights: Weights, layout: Layout) -> dict[str, Tensor]:
    """The tensors of the current JAX names under ours; gradients in the former give gradients in the latter."""
    d, ours = layout.d_model, dict[str, Tensor]()

    def dense(to: str, *names: str, inputs: int | None = None) -> None:
        """Dense layers side by side, their inputs flattened to one axis."""
        kernels = [weights[f"{name}/kernel"] for name in names]
        ours[f"{to}.weight"] = torch.cat([k.reshape(inputs or k.shape[0], -1).T for k in kernels]).contiguous()
        ours[f"{to}.bias"] = torch.cat([weights[f"{name}/bias"].flatten() for name in names])

    def norm(to: str, name: str) -> None:
        ours.update({f"{to}.weight": weights[f"{name}/scale"], f"{to}.bias": weights[f"{name}/bias"]})

    dense("embed.linear", "embedding", inputs=layout.patch**2 * layout.channels)
    ours["embed.positions"] = weights[_POSITIONS][0]
    if layout.token:
        ours["embed.token"] = weights["cls"].flatten()
    for i in range(layout.n_layer):
        at, to = _BLOCK.format(i), f"blocks.{i}"
        norm(f"{to}.mixer_norm", f"{at}/LayerNorm_0")
        dense(f"{to}.mixer.Wqkv", *(f"{at}/{_ATTENTION}/{name}" for name in ("query", "key", "value")), inputs=d)
        dense(f"{to}.mixer.out_proj", f"{at}/{_ATTENTION}/out", inputs=d)
        norm(f"{to}.channel_norm", f"{at}/LayerNorm_1")
        dense(f"{to}.channel.fc1", f"{at}/{_MLP}/Dense_0")
        dense(f"{to}.channel.fc2", f"{at}/{_MLP}/Dense_1")
    norm("final_norm", "Transformer/encoder_norm")
    if layout.d_hidden is not None:
        dense("readout.hidden", "pre_logits")
    dense("readout.linear", "head")
    return ours


def convert_vit(
    checkpoint: str | Path,
    out: str | Path,
    *,
    image_size: Sequence[int] = (),
    n_head: int | None = None,
    activation: Activation | None = None,
) -> dict[str, Any]:
    """Write the Vision Transformer in `checkpoint` as the folder `out` and return what converted.json in it says.

    image_size: pixels of a side, or height and width, of the pictures to come, for which the positions are resized; () keeps
    the file's own. n_head: needed for a file of timm's of no published width. activation: None is that of the code the names
    are of, gelu_tanh for JAX and gelu for timm. Raises `BadInput` when the file is none, is damaged, or when the converted
    model fails the check; `out` is then untouched.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"{out} is {'a file' if out.is_file() else 'not empty'}: give a new folder to write")
    weights, usual = read_weights(checkpoint, n_head)
    layout = infer_layout(weights, n_head)
    old, new = grids(layout, image_size)
    weights[_POSITIONS] = resized_positions(weights[_POSITIONS][0], old, new)[None]
    with torch.device("meta"):
        model = model_config(layout, new, activation or usual).build()
    model.load_state_dict(our_weights(weights, layout), assign=True)
    report = {
        "source": {"file": checkpoint.name, "bytes": checkpoint.stat().st_size},
        "layout": asdict(layout),
        "grid": {"trained": list(old), "now": list(new)},
        "activation": activation or usual,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "check": _checked(model, weights, layout, activation or usual),
        "provenance": provenance(),
    }
    with replacing(out) as beside:
        save(model, beside)
        write_json(beside / "converted.json", report)
    return report


def _checked(model: Model, weights: Weights, layout: Layout, activation: Activation) -> dict[str, float]:
    """How far the model's logits of a fixed picture are from `reference_logits`; raises `BadInput` if too far."""
    embed = model.embed.config
    assert isinstance(embed, Patches.Config)
    picture = torch.arange(embed.height * embed.width * embed.channels).double().mul(0.7).sin()
    picture = picture.reshape(1, embed.height, embed.width, embed.channels)
    wanted = reference_logits(weights, layout, picture, activation)
    with torch.no_grad():
        said = model.eval()(picture.float()).logits.double()
    difference = ((said - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
    # Written so that NaN fails as well.
    if not difference <= TOLERANCE:
        raise BadInput(
            f"the check failed: of a fixed picture the converted model's logits differ from the file's own formulas by "
            f"{difference:.1e} of the largest, {TOLERANCE:.0e} is allowed; nothing was written"
        )
    return {"difference": difference, "tolerance": TOLERANCE}


def reference_logits(weights: Weights, layout: Layout, pictures: Tensor, activation: Activation = "gelu_tanh") -> Tensor:
    """Logits (B, classes) float64 of pictures (B, H, W, C): the authors' equations written plainly, head by head.

    This shares nothing with the model that it checks.
    """

    def get(name: str) -> Tensor:
        return weights[name].double()

    def dense(x: Tensor, at: str) -> Tensor:
        return x @ get(f"{at}/kernel") + get(f"{at}/bias")

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{at}/scale"), get(f"{at}/bias"), _EPS)

    def attention(x: Tensor, at: str) -> Tensor:
        y = get(f"{at}/out/bias")
        for head in range(layout.n_head):
            q, k, v = (
                x @ get(f"{at}/{name}/kernel")[:, head] + get(f"{at}/{name}/bias")[head] for name in ("query", "key", "value")
            )
            y = y + (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v @ get(f"{at}/out/kernel")[head]
        return y

    kernel = get("embedding/kernel").permute(3, 2, 0, 1)
    x = F.conv2d(pictures.double().permute(0, 3, 1, 2), kernel, get("embedding/bias"), stride=layout.patch).flatten(2).mT
    if layout.token:
        x = torch.cat([get("cls").expand(len(x), 1, -1), x], 1)
    x = x + get(_POSITIONS)
    for i in range(layout.n_layer):
        at = _BLOCK.format(i)
        x = x + attention(norm(x, f"{at}/LayerNorm_0"), f"{at}/{_ATTENTION}")
        hidden = dense(norm(x, f"{at}/LayerNorm_1"), f"{at}/{_MLP}/Dense_0")
        hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
        x = x + dense(hidden, f"{at}/{_MLP}/Dense_1")
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if layout.token else x.mean(1)
    return dense(x if layout.d_hidden is None else dense(x, "pre_logits").tanh(), "head")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, fp32."""
    if not path.is_file():
        raise BadInput(f"{path} is not there" if not path.exists() else f"{path} is a folder: give the file of weights in it")
    with path.open("rb") as file:
        packed = file.read(2) == b"PK"
    try:
        if not packed:
            return {name: tensor.float() for name, tensor in load_file(path).items()}
        with np.load(path, allow_pickle=False) as arrays:
            if any(name.endswith(".pkl") for name in arrays.files):
                raise ValueError("it holds a pickle, as torch.save writes it, and none is loaded: save it as .safetensors")
            return {name: torch.from_numpy(np.asarray(arrays[name], dtype=np.float32).copy()) for name in arrays.files}
    except (SafetensorError, zipfile.BadZipFile, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{path} is no whole .npz or .safetensors of numbers: {reason}") from None


def _current_names(weights: Weights) -> dict[str, Tensor]:
    return {"/".join(_OLDER.get(word, word) for word in name.split("/")): tensor for name, tensor in weights.items()}


def _from_timm(weights: Weights, n_head: int | None) -> dict[str, Tensor]:
    """timm's names and axes in those of JAX. What it does not know keeps its name, and is refused later."""
    if weights["patch_embed.proj.weight"].dim() != 4:
        raise BadInput("patch_embed.proj.weight must have 4 axes")
    d_model = len(weights["patch_embed.proj.weight"])
    heads = PUBLISHED_HEADS.get(d_model) if n_head is None else n_head
    if heads is None or heads < 1 or d_model % heads:
        said = f"width {d_model} is no published size" if heads is None else f"--n-head is {heads}"
        possible = ", ".join(str(n) for n in range(1, d_model + 1) if d_model % n == 0)
        raise BadInput(f"{said}: give --n-head, which timm's files do not hold, one of {possible}")
    plain = {"cls_token": "cls", "pos_embed": _POSITIONS, "patch_embed.proj.bias": "embedding/bias"}
    modules = {"norm": "Transformer/encoder_norm", "head": "head", "pre_logits.fc": "pre_logits"}
    inner = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "mlp.fc1": f"{_MLP}/Dense_0", "mlp.fc2": f"{_MLP}/Dense_1"}
    if "fc_norm.weight" in weights:
        raise BadInput("fc_norm is a norm after the mean over the patches: only models that norm before it are read")
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if name == "patch_embed.proj.weight":
            named["embedding/kernel"] = tensor.permute(2, 3, 1, 0)
        elif name in plain:
            named[plain[name]] = tensor
        elif module in modules:
            named |= _dense_or_norm(modules[module], kind, tensor)
        elif found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            at, part = _BLOCK.format(found[1]), found[2]
            if part in inner:
                named |= _dense_or_norm(f"{at}/{inner[part]}", kind, tensor)
            elif part in ("attn.qkv", "attn.proj"):
                named |= _heads_apart(f"{at}/{_ATTENTION}", name, tensor, d_model, heads)
            else:
                named[name] = tensor
        else:
            named[name] = tensor
    return named


def _dense_or_norm(to: str, kind: str, tensor: Tensor) -> dict[str, Tensor]:
    if kind == "weight":
        return {f"{to}/kernel": tensor.T} if tensor.dim() == 2 else {f"{to}/scale": tensor}
    return {f"{to}/{kind}": tensor}


def _heads_apart(to: str, name: str, tensor: Tensor, d_model: int, heads: int) -> dict[str, Tensor]:
    """The maps of timm's attention: out of one matrix those of queries, keys and values, with an axis of heads."""
    joined, weight = ".qkv." in name, name.endswith(".weight")
    wanted = ((3 if joined else 1) * d_model, *([d_model] if weight else []))
    if tuple(tensor.shape) != wanted:
        raise BadInput(f"{name} has shape {tuple(tensor.shape)}: with the other tensors' sizes it must be {wanted}")
    if not joined:
        return {f"{to}/out/kernel": tensor.T.reshape(heads, -1, d_model)} if weight else {f"{to}/out/bias": tensor}
    parts = dict(zip(("query", "key", "value"), tensor.chunk(3), strict=True))
    if weight:
        return {f"{to}/{part}/kernel": rows.T.reshape(d_model, heads, -1) for part, rows in parts.items()}
    return {f"{to}/{part}/bias": rows.reshape(heads, -1) for part, rows in parts.items()}


def _shape(weights: Weights, name: str, axes: int) -> tuple[int, ...]:
    if name not in weights:
        raise BadInput(f"this Vision Transformer lacks {name}")
    if weights[name].dim() != axes:
        raise BadInput(f"{name} has shape {tuple(weights[name].shape)}: it must have {axes} axes")
    return tuple(weights[name].shape)


def _check(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is there, is known, and has its shape."""
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise BadInput(f"this Vision Transformer lacks {', '.join(missing[:3])} ({len(missing)} in all)")
    if unknown:
        raise BadInput(
            f"this file holds what no plain Vision Transformer has: {', '.join(unknown[:3])} ({len(unknown)} in all)"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise BadInput(f"{name} has shape {tuple(weights[name].shape)}: with the other tensors' sizes it must be {shape}")
