"""Token ids to text while they are generated, with stop strings."""

from collections.abc import Sequence

from jaxdual.tokenizer import Tokenizer

# The longest unfinished part of a UTF-8 character, in bytes: a decoder shows it as at most that many U+FFFD.
_UNFINISHED = 3


class IncrementalDetokenizer:
    """Turns the token ids of one sequence into text that is final as soon as it is given out.

    Held back are bytes that do not make a whole character yet, and text that may turn out to be the beginning of a stop
    string. The pieces that `push` and `finish` return, joined, are `text`.

    Args:
        tokenizer: the model's tokenizer, or None for a model without one: the text is then always empty.
        stop: stop strings; the one that is complete first ends the text.
        include_stop_str: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: stop strings are looked for only in the text after this many tokens.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        if any(not s for s in stop):
            raise ValueError(f"a stop string must not be empty, got {list(stop)!r}")
        self.text = ""
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop_str = include_stop_str
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._count = 0
        # Tokens that are decoded together: those of the last piece (a decoder may treat the first token of a text in
        # its own way) and the ones after it. `_shown` is the part of their text that has left the decoder.
        self._window: list[int] = []
        self._boundary = 0
        self._shown = ""
        self._held = ""

    def push(self, token_id: int) -> str:
        """Adds one token; returns the text that became final (often empty). After a stop it is always empty."""
        if self._tokenizer is None or self.stopped is not None:
            return ""
        self._count += 1
        self._window.append(token_id)
        text = self._decode()
        whole = text[: len(text) - _unfinished(text)]
        if whole == text:
            piece = text[len(self._shown) :]
            if not piece:  # a token without text stays in the window: it is no first token for the next one
                return ""
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._shown = self._decode()
        elif whole.startswith(self._shown):
            piece = whole[len(self._shown) :]
            self._shown = whole
        else:  # a byte-fallback decoder shows a run of byte tokens as U+FFFD until its last character is complete
            return ""
        return self._release(piece)

    def finish(self) -> str:
        """Returns the text still held back: the sequence has ended without a further token."""
        if self._tokenizer is None or self.stopped is not None:
            return ""
        piece = self._decode()[len(self._shown) :]
        self._window, self._boundary, self._shown = [], 0, ""
        released = self._release(piece)
        rest, self._held = self._held, ""
        self.text += rest
        return released + rest

    def _decode(self) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(self._window, self._skip_special_tokens)

    def _release(self, piece: str) -> str:
        """Passes decoded text through the search for stop strings."""
        self._held += piece
        final, self._held = self._held, ""
        if self._count > self._min_tokens:
            match = _first_match(final, self._stop)
            if match is not None:
                start, self.stopped = match
                final = final[:start] + (self.stopped if self._include_stop_str else "")
            else:
                keep = max((_overlap(final, s) for s in self._stop), default=0)
                if keep:
                    final, self._held = final[:-keep], final[-keep:]
        self.text += final
        return final


def _unfinished(text: str) -> int:
    """Number of characters at the end of `text` that may be an unfinished character."""
    count = 0
    while count < min(_UNFINISHED, len(text)) and text[-1 - count] == "\ufffd":
        count += 1
    return count


def _first_match(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that is complete first, with its start; of two that end together, the longer.

    That is the choice of a search character by character, so it does not depend on how text is cut into tokens.
    """
    found = [(start + len(s), start, s) for s in stop if (start := text.find(s)) >= 0]
    if not found:
        return None
    _, start, stop_string = min(found)
    return start, stop_string


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
