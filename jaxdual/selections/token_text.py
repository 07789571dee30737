"""Tokens as HTML: their text, and what has none made visible."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator

from markupsafe import Markup, escape

# Bytes that are no UTF-8 by themselves, ends of lines, and characters that don't show or change what is around them.
_UNSEEN = re.compile(
    "(?P<bytes>[\udc80-\udcff]+)|(?P<end>\n)"
    "|(?P<sign>[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff])"
)


def token_markups(tokens: Iterable[tuple[int, bytes]]) -> Iterator[Markup]:
    """Tokens of a text for people. What is not a token's own text stands in `<i>`: bytes of an unfinished character in
    hexadecimal digits, with the character where it becomes whole; the number of an invisible character; the id of a
    token without text.

    Args:
      tokens: ids, and what they stand for.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id, text in tokens:
        first = decoder.decode(text)[:1]
        completed = first if first != "\ufffd" and first.isprintable() else ""
        yield _markup(text.decode("utf-8", "surrogateescape"), completed) if text else Markup(f"<i>{token_id}</i>")


def _markup(decoded: str, completed: str) -> Markup:
    out, end = Markup(), 0
    for match in _UNSEEN.finditer(decoded):
        out += escape(decoded[end : match.start()]) + _shown(match, "" if match.start() else completed)
        end = match.end()
    return out + escape(decoded[end:])


def _shown(match: re.Match[str], completed: str) -> Markup:
    if match["end"]:
        return Markup('<i class="end"></i>\n')
    if match["bytes"]:
        digits = match["bytes"].encode("utf-8", "surrogateescape").hex(" ")
        return Markup("<i>{}</i>").format(f"{digits} {completed}".rstrip())
    name = unicodedata.name(match["sign"], "")
    return Markup('<i title="{}">U+{:04X}</i>').format(name, ord(match["sign"]))
