"""Generation: what is drawn, from which prompts, in which chunks, and where it stops."""

import contextlib
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hippodrome.channels.mlp import Mlp
from hippodrome.embeds.tokens import Tokens
from hippodrome.generation import generate, stream, stream_text
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Model, ModelConfig
from hippodrome.ops._op import use_backend
from hippodrome.part import BadInput
from hippodrome.patterns import Full, Window
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.sampling import Sampling, probabilities
from hippodrome.state import State
from hippodrome.timing import time_generation, time_steps
from hippodrome.tokenizer import Tokenizer

VOCAB = 40

MIXERS = {
    "attention": (Attention.Config(n_head=2), Attention.Config(n_head=2)),
    "window": (Attention.Config(n_head=2, pattern=Window(size=5)), Attention.Config(n_head=2)),
    "h3": (H3.Config(d_state=8), H3.Config(d_state=8)),
    "hybrid": (H3.Config(d_state=8), Attention.Config(n_head=2)),
    "heads of h3": (H3.Config(d_state=8, head_dim=4), H3.Config(d_state=8, use_shift=False)),
    "grouped rotary": (Attention.Config(n_head=4, n_kv_head=2, position=Rotary(4)), SSM.Config()),
}


def build(kind: str, vocab: int = VOCAB) -> Model:
    torch.manual_seed(0)
    blocks = tuple(BlockConfig(mixer=mixer, channel=Mlp.Config()) for mixer in MIXERS[kind])
    config = ModelConfig(
        d_model=16,
        blocks=blocks,
        embed=Tokens.Config(vocab_size=vocab),
        readout=Lm.Config(),
        init_std=0.4,
    )
    return config.build()


@dataclass(frozen=True)
class Place(State):
    """How many tokens of the script each row has said."""

    at: Tensor


class Script(nn.Module):
    """Says the same ids whatever it is asked, so that what follows the model can be tested alone."""

    causal = True
    embed = None
    prompt_end = None

    def __init__(self, ids: list[int], vocab: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.ids, self.vocab = ids, vocab

    def init_state(self, batch: int, max_len: int | None = None) -> Place:
        return Place(torch.zeros(batch, dtype=torch.int64))

    def prefill(self, inputs: Tensor, state: Place, *, lengths: Tensor | None = None) -> tuple[Tensor, Place]:
        return self.say(state), Place(state.at + 1)

    def stepper(self, state_dtype: torch.dtype | None = None) -> "Script":
        return self

    def begin(self, state: Place) -> Place:
        return state

    def step(self, inputs: Tensor, state: Place) -> tuple[Tensor, Place]:
        return self.say(state), Place(state.at + 1)

    def say(self, state: Place) -> Tensor:
        return nn.functional.one_hot(torch.tensor(self.ids)[state.at], self.vocab).float() * 50


def scripted(text: str | bytes) -> Script:
    ids = list(text.encode() if isinstance(text, str) else text)
    return Script([*ids, Tokenizer.bytes().end], 257)


# What is drawn


def test_greedy_is_the_argmax_and_temperature_divides():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert probabilities(logits, Sampling(temperature=0)).tolist() == [[0, 1, 0], [1, 0, 0]]
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=0.5)), (logits / 0.5).softmax(-1))
    torch.testing.assert_close(probabilities(logits.bfloat16(), Sampling()), logits.softmax(-1))
    assert probabilities(logits * 1e30, Sampling(temperature=1e-30)).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("k", [1, 2, 7, 12, 50])
def test_top_k_keeps_the_k_largest(k):
    logits = torch.randn(3, 12)
    wanted = torch.zeros(3, 12)
    for row, out in zip(logits, wanted, strict=True):
        for token in sorted(range(12), key=lambda i: -row[i])[:k]:
            out[token] = math.exp(row[token])
    torch.testing.assert_close(probabilities(logits, Sampling(top_k=k)), wanted / wanted.sum(-1, keepdim=True))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.75, 0.999])
