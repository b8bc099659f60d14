"""Every recipe builds, takes its flags, and says what it is; the papers' settings are what the papers say."""

import inspect

import pytest
import torch

from hippodrome.compare import count_parameters, match
from hippodrome.part import BadInput, from_dict, to_dict
from hippodrome.patterns import Chunk
from hippodrome.recipes import find_recipe, recipes
from hippodrome.recipes._atomic import Exercise
from hippodrome.recipes._lm import Text
from hippodrome.recipes._lra import Budget, Size
from hippodrome.recipes._synthetic import Language
from hippodrome.recipes.mega import Unit
from hippodrome.run import RunConfig, TrainConfig
from hippodrome.task import Batch
from hippodrome.train import train

LANGUAGE_MODELS = [name for name in recipes() if "text" in inspect.signature(find_recipe(name)).parameters]
SYNTHETIC = [name for name in recipes() if "language" in inspect.signature(find_recipe(name)).parameters]
SIGNALS = [name for name in recipes() if "body" in inspect.signature(find_recipe(name)).parameters]
ATOMIC = [name for name in recipes() if "exercise" in inspect.signature(find_recipe(name)).parameters]
SPREAD = ("text", "train", "language", "trees", "size", "budget", "exercise", "body", "frame", "pictures", "unit")
"""Parameters that are dataclasses: their fields are the flags, each with its own help."""
VISION = [name for name in recipes() if name.startswith("vit.")]
CLASSIFIERS = [name for name in recipes() if name.startswith("lra.")]
COPIES = [name for name in recipes() if name.endswith(".mirror_copy")]
PAIRS = ["bigbird.encoder_decoder", "bigbird.seq2seq"]
OF_IMAGES = ["lra_images.image", "lra_images.pathfinder", "lra_images.pathfinder_segmentation"]


