"""A prompt as it came, of which each tier's own tokenizer makes tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdual.front import Prompt, TokenizedPrompt


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """A text, or token ids.

    Attributes:
      prompt: see `Front.tokenize`; it is checked there.
      add_special_tokens: puts around a text what the tokenizer puts around texts.
    """

    prompt: Prompt | TokenizedPrompt
    add_special_tokens: bool = True

    @property
    def text(self) -> str | None:
        """The text; None for token ids."""
        if isinstance(self.prompt, Mapping):
            value = self.prompt.get("prompt")
            return value if isinstance(value, str) else None
        return self.prompt if isinstance(self.prompt, str) else None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation; attributes are the arguments of `Front.tokenize_chat`."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    template_vars: Mapping[str, Any] = field(default_factory=dict)


type CascadePrompt = PlainPrompt | ChatPrompt