def test_top_p_keeps_the_fewest_that_add_up_to_p(p):
    logits = torch.randn(4, 12) * 2
    odds = logits.softmax(-1)
    wanted = torch.zeros(4, 12)
    for row, out in zip(odds, wanted, strict=True):
        total = 0.0
        for token in sorted(range(12), key=lambda i: -row[i]):
            if total >= p:
                break
            total += float(row[token])
            out[token] = row[token]
    torch.testing.assert_close(probabilities(logits, Sampling(top_p=p)), wanted / wanted.sum(-1, keepdim=True))


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_nearly_as_likely_as_the_best(share):
    logits = torch.randn(4, 12) * 2
    odds = logits.softmax(-1)
    wanted = odds * (odds >= share * odds.max(-1, keepdim=True).values * (1 - 1e-6))
    torch.testing.assert_close(probabilities(logits, Sampling(min_p=share)), wanted / wanted.sum(-1, keepdim=True))


def test_filters_follow_one_another():
    odds = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # top-k leaves 4:3:2, of which 4/9 < 0.7 <= 7/9; min-p then asks for 0.8 * 4/7.
    assert probabilities(odds.log(), Sampling(top_k=3, top_p=0.7))[0].nonzero().flatten().tolist() == [0, 1]
    assert probabilities(odds.log(), Sampling(top_k=3, top_p=0.7, min_p=0.8))[0].nonzero().flatten().tolist() == [0]


def test_repetition_penalty_pushes_seen_tokens_down_on_both_sides_of_zero():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    wanted = torch.tensor([[1.0, -4.0, 1.0, -1.0]]).softmax(-1)
    torch.testing.assert_close(probabilities(logits, Sampling(repetition_penalty=2.0), seen), wanted)


def test_draws_follow_the_probabilities():
    model = Script([0] * 4000, 3)
    model.say = lambda state: torch.tensor([[0.0, math.log(3.0), -math.inf]]).expand(len(state.at), 3)  # type: ignore[method-assign]
    (ids,) = generate(model, [[0]], 3000, sampling=Sampling(seed=3))
    assert ids.count(2) == 0
    assert abs(ids.count(1) / 3000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 3000)


def test_seen_tokens_are_those_of_prompt_and_answer():
    model = build("hybrid")
    (ids,) = generate(model, [[3, 4]], VOCAB - 2, sampling=Sampling(temperature=0, repetition_penalty=1e9))
    assert sorted([3, 4, *ids]) == list(range(VOCAB)), "with an endless penalty every token comes once"


# Prompts, chunks, batches


def plain_greedy(model: Model, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", MIXERS)
def test_greedy_equals_the_argmax_of_the_whole_sequence(kind):
    model = build(kind)
    prompts = [[5, 9, 2, 30, 7, 7, 1], [8], [39, 0, 21]]
    assert generate(model, prompts, 12, sampling=Sampling(temperature=0)) == [plain_greedy(model, p, 12) for p in prompts]


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("chunk", [1, 3, 8192])
def test_a_row_of_a_batch_draws_what_it_draws_alone(kind, chunk):
    model = build(kind)
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (11, 1, 4, 9)]
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    # Rows that meet the stop id leave the batch early, the others must not notice.
    batch = generate(model, prompts, 15, sampling=Sampling(seed=7, **options), stop_ids=[3, 17], prefill_chunk=chunk)
    alone = [
        generate(model, [prompt], 15, sampling=Sampling(seed=7 + row, **options), stop_ids=[3, 17])[0]
        for row, prompt in enumerate(prompts)
    ]
    assert batch == alone


def test_seeds_repeat_and_differ():
    model = build("hybrid")
    first, again, other = (generate(model, [[1, 2]] * 2, 20, sampling=Sampling(seed=seed)) for seed in (5, 5, 99))
    assert first == again
    assert first != other
    assert first[0] != first[1], "two rows of one prompt are two samples"


def test_global_generators_are_left_alone():
    model = build("hybrid")
    before = torch.get_rng_state()
    generate(model, [[1, 2]], 5)
    assert torch.equal(before, torch.get_rng_state())


