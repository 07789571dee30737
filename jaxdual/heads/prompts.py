"""From items to tokens, and where in them documents and query are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdual.heads.items import Item
from jaxdual.tokenizer import Tokenizer

LEAD_IN = "Here are some paragraphs:"
INSTRUCTION = "Please find information that are relevant to the following query in the paragraphs above."
_FIELD = "{query}"


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How prompts are made of items (the authors', in the model's chat template if it has one).

    Attributes:
      separator: before each document, and before and within what follows them.
      query_template: what follows the documents, with "{query}" where the question goes; None for `INSTRUCTION`, the
        separator and "Query: {query}".
      template_vars: further variables of the chat template.

    Raises:
      ValueError: a query template that does not have "{query}" once, or begins with it.
    """

    separator: str = "\n\n"
    query_template: str | None = None
    template_vars: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        template = self.query_template
        if template is not None and (template.count(_FIELD) != 1 or template.strip().startswith(_FIELD)):
            raise ValueError(f"query template {template!r} must have {_FIELD} once, and an instruction before it")

    def query(self, question: str) -> str:
        """What follows the documents."""
        template = self.query_template
        if template is None:
            template = f"{INSTRUCTION}{self.separator}Query: {_FIELD}"
        return template.strip().replace(_FIELD, question)


def form_of(family: str, query_template: str | None, template_vars: Mapping[str, Any]) -> PromptForm:
    """The form for a family of models: the authors part paragraphs of Llama's prompts by a space more."""
    return PromptForm(" \n\n" if family == "llama" else "\n\n", query_template, template_vars)


@dataclass(frozen=True, slots=True)
class ItemPrompts:
    """An item's prompts as tokens; the query's span is from its start to the prompt's end.

    Attributes:
      id: of the item.
      tokens, null_tokens: of the prompts with the question and with the null query.
      query_start, null_query_start: first token of what follows the documents.
      documents: first token of each document, and the one behind its last.
      gold: indices of the documents that answer.
    """

    id: str
    tokens: Sequence[int]
    null_tokens: Sequence[int]
    query_start: int
    null_query_start: int
    documents: tuple[tuple[int, int], ...]
    gold: tuple[int, ...]


def build_prompts(tokenizer: Tokenizer, item: Item, form: PromptForm) -> ItemPrompts:
    """Tokenizes an item's prompts; texts that it brings are taken as they are.

    Raises:
      ValueError: documents or query can't be found in the prompts; the message names the item.
    """
    if item.prompt_text is not None and item.null_prompt_text is not None:
        text, null_text, special = item.prompt_text, item.null_prompt_text, True
    else:
        text, special = _render(tokenizer, item, item.question, form)
        null_text, _ = _render(tokenizer, item, item.null_query, form)
    places = _document_places(text, item)
    start = places[-1][1]
    start += len(text[start:]) - len(text[start:].lstrip())
    if start == len(text) or null_text[:start] != text[:start]:
        raise ValueError(f"item {item.id!r}: the prompts with and without the question must be equal up to the query")
    tokens, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=special)
    null_tokens, null_offsets = tokenizer.encode_with_offsets(null_text, add_special_tokens=special)
    return ItemPrompts(
        id=item.id,
        tokens=tokens,
        null_tokens=null_tokens,
        query_start=_first(offsets, start),
        null_query_start=_first(null_offsets, start),
        documents=tuple((_first(offsets, begin), _behind(offsets, end)) for begin, end in places),
        gold=item.gold,
    )


def _render(tokenizer: Tokenizer, item: Item, question: str, form: PromptForm) -> tuple[str, bool]:
    """The prompt's text, and whether the tokenizer is to put special tokens around it."""
    parts = [LEAD_IN, *_document_texts(item), form.query(question)]
    content = form.separator.join(parts)
    if not tokenizer.has_chat_template:
        return content, True
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, **form.template_vars)), False


def _document_texts(item: Item) -> list[str]:
    return [
        f"[{number}] {document.text}" if document.title is None else f"[{number}] {document.title}\n{document.text}"
        for number, document in enumerate(item.documents, 1)
    ]


def _document_places(text: str, item: Item) -> list[tuple[int, int]]:
    """First character of each document, and the one behind its last."""
    places, behind = [], 0
    for document, wanted in zip(item.documents, _document_texts(item), strict=True):
        begin = text.find(wanted, behind)
        if begin < 0:
            raise ValueError(f"item {item.id!r}: the prompt does not have document {document.id!r} as {wanted[:40]!r}")
        behind = begin + len(wanted)
        places.append((begin, behind))
    return places


def _first(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The first token that reaches beyond a character's beginning."""
    return next(place for place, (_, end) in enumerate(offsets) if end > character)


def _behind(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The token behind the last one that begins before a character."""
    return 1 + max(place for place, (begin, end) in enumerate(offsets) if begin < character and end > begin)
