"""Stop strings: watched for in bytes while rows are written, and kept out of the text that is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hippodrome.tokenizer import Tokenizer


class StopBytes:
    """Watches one row for the stop strings, which may begin in one token and end in another."""

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
        self.stop = [text.encode() for text in stop]
        self.tokenizer = tokenizer
        self.tail = b""

    def reached(self, token: int) -> bool:
        """Whether a stop string is complete once `token` follows the tokens before."""
        if not self.stop or self.tokenizer is None:
            return False
        text = self.tail + self.tokenizer.decode_bytes([token])
        keep = max(len(stop) for stop in self.stop) - 1
        self.tail = text[len(text) - min(keep, len(text)) :]
        return any(stop in text for stop in self.stop)


def text_before_stop(steps: Iterator[list[int | None]], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    """What the ids of one row say, in pieces of whole characters, up to but without a stop string."""
    decoder = tokenizer.decoder()
    held = ""
    for (token,) in steps:
        assert token is not None
        held += decoder.push(token)
        if _first_stop(held, stop) is not None:
            break
        ready = len(held) - _maybe_stop(held, stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    held += decoder.finish()
    held = held[: _first_stop(held, stop)]
    if held:
        yield held


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    return min((text.index(word) for word in stop if word in text), default=None)


def _maybe_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
