"""Tokens: look-up, positions and ids that do not exist."""

import pytest
import torch

from hippodrome.embeds.tokens import Tokens
from hippodrome.part import BadInput
from tests.support import assert_close


def test_looks_up_rows_and_adds_positions():
    torch.manual_seed(0)
    embed = Tokens.Config(vocab_size=10, positions=6).build(4)
    ids = torch.tensor([[3, 9, 0], [1, 1, 2]])
    assert_close(embed(ids), embed.table.weight[ids] + embed.positions.weight[:3])
    seen = torch.tensor([0, 3])
    expected = embed.table.weight[ids] + embed.positions.weight[torch.tensor([[0, 1, 2], [3, 4, 5]])]
    assert_close(embed(ids, seen), expected)


def test_without_learned_positions_only_the_id_counts():
    embed = Tokens.Config(vocab_size=10).build(4)
    ids = torch.tensor([[3, 3]])
    assert torch.equal(embed(ids)[0, 0], embed(ids)[0, 1])
    assert torch.equal(embed(ids, torch.tensor([10**9])), embed(ids))


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(50257, 8, 50264), (50264, 8, 50264), (20, 1, 20), (257, 64, 320)])
def test_the_table_is_padded(vocab, multiple, rows):
    config = Tokens.Config(vocab_size=vocab, pad_to_multiple=multiple)
    assert config.rows == rows
    with torch.device("meta"):
        assert config.build(2).weight.shape == (rows, 2)


@pytest.mark.parametrize(
    ("ids", "wrong"), [([[0, 16]], "token id 16 is outside of the vocabulary: ids go from 0 to 15"), ([[-1, 3]], "token id -1")]
)
def test_an_unknown_id_is_named(ids, wrong):
    with pytest.raises(BadInput, match=wrong):
        Tokens.Config(vocab_size=10).build(4)(torch.tensor(ids))


def test_more_tokens_than_positions_are_refused():
    embed = Tokens.Config(vocab_size=10, positions=4).build(4)
    with pytest.raises(BadInput, match="5 tokens, but only 4 positions"):
        embed(torch.zeros(1, 5, dtype=torch.int64))
    ids, seen = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([3, 0])
    assert embed(ids, seen).shape == (2, 1, 4)
    with pytest.raises(BadInput, match="token 4 has no learned vector: the model knows 4 positions"):
        embed(ids, seen + 1)


def test_positions_of_several_axes_are_summed_by_coordinate():
    """Two rows of three columns of two channels, with sums of one digit a coordinate."""
    embed = Tokens.Config(vocab_size=3, axes=(2, 3, 2)).build(1)
    with torch.no_grad():
        embed.table.weight.zero_()
        for table, values in zip(embed.axes, ([0, 100], [0, 10, 20], [1, 2]), strict=True):
            table.weight.copy_(torch.tensor(values, dtype=torch.float32)[:, None])
    ids = torch.zeros(1, 12, dtype=torch.int64)
    assert embed(ids).flatten().tolist() == [1, 2, 11, 12, 21, 22, 101, 102, 111, 112, 121, 122]
    assert embed(ids[:, :2].expand(2, 2), torch.tensor([6, 1])).flatten(1).tolist() == [[101, 102], [2, 11]]
    embed(ids).sum().backward()
    assert [table.weight.grad.flatten().tolist() for table in embed.axes] == [[6, 6], [4, 4, 4], [6, 6]]
    with pytest.raises(BadInput, match="13 tokens, but only 12 positions"):
        embed(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(BadInput, match="token 12 has no learned vector: the model knows 12 positions"):
        embed(ids[:, :1], torch.tensor([12]))


def test_no_token_is_fine():
    assert Tokens.Config(vocab_size=10).build(4)(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 4)


def test_dropout_acts_in_training_only():
    embed = Tokens.Config(vocab_size=10, dropout=0.5).build(64)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert (embed(ids) == 0).any()
    assert torch.equal(embed.eval()(ids)[0, 0], embed.table.weight[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"positions": -1}, "positions is -1"),
        ({"axes": (2, 0)}, r"axes are \(2, 0\): sizes of at least 1"),
        ({"axes": (2, 3), "positions": 6}, "then positions must be 0, not 6"),
        ({"pad_to_multiple": 0}, "pad_to_multiple is 0"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        Tokens.Config(**{"vocab_size": 10, **change}).build(4)
