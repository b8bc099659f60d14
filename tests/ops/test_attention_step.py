"""One attention step: the op against the whole attention, in place, and its kernels against the op."""

import math

import pytest
import torch

from hippodrome.ops._op import use_backend
from hippodrome.ops.attention_step import attention_step, slot_positions
from hippodrome.part import BadInput
from tests.support import assert_close, interpreted

SHAPES = [
    # batch, heads, groups, width, slots, programs
    (3, 4, 4, 16, 40, 1),
    (3, 4, 2, 8, 70, 1),
    (3, 4, 4, 24, 150, 64),
    (3, 6, 2, 32, 150, 64),
    (3, 2, 2, 32, 1, 1),
]
FREQUENCY = torch.tensor([0.9, 0.4, 0.02])
"""Of six channels that turn; the others of a head do not."""


def inputs(batch, heads, groups, width, slots, dtype=torch.float32, device="cpu", seed=0):
    """Slices of one product; rows that have seen nothing, nearly all that fits, and more than fits."""
    g = torch.Generator().manual_seed(seed)
    product = torch.randn(batch, (heads + 2 * groups) * width, generator=g).to(dtype)
    q, k, v = (t.unflatten(1, (-1, width)) for t in product.split([heads * width, groups * width, groups * width], 1))
    keys, values = torch.randn(2, batch, groups, slots, width, generator=g).to(dtype)
    position = torch.tensor([0, slots - 1, 2 * slots + 3]).repeat(-(-batch // 3))[:batch]
    return [t.to(device) for t in (q, k, v, keys, values, position)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_attention_written_plainly(backend):
    q, k, v, keys, values, position = given = inputs(3, 4, 2, 8, 7)
    with use_backend(backend), torch.no_grad():
        y, after_keys, after_values = attention_step(*[t.clone() for t in given], scale=0.3)
    for b in range(3):
        at = int(position[b])
        keys[b, :, at % 7], values[b, :, at % 7] = k[b], v[b]
        assert torch.equal(after_keys[b], keys[b])
        assert torch.equal(after_values[b], values[b])
        for h in range(4):
            shown = [p % 7 for p in range(max(0, at - 6), at + 1)]
            weights = torch.tensor([math.exp(0.3 * float(q[b, h] @ keys[b, h // 2, s])) for s in shown])
            assert_close(y[b, h], (weights / weights.sum()) @ values[b, h // 2, shown], 1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_queries_and_keys_turn_with_their_position(backend):
    """Channels j and j + R as a complex number times exp(i position frequency_j); only the turned key is remembered."""
    q, k, v, keys, values, position = inputs(3, 4, 2, 8, 7)

    def turned(x):
        z = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones(1), position[:, None, None] * FREQUENCY)
        return torch.cat([z.real, z.imag, x[..., 6:]], -1)

    with use_backend(backend), torch.no_grad():
        wanted = attention_step(turned(q), turned(k), v, keys.clone(), values.clone(), position)
        found = attention_step(q, k, v, keys, values, position, FREQUENCY)
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected, 1e-6)


def test_slots_hold_the_newest_positions():
    assert slot_positions(torch.tensor([1, 6]), 4).tolist() == [[0, 1, -2, -1], [4, 5, 6, 3]]


def test_keys_are_written_in_place_unless_a_gradient_is_to_flow():
    given = inputs(3, 4, 2, 8, 7)
    with torch.no_grad():
        _, keys, values = attention_step(*given)
    assert keys.data_ptr() == given[3].data_ptr()
    assert values.data_ptr() == given[4].data_ptr()
    before = [t.clone() for t in given]
    attention_step(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_op_says_why_not():
    given = inputs(3, 4, 2, 8, 7)
    assert attention_step.explain(*given) == {"triton": "the tensors are on cpu", "cpu": "ok", "reference": "ok"}
    with use_backend("triton"), pytest.raises(BadInput, match="on cpu"):
        attention_step(*given)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_the_kernels_equal_the_reference_in_the_interpreter(shape, dtype, tolerance, monkeypatch):
    """The interpreter's matrix product knows no bfloat16."""
    from hippodrome.ops.attention_step import _kernels

    for name, size in (("_LEAST", 16), ("_TILE", 512), ("_GROUP_TILE", 512)):
        monkeypatch.setattr(_kernels, name, size)
    *shape, programs = shape
    given = inputs(*shape, dtype)
    turning = FREQUENCY if shape[1] == 4 else None
    wanted = attention_step.reference(*given, turning)
    q, k, v, keys, values, position = given
    y = _kernels.launch(q, k, v, keys, values, position, turning, q.shape[2] ** -0.5, programs)
    for found, expected in zip((y, keys, values), wanted, strict=True):
        assert_close(found.float(), expected.float(), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *(shape[:5] for shape in SHAPES),
        (64, 16, 16, 128, 1152),  # as many programs as the device wants: unsplit
        (3, 16, 16, 128, 5000),  # split
        (2, 32, 4, 128, 3001),  # groups, split
        (48, 32, 16, 64, 257),  # groups, unsplit
        (1, 8, 1, 128, 20000),  # one head of keys, many shares
        (3, 2, 2, 256, 300),
    ],
)
@pytest.mark.parametrize("turning", [False, True])
def test_the_kernels_equal_the_reference_on_the_device(shape, dtype, turning):
    frequency = FREQUENCY.cuda() if turning else None
    given = inputs(*shape, dtype, "cuda")
    exact = [t.double() if t.is_floating_point() else t for t in given]
    with torch.no_grad():
        wanted = attention_step.reference(*exact, frequency)
        with use_backend("triton"):
            found = attention_step(*given, frequency)
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got.double(), expected, {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype])
    assert found[1].data_ptr() == given[3].data_ptr()


@pytest.mark.gpu
def test_slots_that_are_not_filled_are_not_read():
    """Poison lies where nothing was written yet."""
    for groups in (2, 4):
        given = inputs(3, 4, groups, 64, 700, torch.bfloat16, "cuda")
        given[5] = torch.tensor([0, 300, 699], device="cuda")
        for row, filled in enumerate(given[5].tolist()):
            for buffer in given[3:5]:
                buffer[row, :, filled:] = math.nan
        with torch.no_grad(), use_backend("triton"):
            y, _, _ = attention_step(*given)
        assert torch.isfinite(y).all()


@pytest.mark.gpu
def test_the_leaf_is_a_good_citizen_of_torch():
    args = (*inputs(3, 4, 2, 16, 40, torch.bfloat16, "cuda"), FREQUENCY.cuda(), 0.25)
    leaf = torch.ops.hippodrome.attention_step_in_place.default
    torch.library.opcheck(leaf, args, test_utils=("test_schema", "test_faketensor"))
