"""Pair: two sequences read apart and joined, whatever cut the batch."""

import pytest
import torch
import torch.nn.functional as F

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.lti.s4d import S4D
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, ModelConfig
from hippodrome.part import BadInput
from hippodrome.readouts.pair import Pair
from hippodrome.step import _count_tokens
from hippodrome.task import IGNORE, Batch
from tests.support import assert_close


def pair(**settings):
    torch.manual_seed(0)
    return Pair.Config(**settings).build(4, Signal.Config().build(4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    block = BlockConfig(mixer=SSM.Config(system=S4D.Config(d_state=4), bidirectional=True), channel=Mlp.Config())
    return ModelConfig(d_model=8, blocks=(block, block), embed=Tokens.Config(vocab_size=9), readout=Pair.Config()).build()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    lengths = torch.tensor([[6, 3], [1, 6], [4, 4]])
    ids = torch.randint(1, 9, (3, 2, 6))
    return Batch(ids * (torch.arange(6) < lengths[..., None]), torch.tensor([1, 0, 1]), lengths)


@pytest.mark.parametrize("how", ["mean", "last", "first"])
def test_is_the_published_head(how):
    readout, hidden = pair(how=how, d_ff=6), torch.randn(4, 5, 4)
    pooled = {"mean": hidden.mean(1), "last": hidden[:, -1], "first": hidden[:, 0]}[how]
    for row, (one, two) in enumerate([(pooled[0], pooled[1]), (pooled[2], pooled[3])]):
        inner = F.relu(readout.fc1.weight @ torch.cat([one, two, one * two, one - two]) + readout.fc1.bias)
        inner = F.relu(readout.fc2.weight @ inner + readout.fc2.bias)
        assert_close(readout(hidden)[row], readout.linear.weight @ inner + readout.linear.bias)
    assert readout.fc1.weight.shape == (6, 16)
    assert readout.fc2.weight.shape == (3, 6)
    assert pair().fc1.weight.shape == (16, 16)


def test_loss_is_the_cross_entropy_of_the_pairs_asked_for():
    readout, hidden, lengths = pair(), torch.randn(4, 5, 4), torch.tensor([5, 2, 3, 1])
    nats, count = readout.loss(hidden, Batch(torch.zeros(2, 2, 5), torch.tensor([IGNORE, 1]), lengths))
    assert count == 1
    assert_close(nats, -F.log_softmax(readout(hidden, lengths), -1)[1, 1])


def test_a_model_reads_each_document_alone(model, batch):
    """Neither the other document, nor the rest of the batch, nor padding moves a hidden vector."""
    logits = model(batch.inputs, lengths=batch.lengths).logits
    for row in range(3):
        alone = [
            model._hidden(batch.inputs[row, side, :length][None], None, None)[0].mean(1)
            for side, length in enumerate(batch.lengths[row].tolist())
        ]
        one, two = alone
        joined = torch.cat([one, two, one * two, one - two], -1)
        head = model.readout
        assert_close(logits[row], head.linear(F.relu(head.fc2(F.relu(head.fc1(joined)))))[0])


def test_cuts_through_a_batch_part_no_pair(model, batch):
    whole = model(batch.inputs, lengths=batch.lengths).logits
    parts = [batch.rows(0, 1), batch.rows(1, 3)]
    assert_close(torch.cat([model(part.inputs, lengths=part.lengths).logits for part in parts]), whole)
    losses = [model.loss(part).parts["loss"] for part in parts]
    assert_close(sum(nats for nats, _ in losses), model.loss(batch).parts["loss"][0])


def test_the_order_of_two_documents_counts_and_both_learn(model, batch):
    assert not torch.allclose(
        model(batch.inputs, lengths=batch.lengths).logits, model(batch.inputs.flip(1), lengths=batch.lengths.flip(1)).logits
    )
    vectors = model.embed(batch.inputs.flatten(0, 1)).detach().requires_grad_()
    hidden = model.final_norm(vectors)
    model.readout.loss(hidden, Batch(batch.inputs, batch.targets, batch.lengths.flatten()))[0].backward()
    assert vectors.grad.abs().sum((1, 2)).all()


def test_tokens_of_pairs_are_counted(batch):
    assert _count_tokens(batch) == 24
    assert _count_tokens(Batch(batch.inputs, batch.targets)) == 36
    assert _count_tokens(Batch(torch.zeros(3, 6, 2), batch.targets)) == 18
    assert _count_tokens(Batch(batch.inputs[:, 0], batch.targets, torch.tensor([[0, 6], [1, 3], [2, 2]]))) == 8


def test_what_is_no_pair_is_refused():
    with pytest.raises(BadInput, match="3 sequences are no pairs"):
        pair()(torch.zeros(3, 5, 4))
    with pytest.raises(BadInput, match="classes is 0"):
        pair(classes=0)
    with pytest.raises(BadInput, match="d_ff is 1"):
        pair(d_ff=1)
