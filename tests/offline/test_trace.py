"""Reading traces, and the prompts made of them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.offline.trace import BLOCK_TOKENS, Session, TraceError, Turn, read_trace, write_trace
from jaxdual.offline.trace_prompts import PromptTokens
from jaxdual.offline.trace_scaling import scale_lengths

TOKENS = PromptTokens(50_000, seed=3)


def request(prompt, output=5, first_id=0, **more):
    ids = list(range(first_id, first_id + -(-prompt // BLOCK_TOKENS)))
    return {"timestamp": 0, "input_length": prompt, "output_length": output, "hash_ids": ids, **more}


@pytest.fixture
def read(tmp_path):
    """Reads lines as a trace."""

    def read_lines(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return read_trace(path)

    return read_lines


def test_request_lines_are_sessions_of_one_turn(read):
    first, second = read(request(1200, 7, timestamp=1500), "", request(3, 1, 9))
    assert first == Session("line 1", (Turn(1200, 7, block_ids=(0, 1, 2)),), 1.5)
    assert second == Session("line 3", (Turn(3, 1, block_ids=(9,)),), 0.0)


def test_session_lines_are_turns_in_order(read):
    turns = [{"append": 10, "generate": 4}, {"append": 3, "generate": 2, "drop": 5, "delay": 250}]
    (session,) = read({"session_id": 7, "turns": turns, "timestamp": 2000})
    assert session == Session("7", (Turn(10, 4), Turn(3, 2, 5, 0.25)), 2.0)
    assert list(session.prompt_lengths()) == [10, 12]


def test_request_lines_of_one_session_go_on_from_its_context(read):
    a, b = read(
        request(600, 100, session_id="a", timestamp=3000),
        request(100, 10, 50, session_id="b"),
        request(1000, 20, session_id="a", timestamp=9000, delay=500) | {"hash_ids": [0, 7]},
    )
    assert (a.session_id, a.timestamp, b.session_id) == ("a", 3.0, "b")
    assert a.turns == (Turn(600, 100, block_ids=(0, 1)), Turn(300, 20, 0, 0.5, (0, 7)))


@pytest.mark.parametrize(
    ("prompt", "ids", "kept"),
    [
        (1700, [0, 1, 8, 9], 1600),  # the last full blocks are there: the context, output included
        (1600, [0, 1, 8, 9], 1024),  # no longer than the context
        (1700, [0, 7, 8, 9], 512),  # another second block
        (1700, [7, 1, 8, 9], 0),
        (1500, [0, 1, 2], 1499),  # the same prompt again: something must be new
        (2000, [0, 1, 2, 9], 1600),
    ],
)
def test_rewritten_context_keeps_what_prompts_have_in_common(read, prompt, ids, kept):
    (session,) = read(
        request(1500, 100, session_id="a"),
        {"input_length": prompt, "output_length": 1, "hash_ids": ids, "session_id": "a"},
    )
    assert session.turns[1] == Turn(prompt - kept, 1, 1600 - kept, block_ids=tuple(ids))
    assert list(session.prompt_lengths()) == [1500, prompt]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nope", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        (
            "[1]",
            "must be a JSON object with timestamp, input_length, output_length, hash_ids, session_id, delay, got [1]",
        ),
        (request(5) | {"input_length": 0}, "input_length 0 must be a whole number of at least 1"),
        (request(5) | {"input_length": True}, "input_length True must be a whole number of at least 1"),
        (request(5, "x"), "output_length 'x' must be a whole number of at least 1"),
        (request(5, timestamp=-1), "timestamp -1 must be a number of milliseconds, at least 0"),
        (
            '{"input_length":5,"output_length":1,"hash_ids":[0],"delay":NaN}',
            "delay nan must be a number of milliseconds",
        ),
        (
            request(513) | {"hash_ids": [0]},
            "hash_ids [0] must be 2 whole numbers of at least 0, one for each 512 tokens ",
        ),
        (request(5) | {"hash_ids": [-1]}, "hash_ids [-1] must be 1 whole numbers of at least 0"),
        (request(5) | {"hash_ids": 4}, "hash_ids 4 must be a list that is not empty"),
        ({"input_length": 5, "hash_ids": [1]}, "output_length is missing; required are input_length, output_length, "),
        (request(5, kind="text"), "unknown key 'kind'; known are timestamp, input_length, output_length, hash_ids, "),
        (request(5, session_id=""), "session_id '' must be a whole number, or a string that is not empty"),
        ({"session_id": "s", "turns": []}, "turns [] must be a list that is not empty"),
        ({"turns": [{"append": 1, "generate": 1}]}, "session_id is missing; required are session_id, turns"),
        ({"session_id": "s", "turns": [{"append": 1}]}, "turns[0]: generate is missing; required are append, generate"),
        (
            {"session_id": "s", "turns": [5]},
            "turns[0]: must be a JSON object with append, generate, drop, delay, got 5",
        ),
        (
            {"session_id": "s", "turns": [{"append": 3, "generate": 1}, {"append": 1, "generate": 1, "drop": 5}]},
            "turns[1]: drop 5 must be at most 4, the tokens of the context",
        ),
        (
            {"session_id": "s", "turns": [{"append": 3, "generate": 1, "drop": drop} for drop in (0, 4, 5)]},
            "turns[2]: drop 5 must be at most 4, the tokens of the context",
        ),
        (
            {"session_id": "ok", "turns": [{"append": 3, "generate": 1}]},
            "session_id 'ok' was already used; a session's line holds all of its turns",
        ),
    ],
)
def test_malformed_line_is_named_with_what_is_accepted(read, tmp_path, line, message):
    with pytest.raises(TraceError) as raised:
        read(request(5, session_id="ok"), line)
    assert f"{tmp_path / 'trace.jsonl'}: line 2: {message}" in str(raised.value)


def test_trace_without_requests_or_file_is_refused(read, tmp_path):
    with pytest.raises(TraceError, match=r"trace.jsonl: has no requests"):
        read("", " ")
    with pytest.raises(TraceError, match="nowhere: cannot be read: No such file"):
        read_trace(tmp_path / "nowhere")


@st.composite
def sessions(draw):
    turns, context = [], 0
    for _ in range(draw(st.integers(1, 5))):
        turn = Turn(
            draw(st.integers(1, 50)),
            draw(st.integers(1, 50)),
            draw(st.integers(0, context)),
            draw(st.integers(0, 8)) / 8,
        )
        turns.append(turn)
        context += turn.append + turn.generate - turn.drop
    timestamp = draw(st.none() | st.integers(0, 64).map(lambda n: n / 16))
    return tuple(turns), timestamp


@given(st.lists(sessions(), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_written_trace_reads_the_same(tmp_path_factory, drawn):
    trace = [Session(f"s{i}", turns, timestamp) for i, (turns, timestamp) in enumerate(drawn)]
    path = tmp_path_factory.mktemp("written") / "trace.jsonl"
    write_trace(path, trace)
    assert read_trace(path) == trace


# Prompts of a prefix tree: the id of a block stands for it and all before it.
paths = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(
    st.lists(st.tuples(paths, st.integers(1, BLOCK_TOKENS)), min_size=2, max_size=6), st.sampled_from([1, 0.3, 0.07])
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_prompts_are_equal_where_their_ids_are(drawn, scale):
    ids: dict[tuple, int] = {}
    prompts = []
    for path, last in drawn:
        # The tail of a prompt is a block of its own unless it is full.
        tail = () if last == BLOCK_TOKENS else (last,)
        keys = [tuple(path[: i + 1]) for i in range(len(path))]
        keys[-1] = (*keys[-1], "tail", *tail) if tail else keys[-1]
        blocks = tuple(ids.setdefault(key, len(ids)) for key in keys)
        session = Session("s", (Turn((len(path) - 1) * BLOCK_TOKENS + last, 1, block_ids=blocks),))
        (session,) = scale_lengths([session], scale)
        prompts.append((blocks, TOKENS.prompt(session, 0, ())))
    for blocks, prompt in prompts:
        for others, other in prompts:
            for i in range(min(len(blocks), len(others))):
                low, high = round(i * BLOCK_TOKENS * scale), round((i + 1) * BLOCK_TOKENS * scale)
                a, b = prompt[low:high], other[low:high]
                if blocks[i] == others[i]:
                    assert prompt[:high] == other[:high]
                elif min(len(a), len(b)) > 2:  # fewer random tokens may be equal by chance
                    assert a[: len(b)] != b[: len(a)]


def test_new_tokens_come_after_the_context_that_is_not_dropped():
    session = Session("s", (Turn(4, 3), Turn(5, 2, drop=2)))
    first = TOKENS.prompt(session, 0, ())
    context = [*first, 1, 2, 3]
    second = TOKENS.prompt(session, 1, context)
    assert second[:5] == [*first, 1]
    assert len(second) == 10
    assert second == TOKENS.prompt(session, 1, context)


def test_tokens_depend_on_session_turn_and_seed_only():
    def prompt(session_id="s", number=0, seed=3, vocab=50_000):
        session = Session(session_id, (Turn(40, 1), Turn(40, 1, drop=41)))
        return tuple(PromptTokens(vocab, seed).prompt(session, number, [0] * 41 if number else ()))

    variants = [prompt(), prompt("t"), prompt(number=1), prompt(seed=4)]
    assert len(set(variants)) == 4
    assert prompt() == prompt()
    assert np.all(np.array(prompt(vocab=7)) < 7)
    assert len(set(prompt(vocab=7))) == 7


def test_later_turn_with_blocks_replaces_only_what_the_model_did_not_give():
    blocks = Session("a", (Turn(600, 100, block_ids=(0, 1)), Turn(300, 20, block_ids=(0, 7))))
    first = TOKENS.prompt(blocks, 0, ())
    output = list(range(100))
    second = TOKENS.prompt(blocks, 1, first + output)
    whole = TOKENS.prompt(Session("b", (Turn(1000, 1, block_ids=(0, 7)),)), 0, ())
    assert second == first + output + whole[700:]
