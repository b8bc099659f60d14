"""Patterns by hand, and what they refuse."""

import pytest
import torch

from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import (
    Butterfly,
    Causal,
    Chunk,
    Documents,
    Full,
    Global,
    Pattern,
    Prefix,
    Random,
    Strided,
    Window,
    spelled,
)


def drawn(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def test_causal():
    assert drawn(Causal().mask(3, 4)) == ["x...", "xx..", "xxx."]
    assert drawn(Causal().mask(2, 5, q_start=3)) == ["xxxx.", "xxxxx"]


def test_window():
    assert drawn(Window(size=2).mask(4, 4)) == ["x...", "xx..", ".xx.", "..xx"]
    assert drawn(Window(size=1).mask(2, 2)) == ["x.", ".x"]
    assert drawn(Window(size=2, right=1).mask(4, 4)) == ["xx..", "xxx.", ".xxx", "..xx"]


def test_chunk():
    assert drawn(Chunk(size=2).mask(5, 5)) == ["x....", "xx...", "..x..", "..xx.", "....x"]
    assert drawn(Chunk(size=3).mask(2, 5, q_start=3)) == ["...x.", "...xx"]
    assert not Chunk(size=2).moves
    with pytest.raises(BadInput, match="a chunk of 0 keys"):
        Chunk(size=0)


def test_global():
    assert drawn(Global(size=1).mask(4, 4)) == ["xxxx", "xx..", "x.x.", "x..x"]
    assert drawn(Global(size=2).mask(2, 5, q_start=3)) == ["xx.x.", "xx..x"]


def test_prefix():
    assert drawn(Prefix(size=2).mask(4, 4)) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert drawn(Prefix(size=1).mask(2, 2)) == ["x.", "xx"]


def test_strided():
    assert drawn(Strided(stride=3).mask(5, 5)) == ["x..x.", ".x..x", "..x..", "x..x.", ".x..x"]
    assert drawn((Strided(stride=2) & Causal()).mask(4, 4)) == ["x...", ".x..", "x.x.", ".x.x"]


def test_documents_and_what_follows_them():
    assert drawn(Documents(lengths=(2, 1)).mask(5, 5)) == ["xx...", "xx...", "..x..", "...xx", "...xx"]
    assert drawn((Documents(lengths=(2, 2)) & Causal()).mask(4, 4)) == ["x...", "xx..", "..x.", "..xx"]


def test_butterfly():
    assert drawn(Butterfly(tile=1).mask(4, 4)) == ["xxx.", "xx.x", "x.xx", ".xxx"]
    assert drawn(Butterfly(tile=1, n_factors=1).mask(4, 4)) == ["xx..", "xx..", "..xx", "..xx"]
    assert drawn(Butterfly(tile=2, n_factors=0).mask(4, 4)) == ["xx..", "xx..", "..xx", "..xx"]


def test_a_butterfly_of_six_tiles_is_that_of_eight_cropped():
    six = ["xxx.x.", "xx.x.x", "x.xx..", ".xxx..", "x...xx", ".x..xx"]
    assert drawn(Butterfly(tile=1).mask(6, 6)) == six
    assert drawn(Butterfly(tile=3).tiles(17, 17, 3)) == six


def test_random_draws_by_head_the_same_for_ever():
    """Written down once: a checkpoint must find its pattern again."""
    past, all_over = Random(tile=2, per_row=1), Random(tile=2, per_row=1, length=8)
    assert drawn(past.mask(8, 8)) == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "..xxx...",
        "..xxxx..",
        "xx....x.",
        "xx....xx",
    ]
    assert drawn(past.tiles(8, 8, 2)) == ["x...", "xx..", ".xx.", "x..x"]
    assert drawn(past.tiles(8, 8, 2, head=1)) == ["x...", "xx..", "x.x.", ".x.x"]
    assert drawn(all_over.tiles(8, 8, 2)) == ["x..x", ".x.x", ".xx.", "x..x"]
    assert drawn(all_over.tiles(8, 8, 2, head=1)) == ["x..x", ".xx.", "..xx", ".x.x"]


def test_and_shows_what_both_show_and_or_what_either_does():
    window, anchor = Window(size=2), Global(size=1)
    assert drawn((anchor & Causal()).mask(4, 4)) == ["x...", "xx..", "x.x.", "x..x"]
    assert drawn((window | anchor).mask(4, 4)) == ["xxxx", "xx..", "xxx.", "x.xx"]
    assert drawn((window | anchor & Causal()).mask(4, 4)) == ["x...", "xx..", "xxx.", "x.xx"]
    assert window & anchor & Causal() == window & (anchor & Causal())
    assert (window | anchor & Causal()).causal
    assert not (window | anchor).causal
    assert (anchor & window).reach == 2


def test_spellings_are_what_python_builds():
    for text, pattern in {
        "causal": Causal(),
        "window(size=2) | global(size=1) & causal": Window(size=2) | Global(size=1) & Causal(),
        "(Window(size=2) | Global) & causal": (Window(size=2) | Global()) & Causal(),
        "documents(lengths=[2, 1])": Documents(lengths=(2, 1)),
    }.items():
        assert spelled(text) == pattern


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
