"""Items from files and from a seed, and their prompts in a model's own template."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual.heads import Document, Item, PromptForm, build_prompts, read_items
from jaxdual.heads.prompts import INSTRUCTION, form_of
from jaxdual.heads.synthetic import _ATTRIBUTES, _names, synthetic_items
from jaxdual.heads.template import template_sequences
from jaxdual.model_folder import shipped_model
from jaxdual.tokenizer import Tokenizer

RECORDED = Path(__file__).parents[1] / "fixtures" / "qrhead" / "llama_two_items"
ITEMS: list[dict[str, Any]] = json.loads((RECORDED / "items.json").read_text())


@pytest.fixture(scope="module")
def chat() -> Tokenizer:
    return Tokenizer.from_dir(shipped_model("small"))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return synthetic_items(60, (8, 12), 3)


def statement_of(question: str) -> tuple[re.Pattern[str], str]:
    """What a document says that answers it, and the name that it asks about."""
    for attribute in _ATTRIBUTES:
        asked = re.fullmatch(
            re.escape(attribute.question).replace(r"\{kind\}", r"(?P<k>\w+)").replace(r"\{name\}", r"(?P<n>[\w ]+)"),
            question,
        )
        if asked:
            said = re.escape(attribute.sentence).replace(r"\{kind\}", asked["k"]).replace(r"\{value\}", r"\w+")
            return re.compile(said), asked["n"]
    raise AssertionError(question)


def test_synthetic_items_have_one_answer_among_documents_that_are_near_it(items: list[Item]) -> None:
    near = total = 0
    for item in items:
        assert 8 <= len(item.documents) <= 12
        said, name = statement_of(item.question)
        [gold] = item.gold
        assert item.documents[gold].title == name
        assert said.search(item.documents[gold].text)
        names = [document.title or "" for document in item.documents]
        assert [one for one in names if one.startswith(name)] == [name]
        kind = item.documents[gold].text.removeprefix(f"{name} is a ").split()[0]
        for place, document in enumerate(item.documents):
            assert document.text.startswith(f"{document.title} is a ")
            assert 60 <= len(document.text.split()) <= 100
            assert 4 <= document.text.count(". ") + 1 <= 6
            general = said.pattern.replace(f"\\ {kind}\\ ", r"\ \w+\ ")
            near += place != gold and (f" is a {kind} " in document.text or bool(re.search(general, document.text)))
        total += len(item.documents) - 1
    assert near / total > 2 / 3
    assert len({item.question for item in items}) == len(items)


def test_synthetic_answers_are_anywhere_and_items_are_of_the_seed(items: list[Item]) -> None:
    places = [item.gold[0] / len(item.documents) for item in items]
    assert all(sum(low <= place < low + 0.25 for place in places) > 5 for low in (0, 0.25, 0.5, 0.75))
    assert synthetic_items(2, (8, 12), 3) == items[:2]
    assert synthetic_items(2, (8, 12), 4) != items[:2]
    assert [len(item.documents) for item in synthetic_items(9, (5, 5), 0)] == [5] * 9
    assert {len(item.documents) for item in items} == {8, 9, 10, 11, 12}


def test_no_name_begins_another() -> None:
    names = sorted(_names(3000, np.random.default_rng(0)))
    assert not any(longer.startswith(name) for name, longer in itertools.pairwise(names))


@pytest.mark.parametrize(("count", "documents"), [(0, (1, 2)), (1, (0, 2)), (1, (3, 2))])
def test_synthetic_sets_that_are_none_are_refused(count: int, documents: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        synthetic_items(count, documents, 0)


def test_prompts_are_the_authors_in_the_model_s_template(chat: Tokenizer) -> None:
    [item] = synthetic_items(1, (3, 3), 5)
    prompts = build_prompts(chat, item, PromptForm())
    texts = [f"[{number}] {one.title}\n{one.text}" for number, one in enumerate(item.documents, 1)]
    opening = "<|im_start|>user\nHere are some paragraphs:\n\n" + "\n\n".join(texts) + "\n\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    asked = f"{INSTRUCTION}\n\nQuery: {item.question}{closing}"
    assert chat.decode(prompts.tokens) == opening + asked
    assert chat.decode(prompts.tokens[prompts.query_start :]).strip() == asked.strip()
    null = f"{INSTRUCTION}\n\nQuery: N/A{closing}"
    assert chat.decode(prompts.null_tokens) == opening + null
    assert chat.decode(prompts.null_tokens[prompts.null_query_start :]).strip() == null.strip()
    for (begin, end), text in zip(prompts.documents, texts, strict=True):
        assert chat.decode(prompts.tokens[begin:end]).strip() == text


def test_prompts_have_the_given_template_and_the_family_s_separator(chat: Tokenizer) -> None:
    [item] = synthetic_items(1, (1, 1), 5)
    prompts = build_prompts(chat, item, form_of("llama", "Which one says: {query}", {}))
    assert f" \n\nWhich one says: {item.question}<|im_end|>" in chat.decode(prompts.tokens)
    assert "paragraphs: \n\n[1] " in chat.decode(prompts.tokens)
    plain = Tokenizer.from_dir(RECORDED)
    text = plain.decode(build_prompts(plain, item, PromptForm()).tokens)
    assert text.startswith("Here are some paragraphs:\n\n[1] ")
    assert text.endswith(f"Query: {item.question}")


def test_texts_that_items_bring_are_rebuilt_from_their_parts() -> None:
    """The recorded prompts, but for Llama's template around them, are those that are made of documents and question."""
    tokenizer = Tokenizer.from_dir(RECORDED)
    for item, entry in zip(read_items(RECORDED / "items.json"), ITEMS, strict=True):
        made = Item(item.id, item.question, item.documents, item.gold)
        text = tokenizer.decode(build_prompts(tokenizer, made, form_of("llama", None, {})).tokens)
        assert text in entry["prompt_text"]


