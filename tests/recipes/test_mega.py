"""Mega's recipes: what the chunks and the widths of the flags become."""

from hippodrome.channels.mlp import Mlp
from hippodrome.mixers.mega import Mega
from hippodrome.recipes import find_recipe
from hippodrome.recipes.mega import Unit


def test_mega_chunk_is_mega_with_chunks():
    unit = Unit(inner_dropout=0.1)
    full, chunked = (find_recipe(name)(d_model=64, dropout=0.3, unit=unit) for name in ("mega", "mega.chunked"))
    drops = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    for config, chunk in ((full, None), (chunked, 64)):
        for block in config.model.blocks:
            assert block.mixer == Mega.Config(chunk=chunk, **drops)
            assert block.channel == Mlp.Config(d_ff=128, activation="silu", dropout=0.1)
            assert (block.norm, block.order, block.dropout) == ("layer", "pre", 0.3)


def test_the_flags_reach_the_layers():
    widths = {"d_key": 6, "d_value": 10, "d_state": 3, "function": "laplace"}
    config = find_recipe("mega.chunked")(chunk=7, n_layer=1, d_ff=5, unit=Unit(**widths))
    assert config.model.blocks[0].mixer == Mega.Config(chunk=7, **widths)
    assert config.model.blocks[0].channel.d_ff == 5
