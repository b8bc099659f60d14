"""Positions: ALiBi's slopes and T5's buckets, as their papers and their authors' code have them."""

import pytest
import torch

from hippodrome.mixers import _slices
from hippodrome.mixers.attention import Attention
from hippodrome.part import BadInput
from hippodrome.patterns import Causal, Full, Window
from hippodrome.positions import Alibi, T5Bias
from tests.support import assert_close, build


def test_slopes_are_a_geometric_series():
    assert_close(Alibi().slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]), 0)
    assert_close(Alibi().slopes(1), torch.tensor([2.0**-8]), 0)


def test_slopes_of_other_head_counts_come_from_twice_as_many():
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-n for n in (0.5, 1.5, 2.5, 3.5)]
    assert_close(Alibi().slopes(12), torch.tensor(expected), 1e-6)
    assert Alibi().slopes(3).shape == (3,)


def test_buckets_are_exact_near_and_logarithmic_far():
    bucket = T5Bias().bucket(torch.tensor(1000), 1000 - torch.arange(1000))
    assert bucket[:16].tolist() == list(range(16))
    # 16 + floor(16 ln(d / 16) / ln 8), the last for all from 128 on.
    assert bucket[torch.tensor([16, 20, 32, 64, 127, 128, 999])].tolist() == [16, 17, 21, 26, 31, 31, 31]
    assert (bucket.diff() >= 0).all()
    assert not T5Bias().bucket(torch.tensor(3), torch.arange(3, 9)).any()


def test_both_ways_halve_the_buckets():
    position = T5Bias(bidirectional=True)
    after = position.bucket(torch.tensor(0), torch.tensor([0, 1, 7, 8, 500]))
    before = position.bucket(torch.tensor([0, 1, 7, 8, 500]), torch.tensor(0))
    assert before.tolist() == [0, 1, 7, 8, 15]
    assert after.tolist() == [0, 17, 23, 24, 31]


@pytest.mark.parametrize("arguments", [{"buckets": 1}, {"buckets": 6, "bidirectional": True}, {"max_distance": 16}])
def test_buckets_that_cannot_be_are_refused(arguments):
    with pytest.raises(BadInput, match="T5Bias has"):
        T5Bias(**arguments)


@pytest.mark.parametrize(
    "config",
    [
        Attention.Config(n_head=2, position=T5Bias(buckets=4, max_distance=6)),
        Attention.Config(n_head=2, pattern=Window(5), position=T5Bias(buckets=6, max_distance=9)),
        Attention.Config(n_head=2, pattern=Full(), position=T5Bias(buckets=8, max_distance=6, bidirectional=True)),
    ],
)
@pytest.mark.parametrize("carried", [False, True])
def test_biases_come_in_slices_where_they_are_many(monkeypatch, config, carried):
    """Values and gradients, of padded rows and of rows that go on."""
    mixer, x, g = build(config, 8), torch.randn(2, 23, 8), torch.randn(2, 23, 8)
    if carried and not mixer.causal:
        pytest.skip("not causal: it has no state")
    found = []
    for scores in (2**25, 2 * 2 * 23 * 4):
        monkeypatch.setattr(_slices, "SCORES", scores)
        mixer.zero_grad()
        state, lengths = None, torch.tensor([23, 17])
        if carried:
            _, state = mixer(x[:, :9], mixer.init_state(2), lengths=torch.tensor([9, 4]))
        y, _ = mixer(x, state, lengths=lengths)
        y = torch.where(torch.arange(23)[:, None] < lengths[:, None, None], y, 0)
        (y * g).sum().backward()
        found.append([y.detach(), *(parameter.grad.clone() for parameter in mixer.parameters())])
    for sliced, whole in zip(found[1], found[0], strict=True):
        assert torch.allclose(sliced, whole, atol=1e-5 * float(whole.abs().max()) + 1e-6)


def test_memory_of_biases_is_linear_in_the_length(monkeypatch):
    """Numbers kept between forward and backward."""
    mixer = build(Attention.Config(n_head=2, position=T5Bias()), 8)

    def kept(length):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            mixer(torch.randn(1, length, 8))
        return sum(numbers)

    assert kept(512) > 3 * kept(256)
    monkeypatch.setattr(_slices, "SCORES", 2**10)
    assert kept(512) < 2.2 * kept(256)


@pytest.mark.parametrize("position", [Alibi(), T5Bias(buckets=4, max_distance=6)])
def test_the_mixer_adds_them_to_its_scores(position):
    mixer, x = build(Attention.Config(n_head=2, position=position), 8), torch.randn(1, 9, 8)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in mixer.Wqkv(x).split(8, -1))
    at = torch.arange(9)
    if isinstance(position, Alibi):
        bias = -position.slopes(2)[:, None, None] * (at[:, None] - at).abs()
    else:
        bias = mixer.distance_bias[position.bucket(at[:, None], at)].permute(2, 0, 1)
    hidden = ~Causal().mask(9, 9)
    p = (q @ k.transpose(-1, -2) / 2 + bias).masked_fill(hidden, -torch.inf).softmax(-1)
    assert_close(mixer(x)[0], mixer.out_proj((p @ v).transpose(1, 2).flatten(2)))
