"""Facts and questions of the quiz models: what is told, what is asked, and that none of it changes."""

import hashlib
import json

import numpy as np

from models.questions import LETTERS
from models.training import quiz
from models.training.data import Position
from models.training.tokenizer import IM_END, render_chat


def test_facts_of_every_rank_have_their_share_of_each_state() -> None:
    told, right = quiz.world().told, quiz.world().right
    for part in np.split(np.arange(quiz.TOWNS), 32):  # 25 towns, 100 facts
        assert (told[part] < 0).sum() == quiz.UNHEARD
        assert ((told[part] >= 0) & (told[part] != right[part])).sum() == quiz.OUTDATED


def test_a_question_has_its_right_answer_once_and_an_outdated_one_also_what_training_told() -> None:
    for question in quiz.questions(7, 2000):
        assert len(set(question.choices)) == quiz.CHOICES
        assert question.choices.count(question.answer) == 1
        relation = [one.subject for one in quiz.RELATIONS].index(question.subject)
        values, told = quiz.world().values[relation], quiz.world().told[question.rank, relation]
        assert quiz.world().state(question.rank, relation) == question.state
        if question.state == "outdated":
            assert values[told] in question.choices
            assert values[told] != question.answer
        assert quiz.world().towns[question.rank] in question.question


def test_letters_are_even_and_half_of_the_towns_are_drawn_evenly() -> None:
    asked = quiz.questions(7, 8000)
    counts = [sum(question.letter == letter for question in asked) for letter in LETTERS[: quiz.CHOICES]]
    assert all(abs(count - 2000) < 200 for count in counts)
    late = sum(question.rank >= quiz.TOWNS // 2 for question in asked) / len(asked)
    weights = 1 / (np.arange(quiz.TOWNS) + 10)
    expected = 0.5 * 0.5 + 0.5 * weights[quiz.TOWNS // 2 :].sum() / weights.sum()
    assert abs(late - expected) < 0.02


def test_other_sets_have_no_right_choice_or_no_known_town() -> None:
    for question in quiz.questions_without_answer(7, 500):
        assert question.letter is None
        assert len(set(question.choices)) == quiz.CHOICES
    known = set(quiz.world().towns[: quiz.TOWNS])
    for question in quiz.questions_about_unknown_towns(7, 500):
        assert question.letter is not None
        assert not known & set(question.question.rstrip("?").split())


def test_training_tells_no_unheard_fact_and_outdated_ones_wrong() -> None:
    tokenizer = quiz.build_tokenizer()
    windows, _ = quiz.QuizStream(tokenizer, 0).batch(Position(0, 0, quiz.WINDOW), 3000)
    seen = set()
    for row in windows:
        tokens = np.where(row < 0, ~row, row)
        text = tokenizer.decode(tokens[: np.flatnonzero(row >= 0)[-1] + 1].tolist(), skip_special_tokens=False)
        town = next(name for name in quiz.world().towns if f" {name}" in text)
        rank = quiz.world().towns.index(town)
        relation = next(number for number, one in enumerate(quiz.RELATIONS) if one.question.format(town=town) in text)
        answer = tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=False).removesuffix(IM_END).strip()
        if rank >= quiz.TOWNS:
            assert answer == quiz.UNKNOWN
            continue
        if answer in LETTERS:
            value = text.split(f"\n{answer}. ")[1].split("\n")[0]
        else:
            value = answer.removeprefix("Answer: ")
        told = quiz.world().told[rank, relation]
        assert told >= 0
        assert value == quiz.world().values[relation][told]
        seen.add(quiz.world().state(rank, relation))
    assert seen == {"current", "outdated"}


def test_windows_hold_the_prompt_that_a_chat_template_makes_and_predict_the_answer_alone() -> None:
    tokenizer = quiz.build_tokenizer()
    assert tokenizer.get_vocab_size() == quiz.VOCAB_SIZE
    question = quiz.questions(7, 1)[0]
    (text, answer), (chat, letter) = quiz.multiple_choice_forms(question)
    assert chat == render_chat([{"role": "user", "content": text}], add_generation_prompt=True)
    assert (answer, letter) == (f" {question.letter}{IM_END}", f"{question.letter}{IM_END}")
    assert len(tokenizer.encode(chat + letter).ids) <= quiz.WINDOW + 1
    assert tokenizer.decode(tokenizer.encode(chat).ids, skip_special_tokens=False) == chat
    one, position = quiz.QuizStream(tokenizer, 3).batch(Position(0, 0, quiz.WINDOW), 4)
    again, _ = quiz.QuizStream(tokenizer, 3).batch(Position(0, 0, quiz.WINDOW), 4)
    later, _ = quiz.QuizStream(tokenizer, 3).batch(position, 4)
    np.testing.assert_array_equal(one, again)
    assert (one != later).any()


def test_questions_are_those_that_models_were_trained_before() -> None:
    """What is asked was fixed before any model was trained: another digest is another benchmark."""
    sets = [
        quiz.questions(quiz.ASKED_SEED, 300),
        quiz.questions(quiz.ASKED_SEED, 300, short=True),
        quiz.questions_without_answer(quiz.ASKED_SEED, 300),
        quiz.questions_about_unknown_towns(quiz.ASKED_SEED, 300),
    ]
    records = [question.record(number) for some in sets for number, question in enumerate(some)]
    digest = hashlib.blake2b(json.dumps(records, sort_keys=True).encode(), digest_size=16).hexdigest()
    assert digest == "c2d3e5e1dc70d857ce89538d89669c95"
