"""Lm: logits, the tie to the embedding and the loss without all logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hippodrome.embeds.signal import Signal
from hippodrome.embeds.tokens import Tokens
from hippodrome.part import BadInput
from hippodrome.readouts.lm import Lm
from hippodrome.task import IGNORE, Batch
from tests.support import assert_close


def pair(tied):
    torch.manual_seed(0)
    embed = Tokens.Config(vocab_size=10).build(4)
    return nn.ModuleDict({"embed": embed, "readout": Lm.Config(tied=tied).build(4, embed)})


def test_tied_logits_are_products_with_the_embeddings():
    both, hidden = pair(tied=True), torch.randn(2, 3, 4)
    assert_close(both.readout(hidden), hidden @ both.embed.table.weight.T)
    assert list(both.readout.parameters()) == []
    assert list(both.state_dict()) == ["embed.table.weight"]


def test_untied_logits_have_their_own_map():
    both, hidden = pair(tied=False), torch.randn(2, 3, 4)
    assert_close(both.readout(hidden), hidden @ both.readout.linear.weight.T)
    assert set(both.state_dict()) == {"embed.table.weight", "readout.linear.weight"}


def test_the_tie_survives_loading_copying_and_moving():
    both, hidden = pair(tied=True), torch.randn(2, 3, 4)
    both.load_state_dict({"embed.table.weight": torch.randn(16, 4)}, assign=True)
    assert_close(both.readout(hidden), hidden @ both.embed.table.weight.T)
    twin = copy.deepcopy(both).double()
    with torch.no_grad():
        twin.embed.table.weight.zero_()
    assert not twin.readout(hidden.double()).any()
    assert both.readout(hidden).any()


def test_a_tied_weight_hears_from_both_ends():
    both, ids = pair(tied=True), torch.tensor([[1, 2]])
    both.readout(both.embed(ids).detach()).sum().backward()
    from_readout = both.embed.table.weight.grad.clone()
    both.zero_grad()
    both.readout(both.embed(ids)).sum().backward()
    assert from_readout[5].any(), "a token that is not in the input is still read out"
    assert not torch.equal(both.embed.table.weight.grad[1], from_readout[1])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits_asked_for(tied):
    both, hidden = pair(tied), torch.randn(2, 3, 4)
    targets = torch.tensor([[1, IGNORE, 9], [IGNORE, IGNORE, 0]])
    nats, count = both.readout.loss(hidden, Batch(torch.zeros(2, 3), targets))
    rows = F.log_softmax(both.readout(hidden), -1)
    assert count == 3
    assert_close(nats, -(rows[0, 0, 1] + rows[0, 2, 9] + rows[1, 2, 0]))


def test_it_reads_out_of_a_vocabulary():
    with pytest.raises(BadInput, match="Signal embeds none"):
        Lm.Config().build(4, Signal.Config().build(4))
