"""HiPPO matrices against the authors' (tests/golden). Eigenvectors have no fixed phase: what is compared is free of it."""

import numpy as np
import pytest

from hippodrome.lti._hippo import low_rank, nplr, transition
from tests.golden_files import as_complex, load

MEASURES = ("legs", "legt", "fout")
# The authors round FouT's low-rank term to float32.
TOLERANCE = {"legs": 1e-12, "legt": 1e-12, "fout": 1e-7}


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_matrices_are_the_authors(measure, n):
    golden = load(f"hippo_{measure}_N{n}")
    a, b = transition(measure, n)
    assert close(a, golden["A"].numpy(), 1e-12)
    assert close(b, golden["B"][:, 0].numpy(), 1e-12)
    assert close(low_rank(measure, n), golden["P"].numpy(), TOLERANCE[measure])


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_eigenvalues_and_weights_are_the_authors(measure, n):
    golden = load(f"hippo_{measure}_N{n}")
    found = nplr(measure, n)
    assert close(found.w, as_complex(golden["nplr/w"]).numpy(), TOLERANCE[measure])
    products = as_complex(golden["nplr/conjP_times_B"]).numpy()
    assert close(found.P.conj() * found.B, products, TOLERANCE[measure])


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank_gives_the_matrix_back(measure, n):
    a, b = transition(measure, n)
    found = nplr(measure, n)
    normal = 2 * ((found.V * found.w) @ found.V.conj().T).real
    p = low_rank(measure, n)
    assert close(normal - p.T @ p, a, 1e-12)
    assert close(2 * (found.V @ found.B).real, b, 1e-12)
    assert close(2 * (found.V @ found.P.T).real, p.T, 1e-12)
    assert (found.w.imag <= 0).all()


def test_phases_are_fixed():
    first = nplr("legs", 32).V[0]
    assert (first.real > 0).all()
    assert np.abs(first.imag).max() < 1e-12


def test_a_matrix_is_decomposed_once_and_kept_from_changes():
    found = nplr("legs", 32)
    assert nplr("legs", 32) is found
    with pytest.raises(ValueError, match="read-only"):
        found.w[0] = 0
