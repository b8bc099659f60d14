"""Patterns by hand, and what they refuse."""

import pytest
import torch

from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import Causal, Chunk, Full, Pattern, Window


def drawn(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def test_causal():
    assert drawn(Causal().mask(3, 4)) == ["x...", "xx..", "xxx."]
    assert drawn(Causal().mask(2, 5, q_start=3)) == ["xxxx.", "xxxxx"]


def test_window():
    assert drawn(Window(size=2).mask(4, 4)) == ["x...", "xx..", ".xx.", "..xx"]
    assert drawn(Window(size=1).mask(2, 2)) == ["x.", ".x"]


def test_chunk():
    assert drawn(Chunk(size=2).mask(5, 5)) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert drawn(Chunk(size=3).mask(2, 5, q_start=3)) == ["...x.", "...xx"]
    assert not Chunk(size=2).moves
    with pytest.raises(BadInput, match="a chunk of 0 keys"):
        Chunk(size=0)


def test_full():
    assert drawn(Full().mask(2, 3)) == ["xxx", "xxx"]
    assert not Full().causal


def test_tiles_at_edges_that_do_not_divide():
    assert drawn(Causal().tiles(5, 5, 2)) == ["x..", "xx.", "xxx"]
    assert drawn(Window(size=2).tiles(6, 6, 2)) == ["x..", "xx.", ".xx"]


def test_visible_broadcasts_over_heads():
    head, q, k = torch.arange(2)[:, None, None], torch.arange(3)[:, None], torch.arange(3)
    for pattern in (Causal(), Window(size=2), Full()):
        shape = torch.broadcast_shapes(pattern.visible(head, q, k).shape, (2, 3, 3))
        assert shape == (2, 3, 3)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(BadInput, match="a window of 0 keys sees nothing"):
        Window(size=0)


def test_patterns_are_told_apart_by_name():
    for pattern in (Causal(), Window(size=7), Chunk(size=7), Full()):
        assert from_dict(Pattern, to_dict(pattern)) == pattern
    with pytest.raises(BadInput, match="did you mean 'Window'"):
        from_dict(Pattern, {"choice": "Windw", "size": 3})
