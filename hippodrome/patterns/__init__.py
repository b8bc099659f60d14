"""Attention patterns: which keys a query may see, as small predicates on positions that `&` and `|` combine.

`visible` is the definition; everything else (tile maps, masks, how many keys a decoder must keep) follows from it.
`spelled("window(size=64) | global(size=4) & causal")` reads a pattern as a command line gives it.
"""

from hippodrome.patterns._bigbird import BigBird
from hippodrome.patterns._pattern import And, Kept, Or, Pattern
from hippodrome.patterns._positions import Causal, Documents, Full, Global, Prefix, Strided, Window
from hippodrome.patterns._spelling import kinds, spelled
from hippodrome.patterns._tiled import Butterfly, Chunk, Random

__all__ = [
    "And",
    "BigBird",
    "Butterfly",
    "Causal",
    "Chunk",
    "Documents",
    "Full",
    "Global",
    "Kept",
    "Or",
    "Pattern",
    "Prefix",
    "Random",
    "Strided",
    "Window",
    "kinds",
    "spelled",
]
