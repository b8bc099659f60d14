"""Encoder-decoder: whole = chunks = steps, padding that never leaks, and what each side may see."""

import dataclasses

import pytest
import torch

from hippodrome.channels.mlp import Mlp
from hippodrome.checkpoint import load, save
from hippodrome.embeds.tokens import Tokens
from hippodrome.generation import generate
from hippodrome.mixers.attention import Attention
from hippodrome.mixers.h3 import H3
from hippodrome.mixers.mega import Mega
from hippodrome.mixers.ssm import SSM
from hippodrome.model import BlockConfig, Model
from hippodrome.models.encoder_decoder import EncoderDecoder, EncoderDecoderState
from hippodrome.parity import parity
from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import BigBird, Full
from hippodrome.positions import Rotary
from hippodrome.readouts.lm import Lm
from hippodrome.run import ModelConfig
from hippodrome.sampling import Sampling
from hippodrome.task import IGNORE, Batch
from hippodrome.timing import time_generation
from tests.support import assert_close, build

START, LONGEST = 9, 64


def bigbird(length=LONGEST, **how):
    pattern = BigBird(tile=4, n_random=1, form="encoder", length=length, **how)
    return Attention.Config(n_head=2, pattern=pattern, position=Rotary(8))


ENCODERS = {
    "bigbird": bigbird(),
    "bigbird_multiset": bigbird(plan="general", multiset=True),
    "full": Attention.Config(n_head=2, pattern=Full(), position=Rotary(8)),
    "ssm": SSM.Config(bidirectional=True),
    "mega": Mega.Config(bidirectional=True),
    "causal": H3.Config(head_dim=4),
}
DECODERS = {"attention": Attention.Config(n_head=2, position=Rotary(8)), "h3": H3.Config(head_dim=4)}


def config(encoder="bigbird", decoder="attention", order="pre"):
    blocks = (BlockConfig(mixer=DECODERS[decoder], channel=Mlp.Config(d_ff=24), order=order),) * 2
    sources = (BlockConfig(mixer=ENCODERS[encoder], channel=Mlp.Config(d_ff=24), order=order),) * 2
    embed = Tokens.Config(vocab_size=16, sines=100.0)
    return EncoderDecoder.Config(
        d_model=16, encoder=sources, blocks=blocks, embed=embed, readout=Lm.Config(), start=START, n_head=2, init_std=0.3
    )


def small(*choices):
    return build(config(*choices)).eval()


def row(n_source, n_target, seed=0):
    """(1, n_source + n_target) ids: a source without `start`, then `start` and what follows."""
    dice = torch.Generator().manual_seed(seed + 100 * n_source)
    source, target = (torch.randint(8, (n,), generator=dice) for n in (n_source, max(n_target - 1, 0)))
    begin = torch.full((min(n_target, 1),), START)
    return torch.cat([source, begin, target])[None]


def padded(rows, side="right", fill=3):
    """Rows in one batch, and their spans (B, 2)."""
    width = max(one.shape[1] for one in rows) + 2
    ids = torch.full((len(rows), width), fill)
    starts = [0 if side == "right" else width - one.shape[1] for one in rows]
    for i, (one, at) in enumerate(zip(rows, starts, strict=True)):
        ids[i, at : at + one.shape[1]] = one[0]
    return ids, torch.tensor([[at, at + one.shape[1]] for one, at in zip(rows, starts, strict=True)])


