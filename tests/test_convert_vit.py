"""Vision Transformers: equal to the authors' JAX code in values and gradients, from both vocabularies of weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hippodrome import load as load_model
from hippodrome.convert_vit import convert_vit, grids, infer_layout, model_config, our_weights, read_weights, reference_logits
from hippodrome.part import BadInput
from tests.commands import run
from tests.golden_files import load

CASES = ("vit_tiny_token", "vit_tiny_gap_rect", "vit_tiny_prelogits")
BLOCK = "Transformer/encoderblock_"


def weights_of(case):
    return {name.removeprefix("param."): tensor for name, tensor in load(case).items() if name.startswith("param.")}


def size_of(case):
    return tuple(load(case)["in.image"].shape[1:3])


def write_npz(path, weights):
    np.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})
    return path


def published(weights):
    """The older numbers of the layers of a block."""
    older = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    older |= {"MlpBlock_0": "MlpBlock_3"}
    return {"/".join(older.get(word, word) for word in name.split("/")): tensor for name, tensor in weights.items()}


def as_timm(weights):
    """The same numbers in timm's names and axes, written out apart from the converter."""
    d = weights["embedding/kernel"].shape[-1]
    out = {"patch_embed.proj.weight": weights["embedding/kernel"].permute(3, 2, 0, 1)}
    out["patch_embed.proj.bias"] = weights["embedding/bias"]
    out["pos_embed"] = weights["Transformer/posembed_input/pos_embedding"]
    if "cls" in weights:
        out["cls_token"] = weights["cls"]
    at = "Transformer/encoder_norm"
    out |= {"norm.weight": weights[f"{at}/scale"], "norm.bias": weights[f"{at}/bias"]}
    for ours, at in (("head", "head"), ("pre_logits.fc", "pre_logits")):
        if f"{at}/kernel" in weights:
            out |= {f"{ours}.weight": weights[f"{at}/kernel"].T, f"{ours}.bias": weights[f"{at}/bias"]}
    for i in range(sum(name.endswith("query/bias") for name in weights)):
        at = f"{BLOCK}{i}"
        for ours, norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1")):
            out[f"blocks.{i}.{ours}.weight"] = weights[f"{at}/{norm}/scale"]
            out[f"blocks.{i}.{ours}.bias"] = weights[f"{at}/{norm}/bias"]
        for ours, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"blocks.{i}.mlp.{ours}.weight"] = weights[f"{at}/MlpBlock_0/{dense}/kernel"].T
            out[f"blocks.{i}.mlp.{ours}.bias"] = weights[f"{at}/MlpBlock_0/{dense}/bias"]
        at += "/MultiHeadDotProductAttention_0"
        three = ("query", "key", "value")
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([weights[f"{at}/{n}/kernel"].reshape(d, d).T for n in three])
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([weights[f"{at}/{n}/bias"].reshape(d) for n in three])
        out[f"blocks.{i}.attn.proj.weight"] = weights[f"{at}/out/kernel"].reshape(d, d).T
        out[f"blocks.{i}.attn.proj.bias"] = weights[f"{at}/out/bias"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_authors(case):
    golden, weights = load(case), weights_of(case)
    layout = infer_layout(weights)
    model = model_config(layout, grids(layout, size_of(case))[1], "gelu_tanh").build().eval()
    model.load_state_dict(our_weights(weights, layout))
    image = golden["in.image"].clone().requires_grad_()
    logits = model(image).logits
    torch.testing.assert_close(logits, golden["out.logits"], rtol=1e-4, atol=2e-5)
    (logits * golden["cot.logits"]).sum().backward()
    torch.testing.assert_close(image.grad, golden["grad.image"], rtol=1e-4, atol=2e-5)
    grads = {name.removeprefix("grad.param."): tensor for name, tensor in golden.items() if name.startswith("grad.param.")}
    wanted = our_weights(grads, layout)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_plain_forward_pass_is_the_authors(case):
    golden, weights = load(case), weights_of(case)
    logits = reference_logits(weights, infer_layout(weights), golden["in.image"])
    torch.testing.assert_close(logits.float(), golden["out.logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["npz", "published", "timm", "flax"])
def test_from_the_file_to_the_authors_logits(tmp_path, case, kind):
    golden, weights = load(case), weights_of(case)
    path = tmp_path / ("weights.npz" if kind in ("npz", "published") else "weights.safetensors")
    if path.suffix == ".npz":
        write_npz(path, published(weights) if kind == "published" else weights)
    else:
        save_file(as_timm(weights) if kind == "timm" else weights, path)
    n_head = infer_layout(weights).n_head if kind == "timm" else None
    report = convert_vit(path, tmp_path / "out", image_size=size_of(case), n_head=n_head, activation="gelu_tanh")
    assert report["check"]["difference"] < 1e-5
    model = load_model(tmp_path / "out")
    torch.testing.assert_close(model(golden["in.image"]).logits, golden["out.logits"], rtol=1e-4, atol=2e-5)


def test_the_command_resizes_positions(tmp_path):
    path = write_npz(tmp_path / "weights.npz", weights_of("vit_tiny_token"))
    result = run("convert", "vit", path, tmp_path / "out", "--image-size", 24, 32)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "converted.json").read_text())["grid"] == {"trained": [4, 4], "now": [6, 8]}
    model = load_model(tmp_path / "out")
    assert model.embed.positions.shape == (49, 24)
    assert model(torch.zeros(1, 24, 32, 3)).logits.shape == (1, 10)


def test_the_activation_is_that_of_the_names(tmp_path):
    weights = weights_of("vit_tiny_token")
    assert read_weights(write_npz(tmp_path / "a.npz", weights))[1] == "gelu_tanh"
    save_file(as_timm(weights), tmp_path / "b.safetensors")
    assert read_weights(tmp_path / "b.safetensors", 3)[1] == "gelu"
    convert_vit(tmp_path / "b.safetensors", tmp_path / "out", n_head=3)
    assert load_model(tmp_path / "out").config.blocks[0].channel.activation == "gelu"


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: without(w, "head/kernel", "head/bias"), {}, "no head"),
        (lambda w: without(w, f"{BLOCK}1/LayerNorm_0/bias"), {}, "lacks Transformer/encoderblock_1/LayerNorm_0/bias"),
        (lambda w: w | {"conv_root/kernel": torch.zeros(2)}, {}, "no plain Vision Transformer has: conv_root/kernel"),
        (lambda w: w | {"head/bias": torch.zeros(3)}, {}, r"head/bias has shape \(3,\)"),
        (lambda w: w | {"head/bias": torch.full((10,), torch.nan)}, {}, "the check failed"),
        (lambda w: without(w, "embedding/kernel"), {}, "is no Vision Transformer of JAX or timm"),
        (lambda w: w, {"image_size": (30,)}, "image-size is 30: .* multiples of the patch, 4"),
        (lambda w: w, {"n_head": 4}, "--n-head is 4, but the file has 3 heads"),
        (as_timm, {}, "width 24 is no published size: give --n-head"),
        (as_timm, {"n_head": 5}, "--n-head is 5: .* one of 1, 2, 3"),
        (lambda w: as_timm(w) | {"blocks.0.ls1.gamma": torch.ones(24)}, {"n_head": 3}, "blocks.0.ls1.gamma"),
        # timm's fc_norm norms the mean, and the authors' code means what is normed: other numbers.
        (lambda w: as_timm(w) | {"fc_norm.weight": torch.ones(24)}, {"n_head": 3}, "norm after the mean over the patches"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path, change, options, message):
    path = write_npz(tmp_path / "weights.npz", change(weights_of("vit_tiny_token")))
    with pytest.raises(BadInput, match=message) as error:
        convert_vit(path, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_grid_that_is_no_square_has_to_be_told(tmp_path):
    path = write_npz(tmp_path / "weights.npz", weights_of("vit_tiny_gap_rect"))
    with pytest.raises(BadInput, match="15 positions are no square of patches: give"):
        convert_vit(path, tmp_path / "out")
    with pytest.raises(BadInput, match="nor 6 x 6"):
        convert_vit(path, tmp_path / "out", image_size=(24,))


def test_pickles_and_damaged_files_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
    with pytest.raises(BadInput, match=r"no whole \.npz or \.safetensors of numbers: Object arrays"):
        convert_vit(tmp_path / "objects.npz", tmp_path / "out")
    torch.save({"embedding/kernel": torch.zeros(3)}, tmp_path / "torch.pth")
    with pytest.raises(BadInput, match=r"it holds a pickle, .* save it as \.safetensors"):
        convert_vit(tmp_path / "torch.pth", tmp_path / "out")
    whole = write_npz(tmp_path / "whole.npz", weights_of("vit_tiny_token")).read_bytes()
    for name, data in {"half.npz": whole[: len(whole) // 2], "noise": b"noise" * 9, "empty": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=r"no whole \.npz or \.safetensors"):
            convert_vit(tmp_path / name, tmp_path / "out")
    with pytest.raises(BadInput, match="is not there"):
        convert_vit(tmp_path / "none.npz", tmp_path / "out")
