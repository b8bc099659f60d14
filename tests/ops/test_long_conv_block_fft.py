"""The block FFT: the authors' numbers, any number of points, and what it shares with the partitioned convolution."""

import pytest
import torch

from hippodrome.ops.long_conv.block_fft import block_fft, matrices
from tests.golden_files import as_complex, cases, load, relative_error


@pytest.mark.parametrize("name", cases("block_fft"))
def test_the_authors_block_fft(name):
    golden = load(name)
    found = block_fft(as_complex(golden["in/k"]), int(name.split("_N")[1].split("_")[0]))
    if "in/index" in golden:
        found = found[..., golden["in/index"]]
    assert relative_error(found, as_complex(golden["out/k_f"])) < 1e-5


@pytest.mark.parametrize("radix", [2, 16, 64])
@pytest.mark.parametrize("n", [1, 2, 15, 17, 34, 60, 97, 289, 1000, 1024])
def test_any_number_of_points(n, radix):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_error(block_fft(x, radix=radix), torch.fft.fft(x)) < 1e-12


@pytest.mark.parametrize("n", [5, 100, 250])
def test_points_are_padded_or_cut(n):
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert relative_error(block_fft(x, n), torch.fft.fft(x.double(), n)) < 1e-6


@pytest.mark.parametrize("t", [16, 64, 100])
def test_the_matrices_of_the_partitioned_path_are_a_step_of_it(t):
    forth, back = matrices(t, torch.float64, torch.device("cpu"))
    block = torch.randn(3, t, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = block @ forth.T
    odd_bins = block_fft(block, 4 * t)[..., 1 : 2 * t : 2]
    assert relative_error(torch.view_as_complex(spectrum.view(3, t, 2)), odd_bins) < 1e-12
    assert relative_error(spectrum @ back, block) < 1e-12
