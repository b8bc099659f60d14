"""What the tests of Triton's programs share."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN: what reads what was never written shows it."""
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