RAGGED = [(13, 5), (1, 7), (30, 2), (16, 4), (0, 3), (6, 0)]
"""Tokens of sources and of targets with their start: none, multiples of the tile of 4 and none such."""


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_a_row_is_as_alone_whatever_lies_beside_it(encoder, decoder):
    model, rows = small(encoder, decoder), [row(*sizes) for sizes in RAGGED]
    alone = [model(one).logits[0] for one in rows]
    for side in ("right", "left"):
        for fill in (3, START):
            ids, spans = padded(rows, side, fill)
            found = model(ids, lengths=spans).logits
            for i, (start, stop) in enumerate(spans.tolist()):
                assert_close(found[i, start:stop], alone[i])


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_whole_is_chunks_is_steps_is_ragged_prefill_and_steps(decoder):
    model = small("bigbird", decoder)
    x = torch.cat([row(11, 9), row(11, 9, seed=1), torch.cat([row(4, 6), row(9, 1)], 1)])
    whole = model(x).logits
    assert not whole[0, :11].any()
    assert whole[0, 11:].any(-1).all()
    for cuts in ([20], [5, 15], [11, 9], [12, 8], [4, 1, 6, 1, 1, 7], [1] * 20):
        for room in (None, 20):
            state, said = model.init_state(3, room), []
            for piece in x.split(cuts, 1):
                out = model(piece, state)
                state, said = out.state, [*said, out.logits]
            assert_close(torch.cat(said, 1), whole)
    state, said = model.init_state(3, 20), []
    for t in range(20):
        logits, state = model.step(x[:, t], state)
        said.append(logits)
    assert_close(torch.stack(said, 1), whole)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_the_stepper_goes_on_from_prompts_of_any_lengths(decoder, order):
    model, rows = small("bigbird", decoder, order), [row(*sizes) for sizes in ((13, 1), (0, 4), (30, 2))]
    ids, spans = padded(rows)
    said, state = model.prefill(ids, model.init_state(3, 48), lengths=spans[:, 1])
    # The decoder's own room is what a row may have beyond the shortest source.
    assert model.config.blocks[0].mixer is not DECODERS["attention"] or state.blocks[0].k.shape[2] == 48
    kept, stepper = state.clone(), model.stepper()
    state = stepper.begin(state)
    for t in range(6):
        tokens = said.argmax(-1) % 8
        rows = [torch.cat([one, token.view(1, 1)], 1) for one, token in zip(rows, tokens, strict=True)]
        said, state = stepper.step(tokens, state)
        plain, kept = model.step(tokens, kept)
        assert_close(said, plain)
        for i, one in enumerate(rows):
            assert_close(said[i], model(one).logits[0, -1])
        if t == 3:
            state, order = stepper.begin(stepper.end(state)), torch.tensor([2, 0])
            state, kept, said, rows = state.reorder(order), kept.reorder(order), said[order], [rows[2], rows[0]]
    assert stepper.traffic(state) > 0


@torch.no_grad()
def test_rows_prefilled_apart_are_joined():
    model, rows = small(), [row(13, 3), row(5, 4)]
    states = [model.prefill(one, model.init_state(1, 40))[1] for one in rows]
    joined = EncoderDecoderState.join(states)
    said, _ = model.step(torch.tensor([2, 5]), joined)
    for i, (one, token) in enumerate(zip(rows, (2, 5), strict=True)):
        assert_close(said[i], model(torch.cat([one, torch.tensor([[token]])], 1)).logits[0, -1])


@pytest.mark.parametrize("encoder", ["bigbird", "ssm"])
def test_the_house_finds_it_one_function(encoder):
    assert all(check.ok for check in parity(small(encoder), length=40, batch=4))


@torch.no_grad()
def test_the_target_sees_all_of_the_source_and_nothing_after_itself():
    model, x = small("full"), row(10, 6)
    whole = model(x).logits
    for t in range(10):
        other = x.clone()
        other[0, t] = (other[0, t] + 1) % 8
        assert (model(other).logits[0, 10:] - whole[0, 10:]).abs().amax(-1).min() > 1e-6
    other = x.clone()
    other[0, 13] = (other[0, 13] + 1) % 8
    changed = (model(other).logits[0] - whole[0]).abs().amax(-1)
    assert not changed[:13].any()
    assert (changed[13:] > 1e-6).all()