def test_stream_gives_what_generate_gives():
    model = build("hybrid")
    prompts = torch.randint(VOCAB, (3, 6))
    steps = list(stream(model, prompts, 30, stop_ids=[3]))
    whole = generate(model, prompts.tolist(), 30, stop_ids=[3])
    assert [[step[row] for step in steps if step[row] is not None] for row in range(3)] == whole
    for row in range(3):
        said = [step[row] is not None for step in steps]
        assert said == sorted(said, reverse=True), "a row that has ended stays silent"
    assert any(len(row) < 30 for row in whole), "no row met the stop id: the test shows nothing"


@pytest.mark.parametrize("kind", MIXERS)
def test_a_long_prompt_in_chunks_equals_one_call(kind):
    model = build(kind)
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (301, 64, 65)]
    whole = generate(model, prompts, 8, sampling=Sampling(temperature=0))
    assert generate(model, prompts, 8, sampling=Sampling(temperature=0), prefill_chunk=64) == whole


def test_a_chunked_prefill_never_sees_more_than_a_chunk():
    model, widest = build("hybrid"), 0
    whole = model.embed.forward

    def watch(inputs, position=None):
        nonlocal widest
        widest = max(widest, inputs.shape[1])
        return whole(inputs, position)

    model.embed.forward = watch
    generate(model, [[1] * 100], 2, prefill_chunk=16)
    assert widest == 16


def test_the_state_of_an_h3_model_does_not_grow_with_its_context():
    model = build("h3")
    sizes = {time_generation(model, n, 2)["state_bytes"] for n in (1, 50, 400)}
    assert len(sizes) == 1
    growing = build("attention")
    assert time_generation(growing, 400, 2)["state_bytes"] > time_generation(growing, 50, 2)["state_bytes"]


def test_dropout_sleeps_while_generating_and_wakes_after():
    model = build("hybrid").train()
    modes = [model.training for _ in stream(model, [[1]], 3)]
    assert modes == [False] * 3
    assert model.training


def test_padding_of_the_vocabulary_is_never_drawn():
    model = build("hybrid")
    with torch.no_grad():
        model.embed.get_parameter("table.weight")[VOCAB - 1] *= 1e3
    (ids,) = generate(model, [[1, 2, 3]], 40, vocab_size=VOCAB - 8, sampling=Sampling(temperature=5.0))
    assert max(ids) < VOCAB - 8


def test_an_empty_prompt_starts_after_a_document():
    model, tokenizer = build("hybrid", 257), Tokenizer.bytes()
    greedy = Sampling(temperature=0)
    from_text = generate(model, ["", "ab"], 5, tokenizer=tokenizer, sampling=greedy)
    assert from_text == generate(model, [[tokenizer.end], [97, 98]], 5, sampling=greedy)


# Where it stops


@pytest.mark.parametrize(
    ("said", "stop", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["wo thr", "three"], "one t"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("no such word", ["word!"], "no such word"),
        ("x\n\ny", ["\n\n"], "x"),
        ("né à", ["à"], "né "),
        ("one", ["o"], ""),
    ],
)
def test_stop_strings_are_found_across_tokens_and_left_out(said, stop, wanted):
    model, tokenizer = scripted(said), Tokenizer.bytes()
    pieces = list(stream_text(model, tokenizer, "?", 50, stop=stop, stop_ids=[tokenizer.end]))
    assert "".join(pieces) == wanted
    assert all(pieces), "no empty pieces"


def test_ids_end_with_the_token_that_completes_the_stop_string():
    model, tokenizer = scripted("one two three"), Tokenizer.bytes()
    (ids,) = generate(model, ["?"], 50, stop=["two"], tokenizer=tokenizer, sampling=Sampling(temperature=0))
    assert tokenizer.decode(ids) == "one two"


def test_text_is_streamed_as_soon_as_it_is_sure():
    tokenizer = Tokenizer.bytes()
    pieces = list(stream_text(scripted("abXYcdé"), tokenizer, "?", 50, stop=["XYZ"], stop_ids=[tokenizer.end]))
    assert pieces == ["a", "b", "XYc", "d", "é"], "XY waits for its third letter, é for its second byte"


def test_broken_utf8_becomes_replacement_characters():
    tokenizer = Tokenizer.bytes()
    pieces = stream_text(scripted(b"a\xffb\xc3"), tokenizer, "?", 50, stop_ids=[tokenizer.end])
    assert "".join(pieces) == "a�b�"


