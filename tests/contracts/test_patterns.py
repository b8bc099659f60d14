"""What every attention pattern keeps to: tiles, the causal flag and the reach are all true to `visible`."""

import operator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hippodrome.part import from_dict, to_dict
from hippodrome.patterns import And, BigBird, Causal, Or, Pattern, Prefix, Random, kinds

EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True, database=None)


SMALL = st.integers(1, 12)
FIELDS = {
    "right": st.integers(0, 3),
    "n_factors": st.none() | st.integers(1, 4),
    "n_random": st.integers(0, 4),
    "per_row": st.integers(0, 4),
    "seed": st.integers(0, 5),
    "lengths": st.lists(SMALL, min_size=1, max_size=4).map(tuple),
    "length": st.none(),
    "multiset": st.booleans(),
    "n_head": st.none(),
    "table": st.none(),
}
"""How fields are drawn that are not small positive integers."""

LONG = 60
"""Tokens of the patterns that have a length, more than any test asks for."""

LOOK_BACK = (Causal, Prefix, BigBird)
"""Causal patterns without a reach that look back to the first key from wherever they are; any other may do so or not."""


def drawn(kind, **fixed):
    strategies = {name: FIELDS.get(name, SMALL) for name in kind.__dataclass_fields__}
    return st.builds(kind, **strategies | {name: st.just(value) for name, value in fixed.items()})


def strategies():
    """Every pattern of hippodrome/patterns that has a name, and what two of them make."""
    alone = [drawn(kind) for name, kind in kinds().items() if name != "bigbird"]
    assert len(alone) >= 10
    alone += [drawn(BigBird, form="causal", plan="uniform"), drawn(BigBird, form="encoder", plan="uniform", length=LONG)]
    alone.append(drawn(Random, length=LONG))
    simple = st.one_of(alone)
    return simple | st.builds(operator.and_, simple, simple) | st.builds(operator.or_, simple, simple)


patterns = strategies()
lengths = st.integers(1, 20)


def pairs(pattern, n_q, n_k, q_start=0):
    """visible, asked one pair at a time."""
    head = torch.tensor(0)
    return [[bool(pattern.visible(head, torch.tensor(q_start + i), torch.tensor(j))) for j in range(n_k)] for i in range(n_q)]


@EXAMPLES
@given(pattern=patterns, n_q=lengths, n_k=lengths, q_start=st.integers(0, 9), size=st.integers(1, 7))
def test_a_tile_is_marked_if_any_pair_in_it_is_visible(pattern, n_q, n_k, q_start, size):
    shown = pairs(pattern, n_q, n_k, q_start)
    assert pattern.mask(n_q, n_k, q_start).tolist() == shown
    tiles = pattern.tiles(n_q, n_k, size, q_start)
    expected = [
        [
            any(shown[i][j] for i in range(a, min(a + size, n_q)) for j in range(b, min(b + size, n_k)))
            for b in range(0, n_k, size)
        ]
        for a in range(0, n_q, size)
    ]
    assert tiles.dtype == torch.bool
    assert tiles.tolist() == expected
    whole = [
        [
            all(shown[i][j] for i in range(a, min(a + size, n_q)) for j in range(b, min(b + size, n_k)))
            for b in range(0, n_k, size)
        ]
        for a in range(0, n_q, size)
    ]
    assert pattern.full_tiles(n_q, n_k, size, q_start).tolist() == whole


@EXAMPLES
@given(pattern=patterns, n_q=lengths, n_k=lengths, q_start=st.integers(0, 9), size=st.integers(1, 7), head=st.integers(0, 2))
def test_the_lists_of_kept_tiles_are_the_maps(pattern, n_q, n_k, q_start, size, head):
    side = pattern.count_tile
    if side is not None:
        size, q_start = side, q_start // side * side
    if side is not None and isinstance(pattern, (And, Or)):
        return
    kept = pattern.kept(n_q, n_k, size, q_start, head)
    assert kept.rows.dtype == kept.columns.dtype == torch.int32
    some, whole = pattern.tiles(n_q, n_k, size, q_start, head), pattern.full_tiles(n_q, n_k, size, q_start, head)
    for i, row in enumerate(some):
        mine = slice(int(kept.rows[i]), int(kept.rows[i + 1]))
        columns, times = kept.columns[mine].unique_consecutive(return_counts=True)
        assert columns.tolist() == row.nonzero().flatten().tolist()
        assert kept.whole[mine].tolist() == whole[i, kept.columns[mine].long()].tolist()
        count = pattern.count(torch.tensor(head), torch.tensor(q_start + i * size), columns * size)
        assert times.tolist() == (torch.ones_like(columns) if count is None else count.expand_as(columns)).tolist()


@EXAMPLES
@given(pattern=patterns)
def test_a_pattern_survives_json(pattern):
    assert from_dict(Pattern, to_dict(pattern)) == pattern


@EXAMPLES
@given(pattern=patterns, n=lengths, head=st.integers(0, 2))
def test_padding_and_broadcast_shapes_are_no_trouble(pattern, n, head):
    """Positions as attention gives them, (B, H, Lq, Lk), some of them negative; what is visible is the mask."""
    at = torch.arange(n)
    heads, q, k = (
        torch.arange(3)[None, :, None, None],
        at[None, None, :, None],
        torch.stack([at, at.flip(0) - 2])[:, None, None],
    )
    seen = pattern.visible(heads, q, k).expand(2, 3, n, n)
    assert torch.equal(seen[0, head], pattern.mask(n, n, head=head))
    count = pattern.count(heads, q, k)
    assert count is None or (count.expand(2, 3, n, n).min() >= 1 and not count.is_floating_point())


@EXAMPLES
@given(pattern=patterns)
def test_causal_is_said_exactly_by_those_that_never_look_ahead(pattern):
    ahead = bool(pattern.mask(LONG, LONG).triu(1).any())
    assert not (ahead and pattern.causal)
    # Two patterns may hide each other's future, and a draw may happen to lie in the past.
    if not isinstance(pattern, (And, Or, Random)):
        assert ahead or pattern.causal


@EXAMPLES
@given(pattern=patterns, n=lengths, start=st.integers(0, 30))
def test_reach_bounds_how_far_back_a_query_looks_and_is_met(pattern, n, start):
    total = start + n
    mask = pattern.mask(n, total, start)
    back = [start + i - j for i in range(n) for j in range(total) if mask[i, j] and j <= start + i]
    if pattern.reach is not None:
        assert max(back) < pattern.reach
        if total >= pattern.reach and pattern.moves and not isinstance(pattern, (And, Or)):
            assert max(back) == pattern.reach - 1
    elif pattern.causal and isinstance(pattern, LOOK_BACK):
        assert max(back) == total - 1, "a causal pattern that never looks back to the first key should state its reach"


@EXAMPLES
@given(pattern=patterns, n=lengths)
def test_every_query_sees_itself(pattern, n):
    assert pattern.mask(n, n).diagonal().all()


@EXAMPLES
@given(pattern=patterns, shift=st.integers(0, 30))
def test_bounded_patterns_say_whether_they_depend_on_absolute_positions(pattern, shift):
    """The mask moves with the query, or the pattern says that it does not."""
    if pattern.reach is not None and pattern.moves:
        moved = pattern.mask(9, 9 + shift, shift)[:, shift:]
        assert torch.equal(moved, pattern.mask(9, 9))
