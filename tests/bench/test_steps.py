"""Training steps: what is counted, and what happens without memory."""

import pytest
import torch

from hippodrome.bench import lra, train
from hippodrome.bench._measure import Bench, Row
from hippodrome.bench._steps import compile_blocks, model_flops, plain_attention, step_row
from hippodrome.task import Batch

CPU = torch.device("cpu")
ROW = Row(way="w", task="t", length=8, batch=4)
CONFIG = train.models(64, 2, 1, 40)[train.HYBRID]


def draw(size):
    ids = torch.randint(40, (size, 9))
    return Batch(ids[:, :-1], ids[:, 1:])


def test_the_batch_is_halved_until_it_fits():
    asked = []

    def short(size):
        asked.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(size)

    found = step_row(Bench(CPU, repeats=1), ROW, CONFIG, short, mode="eager", flops_per_token=lambda _: 1)
    assert asked == [4, 2, 1]
    assert (found.batch, found.error) == (1, None)
    assert found.more["tokens_per_s"] == pytest.approx(8e3 / found.ms)


def test_a_loss_that_is_not_finite_is_not_timed(monkeypatch):
    monkeypatch.setattr(type(CONFIG.build()), "loss", lambda self, *_: _nan(self))
    found = step_row(Bench(CPU, repeats=1), ROW, CONFIG, draw, mode="eager", flops_per_token=lambda _: 1)
    assert found.ms is None
    assert "the loss is nan after" in found.error


def _nan(model):
    from hippodrome.model import Loss

    return Loss(sum(p.sum() for p in model.parameters()) * float("nan"), {})


def test_flops_of_gpt_125m():
    """Counted by hand: 12 d^2 weights a block, the tied table, and half of the keys of causal attention."""
    with torch.device("meta"):
        models = {way: config.build() for way, config in train.models(768, 12, 1, 50257).items()}
    by_hand = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 6 * 2048 * 768
    assert model_flops(models[train.TRANSFORMER], 2048) == by_hand
    h3_layer = 3 * 768 * (4 * 64 + 2 * 64 + 8 * 32)
    weights = 6 * (12 * 12 * 768**2 + 50304 * 768)
    assert model_flops(models[train.PURE], 2048) == weights + 12 * h3_layer
    assert model_flops(models[train.HYBRID], 2048) == weights + 11 * h3_layer + 6 * 2048 * 768


def test_classifiers_differ_in_their_mixer_only():
    models = lra._models(32, 2, 4, False, 256)
    with torch.device("meta"):
        flops = {way: model_flops(config.build(), 256) for way, config in models.items()}
    assert flops[lra.PLAIN] == flops[lra.FAST] > flops[lra.STATE_MLP] > flops[lra.STATE]


def test_flops_of_mega_by_hand():
    """Half of the keys of a chunk, for queries and keys of D / 4 and values of 2 D; averages as state passing."""
    with torch.device("meta"):
        whole, chunks = (lra._models(32, 1, 4, False, 256)[way].build() for way in (lra.MEGA, lra.MEGA_CHUNK))
    saved = 6 * (256 - 128) // 2 * (8 + 64)
    assert model_flops(whole, 256) - model_flops(chunks, 256) == saved


def test_plain_attention_is_torchs_math_and_the_same_function():
    q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    with plain_attention():
        assert not torch.backends.cuda.flash_sdp_enabled()
        plain = attend(q, k, v)
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(plain, attend(q, k, v))


@pytest.mark.slow
def test_blocks_alike_are_compiled_once():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = train.models(64, 3, 1, 40)[train.TRANSFORMER].build()
    whole = model.loss(draw(2)).total
    compile_blocks(model)
    torch.testing.assert_close(model.loss(draw(2)).total.shape, whole.shape)
    assert counters["stats"]["unique_graphs"] == 2
