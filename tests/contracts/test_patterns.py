"""What every attention pattern keeps to: tiles, the causal flag and the reach are all true to `visible`."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hippodrome.patterns
from hippodrome.patterns import Pattern

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def strategies():
    """Every pattern of hippodrome/patterns.py; a field is drawn from small positive integers."""
    kinds = [kind for kind in vars(hippodrome.patterns).values() if isinstance(kind, type) and issubclass(kind, Pattern)]
    kinds.remove(Pattern)
    assert len(kinds) >= 3
    return st.one_of([st.builds(kind, **dict.fromkeys(kind.__dataclass_fields__, st.integers(1, 12))) for kind in kinds])


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


@EXAMPLES
@given(pattern=patterns, n=lengths)
def test_causal_is_said_exactly_by_those_that_never_look_ahead(pattern, n):
    ahead = pattern.mask(n + 1, n + 1).triu(1).any()
    assert bool(ahead) == (not pattern.causal)


@EXAMPLES
@given(pattern=patterns, n=lengths, start=st.integers(0, 30))
def test_reach_bounds_how_far_back_a_query_looks_and_is_met(pattern, n, start):
    total = start + n
    mask = pattern.mask(n, total, start)
    back = [start + i - j for i in range(n) for j in range(total) if mask[i, j] and j <= start + i]
    if pattern.reach is not None:
        assert max(back) < pattern.reach
        if total >= pattern.reach and pattern.moves:
            assert max(back) == pattern.reach - 1
    elif pattern.causal:
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