@pytest.mark.parametrize("template", ["no place", "{query} {query}", " {query}?"])
def test_query_templates_without_a_place_or_an_instruction_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"must have \{query\} once, and an instruction before it"):
        PromptForm(query_template=template)


def test_prompts_whose_parts_are_elsewhere_are_refused() -> None:
    tokenizer, [item, _] = Tokenizer.from_dir(RECORDED), read_items(RECORDED / "items.json")
    assert item.prompt_text is not None
    assert item.null_prompt_text is not None
    missing = item.prompt_text.replace("quiet", "loud")
    for prompt, null, message in (
        (missing, item.null_prompt_text, r"item 'q0': the prompt does not have document 'b' as '\[2\] Levikha"),
        (item.prompt_text, missing, "item 'q0': the prompts .* must be equal up to the query"),
        (item.prompt_text.partition("\n\nPlease")[0], item.null_prompt_text, "must be equal up to the query"),
    ):
        bad = Item("q0", item.question, item.documents, item.gold, "N/A", prompt, null)
        with pytest.raises(ValueError, match=message):
            build_prompts(tokenizer, bad, form_of("llama", None, {}))


def test_documents_are_found_behind_each_other() -> None:
    tokenizer = Tokenizer.from_dir(RECORDED)
    item = Item("quoting", "Who?", (Document("a", None, "as in [2] this"), Document("b", None, "this")), (1,))
    prompts = build_prompts(tokenizer, item, PromptForm())
    begin = len("Here are some paragraphs:\n\n")
    assert prompts.documents == ((begin, begin + 18), (begin + 20, begin + 28))


def test_template_sequences_are_what_is_between_messages(chat: Tokenizer) -> None:
    texts = [chat.decode(sequence) for sequence in template_sequences(chat, {})]
    assert texts == ["<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n", "<|im_start|>assistant\n"]
    prompt = chat.apply_chat_template([{"role": "user", "content": "x y z"}], tokenize=True)
    assert template_sequences(chat, {})[2] == tuple(prompt[:3])
    assert template_sequences(Tokenizer.from_dir(RECORDED), {}) == ()


def test_templates_may_refuse_system_messages_and_put_text_before_special_tokens(tmp_path: Path) -> None:
    folder = shutil.copytree(shipped_model("small"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% for message in messages %}{{ 'Turn: <|im_start|>' + message.content + mark }}{% endfor %}"
    )
    tokenizer = Tokenizer.from_dir(folder)
    sequences = template_sequences(tokenizer, {"mark": "<|im_end|>"})
    assert [tokenizer.decode(one) for one in sequences] == ["<|im_start|>", "<|im_end|>Turn: ", "<|im_end|>"]
    prompts = build_prompts(tokenizer, synthetic_items(1, (1, 1), 0)[0], PromptForm(template_vars={"mark": "!mark"}))
    assert tokenizer.decode(prompts.tokens).endswith("!mark")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('none') }}")
    assert template_sequences(Tokenizer.from_dir(folder), {}) == ()


def change(path: str, value: Any) -> list[dict[str, Any]]:
    """The recorded items with one value of the second one replaced; None takes it away."""
    items: Any = copy.deepcopy(ITEMS)
    at, [*keys, last] = items[1], path.split(".")
    for key in keys:
        at = at[int(key) if key.isdecimal() else key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return items


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({}, "must be a list of at least one item"),
        ([], "must be a list of at least one item"),
        (change("gold", ["x", "w"]), "item 1: .*must name at least one of the documents, and no other"),
        (change("gold", []), "item 1: .*must name at least one of the documents, and no other"),
        (change("question", " "), "item 1: .*question=' ' must be a text"),
        (change("question", None), "item 1: KeyError: 'question'"),
        (change("documents.0.id", "y"), "item 1: .*documents must have different ids"),
        (change("documents.0.text", 3), "item 1: .*text=3 must be a text"),
        (change("prompt_text", None), "item 1: .*must be texts, both or neither"),
        (change("null_prompt_text", 4), "item 1: .*must be texts, both or neither"),
        ([3], "item 0: TypeError"),
    ],
)
def test_files_that_are_no_items_are_refused(items: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text(json.dumps(items))
    with pytest.raises(ValueError, match=message):
        read_items(path)


def test_files_that_can_t_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    with pytest.raises(ValueError, match=r"items\.json: can't be read"):
        read_items(path)
    path.write_text("[")
    with pytest.raises(ValueError, match=r"items\.json: can't be read"):
        read_items(path)
