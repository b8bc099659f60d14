"""Run long_conv's Triton programs in the interpreter: `python -m tests.ops.interpreted_long_conv PATH SKIPPED...`.

A process of its own, because triton reads TRITON_INTERPRET when it is imported. One line of JSON a case: its name, the errors,
and those that exact arithmetic makes of inputs cast to the dtype.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from hippodrome.ops._op import use_backend
from hippodrome.ops.long_conv import _taps, long_conv
from hippodrome.ops.long_conv import triton as backend

CASES = {
    "gates, strided": {"shape": (2, 2, 200), "taps": 200, "gates": True},
    "two directions of unequal length": {"shape": (3, 1, 65), "taps": 65, "back": 40, "gates": True},
    "short taps both ways": {"shape": (1, 2, 300), "taps": 64, "back": 10},
    "one token": {"shape": (5, 1, 1), "taps": 3, "gates": True},
    "more taps than tokens": {"shape": (2, 1, 63), "taps": 7, "back": 80},
    "many sequences": {"shape": (70, 1, 130), "taps": 130},
    "pairs of tiles": {"shape": (350, 1, 380), "taps": 380, "back": 150, "dtype": torch.bfloat16},
    "groups of channels": {"shape": (17, 3, 130), "taps": 130, "gates": True},
    "bfloat16": {"shape": (2, 1, 256), "taps": 256, "dtype": torch.bfloat16},
    "float16 beyond its range": {"shape": (1, 2, 100), "taps": 100, "gates": True, "dtype": torch.float16, "scale": 3e3},
    "long and two-sided": {"shape": (1, 1, 2500), "taps": 2500, "back": 2500, "gates": True},
    "a power of two": {"shape": (5, 1, 256), "taps": 256, "back": 256, "gates": True, "dtype": torch.bfloat16},
    "one more": {"shape": (3, 2, 257), "taps": 257, "back": 256, "gates": True, "dtype": torch.bfloat16},
    "a thousand": {"shape": (7, 1, 1000), "taps": 1000, "back": 3, "dtype": torch.bfloat16},
    "four thousand": {"shape": (3, 1, 4095), "taps": 4095, "gates": True, "dtype": torch.float16},
    "eight thousand": {"shape": (1, 1, 8191), "taps": 8191, "back": 8191, "dtype": torch.float16},
    "sixteen thousand": {"shape": (2, 1, 16384), "taps": 16384, "gates": True, "dtype": torch.bfloat16},
}


def inputs(shape, taps, back=0, gates=False, dtype=torch.float32, scale=1.0, device="cpu"):
    """Random float64 numbers rounded to what the op is given."""
    dice = torch.Generator(device=device).manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=dice, dtype=torch.float64, device=device)  # noqa: E731
    batch, channels, length = shape
    given = {"u": draw(*shape), "kernel": draw(channels, taps) / taps**0.5, "skip": draw(channels)}
    if back:
        given["kernel_rev"] = draw(channels, back) / back**0.5
    if gates:
        given["pre_gate"] = draw(batch, length, channels).transpose(1, 2) * scale
        given["post_gate"] = draw(channels, batch, length).transpose(0, 1) / scale
        given["u"] *= scale**0.5
        given["kernel"] /= scale**0.5
        given["skip"] /= scale**0.5
    return {name: t.to(dtype if name in ("u", "pre_gate", "post_gate") else torch.float32) for name, t in given.items()}


def results(given, name):
    """The output and all gradients, of a fixed random projection."""
    leaves = {key: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for key, t in given.items()}
    with use_backend(name):
        y = long_conv(**leaves)
    dice = torch.Generator(device=y.device).manual_seed(1)
    y.backward(torch.randn(y.shape, generator=dice, dtype=torch.float64, device=y.device).to(y.dtype))
    return {"y": y.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}


def errors(got, exact):
    """Relative to the norm of the exact result."""
    return {name: float((got[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


def nearest(self, handle, dtype):
    """The interpreter's casts, but to bfloat16 by rounding to the nearest, as the hardware does; it truncates."""
    if (handle.dtype.scalar, dtype.scalar) != (interpreter.tl.float32, interpreter.tl.bfloat16):
        return CAST(self, handle, dtype)
    rounded = torch.from_numpy(np.array(handle.data, dtype=np.float32)).to(torch.bfloat16)
    return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), interpreter.tl.bfloat16)


CAST = interpreter.InterpreterBuilder.cast_impl


def wide(handle):
    """The interpreter keeps bfloat16 as bits and would multiply those."""
    if handle.dtype != interpreter.tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)


def main():
    dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    interpreter.InterpreterBuilder.cast_impl = nearest
    backend.DEVICES, backend.forced = ("cpu",), sys.argv[1]
    # Short blocks: as many programs as they have tokens run one after the other here.
    _taps.SCRATCH = 1 << 16
    backend.path("partitioned").block_length = lambda length: 16
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    for name, case in CASES.items():
        if name in sys.argv[2:]:
            continue
        given = inputs(**case)
        exact = results({key: t.double() for key, t in given.items()}, "reference")
        uncast = inputs(**case | {"dtype": torch.float64})
        cast = errors(exact, results({key: t.double() for key, t in uncast.items()}, "reference"))
        print(json.dumps([name, errors(results(given, "triton"), exact), cast]), flush=True)


if __name__ == "__main__":
    main()
