"""Items as tokens, and where in them the lines are that answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.longcontext.items import Item
from jaxdual import LLM
from jaxdual.front import TokenizedPrompt
from jaxdual.tokenizer import Tokenizer


class Prompts:
    """Makes prompts for a model: in its chat template, or as text where it has none."""

    def __init__(self, llm: LLM, template_vars: Mapping[str, Any]) -> None:
        self._llm = llm
        self._tokenizer = Tokenizer.from_dir(llm.info.model_folder)
        self._vars = template_vars

    def prompt(self, item: Item) -> TokenizedPrompt:
        """The tokens that are completed; a reply that is begun counts as opened by the template."""
        text = self.text(item)
        tokens = self._tokenizer.encode(text, add_special_tokens=not self._tokenizer.has_chat_template)
        opening = None
        if self._tokenizer.has_chat_template:
            opening = self._llm.tokenize_chat(self._messages(item), template_vars=self._vars).opening
        if opening is not None and item.reply_start:
            opening += len(self._tokenizer.encode(item.reply_start, add_special_tokens=False))
        return TokenizedPrompt(text=text, tokens=tokens, opening=opening)

    def text(self, item: Item) -> str:
        """That of the prompt."""
        if self._tokenizer.has_chat_template:
            rendered = str(self._tokenizer.apply_chat_template(self._messages(item), True, **self._vars))
        else:
            rendered = "\n\n".join(content for _, content in item.messages) + "\n"
        return rendered + item.reply_start

    def length(self, item: Item) -> int:
        """Tokens of the prompt."""
        return len(self._tokenizer.encode(self.text(item), add_special_tokens=not self._tokenizer.has_chat_template))

    def gold_positions(self, item: Item) -> frozenset[int]:
        """Positions of the lines that answer."""
        text = self.text(item)
        _, offsets = self._tokenizer.encode_with_offsets(text, not self._tokenizer.has_chat_template)
        spans = []
        for line in item.gold:
            start = text.index(line)
            spans.append((start, start + len(line)))
        return frozenset(
            place
            for place, (begin, end) in enumerate(offsets)
            if any(begin < stop and end > start for start, stop in spans)
        )

    def _messages(self, item: Item) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in item.messages]