def test_the_recipes_asked_for_are_there():
    wanted = {"h3", "h3.pure", "h3.synthetic", "h3.no_shift", "transformer", "transformer.synthetic", "s4d", "s4d.synthetic"}
    wanted |= {"linear_transformer", "linear_transformer.synthetic", "s5", "s5.synthetic"}
    wanted |= {"mega", "mega.chunked", "mega.synthetic", "s4", "s4.synthetic", "dss", "dss.synthetic"}
    wanted |= {"gss", "gss.hybrid", "gss.synthetic", "dlr", "dlr.synthetic"}
    wanted |= {"long_text", "lra.listops", "lra.text", "lra.retrieval", "listops_subtrees"}
    wanted |= {"block_recurrent", "block_recurrent.sliding", "vit.fashion", "vit.tiny", "vit.small", "vit.base"}
    wanted |= {"signals.image", "signals.waveform", "signals.dna"}
    systems = ("dlr", "dss", "gss", "h3", "linear_transformer", "mega", "s4", "s4d", "s5", "transformer")
    wanted |= {f"{system}.atomic" for system in systems}
    wanted |= {"perceiver_ar", "block_sparse", "bigbird"}
    wanted |= {"perceiver_ar.mirror_copy", "transformer.mirror_copy", "h3.mirror_copy"}
    assert wanted <= set(recipes())
    groups = (LANGUAGE_MODELS, SYNTHETIC, CLASSIFIERS, OF_IMAGES, ["listops_subtrees"], ATOMIC, SIGNALS, COPIES, VISION, PAIRS)
    assert {name for group in groups for name in group} == set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_builds_on_meta_and_survives_json(name):
    config = find_recipe(name)()
    with torch.device("meta"):
        model = config.model.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert from_dict(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize("name", recipes())
def test_every_flag_has_a_default_and_help(name):
    recipe = find_recipe(name)
    doc = inspect.getdoc(recipe)
    assert doc
    for parameter in inspect.signature(recipe).parameters.values():
        assert parameter.kind == parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty
        assert parameter.name in SPREAD or f"{parameter.name}: " in doc
    assert recipes()[name] == doc.partition("\n")[0]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_reads_the_text_it_is_given(name):
    text = Text(text="somewhere.txt", tokenizer="bytes", length=64)
    config = find_recipe(name)(n_layer=3, d_model=64, text=text, train=TrainConfig(seed=5))
    assert (config.task.text, config.task.length, config.task.seed) == ("somewhere.txt", 64, 5)
    assert len(config.model.blocks) == 3
    assert config.model.embed.vocab_size == 257
    assert find_recipe(name)(text=Text(tokenizer="gpt2")).model.embed.vocab_size == 50257


# Perceiver AR scores crops, each from its beginning: there is no state to carry.
@pytest.mark.parametrize("name", sorted(set(LANGUAGE_MODELS) - {"perceiver_ar"}))
def test_a_carried_state_reads_a_stream(name):
    assert find_recipe(name)().task.order == "shuffled"
    assert find_recipe(name)(train=TrainConfig(carry_state=True)).task.order == "stream"


def attention_layers(config):
    return [i for i, block in enumerate(config.model.blocks) if type(block.mixer).part.__name__ == "Attention"]


@pytest.mark.parametrize(("n_layer", "layers"), [(12, [1, 7]), (24, [1, 13]), (4, [1, 3]), (2, [1]), (1, [])])
def test_the_hybrid_has_the_papers_two_attention_layers(n_layer, layers):
    assert attention_layers(find_recipe("h3")(n_layer=n_layer)) == layers


def test_attention_goes_where_it_is_told():
    h3 = find_recipe("h3")
    assert attention_layers(h3(n_layer=12, attention_layers=(6,))) == [6]
    assert attention_layers(h3(attention_layers=())) == attention_layers(find_recipe("h3.pure")()) == []
    with pytest.raises(BadInput, match="blocks 0 to 3"):
        h3(n_layer=4, attention_layers=(4,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("s4d", {"init": "inv", "disc": "bilinear"}),
        ("dlr", {"init": "random", "readout": "product"}),
        ("gss", {"init": "lin", "imag": "plain"}),
        ("gss.hybrid", {"init": "lin", "imag": "plain"}),
        ("s5", {"activation": "full_glu"}),
        ("dlr.atomic", {"readout": "product"}),
        ("gss.atomic", {"init": "lin", "imag": "plain"}),
    ],
)
def test_variants_of_a_system_are_words_of_its_recipe(name, words):
    mixer = find_recipe(name)(**words).model.blocks[0].mixer
    config = getattr(mixer, "system", mixer)
    assert {word: getattr(config, word) for word in words} == words


def test_variants_of_mega_are_words_of_its_unit():
    for name, function in ("mega", "laplace"), ("mega.chunked", "relu2"):
        mixer = find_recipe(name)(unit=Unit(function=function, bias="simple")).model.blocks[0].mixer
        assert (mixer.function, mixer.bias) == (function, "simple")


def test_a_simple_bias_reaches_over_the_row():
    config = find_recipe("mega")(unit=Unit(bias="simple"), text=Text(length=3000))
    assert config.model.blocks[0].mixer.max_positions == 3000


def test_the_gss_hybrid_has_chunks_of_attention_in_every_fourth_block():
    config = find_recipe("gss.hybrid")(n_layer=9)
    assert attention_layers(config) == [3, 7]
    assert config.model.blocks[3].mixer.pattern == Chunk(size=512)
    assert [block.channel is None for block in config.model.blocks] == [i not in (3, 7) for i in range(9)]
    assert attention_layers(find_recipe("gss")()) == []
    with pytest.raises(BadInput, match="every is 0"):
        find_recipe("gss.hybrid")(every=0)


def test_the_published_125m_has_its_parameters():
    config = find_recipe("h3")(n_layer=12, d_model=768, n_head=12, attention_layers=(6,), text=Text(tokenizer="gpt2"))
    # The authors' 126,387,456 count B of the shift and A, B of the diagonal system, as we do.
    assert count_parameters(config.model) == 126_387_456


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize(("task", "rows", "epochs"), [("induction", 31, 400), ("recall", 22, 200)])
def test_synthetic_settings_are_the_papers(name, task, rows, epochs):
    config = find_recipe(name)(language=Language(task=task, seed=3))
    train, model = config.train, config.model
    assert train.steps == 157 * epochs
    assert (train.batch_size, train.lr, train.weight_decay, train.decay, train.clip) == (32, 5e-4, 0.1, "all", None)
    assert (train.schedule, train.seed) == ("cosine" if task == "induction" else "linear", 3)
    assert (model.d_model, len(model.blocks), model.blocks[0].channel.d_ff, model.embed.dropout) == (32, 2, 128, 0.1)
    built = config.task.build()
    batch = built.batch("train", 0, 4)
    assert batch.inputs.shape == (4, rows)
    assert config.model.build()(batch.inputs).logits.shape[-1] >= config.task.vocab_size


def test_the_synthetic_h3_has_the_papers_size():
    assert 46_000 < count_parameters(find_recipe("h3.synthetic")().model) < 47_000


def test_only_transformers_have_positions_in_the_synthetic_race():
    positions = {name: find_recipe(name)().model.embed.positions for name in SYNTHETIC}
    told = {"transformer.synthetic": 32, "linear_transformer.synthetic": 32}
    assert positions == {**dict.fromkeys(SYNTHETIC, 0), **told}


@pytest.mark.parametrize("name", ATOMIC)
def test_an_atomic_recipe_is_one_post_norm_layer_that_fits_its_task(name):
    for task, length in (("shift", 512), ("mips", 64), ("select", 100), ("reverse", 64)):
        config = find_recipe(name)(exercise=Exercise(task=task, length=length, seed=3))
        model, train = config.model, config.train
        (block,) = model.blocks
        assert (model.d_model, block.norm, block.order, block.channel) == (128, "scalar", "post", None)
        assert (model.embed.channels, model.readout.outputs) == (config.task.channels, config.task.outputs)
        assert (train.schedule, train.warmup, train.weight_decay, train.clip, train.seed) == ("constant", 0.0, 0.0, None, 3)
        assert train.steps * train.batch_size == 12 * 57_600
        assert config.task.seed == 0


def learns_from_a_batch(config, rows):
    torch.manual_seed(0)
    model, batch = config.model.build(), config.task.build().batch("train", 0, rows)
    loss = model.loss(batch).total
    loss.backward()
    assert 0 < float(loss.detach()) < 10
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ATOMIC)
def test_an_atomic_recipe_learns_from_a_batch(name):
    config = find_recipe(name)(exercise=Exercise(task="context_shift", length=16, d_model=8))
    learns_from_a_batch(config, 2)


