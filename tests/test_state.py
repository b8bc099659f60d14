"""State: whatever holds states can select, reorder, detach and join them without knowing what they mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hippodrome.state import State


@dataclass(frozen=True)
class Inner(State):
    z: Tensor


@dataclass(frozen=True)
class Outer(State):
    """A tensor, a state, states in a tuple, what may be absent, and what is no tensor."""

    x: Tensor
    inner: Inner
    many: tuple[State, ...]
    absent: Tensor | None
    room: int


def outer(*rows: float) -> Outer:
    column = torch.tensor(rows)
    return Outer(column, Inner(column[:, None] * 10), (Inner(column * 100), Inner(column.to(torch.complex64))), None, 7)


def rows_of(state: Outer) -> list[list[float]]:
    return [tensor.real.flatten().tolist() for tensor in state.tensors()]


def test_tensors_are_found_in_the_order_of_the_fields():
    assert rows_of(outer(1.0, 2.0)) == [[1, 2], [10, 20], [100, 200], [1, 2]]


def test_map_reaches_every_tensor_and_keeps_the_rest():
    doubled = outer(1.0, 2.0).map(lambda tensor: tensor * 2)
    assert rows_of(doubled) == [[2, 4], [20, 40], [200, 400], [2, 4]]
    assert type(doubled) is Outer
    assert doubled.absent is None
    assert doubled.room == 7


def test_reorder_selects_repeats_and_drops_rows():
    state = outer(1.0, 2.0, 3.0).reorder(torch.tensor([2, 0, 2, 2]))
    assert rows_of(state)[:2] == [[3, 1, 3, 3], [30, 10, 30, 30]]
    assert rows_of(outer(1.0, 2.0).reorder(torch.tensor([1])))[0] == [2]


def test_join_puts_batches_one_after_the_other():
    joined = Outer.join([outer(1.0), outer(2.0, 3.0), outer(4.0)])
    assert rows_of(joined) == rows_of(outer(1.0, 2.0, 3.0, 4.0))
    assert joined.room == 7
    assert joined.absent is None


def test_join_uses_the_join_of_the_states_inside():
    class Padded(Inner):
        @classmethod
        def join(cls, states):
            width = max(state.z.shape[1] for state in states)
            return cls(torch.cat([torch.nn.functional.pad(state.z, (0, width - state.z.shape[1])) for state in states]))

    @dataclass(frozen=True)
    class Holder(State):
        parts: tuple[State, ...]

    joined = Holder.join([Holder((Padded(torch.ones(1, 2)),)), Holder((Padded(torch.ones(1, 3)),))])
    assert joined.parts[0].z.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_reset_takes_marked_rows_from_the_fresh_state():
    state = outer(1.0, 2.0, 3.0).reset(torch.tensor([False, True, False]), outer(-1.0, -2.0, -3.0))
    assert rows_of(state)[:2] == [[1, -2, 3], [10, -20, 30]]


def test_detach_cuts_the_graph_and_shares_the_values():
    leaf = torch.ones(2, requires_grad=True)
    state = Inner(leaf * 3)
    assert state.z.requires_grad
    assert not state.detach().z.requires_grad
    assert state.detach().z.data_ptr() == state.z.data_ptr()


def test_gradients_flow_through_reorder_join_and_reset():
    leaf = torch.ones(2, requires_grad=True)
    state = Inner.join([Inner(leaf), Inner(leaf * 2)]).reorder(torch.tensor([0, 3, 3]))
    state.reset(torch.tensor([True, False, False]), Inner(torch.zeros(3))).z.sum().backward()
    assert leaf.grad.tolist() == [0.0, 4.0]


def test_clone_survives_the_original():
    state = outer(1.0, 2.0)
    kept = state.clone()
    for tensor in state.tensors():
        tensor.zero_()
    assert rows_of(kept) == [[1, 2], [10, 20], [100, 200], [1, 2]]


def test_nbytes_counts_every_tensor():
    assert outer(1.0, 2.0).nbytes == 2 * 4 * 3 + 2 * 8
