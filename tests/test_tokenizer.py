import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hippodrome.part import BadInput
from hippodrome.tokenizer import END, Tokenizer

WORDS = ["the cat sat on the mat, and the dog sat on the cat.\n" * 20, "Ünïcödé: naïve café 😀 " * 10]


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(WORDS, 290)


def test_gpt2_ids_are_gpt2s(gpt2):
    assert gpt2.encode("Hello world, the quick brown fox") == [15496, 995, 11, 262, 2068, 7586, 21831]
    assert gpt2.encode("  two  spaces\n\nand it's 2024") == [220, 734, 220, 9029, 198, 198, 392, 340, 338, 48609]
    assert (gpt2.vocab_size, gpt2.end) == (50257, 50256)


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    assert tokenizer.token_bytes[65] == b"A"


def test_a_bpe_has_the_size_asked_for_and_its_end_last(bpe):
    assert (bpe.vocab_size, bpe.end) == (290, 289)
    assert len(bpe.encode(WORDS[0])) < len(WORDS[0]) / 2


def test_training_is_deterministic(bpe):
    again = Tokenizer.train(iter(WORDS), 290)
    assert again.hash == bpe.hash
    assert Tokenizer.train([*WORDS[::-1], "zebra " * 50], 290).hash != bpe.hash


def test_a_bpe_is_smaller_when_the_text_has_no_more_pairs():
    tokenizer = Tokenizer.train(["ab ab"], 1000)
    assert tokenizer.vocab_size < 270
    assert tokenizer.end == tokenizer.vocab_size - 1


def test_a_bpe_needs_all_bytes():
    with pytest.raises(BadInput, match=r"vocab_size is 256: .* at least 257"):
        Tokenizer.train(WORDS, 256)


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(len(tokenizer.token_bytes[number]) for number in ids) == len(text.encode())
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.end not in ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_comes_back(gpt2, bpe, text):
    for tokenizer in (Tokenizer.bytes(), gpt2, bpe):
        check_round_trip(tokenizer, text)


def test_text_that_spells_the_end_is_only_text(gpt2, bpe):
    for tokenizer in (Tokenizer.bytes(), gpt2, bpe):
        check_round_trip(tokenizer, f"a{END}b")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_streaming_any_ids_says_what_decode_says(ids):
    tokenizer = Tokenizer.bytes()
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_a_character_is_streamed_when_it_is_whole():
    tokenizer = Tokenizer.bytes()
    decoder = tokenizer.decoder()
    assert [decoder.push(number) for number in tokenizer.encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    assert [decoder.push(0xC3), decoder.finish()] == ["", "\ufffd"]


def test_the_end_and_padding_of_the_vocabulary_decode(bpe):
    assert bpe.decode([bpe.end]) == ""
    assert bpe.decode([bpe.vocab_size + 7]) == "\ufffd"


def test_half_a_surrogate_pair_is_replaced():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_saved_and_loaded(tmp_path, bpe, gpt2):
    for tokenizer in (Tokenizer.bytes(), bpe, gpt2):
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        assert loaded.hash == tokenizer.hash
        assert loaded.encode(WORDS[1]) == tokenizer.encode(WORDS[1])
        # The library that the format belongs to reads the same ids.
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(WORDS[1]).ids == tokenizer.encode(
            WORDS[1]
        )


def without_a_byte(saved):
    del saved["model"]["vocab"]["a"]


def without_end(saved):
    del saved["model"]["vocab"][END]


def of_another_kind(saved):
    saved["model"] = {"vocab": [["a", 0.1]], "merges": []}


@pytest.mark.parametrize("spoil", [without_a_byte, without_end, of_another_kind])
def test_a_foreign_tokenizer_file_is_refused(tmp_path, spoil):
    Tokenizer.bytes().save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    spoil(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(BadInput, match="is no byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_a_missing_or_truncated_tokenizer_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(BadInput, match="is no byte-level BPE"):
        Tokenizer.load(tmp_path)