@pytest.mark.parametrize("name", COPIES)
def test_the_mirror_copy_is_one_task_for_all_and_learned_the_same_way(name):
    config = find_recipe(name)(length=8, d_model=16, rows=5, train=TrainConfig(seed=3))
    ours, theirs = (find_recipe(each)() for each in (name, "perceiver_ar.mirror_copy"))
    assert (ours.task, ours.train) == (theirs.task, theirs.train)
    assert (config.task.length, config.task.test_rows, config.task.seed) == (8, 5, 3)
    learns_from_a_batch(config, 2)


@pytest.mark.parametrize("encoder", ["bigbird", "full", "s4d", "s5", "mega"])
def test_an_encoder_decoder_of_every_encoder_extracts_from_rows_of_its_task(encoder):
    recipe = find_recipe(f"bigbird.encoder_decoder+encoder={encoder}")
    config = recipe(
        length=40, lines=2, width=2, n_layer=1, n_decoder=1, d_model=16, n_head=2, tile=8, train=TrainConfig(seed=3)
    )
    assert (config.task.length, config.task.seed, config.model.start) == (40, 3, config.task.start)
    learns_from_a_batch(config, 3)


def test_encoders_of_attention_are_twins_of_one_size():
    sizes = {
        encoder: count_parameters(find_recipe("bigbird.encoder_decoder")(encoder=encoder).model)
        for encoder in ("bigbird", "full")
    }
    assert len(set(sizes.values())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["shift", "select"])
def test_an_atomic_task_trains_as_one_cuda_graph(tmp_path, task):
    reports, sizes = [], {"length": 64, "d_model": 16, "steps": 6, "batch_size": 4, "test_rows": 8}
    for graph in (False, True):
        exercise = Exercise(task=task, device="cuda", cuda_graph=graph, **sizes)
        reports.append(train(find_recipe("dlr.atomic")(d_state=300, exercise=exercise), tmp_path / f"{graph}"))
    eager, graphed = (report["scores"]["test"] for report in reports)
    assert graphed == pytest.approx(eager, rel=1e-3, abs=1e-4)


