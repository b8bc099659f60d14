"""ViT's recipes: the published sizes and start, any mixer, and from files to scores and images a second."""

import gzip
import json

import numpy as np
import pytest
import torch

from hippodrome.compare import count_parameters, match
from hippodrome.part import BadInput
from hippodrome.recipes import find_recipe
from hippodrome.recipes.vit import Frame, Name, base, fashion, small, tiny
from tests.commands import run
from tests.tasks.test_image import idx

MIXERS = Name.__args__


def write_fashion(folder, count=20):
    dice = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(dice.integers(0, 256, (count, 28, 28)))))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_reads_patches_and_learns(mixer):
    torch.manual_seed(0)
    model = fashion(mixer=mixer, size="mini", patch=7, frame=Frame(n_layer=1)).model.build()
    # The head starts at zero, so that its first step moves nothing else.
    torch.nn.init.normal_(model.readout.linear.weight)
    logits = model(torch.randn(2, 784, 1)).logits
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert not model.causal


@pytest.mark.parametrize("patch", [1, 2, 4, 7])
def test_patches_are_the_length(patch):
    embed = fashion(patch=patch).model.embed
    assert embed.length == (28 // patch) ** 2
    assert fashion(patch=patch, frame=Frame(pool="token")).model.embed.length == embed.length + 1


def test_sizes_are_the_authors():
    for recipe, d_model, n_head in ((tiny, 192, 3), (small, 384, 6), (base, 768, 12)):
        model = recipe().model
        block = model.blocks[0]
        assert (model.d_model, len(model.blocks), block.mixer.n_head) == (d_model, 12, n_head)
        assert (block.norm_eps, block.channel.activation, block.channel.width(d_model)) == (1e-6, "gelu_tanh", 4 * d_model)
        # Of a block, then 4 x 4 patches of 3 colours, 8 x 8 positions, the last norm and ten classes.
        own = 12 * (12 * d_model**2 + 13 * d_model) + 49 * d_model + 64 * d_model + 2 * d_model + 10 * (d_model + 1)
        assert count_parameters(model) == own


def test_heads_are_of_all_that_have_them_and_positions_of_the_patches_alone():
    for mixer in ("attention", "linear_attention"):
        assert tiny(mixer=mixer).model.blocks[0].mixer.n_head == 3
        assert tiny(mixer=mixer, frame=Frame(n_head=6)).model.blocks[0].mixer.n_head == 6
    assert tiny().model.blocks[0].mixer.position is None


def test_the_start_is_that_of_the_jax_code():
    torch.manual_seed(0)
    model = fashion(size="small", frame=Frame(n_layer=1, pool="token")).model.build()
    (block,) = model.blocks
    d = 384
    for weight in (*block.mixer.Wqkv.weight.chunk(3), block.mixer.out_proj.weight):
        assert float(weight.detach().abs().max()) == pytest.approx((6 / (2 * d)) ** 0.5, rel=1e-3)
    assert not block.mixer.Wqkv.bias.any()
    for linear in (block.channel.fc1, block.channel.fc2):
        assert float(linear.weight.detach().abs().max()) == pytest.approx((6 / (5 * d)) ** 0.5, rel=1e-3)
        assert float(linear.bias.detach().std()) == pytest.approx(1e-6, rel=0.2)
    assert not model.readout.linear.weight.any()
    assert not model.embed.token.any()
    assert float(model.embed.positions.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("mixer", ["s4d", "h3", "mega"])
def test_twins_have_equal_parameters(mixer):
    pair = {"attention": fashion(size="tiny", patch=2), mixer: find_recipe(f"vit.fashion+mixer={mixer}")(size="tiny", patch=2)}
    counts = [count_parameters(config.model) for config in match(pair).values()]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_a_class_token_needs_a_mixer_that_looks_ahead():
    with pytest.raises(BadInput, match="pool is token, but h3 looks back only"):
        fashion(mixer="h3", frame=Frame(pool="token"))


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_from_files_to_scores(tmp_path, pool):
    write_fashion(tmp_path)
    words = ["--size", "mini", "--patch", 7, "--n-layer", 1, "--pool", pool, "--crop", 2, "--flip", "--steps", 3]
    words += ["--batch-size", 4, "--device", "cpu", "--out", tmp_path / "run"]
    result = run("train", "vit.fashion", "--data", tmp_path, *words)
    assert result.code == 0, result.err
    assert "images/s" in result.err + result.out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"] == 12
    assert 0 <= report["scores"]["test"]["accuracy"] <= 1
    assert run("eval", tmp_path / "run", "--device", "cpu").code == 0


def test_twins_are_compared_in_images_a_second(tmp_path):
    write_fashion(tmp_path)
    words = ["--size", "mini", "--patch", 14, "--n-layer", 1, "--steps", 2, "--batch-size", 4, "--device", "cpu"]
    result = run("compare", "vit.fashion", "vit.fashion+mixer=h3", "--data", tmp_path, *words, "--out", tmp_path / "race")
    assert result.code == 0, result.err
    assert "images/s" in result.out
