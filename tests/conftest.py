"""Without a GPU, Triton's programs run in its interpreter, on CPU tensors.

Triton reads the variable when it is imported, so it is set before any test is. A test that needs the interpreter says so with
`tests.support.interpreted`.
"""

import importlib.util
import os

import torch

if importlib.util.find_spec("hypothesis"):  # which the tests on a GPU can do without
    from hypothesis import HealthCheck, settings

    # How long it takes to draw an example is the machine's affair, which may be busy.
    settings.register_profile("patient", suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
