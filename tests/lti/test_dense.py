"""The long products of lti/_dense against loops."""

import pytest
import torch

from hippodrome.lti._dense import answer, driven, orbit, power


def system(seed=0):
    torch.manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(2, 5, 5, dtype=torch.float64))[0] * 0.95
    return matrix, torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)


def powers(matrix, length):
    return torch.stack([torch.linalg.matrix_power(matrix, n) for n in range(length)])


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37])
def test_answers_and_driven_states_are_the_sums(length):
    matrix, vector, x = system()
    u = torch.randn(3, 2, length, dtype=torch.float64)
    expected = torch.einsum("hn,lhnm,hmb->bhl", vector, powers(matrix, length), x)
    torch.testing.assert_close(answer(matrix, vector, x, length), expected)
    expected = torch.einsum("lhnm,hm,bhl->hnb", powers(matrix, length).flip(0), vector, u)
    torch.testing.assert_close(driven(matrix, vector, u), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_orbits_are_powers(count):
    matrix, _, x = system()
    found, leap = orbit(matrix, x, count)
    torch.testing.assert_close(found.unflatten(-1, (count, 3)), torch.einsum("lhnm,hmb->hnlb", powers(matrix, count), x))
    torch.testing.assert_close(leap, torch.linalg.matrix_power(matrix, 1 << (count - 1).bit_length()))


def test_every_column_has_its_own_power():
    matrix, _, x = system()
    counts = torch.tensor([0, 3, 10])
    found = power(matrix, x, counts, 10)
    for column, count in enumerate(counts.tolist()):
        expected = (torch.linalg.matrix_power(matrix, count) @ x)[..., column]
        torch.testing.assert_close(found[..., column], expected)


def test_what_is_multiplied_keeps_its_dtype():
    matrix, vector, x = system()
    assert answer(matrix, vector, x.float(), 9).dtype == torch.float32
    assert driven(matrix, vector, torch.randn(3, 2, 9)).dtype == torch.float32
    assert power(matrix, x.float(), torch.tensor([1, 2, 3]), 3).dtype == torch.float32
