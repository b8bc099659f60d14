"""Associative recall: look a key up in a list of pairs (Fu et al. 2022, "Hungry Hungry Hippos", section 3).

    k_1 v_1  k_2 v_2  ...  k_m v_m  "=>"  k_i  ->  v_i

Keys are the first half of the ordinary tokens, values the second half. Every sequence draws its own value for each key, then
m = length // 2 keys, which may repeat, and asks for one of the keys that it contains. Rows of 2 m + 2 inputs; chance is one
over the number of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hippodrome.tasks._synthetic import _Synthetic


class Recall(_Synthetic):
    """Which value does this key have?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Synthetic.Config):
        """The paper's setting: 10 tokens, 20 of them a row. The authors' code defaults to 20 and 40."""

        vocab_size: int = 10
        length: int = 20

    config: Config

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        size = self.config.vocab_size
        n_keys = (size - 2) // 2
        values = 1 + n_keys + rng.integers(size - 2 - n_keys, size=n_keys)
        keys = rng.integers(n_keys, size=self.config.length // 2)
        # Asked among all keys first, and only where that key is missing among those present: the authors' order of draws.
        asked, present = int(rng.integers(n_keys)), list(dict.fromkeys(keys.tolist()))
        while asked not in present:
            asked = present[int(rng.integers(len(present)))]
        pairs = np.stack([1 + keys, values[keys]], axis=1).flatten().tolist()
        return (*pairs, size - 1, 1 + asked, int(values[asked]))
