"""Induction head: recall the token that followed the first "=>" (Fu et al. 2022, "Hungry Hungry Hippos", section 3).

    s_1 ... s_p = "=>"  a  ...  s_n  "=>"  ->  a

n ordinary tokens of which one, at a position drawn from [0, n - 2), is overwritten by "=>"; a second "=>" asks for the token
after the first. Rows of n + 1 inputs; chance is 1 / (V - 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hippodrome.tasks._synthetic import _Synthetic


class Induction(_Synthetic):
    """Which token came after the special one?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Synthetic.Config):
        """The paper's setting: 20 tokens, 30 of them a row."""

    config: Config

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        size, length = self.config.vocab_size, self.config.length
        chances = np.full(size, 1 / (size - 2))
        chances[[0, -1]] = 0.0
        row = rng.choice(size, length, p=chances).tolist()
        # The authors' code draws a number here that one trigger has no use for; the stream must stay in step with theirs.
        rng.uniform()
        place = int(rng.integers(length - 2))
        row[place] = size - 1
        return (*row, size - 1, row[place + 1])
