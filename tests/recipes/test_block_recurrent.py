"""The block-recurrent recipes: where the states are, and what cannot be built."""

import pytest

from hippodrome.part import BadInput
from hippodrome.recipes._lm import Text
from hippodrome.recipes.block_recurrent import block_recurrent, sliding
from hippodrome.run import TrainConfig


def test_one_layer_has_states_and_the_twin_none():
    states = [block.mixer.n_state for block in block_recurrent(n_layer=5, n_state=7, recurrent_layer=-3).model.blocks]
    assert states == [0, 0, 7, 0, 0]
    assert {block.mixer.n_state for block in sliding().model.blocks} == {0}


def test_the_twin_costs_about_the_same():
    """In parameters: the cell's maps are about a block."""
    one, other = (sum(p.numel() for p in recipe().model.build().parameters()) for recipe in (block_recurrent, sliding))
    assert 0.8 < one / other < 1.2


@pytest.mark.parametrize(
    ("fields", "message"), [({"recurrent_layer": 4}, "recurrent_layer is 4"), ({"n_state": 0}, "block_recurrent.sliding")]
)
def test_what_cannot_be_built_is_said(fields, message):
    with pytest.raises(BadInput, match=message):
        block_recurrent(**fields)


def test_a_run_that_carries_its_state_reads_a_stream_or_documents():
    for carry, order, found in ((False, None, "shuffled"), (True, None, "stream"), (True, "documents", "documents")):
        config = block_recurrent(text=Text(order=order), train=TrainConfig(carry_state=carry))
        assert config.task.order == found


@pytest.mark.parametrize(("order", "carry"), [("documents", False), ("stream", False), ("shuffled", True)])
def test_orders_that_do_not_go_with_carrying_are_said(order, carry):
    with pytest.raises(BadInput, match=f"order is {order} and carry_state {'on' if carry else 'off'}"):
        block_recurrent(text=Text(order=order), train=TrainConfig(carry_state=carry))