def test_the_atomic_dlr_is_the_papers():
    config = find_recipe("dlr.atomic")(exercise=Exercise(length=4096))
    system = config.model.blocks[0].mixer.system
    assert (system.d_state, system.dt_min, system.dt_max, config.train.lr) == (4096, 1e-5, 1e-5, 1e-4)
    assert not config.model.blocks[0].mixer.glu
    assert (config.train.batch_size, config.train.steps) == (16, 43_200)
    long = find_recipe("dlr.atomic")(exercise=Exercise(length=2**14, d_model=32, lr=1e-5))
    assert (long.train.batch_size, long.train.lr, long.model.d_model) == (4, 1e-5, 32)


def test_atomic_systems_have_the_papers_learning_rates():
    rates = {name: find_recipe(name)().train.lr for name in ATOMIC}
    assert rates["dlr.atomic"] == 1e-4
    assert rates["dss.atomic"] == rates["transformer.atomic"] == 1e-3
    assert find_recipe("transformer.atomic")(exercise=Exercise(task="mips")).train.lr == 1e-4


def test_unknown_names_get_the_nearest():
    with pytest.raises(BadInput, match=r"did you mean 'h3\.pure'"):
        find_recipe("h3.puer")


# Long Range Arena

MIXERS = ("s4", "s4d", "dss", "dlr", "gss", "s5", "mega", "mega_chunk", "transformer", "linear_transformer")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_every_mixer_reads_its_task(name, mixer):
    """Rows of the task's own length, a batch of two, forward and backward."""
    config = find_recipe(name)(mixer=mixer, size=Size(n_layer=1, d_model=16, d_ff=8, n_head=2))
    length = config.task.max_length if name == "lra.listops" else config.task.length
    model = config.model.build()
    shape = (2, 2, length) if name == "lra.retrieval" else (2, length)
    ids = torch.randint(1, 16, shape)
    loss = model.loss(Batch(ids, torch.tensor([0, 1]), torch.randint(1, length, shape[:-1])))
    loss.total.backward()
    assert model.causal == (mixer == "gss")
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_published_sizes_of_the_arena():
    listops, text, retrieval = (find_recipe(f"lra.{name}") for name in ("listops", "text", "retrieval"))
    s4 = listops(mixer="s4")
    assert (len(s4.model.blocks), s4.model.d_model, s4.model.blocks[0].channel) == (6, 256, None)
    assert (s4.model.blocks[0].mixer.system.d_state, s4.model.blocks[0].mixer.bidirectional) == (4, True)
    assert (s4.train.steps, s4.train.batch_size, s4.train.lr, s4.train.weight_decay) == (120_000, 32, 1e-2, 0.05)
    assert (text(mixer="s4").train.batch_size, retrieval(mixer="s4").train.batch_size) == (16, 64)
    assert [(block.norm, block.order) for block in (s4.model.blocks[0], text(mixer="s4").model.blocks[0])] == [
        ("batch", "post"),
        ("batch", "pre"),
    ]
    s5 = text(mixer="s5")
    assert (len(s5.model.blocks), s5.model.d_model, s5.model.blocks[0].mixer.d_state) == (6, 256, 192)
    assert (s5.model.blocks[0].dropout, s5.model.blocks[0].mixer.dropout, s5.train.steps) == (0.1, 0.1, 35 * 25_000 // 50)
    assert retrieval(mixer="s5").train.steps == 20 * 147_086 // 32 + 1
    mega = listops(mixer="mega")
    assert (len(mega.model.blocks), mega.model.d_model, mega.model.blocks[0].channel.d_ff) == (6, 80, 160)
    assert (mega.model.blocks[0].mixer.max_positions, retrieval(mixer="mega").model.blocks[0].norm) == (2002, "scale")
    assert (mega.train.betas, mega.train.schedule, mega.train.steps) == ((0.9, 0.98), "linear", 90_000)
    chunked = text(mixer="mega_chunk")
    assert (chunked.model.blocks[0].mixer.chunk, text(mixer="mega").model.blocks[0].mixer.chunk) == (128, None)
    assert (listops(mixer="dlr").train.lr, listops(mixer="dss").train) == (8e-4, listops(mixer="s4d").train)
    base = listops(mixer="transformer")
    block = base.model.blocks[0]
    assert (len(base.model.blocks), base.model.d_model, block.channel.d_ff, block.mixer.n_head) == (4, 512, 1024, 8)
    assert (base.train.steps, base.train.lr) == (5000, pytest.approx(0.05 / 1000**0.5, rel=1e-2))
    assert base.model.embed.positions == 2000
    assert [make(mixer="transformer").model.d_model for make in (text, retrieval)] == [256, 128]
    assert retrieval(mixer="transformer").model.readout.d_ff is None


def test_a_budget_replaces_what_is_published_field_by_field():
    train = find_recipe("lra.text")(budget=Budget(lr=3e-3, steps=7, seed=2, eval_every=None)).train
    assert (train.lr, train.steps, train.seed, train.batch_size, train.save_every) == (3e-3, 7, 2, 16, None)
    with pytest.raises(BadInput, match="n_layer is 0"):
        find_recipe("lra.text")(size=Size(n_layer=0))
    with pytest.raises(BadInput, match="d_model"):
        find_recipe("lra.text")(size=Size(d_model=0)).model.build()


@pytest.mark.parametrize("mixer", ["dlr", "s4", "s4d", "dss", "gss", "s5", "mega_chunk", "linear_attention", "attention"])
def test_subtrees_are_read_out_at_every_position(mixer):
    config = find_recipe("listops_subtrees")(mixer=mixer, n_layer=1, d_model=16, d_state=8)
    logits = config.model.build()(torch.randint(1, 16, (2, 40)), lengths=torch.tensor([40, 25])).logits
    assert logits.shape == (2, 40, 10)
    assert (config.task.max_depth, config.task.max_args, config.task.max_length) == (15, 9, 8180)
    assert (config.train.lr, config.train.weight_decay, config.train.steps) == (8e-4, 0.01, 300_000)


# A recipe with a word chosen


def test_a_recipe_with_a_word_chosen_is_that_recipe():
    chosen = find_recipe("lra.listops+mixer=s4")
    assert chosen() == find_recipe("lra.listops")(mixer="s4")
    assert chosen(size=Size(n_layer=2)) == find_recipe("lra.listops")(mixer="s4", size=Size(n_layer=2))
    assert "mixer" not in inspect.signature(chosen).parameters
    assert inspect.getdoc(chosen) == inspect.getdoc(find_recipe("lra.listops"))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("lra.listop+mixer=s4", r"did you mean 'lra\.listops'"),
        ("lra.listops+mixr=s4", "did you mean 'mixer'"),
        ("lra.listops+size=s4", "no words to choose for 'size'"),
        ("lra.listops+mixer=transfromer", "mixer of lra.listops is 'transfromer'.*did you mean 'transformer'"),
        ("lra.listops+mixer", "is ''"),
    ],
)
def test_a_word_that_cannot_be_chosen_is_refused(name, complaint):
    with pytest.raises(BadInput, match=complaint):
        find_recipe(name)


def test_a_long_text_has_its_budget_in_tokens():
    recipe = find_recipe("long_text+system=window")
    for length, rows in ((64, 8), (256, 2)):
        config = recipe(text=Text(tokenizer="bytes", length=length), tokens=2100, step_tokens=512)
        assert (config.train.batch_size, config.train.steps) == (rows, 4)
    with pytest.raises(BadInput, match="step_tokens is 500: it must be a multiple of length, 64"):
        recipe(text=Text(length=64), step_tokens=500)
    with pytest.raises(BadInput, match="tokens is 100: it must be at least those of a step, 512"):
        recipe(text=Text(length=64), step_tokens=512, tokens=100)


def test_the_systems_of_a_long_text_come_to_equal_parameters():
    found = {system: find_recipe(f"long_text+system={system}")() for system in ("full", "window", "bigbird", "linear", "h3")}
    first = count_parameters(found["full"].model)
    assert all(abs(count_parameters(c.model) - first) < 0.02 * first for c in match(found).values())
