from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.detokenizer import IncrementalDetokenizer
from jaxdual.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_dir(Path(__file__).parents[1] / "fixtures" / "tokenizer")


def byte_fallback_tokenizer():
    """A SentencePiece-style tokenizer: '▁' marks spaces, unknown characters are byte tokens, the first space is cut."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁a": 257, "b": 258, "▁": 259, "</s>": 260}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.add_special_tokens(["</s>"])
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner, inner, {}, {}, Path("made-for-the-test"))


SENTENCEPIECE = byte_fallback_tokenizer()


def stream(ids, tokenizer=TOKENIZER, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces = [detokenizer.push(i) for i in ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer, pieces


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_full_decode(text):
    ids = TOKENIZER.encode(text)
    detokenizer, _ = stream(ids, skip_special_tokens=False)
    assert detokenizer.text == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, 2047), max_size=40), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_token_sequence_joins_to_the_full_decode(ids, skip):
    detokenizer, _ = stream(ids, skip_special_tokens=skip)
    assert detokenizer.text == TOKENIZER.decode(ids, skip_special_tokens=skip)


def test_no_piece_shows_a_part_of_a_character():
    _, pieces = stream(TOKENIZER.encode("日本 🙂 é"))
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[:3] == ["", "", "日"]


def test_unfinished_character_is_flushed_at_the_end():
    ids = TOKENIZER.encode("a日")[:-1]
    detokenizer, pieces = stream(ids)
    assert pieces[-1] == "\ufffd"
    assert detokenizer.text == TOKENIZER.decode(ids)


def test_invalid_bytes_do_not_hold_back_text_forever():
    byte = TOKENIZER.encode("日")[0]
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    for _ in range(10):
        detokenizer.push(byte)
    assert detokenizer.text == "\ufffd" * 7


@pytest.mark.parametrize(
    "ids",
    [
        [257, 258, 257],
        [0xE6 + 1, 0x97 + 1, 0xA5 + 1, 257],
        [259, 258, 260, 257, 258],
        [257, 0xF0 + 1, 0x9F + 1, 0x98 + 1, 0x80 + 1, 0xE6 + 1, 0x97 + 1, 0xA5 + 1],
    ],
)
def test_sentencepiece_pieces_join_to_the_full_decode(ids):
    detokenizer, _ = stream(ids, SENTENCEPIECE)
    assert detokenizer.text == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_sentencepiece_keeps_the_space_of_a_later_token():
    _, pieces = stream([257, 257], SENTENCEPIECE)
    assert pieces == ["a", " a", ""]
    assert SENTENCEPIECE.token_bytes(257) == b" a"
    assert SENTENCEPIECE.token_bytes(0xE6 + 1) == b"\xe6"


def test_sentencepiece_run_of_bytes_shows_each_character_once_complete():
    _, pieces = stream([b + 1 for b in "日🙂".encode()], SENTENCEPIECE)
    assert pieces == ["", "", "日", "", "", "", "🙂", ""]


def test_special_tokens_are_skipped_or_kept():
    ids = TOKENIZER.encode("a<|im_end|>b")
    assert stream(ids)[0].text == "ab"
    assert stream(ids, skip_special_tokens=False)[0].text == "a<|im_end|>b"


def test_stop_string_across_tokens_ends_the_text():
    ids = TOKENIZER.encode("x = 1\n\n\ndef g():\n    pass")
    detokenizer, pieces = stream(ids, stop=["\n\ndef"])
    assert (detokenizer.text, detokenizer.stopped) == ("x = 1\n", "\n\ndef")
    assert pieces[-1] == ""


def test_stop_string_may_be_kept():
    detokenizer, _ = stream(TOKENIZER.encode("one two three"), stop=["two"], include_stop_str=True)
    assert (detokenizer.text, detokenizer.stopped) == ("one two", "two")


def test_beginning_of_a_stop_string_is_held_until_decided():
    detokenizer = IncrementalDetokenizer(TOKENIZER, ["abcd"])
    a, b, c, x = (TOKENIZER.encode(s)[0] for s in "abcx")
    assert [detokenizer.push(i) for i in (x, a, b, c)] == ["x", "", "", ""]
    assert detokenizer.push(x) == "abcx"
    assert detokenizer.push(a) == ""
    assert detokenizer.finish() == "a"
    assert detokenizer.stopped is None


def test_nothing_follows_a_stop():
    detokenizer = IncrementalDetokenizer(TOKENIZER, ["a"])
    a = TOKENIZER.encode("a")[0]
    assert [detokenizer.push(a), detokenizer.push(a), detokenizer.finish(), detokenizer.text] == [""] * 4
    assert detokenizer.stopped == "a"


@given(
    st.lists(st.text("ab\u65e5", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("ab\u65e5 ", max_size=30),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_equal_a_search_character_by_character(stop, text, include):
    expected, hit = text, None
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            hit = max(complete, key=len)
            expected = text[:end] if include else text[: end - len(hit)]
            break
    detokenizer, _ = stream(TOKENIZER.encode(text), stop=stop, include_stop_str=include)
    assert (detokenizer.text, detokenizer.stopped) == (expected, hit)


def test_stop_strings_count_only_after_min_tokens():
    a = TOKENIZER.encode("a")[0]
    detokenizer, _ = stream([a] * 6, stop=["aa"], min_tokens=3)
    assert (detokenizer.text, detokenizer.stopped) == ("aaa", "aa")


def test_without_a_tokenizer_the_text_is_empty():
    detokenizer, _ = stream([1, 2, 3], tokenizer=None, stop=["a"])
    assert (detokenizer.text, detokenizer.stopped) == ("", None)


def test_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="must not be empty"):
        IncrementalDetokenizer(TOKENIZER, [""])
