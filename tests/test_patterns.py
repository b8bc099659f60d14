"""Patterns by hand, and what they refuse."""

import pytest
import torch

from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import (
    BigBird,
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

HUGE = [
    (Window, {"size": 1 << 31}),
    (Window, {"right": 1 << 31}),
    (Global, {"size": 1 << 31}),
    (Prefix, {"size": 1 << 31}),
    (Chunk, {"size": 1 << 31}),
    (Strided, {"stride": 1 << 31}),
    (Documents, {"lengths": (1, 1 << 31)}),
    (Butterfly, {"tile": 1 << 31}),
    (Random, {"length": 1 << 31}),
    (BigBird, {"tile": 1 << 31}),
    (BigBird, {"form": "encoder", "length": 1 << 31}),
]
"""Of every pattern with a size, one that is too large."""


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


def twice(tile, column):
    """BigBird over 96 tokens whose random tiles are one tile, listed twice."""
    rows = ((column, column),) * (96 // tile - 2)
    return BigBird(tile=tile, form="encoder", length=96, multiset=True, table=(rows,), n_random=2)


def listed(pattern, tile):
    """How often each pair is looked at that is visible, by the lists of kept tiles."""
    kept, times = pattern.kept(96, 96, tile), torch.zeros(96, 96, dtype=torch.int64)
    for row in range(96 // tile):
        for column in kept.columns[kept.rows[row] : kept.rows[row + 1]].tolist():
            times[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] += 1
    return times * pattern.mask(96, 96)


@pytest.mark.parametrize("combined", [twice(16, 3) & twice(24, 2), twice(16, 3) | twice(24, 2), twice(16, 3) | Window(size=9)])
def test_combined_multisets_are_listed_as_often_as_they_count(combined):
    at = torch.arange(96)
    count = combined.count(torch.tensor(0), at[:, None], at[None]) * combined.mask(96, 96)
    assert count.max() > 1
    assert torch.equal(listed(combined, 8), count)


def test_tiles_that_count_unevenly_are_refused():
    with pytest.raises(BadInput, match="take a divisor of 8"):
        (twice(16, 3) & twice(24, 2)).kept(96, 96, 16)
    # Where the window hides a key that BigBird counts twice, Full shows it once.
    with pytest.raises(BadInput, match="take a divisor of 1"):
        ((twice(16, 3) & Window(size=5, right=60)) | Full()).kept(96, 96, 8)


def test_random_tiles_of_a_length_look_both_ways_however_short_it_is():
    assert not Random(tile=64, length=32).causal
    assert Random(tile=64, length=32).mask(8, 8).all()


def test_a_spelling_that_no_literal_is_is_refused():
    with pytest.raises(BadInput, match="cannot be read"):
        spelled("window(size={[1]})")


@pytest.mark.parametrize(("kind", "fields"), HUGE)
def test_sizes_that_do_not_fit_32_bits_are_refused(kind, fields):
    with pytest.raises(BadInput, match=r"is 2147483648: it must be at most 1073741824") as raised:
        kind(**fields)
    assert "\n" not in str(raised.value)


def test_the_largest_sizes_work():
    largest = 1 << 30
    for pattern in (Window(largest, largest), Global(largest), Prefix(largest), Chunk(largest), Strided(largest)):
        assert pattern.kept(40, 40, 16).rows[-1] >= 3
    assert BigBird(tile=largest).mask(9, 9).equal(Causal().mask(9, 9))


def test_what_a_bigbird_of_the_authors_cannot_draw_is_refused():
    with pytest.raises(BadInput, match="takes from 0 to 4294967295"):
        BigBird(form="encoder", plan="general", length=1024, seed=-1)
    with pytest.raises(BadInput, match="n_head must be at least 1"):
        BigBird(form="encoder", plan="general", length=1024, n_head=0)
    with pytest.raises(BadInput, match="names tile 4: they count from 0 to 3"):
        BigBird(tile=4, form="encoder", length=16, table=(((1,), (4,)),))
    with pytest.raises(BadInput, match="names tile -1: they count from 0"):
        BigBird(tile=4, form="encoder", table=(((1,), (-1,)),))


def test_the_heads_of_a_given_table_differ_whatever_n_random_says():
    """Block-sparse kernels make one list for all heads of a pattern that is not by_head."""
    table = (((1,), (2,)), ((2,), (1,)))
    assert BigBird(tile=4, form="encoder", length=16, n_random=0, table=table).by_head
    assert not BigBird(tile=4, form="encoder", length=16, table=table[:1]).by_head


def test_a_spelling_without_end_is_refused():
    for text in ("&".join(["causal"] * 5000), "(" * 500 + "causal" + ")" * 500):
        with pytest.raises(BadInput):
            spelled(text)
