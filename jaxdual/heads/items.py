"""What heads are detected with: questions, documents, and which of these answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NULL_QUERY = "N/A"


@dataclass(frozen=True, slots=True)
class Document:
    """A paragraph of a prompt.

    Attributes:
      id: that items name it by.
      title: None for none.
      text: of it.
    """

    id: str
    title: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Item:
    """A question over documents.

    Attributes:
      id: of the item.
      question: of it.
      documents: in the order of the prompt.
      gold: indices of those that answer.
      null_query: what stands for a question that asks nothing.
      prompt_text, null_prompt_text: whole prompts with the question and with the null query; None where they are made
        with the model's template.
    """

    id: str
    question: str
    documents: tuple[Document, ...]
    gold: tuple[int, ...]
    null_query: str = NULL_QUERY
    prompt_text: str | None = None
    null_prompt_text: str | None = None


def read_items(path: Path) -> list[Item]:
    """Items of a JSON file: a list of objects with the fields of `Item`, `gold` being ids of documents.

    Raises:
      ValueError: the file can't be read, has no items, or one that can't be used; the message names it.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: must be a list of at least one item")
    items = []
    for number, entry in enumerate(entries):
        try:
            items.append(_item(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: item {number}: {type(error).__name__}: {error}") from None
    return items


def _item(entry: Mapping[str, Any]) -> Item:
    documents = tuple(
        Document(_text(one, "id"), _text(one, "title") if one.get("title") else None, _text(one, "text"))
        for one in entry["documents"]
    )
    places = {document.id: place for place, document in enumerate(documents)}
    if len(places) < len(documents):
        raise ValueError("documents must have different ids")
    gold = list(dict.fromkeys(entry["gold"]))
    unknown = [one for one in gold if one not in places]
    if unknown or not gold:
        raise ValueError(f"gold={entry['gold']!r} must name at least one of the documents, and no other")
    prompt, null_prompt = entry.get("prompt_text"), entry.get("null_prompt_text")
    if not all(isinstance(text, str) for text in (prompt, null_prompt)) and (prompt, null_prompt) != (None, None):
        raise ValueError("prompt_text and null_prompt_text must be texts, both or neither")
    return Item(
        id=_text(entry, "id"),
        question=_text(entry, "question"),
        documents=documents,
        gold=tuple(places[one] for one in gold),
        null_query=_text(entry, "null_query") if "null_query" in entry else NULL_QUERY,
        prompt_text=prompt,
        null_prompt_text=null_prompt,
    )


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}={value!r} must be a text")
    return value.strip()
