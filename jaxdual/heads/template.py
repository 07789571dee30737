"""Token sequences that a chat template puts into prompts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from jaxdual.tokenizer import Tokenizer, TokenizerError

_CONTENTS = ("contentzero", "contentone", "contenttwo", "contentthree")
_ROLES = ("system", "user", "assistant", "user")


def template_sequences(tokenizer: Tokenizer, template_vars: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """What is between the messages of a chat, from each special token to the next one.

    Args:
      tokenizer: without a chat template, there are none.
      template_vars: further variables of the template.

    Returns:
      Different sequences, in the order of a chat; text that no special token stands before is left out, as it may be
      tokenized together with a message.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for piece in _pieces(tokenizer, template_vars):
        tokens = tokenizer.encode(piece, add_special_tokens=False)
        starts = [place for place, token in enumerate(tokens) if token in tokenizer.special_ids]
        for begin, end in itertools.pairwise([*starts, len(tokens)]):
            sequences.setdefault(tuple(tokens[begin:end]))
    return tuple(sequences)


def _pieces(tokenizer: Tokenizer, template_vars: Mapping[str, Any]) -> list[str]:
    """Of a chat's text, what is not its messages; of one without a system message where the template has none."""
    messages = [{"role": role, "content": content} for role, content in zip(_ROLES, _CONTENTS, strict=True)]
    for chat in (messages, messages[1:]):
        try:
            text = str(tokenizer.apply_chat_template(chat, **template_vars))
        except TokenizerError:
            continue
        return re.split("|".join(_CONTENTS), text)
    return []
