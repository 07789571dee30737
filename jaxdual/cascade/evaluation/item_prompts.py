"""From items to the tokens of their prompts, in a model's chat template or as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from jaxdual.cascade.evaluation.items import Item
from jaxdual.tokenizer import Tokenizer
from models.questions import LETTERS, OPENING, multiple_choice, short_answer

type Form = Literal["chat", "text"]
FORMS: tuple[Form, ...] = get_args(Form.__value__)
# Kadavath et al. 2022, section 3: asked of a question and an answer that is proposed.
_PROPOSED = "{prompt} {letter}\nIs the proposed answer:\nA. True\nB. False\nThe proposed answer is:"
_OPENING = re.compile(rf"\s*{OPENING}\s*:\s*", re.IGNORECASE)
_EDGES = " \t\n\r.\"'"


def default_form(tokenizer: Tokenizer) -> Form:
    """A chat wherever the model has a template for it."""
    return "chat" if tokenizer.has_chat_template else "text"


def prompt_of(tokenizer: Tokenizer, item: Item, form: Form) -> list[int]:
    """Tokens of an item's prompt."""
    if item.choices:
        text = multiple_choice(item.subject, item.question, item.choices)
        return _encoded(tokenizer, [{"role": "user", "content": text}], form)
    return _encoded(tokenizer, short_answer(item.question), form)


def p_true_prompt(tokenizer: Tokenizer, item: Item, given: int, form: Form) -> list[int]:
    """Tokens of the question whether a choice that was given is right, A for true."""
    prompt = multiple_choice(item.subject, item.question, item.choices)
    content = _PROPOSED.format(prompt=prompt, letter=LETTERS[given])
    return _encoded(tokenizer, [{"role": "user", "content": content}], form)


def answer_of(text: str) -> str:
    """What a short answer says, without the opening."""
    return _OPENING.sub("", text, count=1).strip(_EDGES) if _OPENING.match(text) else text.strip(_EDGES)


def same_answer(one: str, other: str) -> bool:
    """Whether two short answers are the same but for case, blanks and what stands around them."""
    return " ".join(one.strip(_EDGES).casefold().split()) == " ".join(other.strip(_EDGES).casefold().split())


def _encoded(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], form: Form) -> list[int]:
    if form == "text":
        return tokenizer.encode("\n\n".join(message["content"] for message in messages))
    tokens = tokenizer.apply_chat_template(messages, tokenize=True)
    if isinstance(tokens, str):
        raise TypeError(f"a chat template gave {type(tokens).__name__} in place of tokens")
    return tokens
