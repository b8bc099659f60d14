"""Text to ids and back: bytes, a BPE trained on the corpus, GPT-2's vocabulary. All three are byte-level BPEs.

A byte-level BPE writes each byte as one printable character, cuts the text at words and merges pairs of characters in the
order of a list; bytes are the case of an empty list. So one class and one file format (tokenizer.json of the `tokenizers`
library) serve all, and every id stands for known bytes: scores can be given per byte, which compares vocabularies.
"""

from __future__ import annotations

import builtins
import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from hippodrome.files import replacing
from hippodrome.part import BadInput

if TYPE_CHECKING:
    import tokenizers

Kind = Literal["bytes", "bpe", "gpt2"]

END = "<|endoftext|>"
"""The entry of a vocabulary that ends a document. Text never encodes to it, not even text that spells it."""

_GPT2 = Path(__file__).parent / "assets" / "gpt2"


class Tokenizer:
    """A vocabulary. `vocab` maps each entry, in byte characters, to its id 0 ... n - 1; `merges` are pairs in their order."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self.vocab_size = len(vocab)
        self.end = vocab[END]
        self._vocab, self._merges = vocab, list(merges)
        bytes_of = {character: bytes([byte]) for byte, character in enumerate(_byte_characters())}
        table = {number: b"".join(bytes_of[character] for character in entry) for entry, number in vocab.items()}
        table[self.end] = b""
        self.token_bytes: list[bytes] = [table[number] for number in range(len(vocab))]
        """The bytes that each id stands for; none for the end of a document."""

    @classmethod
    def bytes(cls) -> Self:
        """256 bytes, id = value, and the end of a document, 256."""
        return cls({character: byte for byte, character in enumerate([*_byte_characters(), END])}, [])

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's 50,257 entries; the end of a document is 50256."""
        vocab = json.loads((_GPT2 / "encoder.json").read_text(encoding="utf-8"))
        lines = (_GPT2 / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        return cls(vocab, [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """A BPE of at most `vocab_size` entries: 256 bytes, merges learned from `texts`, and the end of a document, the last.

        The same texts give the same vocabulary. It is smaller than asked only when the texts have no more pairs to merge.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise BadInput(f"vocab_size is {vocab_size}: a BPE needs at least 257, for 256 bytes and the end of a document")
        learner = Library(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=_byte_characters(), show_progress=False)
        learner.train_from_iterator(texts, trainer)
        learned = json.loads(learner.to_str())["model"]
        return cls({**learned["vocab"], END: len(learned["vocab"])}, [(left, right) for left, right in learned["merges"]])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` left in `folder`."""
        path = folder / "tokenizer.json"
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            vocab, merges = model["vocab"], [(left, right) for left, right in model["merges"]]
            needed = {*_byte_characters(), *(left + right for left, right in merges)}
            if not needed <= vocab.keys():
                raise ValueError(f"{len(needed - vocab.keys())} entries are missing")
            return cls(vocab, merges)
        except FileNotFoundError:
            raise BadInput(f"{folder} has no tokenizer.json") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} is no byte-level BPE with {END} in its vocabulary ({error!r})") from None

    def save(self, folder: Path) -> None:
        """Leave tokenizer.json, which the `tokenizers` library reads too, in `folder`."""
        with replacing(folder / "tokenizer.json") as beside:
            beside.write_text(self._library.to_str(pretty=True), encoding="utf-8")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the vocabulary and its merges: equal exactly when texts encode equally."""
        described = json.dumps([sorted(self._vocab.items()), self._merges], ensure_ascii=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added at either end."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each (n,) uint32."""
        texts = [valid_unicode(text) for text in texts]
        if not self._merges:
            lookup = self._id_of_byte
            return [lookup[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        return [np.array(found.ids, np.uint32) for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int]) -> builtins.bytes:
        """The bytes of ids. An id beyond the vocabulary, which a model with padded logits may say, is U+FFFD."""
        table = self.token_bytes
        return b"".join(table[number] if 0 <= number < len(table) else b"\xef\xbf\xbd" for number in map(int, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        """A decoder for ids that come one at a time."""
        return Decoder(self)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids in pieces, as soon as each is whole. Together they are `decode(ids)`."""
        decoder = self.decoder()
        yield from filter(None, map(decoder.push, ids))
        yield from filter(None, [decoder.finish()])

    @cached_property
    def _id_of_byte(self) -> np.ndarray:
        return np.array([self._vocab[character] for character in _byte_characters()], np.uint32)

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        library = Library(models.BPE(vocab=self._vocab, merges=self._merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        return library


class Decoder:
    """Text of ids as they come. A character whose bytes are not all there yet waits for the next id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """U+FFFD if the last character never became whole, else nothing."""
        return self._utf8.decode(b"", final=True)


def valid_unicode(text: str) -> str:
    """The text with halves of surrogate pairs, which no UTF-8 can hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself if Latin-1 prints it, else the next free one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(spare)) for byte in range(256)]