def test_the_loss_is_that_of_the_logits_and_reaches_every_parameter():
    model, rows = small(), [row(13, 5), row(1, 7), row(30, 2)]
    ids, spans = padded(rows)
    targets = torch.full_like(ids, IGNORE)
    for i, one in enumerate(rows):
        n = int((one == START).int().argmax())
        targets[i, n : one.shape[1]] = torch.arange(one.shape[1] - n) % 8
    loss = model.loss(Batch(ids, targets, spans[:, 1]))
    logits = model(ids, lengths=spans[:, 1]).logits
    assert_close(loss.total, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
    assert int(loss.parts["loss"][1]) == 14
    left, at_the_end = padded(rows, "left")
    moved = torch.stack([one.roll(start) for one, start in zip(targets, at_the_end[:, 0].tolist(), strict=True)])
    assert_close(model.loss(Batch(left, moved, at_the_end)).total, loss.total)
    loss.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    model.train()
    model.activation_checkpointing = True
    model.zero_grad()
    model.loss(Batch(ids, targets, spans[:, 1])).total.backward()
    for name, p in model.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= 1e-4 * grads[name].abs().max() + 1e-7


def test_padding_has_no_gradient():
    """What is written into the padding of inputs changes neither loss nor gradients in any bit."""
    model, rows = small(), [row(13, 5), row(30, 2)]
    found = []
    for fill in (3, 7, START):
        ids, spans = padded(rows, fill=fill)
        targets = torch.where(torch.arange(ids.shape[1]) == spans[:, 1:] - 1, 4, IGNORE)
        model.zero_grad()
        loss = model.loss(Batch(ids, targets, spans[:, 1])).total
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("encoder", ["bigbird", "ssm"])
def test_mixed_precision_is_near_and_its_steps_agree(encoder):
    model, x = small(encoder), torch.cat([row(13, 6), row(13, 6, seed=1)])
    exact = model(x).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(x).logits
        said, state = model.prefill(x[:, :15], model.init_state(2, 20))
        state = (stepper := model.stepper()).begin(state)
        for t in range(15, 19):
            assert (said - found[:, t - 1]).abs().max() <= 2e-2 * found.abs().max()
            said, state = stepper.step(x[:, t], state)
    assert (found.float() - exact).abs().max() <= 3e-2 * exact.abs().max()
    assert state.memory[0][0].dtype == torch.bfloat16
    half = small(encoder).bfloat16()
    assert (half(x).logits.float() - exact).abs().max() <= 5e-2 * exact.abs().max()


def test_it_answers_prompts_and_survives_saving(tmp_path):
    model = small()
    assert from_dict(ModelConfig, to_dict(model.config)) == model.config
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    prompts = [[1, 2, 3, 4, 5], [4] * 9, [7, START, 6]]
    together = generate(again, prompts, 8, sampling=Sampling(temperature=0), prefill_chunk=4)
    for prompt, said in zip(prompts, together, strict=True):
        ids = prompt if START in prompt else [*prompt, START]
        for token in [*said, *[START] * (len(said) < 8)]:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, token]
    assert time_generation(again, 12, 3, batch=2)["step_s"] > 0
    assert isinstance(again, Model)
    assert again.prompt_end == START


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"start": 16}, "start is 16: it must be an id, at most 15"),
        ({"start": -1}, "start is -1"),
        ({"n_head": 3}, "3 heads do not divide"),
        ({"encoder": ()}, "at least 1, not 16, 0 and 2"),
        ({"encoder": (BlockConfig(mixer=bigbird(length=None)),)}, "longest source of a batch: give it length"),
        ({"blocks": (BlockConfig(mixer=ENCODERS["full"]),)}, "must be causal"),
    ],
)
def test_what_cannot_be_built_is_refused(wrong, said):
    with pytest.raises(BadInput, match=said):
        dataclasses.replace(config(), **wrong).build()


def test_what_cannot_be_learned_is_refused():
    model, x = small(), row(5, 4)
    with pytest.raises(BadInput, match="5 targets lie before the id 9"):
        model.loss(Batch(x, x))
    with pytest.raises(BadInput, match="carry_state"):
        model.loss(Batch(x, x), model.init_state(1))
    with pytest.raises(BadInput, match="65 tokens do not fit"):
        model(row(65, 2))
