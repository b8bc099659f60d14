"""The block FFT: the authors' numbers, any number of points, and what it shares with the GPU's programs, which are tested in
test_long_conv_triton.py."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hippodrome.ops.long_conv import _tiles
from hippodrome.ops.long_conv.block_fft import block_fft, matrices, steps
from tests.golden_files import as_complex, cases, load, relative_error

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("n1", "n2"), [(16, 16), (32, 16), (64, 16)])
def test_the_steps_of_the_fused_programs_are_a_turned_transform_and_its_way_back(n1, n2):
    n = n1 * n2
    into, back, twist, second = steps(n1, n2, torch.float64, torch.device("cpu"))
    (into, twist, second), (back_re, back_im) = (torch.complex(*t) for t in (into, twist, second)), back
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = (into @ x.view(n1, n2).to(into.dtype) * twist) @ second
    angle = torch.arange(n, dtype=torch.float64) * (torch.pi / (2 * n))
    turned = x * torch.polar(torch.ones_like(angle), angle)
    assert relative_error(spectrum.T.flatten(), block_fft(turned, radix=32) / n**0.5) < 1e-12
    home = (spectrum.conj() @ second) * twist
    assert relative_error((back_re @ home.real + back_im @ home.imag).flatten(), x) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_smallest_tile_that_holds_a_sequence(dtype):
    for length in range(1, _tiles.longest(dtype, CPU) + 1, 61):
        convolution, gradient = _tiles.tiles(length, dtype, 3)
        n = convolution.n1 * convolution.n2
        assert n == gradient.n1 * gradient.n2 == max(256, 1 << (length - 1).bit_length())
        assert max(convolution.sequences, gradient.sequences) <= 4


@pytest.mark.parametrize(
    ("capability", "kilobytes", "half", "single"),
    [((9, 0), 227, 16384, 4096), ((9, 0), 100, 8192, 2048), ((8, 0), 163, 2048, 2048), ((8, 9), 20, 512, 256)],
)
def test_the_limit_follows_from_the_device(capability, kilobytes, half, single, monkeypatch):
    facts = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=kilobytes << 10)
    facts.shared_memory_per_block = 48 << 10
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(_tiles, "longest", _tiles.longest.__wrapped__)
    for dtype, most in ((torch.float16, half), (torch.bfloat16, half), (torch.float32, single)):
        assert _tiles.why_not(most, dtype, torch.device("cuda", 0)) is None
        assert f"more than the {most:,}" in _tiles.why_not(most + 1, dtype, torch.device("cuda", 0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_shared_memory_of_a_tile_is_what_the_compiler_takes(dtype):
    """For a GPU that need not be here."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compiled_block_fft", str(dtype)[6:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for stated, taken in lines:
        assert 0.5 * stated <= taken <= stated
