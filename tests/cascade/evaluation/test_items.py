"""Questions from files, their splits, and the tokens that they are asked and answered in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from jaxdual.cascade.evaluation.item_prompts import (
    answer_of,
    default_form,
    p_true_prompt,
    prompt_of,
    same_answer,
)
from jaxdual.cascade.evaluation.items import Item, read_items, split_items
from jaxdual.tokenizer import Tokenizer
from models.training import quiz


def write(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries))
    return path


def question(**fields: object) -> dict[str, object]:
    return {"question": "Which?", "choices": ["x", "y", "z"], "answer": 1, "subject": "letters", **fields}


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("B", 1), ("b", 1), ("z", 2), (" x ", 0), (None, None)])
def test_the_answer_is_an_index_a_letter_or_a_choice(tmp_path: Path, answer: object, index: int | None) -> None:
    (item,) = read_items(write(tmp_path / "items.jsonl", question(answer=answer)))
    assert item == Item("1", "Which?", ("x", "y", "z"), index, "letters")


def test_a_choice_that_is_a_letter_is_meant_before_the_letter(tmp_path: Path) -> None:
    (item,) = read_items(write(tmp_path / "items.jsonl", question(choices=["B", "A"], answer="A")))
    assert item.answer == 1


def test_fields_that_may_be_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "items.jsonl", "", {"question": "Who?", "answer": "me", "id": "q", "tags": {"rank": 3}}, "")
    assert read_items(file) == [Item("q", "Who?", (), "me", "general knowledge", {"rank": 3})]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{", ":2: "),
        ("[]", ":2: must be a JSON object"),
        ({"answer": 1}, ":2: 'question' is missing"),
        (question(answer=3), ":2: answer=3 must be 0 to 2, a letter from A to C"),
        (question(answer=-1), ":2: answer=-1"),
        (question(answer=True), ":2: answer=True"),
        (question(answer="D"), ":2: answer='D'"),
        (question(choices=["x", "x"], answer="x"), ":2: .*several choices"),
        (question(choices=["x"]), ":2: 1 choices; from 2 to 10"),
        (question(choices="xyz"), ":2: choices='xyz' must be a list"),
        (question(question=" "), ":2: question=' ' must be a text"),
        (question(id="1"), ":2: id '1' is also that of line 1"),
        (question(tags=3), ":2: tags=3"),
        ({"question": "Who?", "answer": 3}, ":2: answer=3 must be a text"),
        ({"question": "Who?", "answer": "me"}, "with and without choices"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, entry: object, told: str) -> None:
    with pytest.raises(ValueError, match=rf"items.jsonl.*({told})"):
        read_items(write(tmp_path / "items.jsonl", question(), entry))


def test_a_file_must_be_there_and_have_items(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"items.jsonl: can't be read"):
        read_items(tmp_path / "items.jsonl")
    with pytest.raises(ValueError, match=r"items.jsonl: has no items"):
        read_items(write(tmp_path / "items.jsonl", ""))


def many(counts: dict[str, int]) -> list[Item]:
    return [
        Item(f"{subject} {number}", "?", ("x", "y"), 0, subject)
        for subject, count in counts.items()
        for number in range(count)
    ]


def test_each_subject_gives_a_tenth_to_test_and_to_validation_rounded_up() -> None:
    items = many({"a": 100, "b": 101, "c": 7, "d": 1})
    splits = split_items(items)
    counts = Counter((item.subject, split) for item, split in zip(items, splits, strict=True))
    assert [counts["a", split] for split in ("train", "validation", "test")] == [80, 10, 10]
    assert [counts["b", split] for split in ("train", "validation", "test")] == [79, 11, 11]
    assert [counts["c", split] for split in ("train", "validation", "test")] == [5, 1, 1]
    assert [counts["d", split] for split in ("train", "validation", "test")] == [0, 0, 1]


def test_a_subjects_split_follows_from_the_seed_alone() -> None:
    items = many({"a": 40, "b": 40})
    splits = split_items(items)
    assert splits == split_items(items)
    assert splits != split_items(items, seed=1)
    swapped = split_items(items[40:] + items[:40])
    assert swapped[40:] + swapped[:40] == splits
    assert splits[:40] != splits[40:]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from models.training.tokenizer import save

    folder = tmp_path_factory.mktemp("quiz")
    save(quiz.build_tokenizer(), folder, 256)
    return Tokenizer.from_dir(folder)


def test_prompts_are_those_that_quiz_models_are_trained_on(tokenizer: Tokenizer) -> None:
    asked, short = quiz.questions(7, 1)[0], quiz.questions(7, 1, short=True)[0]
    item = Item("1", asked.question, asked.choices, 0, asked.subject)
    (text, _), (chat, _) = quiz.multiple_choice_forms(asked)
    assert prompt_of(tokenizer, item, "text") == tokenizer.encode(text)
    assert prompt_of(tokenizer, item, "chat") == tokenizer.encode(chat)
    assert default_form(tokenizer) == "chat"
    item = Item("1", short.question, (), short.answer, short.subject)
    assert prompt_of(tokenizer, item, "chat") == tokenizer.encode(quiz.short_answer_form(short, "x")[0])
    text = tokenizer.decode(prompt_of(tokenizer, item, "text"))
    assert text.endswith(f"\n\nQuestion: {short.question}")


def test_p_true_asks_of_the_answer_that_was_given(tokenizer: Tokenizer) -> None:
    asked = quiz.questions(7, 1)[0]
    item = Item("1", asked.question, asked.choices, 0, asked.subject)
    text = tokenizer.decode(p_true_prompt(tokenizer, item, 2, "text"))
    assert text.startswith(tokenizer.decode(prompt_of(tokenizer, item, "text")) + " C\n")
    assert text.endswith("A. True\nB. False\nThe proposed answer is:")


def test_short_answers_are_compared_without_opening_case_and_edges() -> None:
    assert answer_of("Answer: Lake Tiva.") == answer_of(" answer:Lake Tiva") == "Lake Tiva"
    assert answer_of("I do not know.") == "I do not know"
    assert same_answer("lake  tiva", "Lake Tiva.")
    assert not same_answer("Lake Tivo", "Lake Tiva")
