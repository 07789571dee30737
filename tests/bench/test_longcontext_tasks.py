"""The long-context tasks: what their generators promise, and what replies are worth."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from bench.longcontext import mrcr, needle, path_walking
from bench.longcontext.items import FORMS, Form, Item, Task
from bench.longcontext.names import place_names, vocabulary
from bench.longcontext.tasks import TASKS, fit

SIZES = {"needle": 30, "path": 40, "mrcr": 12}


def size_of(task: Task) -> int:
    return SIZES[re.split("_", task.name)[0]]


def question_of(item: Item) -> str:
    """Everything that a model is told."""
    return item.messages[-1][1]


# All tasks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TASKS)
def test_items_follow_from_seed_task_and_size(name: str, form: Form) -> None:
    task, size = TASKS[name], size_of(TASKS[name])
    items = task.items(5, size, form, seed=3)
    assert items == task.items(5, size, form, seed=3)
    assert items[:2] == task.items(2, size, form, seed=3)
    assert len({question_of(item) for item in items}) == 5
    assert items[0] != task.items(1, size, form, seed=4)[0]
    assert items[0] != task.items(1, size + 1, form, seed=3)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TASKS)
def test_sizes_out_of_range_are_refused(name: str, form: Form) -> None:
    task = TASKS[name]
    assert len(task.items(1, task.smallest, form, seed=0)) == 1
    with pytest.raises(ValueError, match=f"{name}: size={task.smallest - 1} must be at least {task.smallest}"):
        task.items(1, task.smallest - 1, form, seed=0)
    largest = task.largest(form)
    if largest is not None:
        assert len(task.items(1, largest, form, seed=0)) == 1
        with pytest.raises(ValueError, match=f"at most {largest}"):
            task.items(1, largest + 1, form, seed=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["needle", "needle_hops", "path", "mrcr_2"])
def test_fitted_items_are_as_long_as_they_may_be(name: str, form: Form) -> None:
    def words(item: Item) -> int:
        return sum(len(content.split()) for _, content in item.messages)

    task = TASKS[name]
    size, items = fit(task, 900, 6, form, 0, words)
    assert max(map(words, items)) <= 900
    assert max(map(words, task.items(6, size + max(2, size // 20), form, 0))) > 900
    with pytest.raises(ValueError, match=r"length=5 must be at least \d+ tokens"):
        fit(task, 5, 1, form, 0, words)


def test_a_length_that_words_do_not_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path: length=100000 must be below \d+ tokens in the form 'words'"):
        fit(TASKS["path"], 100_000, 1, "words", 0, lambda item: len(question_of(item).split()))


@pytest.mark.parametrize("form", FORMS)
def test_names_differ_and_none_begins_another(form: Form) -> None:
    names = place_names(np.random.default_rng(1), 400, form)
    ordered = sorted(names)
    assert len(set(names)) == 400
    # In order, a name that begins another one stands right before one that it begins.
    assert not any(later.startswith(earlier) for earlier, later in itertools.pairwise(ordered))
    if form == "full":
        assert 40 < sum(" " in name for name in names) < 160


def test_a_vocabulary_has_different_words() -> None:
    words = vocabulary(2000, seed=0)
    assert len(set(words)) == 2000
    assert words == vocabulary(2000, seed=0)


# Needles


def codes_of(item: Item) -> dict[str, str]:
    pairs = re.findall(r"^The code of (\w+) is (\w+)\.$", question_of(item), re.MULTILINE)
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["needle", "needle_multi", "needle_hops"])
def test_codes_are_found_by_reading_the_question(name: str, form: Form) -> None:
    task = TASKS[name]
    for item in task.items(9, 30, form, seed=1):
        codes = codes_of(item)
        assert len(codes) == 30
        question = re.search(r"(What|Which) .*\?", question_of(item))
        assert question is not None
        hops = re.search(r"Which code is (\d) steps from (\w+)\?", question[0])
        if name == "needle_hops":
            assert hops is not None
            value = hops[2]
            for _ in range(int(hops[1])):
                value = codes[value]
            assert item.expected == (value,)
            assert value not in codes
            assert len(item.gold) == int(hops[1])
        else:
            asked = re.findall(r"\w+", question[0].partition(" of ")[2].replace(" and ", ", "))
            assert item.expected == tuple(codes[key] for key in asked)
            assert len(asked) == (4 if name == "needle_multi" else 1)
        assert all(line in question_of(item).split("\n") for line in item.gold)


@pytest.mark.parametrize("form", FORMS)
def test_no_chain_of_codes_closes(form: Form) -> None:
    for item in TASKS["needle_hops"].items(6, 60, form, seed=2):
        codes = codes_of(item)
        assert sum(value in codes for value in codes.values()) > 5  # chains beside the one that is asked for
        for key in codes:
            steps = 0
            while key in codes:
                key, steps = codes[key], steps + 1
                assert steps <= 60


def test_published_keys_and_values_have_eight_and_seven_digits() -> None:
    (item,) = TASKS["needle"].items(1, 50, "full", seed=0)
    for key, value in codes_of(item).items():
        assert re.fullmatch("[0-9a-f]{8}", key)
        assert re.fullmatch("[1-9][0-9]{6}", value)


def test_recall_is_the_part_of_the_codes_in_the_reply() -> None:
    item = Item((("user", ""),), ("1234567", "7654321", "1111111", "2222222"), 1)
    assert needle.score(item, "It is 1234567, then 7654321.")["recall"].value == 0.5
    assert needle.score(item, "91234567 and 76543210")["recall"].value == 0
    assert needle.score(item, " ".join(item.expected))["recall"].value == 1


# Path walking


def edges_of(item: Item, form: Form) -> list[tuple[str, str, str]]:
    text = question_of(item).rpartition("Connections:\n")[2]
    line = r"From (.+) go to (.+) by (\w+)\." if form == "words" else r"From ([^,]+), .*, one can go to (.+) by (\w+)\."
    return re.findall(f"^{line}$", text, re.MULTILINE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [4, 5, 60])
def test_the_route_is_the_only_way_to_walk(form: Form, size: int) -> None:
    for item in TASKS["path"].items(5, size, form, seed=1):
        edges = edges_of(item, form)
        assert len(edges) == size
        follower = {source: (source, destination, mode) for source, destination, mode in edges}
        assert len(follower) == size  # no place is left twice
        asked = re.findall(r"Which route leads from (.+?) to (.+?)\?", question_of(item))[-1]
        place, route = asked[0], []
        while place != asked[1]:
            route.append(follower[place])
            place = follower[place][1]
        assert route == [(edge.source, edge.destination, edge.mode) for edge in item.expected]
        assert len(route) == 4
        assert asked[1] not in follower
        assert len({name for edge in edges for name in edge[:2]}) == size + 1
        for start in follower:  # no cycle: all ways lead to the destination
            steps = 0
            while start in follower:
                start, steps = follower[start][1], steps + 1
                assert steps <= size
            assert start == asked[1]
        lines = question_of(item).split("\n")
        assert [re.findall("From (.+?)(?:,| go to)", line)[0] for line in item.gold] == [edge[0] for edge in route]
        assert all(line in lines for line in item.gold)


def test_a_third_of_the_other_connections_lead_to_the_path() -> None:
    rng = np.random.default_rng(0)
    gold, rest = path_walking.graph(rng, 2000, [str(number) for number in range(2001)])
    path = {edge.source for edge in gold} | {gold[-1].destination}
    assert np.mean([edge.destination in path for edge in rest]) == pytest.approx(1 / 3, abs=0.05)


def test_the_published_form_has_an_example_of_other_places() -> None:
    (item,) = TASKS["path"].items(1, 20, "full", seed=0)
    example, _, text = question_of(item).rpartition("Connections:\n")
    assert "</Route>" in example
    names = set(re.findall(r"From ([^,]+),", example))
    assert names
    assert not any(re.search(rf"\b{name}\b", text) for name in names)


def route(item: Item) -> str:
    return "\n".join(["<Route>", *(edge.step for edge in item.expected), "</Route>"])


@pytest.mark.parametrize("form", FORMS)
def test_routes_are_scored_step_by_step(form: Form) -> None:
    (item,) = TASKS["path"].items(1, 20, form, seed=0)

    def figures(reply: str) -> tuple[float, float, float, float]:
        scores = path_walking.score(item, reply)
        return scores["exact"].value, scores["step"].value, scores["step"].of, scores["extracted"].value

    assert figures(route(item)) == (1, 4, 4, 1)
    assert figures("I think so:\n" + route(item) + "\nGood luck!") == (1, 4, 4, 1)
    third = item.expected[2]
    wrong_mode = replace(third, mode="train" if third.mode != "train" else "bus")
    assert figures(route(item).replace(third.step, wrong_mode.step)) == (0, 2, 3, 1)
    assert figures(route(item).replace(third.step + "\n", "")) == (0, 2, 3, 1)
    assert figures(route(item).replace("</Route>", "From x go to y by bus.\n</Route>")) == (0, 4, 4, 1)
    assert figures(route(item).removesuffix("</Route>")) == (0, 0, 1, 0)
    assert figures("<Route></Route>") == (0, 0, 1, 1)


def test_given_steps_are_those_before_the_one_that_is_asked_for() -> None:
    for number, item in enumerate(TASKS["path_step"].items(8, 20, "words", seed=0)):
        lines = item.reply_start.split("\n")
        assert lines[0] == ("<Route>" if number % 4 or lines[0] else "")
        assert len(lines) == 2 + number % 4
        assert lines[-1] == ""
        if number % 4:
            assert lines[-2].endswith(f"go to {item.expected[0].source} by {lines[-2].rpartition(' ')[2]}")
        assert path_walking.score_next(item, item.expected[0].step + "\nFrom")["step"].value == 1
        assert path_walking.score_next(item, "From x go to y by bus.\n" + item.expected[0].step)["step"].value == 0


# MRCR


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("needles", mrcr.NEEDLES)
def test_the_chat_has_the_request_as_often_as_it_should(form: Form, needles: int) -> None:
    for item in TASKS[f"mrcr_{needles}"].items(4, 20, form, seed=1):
        roles = [role for role, _ in item.messages]
        assert roles == ["user", "assistant"] * 20 + ["user"]
        asked = re.search(r"Write (\w{10}) and .* the (\w+) (\w+) about (\w+)\.", question_of(item))
        assert asked is not None
        request = f"Write a {asked[3]} about {asked[4]}."
        answers = [
            answer
            for (role, content), (_, answer) in zip(item.messages, item.messages[1:], strict=False)
            if role == "user" and content == request
        ]
        assert len(answers) == needles
        ordinal = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth").index(asked[2])
        assert item.expected == (asked[1], asked[1] + answers[ordinal])
        others = [content for role, content in item.messages[:-1] if role == "user" and content != request]
        assert any(asked[3] in other.split() for other in others)
        low, high = (60, 150) if form == "full" else (15, 30)
        # A blank may stand for two words never; a sentence may go on for a few words over the drawn number.
        assert all(low <= len(answer.split()) <= high for answer in answers)


@pytest.mark.parametrize("form", FORMS)
def test_answers_that_could_be_confused_share_no_content_word(form: Form) -> None:
    (item,) = TASKS["mrcr_8"].items(1, 16, form, seed=0)
    frames = set(re.findall(r"\w+", " ".join(mrcr._SENTENCES).lower()))
    counts: dict[str, list[set[str]]] = {}
    for (_, request), (role, answer) in zip(item.messages, item.messages[1:], strict=False):
        if role == "assistant":
            counts.setdefault(request, []).append(set(re.findall(r"\w+", answer.lower())) - frames)
    (repeated,) = (answers for answers in counts.values() if len(answers) == 8)
    assert len(set.union(*repeated)) == sum(map(len, repeated))


def test_mrcr_replies_need_the_string_in_front() -> None:
    item = Item((("user", ""),), ("abcdefghij", "abcdefghijOne two three."), 1)

    def figures(reply: str) -> tuple[float, float]:
        scores = mrcr.score(item, reply)
        return scores["ratio"].value, scores["prefixed"].value

    assert figures("abcdefghijOne two three.") == (1, 1)
    assert figures("One two three.") == (0, 0)
    assert figures(" abcdefghijOne two three.") == (0, 0)
    # Seven of eight and of eight characters, by difflib: 2 * 7 / 16.
    item = replace(item, expected=("abcdefghij", "abcdefghijABCDEFGH"))
    assert figures("abcdefghijABCDEFGx") == (pytest.approx(14 / 16), 1)
    assert figures("abcdefghij") == (0, 1)