def test_stop_ids_are_not_yielded():
    steps = list(stream(scripted("abc"), [[1], [2]], 50, stop_ids=[ord("c")], sampling=Sampling(temperature=0)))
    assert steps == [[97, 97], [98, 98]]


# What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_bad_sampling_is_named(field, value):
    with pytest.raises(BadInput, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk"),
        ([[1]], {"vocab_size": 0}, "vocab_size"),
        ([], {}, "no prompt"),
        ([[1], []], {}, "empty"),
        ([[1, -2]], {}, "-2"),
        ([1, 2], {}, "list of lists"),
        (["text"], {}, "tokenizer"),
        ("text", {"tokenizer": Tokenizer.bytes()}, "one string"),
        ([[1]], {"stop": ["x"]}, "tokenizer"),
        ([[1]], {"stop": [""], "tokenizer": Tokenizer.bytes()}, "empty"),
        ([[1, VOCAB]], {}, "vocabulary"),
    ],
)
def test_bad_calls_are_named_before_the_first_step(prompts, options, message):
    with pytest.raises(BadInput, match=message):
        stream(build("attention"), prompts, **{"max_new_tokens": 3, **options})


def test_a_model_that_sees_the_future_cannot_generate():
    config = build("attention").config
    blind = ModelConfig(
        d_model=16,
        blocks=(BlockConfig(mixer=Attention.Config(n_head=2, pattern=Full())),),
        embed=config.embed,
        readout=config.readout,
    )
    with pytest.raises(BadInput, match="causal"):
        stream(blind.build(), [[1]], 3)


def test_weights_that_are_not_finite_are_named():
    model = build("hybrid")
    with torch.no_grad():
        next(model.blocks.parameters()).fill_(math.nan)
    with pytest.raises(BadInput, match="finite"):
        generate(model, [[1]], 3)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_times_of_nothing_are_refused(sizes):
    with pytest.raises(BadInput, match="at least 1"):
        time_generation(build("h3"), *sizes)


def test_times_are_those_of_the_batch():
    times = time_generation(build("h3"), 5, 3, batch=2)
    assert times["tokens_per_s"] == pytest.approx(2 / times["step_s"])
    assert times["prefill_s"] > 0
    assert times["begin_s"] > 0


def test_the_bytes_of_a_step_are_its_weights_and_what_its_states_move():
    """The tied table is read by the readout; keys and values as far as filled; H3's ring once, its modes read and written."""
    model = build("h3")
    weights = sum(p.nbytes for p in model.parameters())
    rings, modes = 2 * 3 * 8 * 16 * 4, 2 * 3 * 16 * 4 * 8
    assert time_generation(model, 50, 4, batch=3)["step_bytes"] == weights + rings + 2 * modes
    model = build("attention")
    weights = sum(p.nbytes for p in model.parameters())
    filled = 50 + 2 + 4 // 2
    assert time_generation(model, 50, 4, batch=3)["step_bytes"] == weights + 2 * 2 * 3 * 16 * filled * 4


# Steps as one graph


class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations noted once and run again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.fresh = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        if self.fresh:  # the capture ran already, as one on a GPU does not
            self.fresh = False
            return
        for func, args, kwargs, held in self.calls:
            out = func(*args, **kwargs)
            pairs = zip(held, out, strict=True) if isinstance(held, (tuple, list)) else [(held, out)]
            for old, new in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class NoEvent:
    def record(self, stream):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.CUDAGraph", Tape)
    monkeypatch.setattr("torch.cuda.graph", lambda tape: tape)
    monkeypatch.setattr("torch.cuda.Event", NoEvent)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    for module in ("generation", "timing"):
        monkeypatch.setattr(f"hippodrome.{module}.with_graph", lambda model, wanted: bool(wanted))
    # The CPU's own backends look at positions on the host, which no graph may.
    with use_backend("reference"):
        yield


WAYS_TO_DRAW = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=7),
    "penalised": Sampling(temperature=0, repetition_penalty=1.2),
}


