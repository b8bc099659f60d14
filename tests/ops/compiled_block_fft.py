"""Compile the block FFT's programs for compute capability 9.0, without a GPU: `python -m tests.ops.compiled_block_fft DTYPE`.

One line of JSON a program: the shared memory that its tile states, and what the compiler takes. The longest ones take a minute
to compile and are left out. A process of its own, so that TRITON_INTERPRET of other tests does not matter.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hippodrome.ops.long_conv import _block_fft, _tiles

NAMES = {torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = ("u", "pre", "dy", "out", "post", "out2", "post2", "spectrum", "into", "back", "twist", "second")


def shared(program, tile, dtype):
    """Bytes, with whole vectors and all gates."""
    flags = {"HAS_PRE": True, "HAS_POST": True, "HAS_SECOND": False, "TRANSPOSED": False}
    sizes = {"N1": tile.n1, "N2": tile.n2, "B": tile.sequences, "R": tile.frequencies}
    constants = {**flags, **sizes, "PRECISION": _block_fft._precision(dtype)}
    signature, facts = {}, {}
    for at, name in enumerate(program.arg_names):
        pointer = "fp32" if name in ("size", "sums") else NAMES[dtype] if name in POINTERS else None
        signature[name] = "constexpr" if name in constants else f"*{pointer}" if pointer else "i32"
        if name not in ("batch", "splits", *constants):
            facts[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, {k: v for k, v in constants.items() if k in signature}, facts)
    options = {"num_warps": tile.warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def main():
    dtype = getattr(torch, sys.argv[1])
    for program, table in ((_block_fft.block_fft_conv, _tiles.CONVOLUTION), (_block_fft.block_fft_gradient, _tiles.GRADIENT)):
        for tile in table[dtype]:
            if tile.n1 * tile.n2 in (256, 4096):
                print(json.dumps([tile.shared, shared(program, tile, dtype)]), flush=True)


if __name__ == "__main__":
    main()
