"""Attention against attention written plainly, and its key-value state at its limits."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hippodrome.mixers.attention import Attention, rotate
from hippodrome.part import BadInput
from hippodrome.patterns import BigBird, Butterfly, Causal, Chunk, Full, Global, Pattern, Window
from hippodrome.positions import Alibi, Rotary, T5Bias
from tests.support import assert_close, build

VARIANTS = (
    Attention.Config(position=Rotary(4)),
    Attention.Config(n_head=4, n_kv_head=2, position=Rotary(2, base=100.0)),
    Attention.Config(pattern=Window(size=5)),
    Attention.Config(n_kv_head=1, pattern=Window(size=1)),
    Attention.Config(pattern=Chunk(size=5), position=Rotary(4)),
    Attention.Config(n_head=2, pattern=Full()),
    Attention.Config(n_head=2, pattern=BigBird(tile=4, n_random=2), position=Rotary(4)),
    Attention.Config(n_head=2, pattern=BigBird(tile=8, n_random=2, form="encoder", length=90)),
    Attention.Config(n_head=2, pattern=Butterfly(tile=4) & Causal()),
    Attention.Config(n_head=2, pattern=Window(size=3) | Global(size=2) & Causal()),
    Attention.Config(position=Rotary()),
    Attention.Config(n_head=8, n_kv_head=2, position=Alibi()),
    Attention.Config(pattern=Window(size=5), position=Alibi()),
    Attention.Config(n_head=2, position=T5Bias(buckets=6, max_distance=9)),
    Attention.Config(n_head=2, pattern=Chunk(size=5), position=T5Bias(buckets=4, max_distance=5)),
    Attention.Config(n_head=2, pattern=Full(), position=T5Bias(buckets=8, max_distance=6, bidirectional=True)),
)

D = 16
WINDOWED = Attention.Config(n_head=2, pattern=Window(size=5), position=Rotary(4))
CONFIGS = (Attention.Config(n_head=2, position=Rotary(4)), WINDOWED)


def vectors(batch, length, seed=1):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed))


def plainly(mixer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One row x (L, D), one head, one query and one key at a time; the rotation as a product of complex numbers."""
    config, k_width = mixer.config, mixer.d_head
    h, g = mixer.n_head, mixer.n_kv
    projected = x @ mixer.Wqkv.weight.T + mixer.Wqkv.bias
    q, k, v = projected.split([h * k_width, g * k_width, g * k_width], 1)
    q, k, v = q.reshape(-1, h, k_width), k.reshape(-1, g, k_width), v.reshape(-1, g, k_width)

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        rotary = config.position or Rotary(dim=0)
        dim = k_width if rotary.dim is None else rotary.dim
        half = dim // 2
        out = vector.clone()
        for j in range(half):
            angle = torch.tensor(position * rotary.base ** (-2 * j / dim))
            z = torch.complex(vector[j], vector[j + half]) * torch.polar(torch.tensor(1.0), angle)
            out[j], out[j + half] = z.real, z.imag
        return out

    rows = []
    for i in range(len(x)):
        heads = []
        for head in range(h):
            shown = [j for j in range(len(x)) if sees(config.pattern, i, j, head)]
            scores = [turned(q[i, head], i) @ turned(k[j, head * g // h], j) / math.sqrt(k_width) for j in shown]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * v[j, head * g // h] for w, j in zip(weights, shown, strict=True)))
        rows.append(torch.cat(heads) @ mixer.out_proj.weight.T + mixer.out_proj.bias)
    return torch.stack(rows)


def sees(pattern: Pattern, i: int, j: int, head: int) -> bool:
    if isinstance(pattern, Full):
        return True
    if not isinstance(pattern, (Causal, Window, Chunk)):
        # What these show is tested by itself.
        return bool(pattern.visible(torch.tensor(head), torch.tensor(i), torch.tensor(j)))
    if isinstance(pattern, Chunk):
        return j <= i < (j // pattern.size + 1) * pattern.size
    return j <= i and (not isinstance(pattern, Window) or i - j < pattern.size)


@pytest.mark.parametrize(
    "config", [Attention.Config(), *(config for config in VARIANTS if not isinstance(config.position, (Alibi, T5Bias)))]
)
def test_equals_attention_written_plainly(config):
    mixer, x = build(config, D), vectors(2, 11)
    y, _ = mixer(x)
    for row in range(2):
        assert_close(y[row], plainly(mixer, x[row]))


def test_the_order_of_the_projections_is_q_k_v_each_by_head():
    mixer = build(Attention.Config(n_head=2), D)
    x = vectors(1, 7)
    q, k, v = (x @ mixer.Wqkv.weight.T + mixer.Wqkv.bias).chunk(3, -1)
    heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    assert_close(mixer(x)[0], mixer.out_proj(mixed.transpose(1, 2).flatten(2)))


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    products = [
        (rotate(q, torch.tensor([[at + 5]]), 8, 10000.0) * rotate(k, torch.tensor([[at]]), 8, 10000.0)).sum()
        for at in (0, 3, 90)
    ]
    assert_close(torch.stack(products), products[0].expand(3))
    assert not torch.allclose(products[0], (q * k).sum(), rtol=1e-2)


def test_rotation_of_half_precision_is_computed_in_fp32():
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    at = torch.tensor([[1001]])  # not a number of bf16
    torch.testing.assert_close(rotate(x, at, 8, 10000.0), rotate(x.float(), at, 8, 10000.0).bfloat16(), rtol=0, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    which=st.sampled_from(range(len(CONFIGS))),
    calls=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    max_len=st.sampled_from([None, "room"]),
)
def test_ragged_chunks_of_any_sizes_equal_each_row_alone(which, calls, max_len):
    """Rows take `calls[c][row]` tokens in call c, the rest of the chunk is padding; then two steps."""
    mixer = build(CONFIGS[which], D).eval()
    totals = [sum(call[row] for call in calls) + 2 for row in range(3)]
    x = vectors(3, max(totals))
    expected = [mixer(x[row : row + 1, : totals[row]])[0][0] for row in range(3)]
    state, taken = mixer.init_state(3, max(totals) if max_len else None), [0, 0, 0]
    for call in calls:
        chunk = torch.full((3, max(1, *call), D), 5.0)
        for row, n in enumerate(call):
            chunk[row, :n] = x[row, taken[row] : taken[row] + n]
        with torch.no_grad():
            y, state = mixer(chunk, state, lengths=torch.tensor(call))
        for row, n in enumerate(call):
            if n:
                assert_close(y[row, :n], expected[row][taken[row] : taken[row] + n])
            taken[row] += n
    for _ in range(2):
        with torch.no_grad():
            y, state = mixer.step(torch.stack([x[row, taken[row]] for row in range(3)]), state)
        for row in range(3):
            assert_close(y[row], expected[row][taken[row]])
        taken = [n + 1 for n in taken]
    assert state.position.tolist() == totals


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_prefilled_apart_join_and_are_continued(config, fixed):
    mixer, x = build(config, D).eval(), vectors(3, 30)
    prompts = (1, 12, 4)
    states = [mixer(x[i : i + 1, :n], mixer.init_state(1, 30 if fixed else None))[1] for i, n in enumerate(prompts)]
    state = type(states[0]).join(states)
    for t in range(15):
        with torch.no_grad():
            y, state = mixer.step(torch.stack([x[i, n + t] for i, n in enumerate(prompts)]), state)
        for i, n in enumerate(prompts):
            assert_close(y[i], mixer(x[i : i + 1, : n + t + 1])[0][0, -1])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("max_len", [None, 40])
def test_a_row_that_is_reset_begins_anew(config, max_len):
    mixer, x = build(config, D).eval(), vectors(2, 20)
    _, state = mixer(x[:, :12], mixer.init_state(2, max_len))
    state = state.reset(torch.tensor([True, False]), mixer.init_state(2, max_len))
    y, _ = mixer(x[:, 12:], state)
    assert_close(y[0], mixer(x[:1, 12:])[0][0])
    assert_close(y[1], mixer(x[1:])[0][0, 12:])


def test_a_full_state_says_so_and_one_that_fits_does_not():
    mixer, x = build(Attention.Config(n_head=2), D).eval(), vectors(1, 9)
    _, state = mixer(x[:, :8], mixer.init_state(1, 8))
    with pytest.raises(BadInput, match="9 tokens do not fit the attention state's room for 8"):
        mixer.step(x[:, 8], state)
    with pytest.raises(BadInput, match="room for 8"):
        mixer(x, mixer.init_state(1, 8))
    y, _ = mixer(x, mixer.init_state(1, 8), lengths=torch.tensor([8]))  # padding needs no room
    assert_close(y[:, :8], mixer(x)[0][:, :8])


def test_a_window_wider_than_the_room_is_not_cut_short():
    mixer, x = build(Attention.Config(n_head=2, pattern=Window(size=16)), D).eval(), vectors(1, 9)
    with pytest.raises(BadInput, match="room for 8"):
        mixer(x, mixer.init_state(1, 8))


@pytest.mark.parametrize("max_len", [None, 2000])
def test_a_window_remembers_no_more_at_any_length(max_len):
    mixer = build(WINDOWED, D).eval()
    x = vectors(2, 1000)
    state, sizes = mixer.init_state(2, max_len), set()
    with torch.no_grad():
        expected = mixer(x)[0]
        for t in range(1000):
            y, state = mixer.step(x[:, t], state)
            sizes.add(state.nbytes)
            if t % 97 == 0 or t > 990:
                assert_close(y, expected[:, t])
    assert max(sizes) == state.nbytes == 2 * 2 * 5 * D * 4 + 2 * 8
    _, state = mixer(x, mixer.init_state(2, max_len))
    assert state.nbytes == max(sizes)


def test_a_growing_state_holds_the_longest_row_and_nothing_more():
    mixer, x = build(Attention.Config(n_head=2), D).eval(), vectors(2, 12)
    _, state = mixer(x, mixer.init_state(2), lengths=torch.tensor([3, 7]))
    assert state.k.shape[2] == 7
    assert state.key_position.tolist() == [[0, 1, 2, -4, -3, -2, -1], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_flow_through_fixed_buffers(config):
    mixer, x = build(config, D), vectors(2, 12)
    expected = torch.autograd.grad(mixer(x)[0].square().sum(), mixer.Wqkv.weight)[0]
    state, total = mixer.init_state(2, 12), torch.zeros(())
    for chunk in (x[:, :5], x[:, 5:6], x[:, 6:]):
        y, state = mixer(chunk, state)
        total = total + y.square().sum()
    assert_close(torch.autograd.grad(total, mixer.Wqkv.weight)[0], expected, 1e-4)


def test_a_state_made_before_autocast_serves_within():
    mixer, x = build(CONFIGS[0], D).eval(), vectors(2, 9)
    state = mixer.init_state(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = mixer(x[:, :6], state)
        second, state = mixer(x[:, 6:], state)
    assert state.k.dtype == torch.bfloat16
    assert_close(torch.cat([first, second], 1).float(), mixer(x)[0], 5e-2)


def test_padding_under_a_full_pattern_is_not_seen():
    mixer, x = build(Attention.Config(n_head=2, pattern=Full()), D).eval(), vectors(2, 9)
    y, _ = mixer(x, lengths=torch.tensor([9, 4]))
    assert_close(y[1, :4], mixer(x[1:, :4])[0][0])
    assert_close(y[0], mixer(x[:1])[0][0])


def test_causal_follows_the_pattern():
    for pattern in (Causal(), Window(size=3), Full()):
        assert Attention.Config(pattern=pattern).build(D).causal == pattern.causal


def test_dropout_acts_in_training_only():
    mixer, x = build(Attention.Config(dropout=0.5), D), vectors(2, 9)
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "5 heads do not divide d_model 16: take 4"),
        ({"n_head": 0}, "0 heads do not divide d_model 16: take 1"),
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4: take 2"),
        ({"n_kv_head": 0}, "n_kv_head 0 does not divide n_head 4: take 1"),
        ({"position": Rotary(dim=3)}, "Rotary's dim is 3: it must be even"),
        ({"position": Rotary(dim=6)}, "Rotary's dim is 6: .* at most the head width 4"),
        ({"position": Rotary(dim=-2)}, "Rotary's dim is -2: .* 0 or more"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        dataclasses.replace(Attention.Config(), **change).build(D)


def test_a_pattern_that_sees_the_future_is_named_in_the_refusal():
    with pytest.raises(BadInput, match=r"Full\(\) sees the future"):
        Attention.Config(pattern=Full()).build(D).init_state(1)