def answers(model, stops=True, **options):
    """Of four ragged prompts, the first of which stops early if any does."""
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCAB, (n,), generator=g).tolist() for n in (11, 1, 4, 9)]
    if not stops:
        return generate(model, prompts, 20, vocab_size=VOCAB - 2, **options)
    stop = generate(model, prompts, 6, vocab_size=VOCAB - 2, **options)[0][-1]
    rows = generate(model, prompts, 20, stop_ids=[stop], vocab_size=VOCAB - 2, **options)
    assert len(rows[0]) < 6
    return rows


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("way", WAYS_TO_DRAW)
def test_a_graph_writes_what_the_steps_write(kind, way, graphs_on_the_cpu):
    """Rows that stop early are computed on beside the others."""
    model, sampling = build(kind), WAYS_TO_DRAW[way]
    plain = answers(model, sampling=sampling)
    assert answers(model, sampling=sampling, cuda_graph=True) == plain


def test_a_graph_names_weights_that_are_not_finite(graphs_on_the_cpu):
    model = build("hybrid")
    with torch.no_grad():
        next(model.blocks.parameters()).fill_(math.nan)
    with pytest.raises(BadInput, match="finite"):
        generate(model, [[1]], 3, sampling=Sampling(temperature=0), cuda_graph=True)


def test_a_graph_of_a_growing_state_is_refused(graphs_on_the_cpu):
    model = build("attention").eval()
    with torch.no_grad():
        _, state = model.prefill(torch.tensor([[1, 2]]), model.init_state(1))
    with pytest.raises(BadInput, match="fixed max_len"):
        time_steps(model, state, 2, cuda_graph=True)


def test_a_graph_needs_a_gpu_and_a_state_a_dtype_of_numbers():
    model = build("hybrid")
    with pytest.raises(BadInput, match="not on a CUDA device"):
        stream(model, [[1]], 3, cuda_graph=True)
    with pytest.raises(BadInput, match=r"torch\.int8"):
        stream(model, [[1]], 3, state_dtype=torch.int8)


def test_states_stored_in_half_precision_are_half_as_large():
    model = build("h3")
    whole, half = (time_generation(model, 9, 2, state_dtype=dtype)["state_bytes"] for dtype in (None, torch.bfloat16))
    modes = 2 * 16 * 4 * 8
    assert whole - half == modes // 2
    assert len(generate(model, [[1, 2]], 5, state_dtype=torch.bfloat16)[0]) == 5


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS_TO_DRAW)
def test_on_a_gpu_a_graph_writes_what_the_steps_write(kind, dtype, way):
    model, sampling, exact = build(kind).to("cuda", dtype), WAYS_TO_DRAW[way], dtype == torch.float32
    # Where rows stop the plain batch shrinks, and its products round otherwise.
    plain = answers(model, exact, sampling=sampling, cuda_graph=False)
    assert answers(model, exact, sampling=sampling) == plain
    if exact:
        assert answers(build(kind), sampling=sampling) == plain


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_on_a_gpu_a_stepper_gives_the_steps_and_never_waits(kind, dtype, tolerance):
    model = build(kind).to("cuda", dtype).eval()
    ids = torch.randint(VOCAB, (3, 30), device="cuda")
    with torch.no_grad():
        _, state = model.prefill(ids[:, :20], model.init_state(3, 40), lengths=torch.tensor([20, 3, 9], device="cuda"))
        stepper, plain = model.stepper(), state.clone()
        state = stepper.begin(state)
        for t in range(20, 30):
            wanted, plain = model.step(ids[:, t], plain)
            with contextlib.ExitStack() as waiting:
                if t > 20:
                    torch.cuda.set_sync_debug_mode("error")
                    waiting.callback(torch.cuda.set_sync_debug_mode, "default")
                logits, state = stepper.step(ids[:, t], state)
            assert (logits - wanted).norm() < tolerance * wanted.norm()
        again, wanted = model(ids[:, :9], stepper.end(state)).logits, model(ids[:, :9], plain).logits
    assert (again - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.gpu
def test_on_a_gpu_times_are_of_the_graph():
    model = build("hybrid").cuda()
    graph, eager = (time_generation(model, 50, 50, batch=2, cuda_graph=graph) for graph in (None, False))
    assert graph["step_s"] < eager["step_s"]
    assert graph["step_bytes"] == eager["step_bytes"]
