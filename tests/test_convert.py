"""The converter: which files it takes, what it infers from them, and what it refuses by name."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hippodrome import load
from hippodrome.convert import convert_h3, model_config
from hippodrome.h3_checkpoint import Layout, expected_shapes, infer_layout, read_weights
from hippodrome.h3_reference import reference_logits
from hippodrome.part import BadInput
from hippodrome.run import read_config
from hippodrome.tasks.lm import Lm
from hippodrome.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
EMBEDDING = "backbone.embeddings.word_embeddings.weight"

PUBLISHED = {
    "125M": (768, 12, 12, (6,), 0, 126_387_456),
    "355M": (1024, 24, 16, (8, 16), 0, 361.06e6),
    "1.3B": (2048, 24, 16, (8, 16), 0, 1326.1e6),
    "2.7B": (2560, 32, 20, (8, 16, 24), 0, 2670.3e6),
    "2.7B rotary": (2560, 32, 20, (10, 21), 64, 2671.1e6),
}
"""d_model, n_layer, attention heads, attention layers, rotary channels, parameters."""


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "h3_lm_newkeys.safetensors")


def saved(data, path: Path) -> Path:
    torch.save(data, path)
    return path


# What is inferred


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_inferred_from_shapes(name):
    d_model, n_layer, n_head, attention, rotary, parameters = PUBLISHED[name]
    wanted = Layout(
        vocab_size=50264,
        d_model=d_model,
        n_layer=n_layer,
        d_inner=4 * d_model,
        attention_layers=attention,
        n_head=n_head,
        rotary_dim=rotary,
        d_state=64,
        d_head=1,
        tied=True,
    )
    shapes = {key: torch.empty(shape, device="meta") for key, shape in expected_shapes(wanted).items()}
    shapes["lm_head.weight"] = shapes[EMBEDDING]
    assert infer_layout(shapes) == wanted
    with torch.device("meta"):
        model = model_config(wanted).build()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) < 1e5


@pytest.mark.parametrize("case", ["h3_lm", "h3_lm_rotary"])
def test_golden_layouts_are_inferred(case):
    layout = infer_layout(read_weights(GOLDEN / f"{case}_newkeys.safetensors"), 4)
    assert layout == infer_layout(read_weights(GOLDEN / f"{case}_oldkeys.safetensors"), 4)
    assert (layout.d_model, layout.n_layer, layout.d_inner, layout.vocab_size) == (32, 4, 128, 96)
    assert (layout.attention_layers, layout.d_head, layout.tied) == ((1,), 1, True)
    assert (layout.rotary_dim, layout.d_state) == ((4, 16) if case == "h3_lm_rotary" else (0, 64))


@pytest.mark.parametrize("case", ["h3_lm", "h3_lm_rotary"])
def test_older_names_become_the_current_ones(case):
    old, new = (read_weights(GOLDEN / f"{case}_{keys}.safetensors") for keys in ("oldkeys", "newkeys"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in new)


@pytest.mark.parametrize("case", ["h3_lm", "h3_lm_rotary"])
def test_the_plain_forward_pass_is_the_authors(case):
    io, weights = load_file(GOLDEN / f"{case}_io.safetensors"), load_file(GOLDEN / f"{case}_newkeys.safetensors")
    layout = infer_layout(weights, 4)
    got = torch.stack([reference_logits(weights, layout, row) for row in io["in/input_ids"]])
    assert (got - io["out/logits"]).abs().max() < 5e-6 * io["out/logits"].abs().max()


def test_heads_that_the_file_does_not_hold_are_asked_for_by_name(weights):
    with pytest.raises(BadInput, match=r"--n-head, one of 1, 2, 4, 8, 16, 32$"):
        infer_layout(weights)
    with pytest.raises(BadInput, match="--n-head is 5"):
        infer_layout(weights, 5)
    rotary = load_file(GOLDEN / "h3_lm_rotary_newkeys.safetensors")
    with pytest.raises(BadInput, match=r"one of 1, 2, 4, 8$"):
        infer_layout(rotary, 16)


# A whole conversion


@pytest.fixture
def pure(weights) -> dict[str, torch.Tensor]:
    """A checkpoint without attention: its last two layers, numbered anew."""
    kept = {key: value for key, value in weights.items() if not key.startswith(("backbone.layers.0", "backbone.layers.1"))}
    renamed = {"backbone.layers.2": "backbone.layers.0", "backbone.layers.3": "backbone.layers.1"}
    return {key.replace(key[:17], renamed.get(key[:17], key[:17])): value for key, value in kept.items()}


def test_a_checkpoint_without_attention_needs_no_heads(pure, tmp_path):
    report = convert_h3(saved(pure, tmp_path / "pure.pt"), tmp_path / "run")
    assert report["layout"]["n_head"] is None
    assert report["layout"]["n_layer"] == 2


def test_an_untied_readout_stays_untied(weights, tmp_path):
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    report = convert_h3(saved(weights, tmp_path / "model.pt"), tmp_path / "run", n_head=4)
    assert not report["layout"]["tied"]
    torch.manual_seed(0)
    ids = torch.randint(96, (7,))
    logits = load(tmp_path / "run")(ids[None]).logits[0]
    wanted = reference_logits(weights, infer_layout(weights, 4), ids)
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_missing_readout_is_the_embedding(weights, tmp_path):
    del weights["lm_head.weight"]
    assert convert_h3(saved(weights, tmp_path / "model.pt"), tmp_path / "run", n_head=4)["layout"]["tied"]


@pytest.mark.parametrize("d_head", [2, 4])
def test_any_head_width_is_converted(d_head, tmp_path):
    layout = Layout(
        vocab_size=24,
        d_model=8,
        n_layer=2,
        d_inner=12,
        attention_layers=(1,),
        n_head=2,
        rotary_dim=2,
        d_state=6,
        d_head=d_head,
        tied=False,
    )
    torch.manual_seed(0)
    weights = {key: torch.randn(shape) for key, shape in expected_shapes(layout).items()}
    weights = {key: value / 10 if "A_real" in key or "log_dt" in key else value for key, value in weights.items()}
    weights["backbone.layers.1.mixer.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors")
    report = convert_h3(tmp_path / "model.safetensors", tmp_path / "run", n_head=2)
    assert report["layout"]["d_head"] == d_head
    assert report["check"]["difference"] < 1e-5


def test_half_precision_files_are_converted_in_fp32(weights, tmp_path):
    halves = {key: value.half() if key.endswith(".weight") else value for key, value in weights.items()}
    report = convert_h3(saved(halves, tmp_path / "model.pt"), tmp_path / "run", n_head=4)
    assert report["check"]["difference"] < 1e-5
    assert {p.dtype for p in load(tmp_path / "run").parameters()} == {torch.float32}


def test_gpt2_vocabulary_brings_its_tokenizer(weights, tmp_path):
    wide = dict(weights)
    wide[EMBEDDING] = torch.cat([weights[EMBEDDING]] * 524)[:50264]
    wide["lm_head.weight"] = wide[EMBEDDING]
    convert_h3(saved(wide, tmp_path / "model.pt"), tmp_path / "run", n_head=4)
    assert Tokenizer.load(tmp_path / "run").hash == Tokenizer.gpt2().hash
    config = read_config(tmp_path / "run")
    assert isinstance(config.task, Lm.Config)
    assert config.task.tokenizer == "gpt2", "eval scores it on text in its own vocabulary"
    assert config.model == load(tmp_path / "run").config
    convert_h3(saved(weights, tmp_path / "small.pt"), tmp_path / "small", n_head=4)
    assert not (tmp_path / "small" / "tokenizer.json").exists()


def test_the_folder_says_where_it_came_from(weights, tmp_path):
    report = convert_h3(saved(weights, tmp_path / "model.pt"), tmp_path / "run", n_head=4)
    assert json.loads((tmp_path / "run" / "converted.json").read_text()) == report
    assert report["source"]["file"] == "model.pt"
    assert report["parameters"] == sum(p.numel() for p in load(tmp_path / "run").parameters())


def test_a_wrong_conversion_fails_its_check_and_writes_nothing(weights, tmp_path, monkeypatch):
    from hippodrome import convert

    right = convert._renamed

    def wrong(weights, layout):
        named = right(weights, layout)
        swapped = next(key for key in named if key.endswith("q_proj.weight"))
        return {**named, swapped: named[swapped.replace("q_proj", "k_proj")]}

    monkeypatch.setattr(convert, "_renamed", wrong)
    with pytest.raises(BadInput, match="logit check"):
        convert_h3(saved(weights, tmp_path / "model.pt"), tmp_path / "run", n_head=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


# What is refused


def refused(data, tmp_path: Path, match: str, suffix: str = ".pt") -> None:
    path = tmp_path / f"model{suffix}"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        torch.save(data, path)
    with pytest.raises(BadInput, match=match) as found:
        convert_h3(path, tmp_path / "run", n_head=4)
    assert "\n" not in str(found.value)
    assert sorted(other.name for other in tmp_path.iterdir()) == [path.name], "something was left behind"


def test_missing_and_unknown_tensors_are_named(weights, tmp_path):
    short = {key: value for key, value in weights.items() if key != "backbone.layers.2.mixer.D"}
    refused(short, tmp_path, r"lacks backbone\.layers\.2\.mixer\.D")
    refused({**weights, "backbone.layers.0.mixer.extra": torch.ones(1)}, tmp_path, r"backbone\.layers\.0\.mixer\.extra")
    no_mixer = {key: value for key, value in weights.items() if "mixer.ssm_k_kernel" not in key}
    refused(no_mixer, tmp_path, r"lacks backbone\.layers\.0\.mixer\.ssm_k_kernel\.kernel\.B")


def test_a_misshapen_tensor_is_named_with_its_shape(weights, tmp_path):
    refused({**weights, "backbone.ln_f.bias": torch.ones(31)}, tmp_path, r"backbone\.ln_f\.bias has shape \(31,\).*\(32,\)")
    refused({**weights, EMBEDDING: torch.ones(96)}, tmp_path, "word_embeddings.*axes")


@pytest.mark.parametrize(
    "data",
    [{}, {"weight": torch.ones(2)}, {"transformer.wte.weight": torch.ones(3, 2), "transformer.h.0.ln_1.bias": torch.ones(2)}],
)
def test_foreign_state_dicts_are_named_as_such(data, tmp_path):
    refused(data, tmp_path, "no checkpoint of an H3 language model")


def test_a_bare_tensor_is_no_checkpoint(tmp_path):
    refused(torch.ones(3), tmp_path, "holds a Tensor")


def test_truncated_files_are_named_as_such(weights, tmp_path):
    torch.save(weights, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    refused(whole[: len(whole) // 2], tmp_path, "truncated or damaged")
    (tmp_path / "model.pt").unlink()
    whole = (GOLDEN / "h3_lm_newkeys.safetensors").read_bytes()
    refused(whole[: len(whole) // 2], tmp_path, "truncated or damaged", ".safetensors")
    refused(b"", tmp_path, "truncated or damaged|empty", ".safetensors")


class Bomb:
    """Would write a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_strangers_pickle_is_never_run(weights, tmp_path, legacy):
    mark = tmp_path / "mark"
    torch.save({**weights, "bomb": Bomb(mark)}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "model.pt").read_bytes()
    refused(data, tmp_path, "never loaded")
    refused(pickle.dumps(Bomb(mark)), tmp_path, "never loaded|no checkpoint|no file of tensors")
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_anywhere_is_named(weights, tmp_path, legacy):
    torch.save(weights, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "model.pt").read_bytes()
    numbers = random.Random(0)
    for _ in range(25):
        # Where the names and shapes lie; a wrong number in a tensor cannot be seen.
        damaged = bytearray(whole)
        for at in numbers.choices(range(100, 3000), k=20):
            damaged[at] ^= 1 + numbers.randrange(255)
        refused(bytes(damaged), tmp_path, "model")
        refused(whole[: numbers.randrange(1, len(whole) - 1)], tmp_path, "truncated|damaged|tensors")


def test_text_is_no_checkpoint(tmp_path):
    refused(b"To be, or not to be, that is the question.\n" * 20, tmp_path, "no file of tensors|damaged")


def test_paths_that_are_not_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="not there"):
        convert_h3(tmp_path / "none.pt", tmp_path / "run")
    with pytest.raises(BadInput, match="is a folder"):
        convert_h3(tmp_path, tmp_path / "run")


def test_nothing_is_overwritten(weights, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="not empty"):
        convert_h3(saved(weights, tmp_path / "model.pt"), out, n_head=4)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_the_weights_given_are_not_changed(weights, tmp_path):
    before = copy.deepcopy(weights)
    infer_layout(weights, 4)
    reference_logits(weights, infer_layout(weights, 4), torch.arange(5))
    assert all(torch.equal(before[key], weights[key]) for key in weights)
