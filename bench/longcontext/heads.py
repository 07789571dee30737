"""Retrieval heads by the needle task: lines are the documents, and the line of the key that is asked for answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.longcontext.items import Form, Item
from bench.longcontext.needle import TASKS, codes_question
from jaxdual.heads.detection import Detection, detect
from jaxdual.heads.items import NULL_QUERY
from jaxdual.heads.prompts import ItemPrompts
from jaxdual.tokenizer import Tokenizer
from models import load

_ROOT_SEED = 1 << 16  # so that heads are detected by other items than they are tried on


def detect_heads(
    folder: Path,
    *,
    count: int,
    lines: int,
    form: Form,
    seed: int,
    template_vars: Mapping[str, Any],
    dtype: str = "auto",
) -> Detection:
    """Scores of all heads of a model (QRHead), by items of the task "needle".

    Args:
      folder: of the model.
      count: of items.
      lines: of each.
      form, seed: of items; the seed makes others than those of the benchmark.
      template_vars: further variables of the chat template.
      dtype: as for `models.load`.
    """
    tokenizer = Tokenizer.from_dir(folder)
    items = TASKS[0].items(count, lines, form, _ROOT_SEED + seed)
    prompts = [_prompts(tokenizer, str(number), item, template_vars) for number, item in enumerate(items)]
    model = load(folder, dtype=dtype)
    return detect(model, prompts, model.config.num_layers)


def _prompts(tokenizer: Tokenizer, name: str, item: Item, template_vars: Mapping[str, Any]) -> ItemPrompts:
    content = item.messages[-1][1]
    (gold,) = item.gold
    key = gold.removeprefix("The code of ").partition(" ")[0]
    question = codes_question([key])
    begin = content.rindex(question)
    unasked = content[:begin] + codes_question([NULL_QUERY]) + content[begin + len(question) :]
    texts = [_render(tokenizer, one, template_vars) for one in (content, unasked)]
    start = texts[0].index(content) + begin
    lines = [line for line in content[:begin].split("\n") if line.startswith("The code of ")]
    places = _places(texts[0], lines)
    special = not tokenizer.has_chat_template
    (tokens, offsets), (null_tokens, null_offsets) = (tokenizer.encode_with_offsets(text, special) for text in texts)
    return ItemPrompts(
        id=name,
        tokens=tokens,
        null_tokens=null_tokens,
        query_start=_first(offsets, start),
        null_query_start=_first(null_offsets, start),
        documents=tuple((_first(offsets, first), _behind(offsets, end)) for first, end in places),
        gold=(lines.index(gold),),
    )


def _render(tokenizer: Tokenizer, content: str, template_vars: Mapping[str, Any]) -> str:
    if not tokenizer.has_chat_template:
        return content + "\n"
    return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], True, **template_vars))


def _places(text: str, lines: Sequence[str]) -> list[tuple[int, int]]:
    """First character of each line, and the one behind its last."""
    places, behind = [], 0
    for line in lines:
        begin = text.index(line, behind)
        behind = begin + len(line)
        places.append((begin, behind))
    return places


def _first(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The first token that reaches beyond a character's beginning."""
    return next(place for place, (_, end) in enumerate(offsets) if end > character)


def _behind(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The token behind the last one that begins before a character."""
    return 1 + max(place for place, (begin, end) in enumerate(offsets) if begin < character and end > begin)


def described(detection: Detection, heads: Sequence[tuple[int, int]], seed: int) -> dict[str, Any]:
    """Scores of all heads, and how far those that were chosen are to be trusted."""
    return {
        "scores": detection.mean("sum").round(5).tolist(),
        "stability": dataclasses.asdict(detection.stability("sum", len(heads), seed)),
    }
