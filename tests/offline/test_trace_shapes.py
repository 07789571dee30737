"""Generated traces, and what is made of traces before they run."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace import sessions

from jaxdual.offline.trace import Session, Turn, read_trace, write_trace
from jaxdual.offline.trace_scaling import limit_requests, limit_turns, scale_lengths, scale_work, with_agents
from jaxdual.offline.trace_shapes import TRACE_SHAPES, TRAJECTORIES, generate_sessions

# DualPath, Table 2: turns, append, generation, total, context; and the longest sequence that the name promises.
TABLE = {
    "32k": (60, 608, 148, 28_639, 17_183, 32 * 1024),
    "48k": (106, 474, 172, 42_607, 25_120, 48 * 1024),
    "64k": (157, 429, 176, 55_958, 32_721, 64 * 1024),
}


@pytest.mark.parametrize("name", TABLE)
def test_generated_trace_has_the_statistics_of_its_table(name):
    turns, append, generate, total, context, longest = TABLE[name]
    made = generate_sessions(name, TRAJECTORIES, seed=0)
    prompts = [list(session.prompt_lengths()) for session in made]
    later = [turn for session in made for turn in session.turns[1:]]
    ends = [lengths[-1] + session.turns[-1].generate for lengths, session in zip(prompts, made, strict=True)]
    assert np.mean([len(session.turns) for session in made]) == pytest.approx(turns, rel=0.03)
    assert np.mean([turn.append for turn in later]) == pytest.approx(append, rel=0.03)
    assert np.mean([turn.generate for turn in later]) == pytest.approx(generate, rel=0.03)
    assert np.mean(list(itertools.chain(*prompts))) == pytest.approx(context, rel=0.03)
    assert np.mean(ends) == pytest.approx(total, rel=0.03)
    assert max(ends) <= longest
    computed = sum(turn.append for turn in later) / sum(sum(lengths[1:]) for lengths in prompts)
    assert computed == pytest.approx(append / context, rel=0.03)
    assert len({session.turns for session in made}) == TRAJECTORIES


def test_contexts_of_a_generated_session_grow_by_the_line():
    shape = TRACE_SHAPES["32k"]
    assert (shape.first, shape.increment) == (5_727, pytest.approx(382, abs=0.5))
    (session,) = generate_sessions("32k", 1, seed=0)
    line = [5_727 + (i + 0.5) * (28_639 - 5_727) / 60 for i in range(len(session.turns))]
    assert list(session.prompt_lengths()) == pytest.approx(line, abs=1)


def test_fewer_sessions_are_the_first_ones_and_a_seed_makes_others():
    assert generate_sessions("48k", 5, seed=1)[:3] == generate_sessions("48k", 3, seed=1)
    assert generate_sessions("48k", 3, seed=1) != generate_sessions("48k", 3, seed=2)
    with pytest.raises(ValueError, match=r"count=501 must be in \[1, 500\]"):
        generate_sessions("32k", 501, seed=0)
    with pytest.raises(ValueError, match="trace '16k' must be one of 32k, 48k, 64k"):
        generate_sessions("16k", 1, seed=0)


def test_generated_trace_survives_a_file(tmp_path):
    made = generate_sessions("32k", 3, seed=0)
    write_trace(tmp_path / "t", made)
    assert read_trace(tmp_path / "t") == made


def trace(*lengths):
    return [Session(f"s{i}", (Turn(10, 4),) * count) for i, count in enumerate(lengths)]


def test_limits_cut_turns_and_requests_turn_by_turn():
    assert [len(one.turns) for one in limit_turns(trace(3, 1, 2), 2)] == [2, 1, 2]
    assert [len(one.turns) for one in limit_requests(trace(3, 1, 2), 5)] == [2, 1, 2]
    assert [len(one.turns) for one in limit_requests(trace(3, 1, 2), 6)] == [3, 1, 2]
    assert [one.session_id for one in limit_requests(trace(3, 1, 2), 2)] == ["s0", "s1"]
    assert limit_requests(trace(3, 1, 2), 99) == trace(3, 1, 2)


def test_agents_beyond_the_sessions_begin_with_a_synthetic_round():
    given_sessions = [*trace(2), Session("b", (Turn(600, 2, block_ids=(0, 1)),), 5.0)]
    assert with_agents(given_sessions, 1, seed=0) == given_sessions[:1]
    agents = with_agents(given_sessions, 9, seed=0)
    assert agents[:2] == given_sessions
    assert len({agent.session_id for agent in agents}) == 9
    sources = {"s0": given_sessions[0], "b": given_sessions[1]}
    for agent in agents[2:]:
        source = sources[agent.session_id.split(" ")[0]]
        assert (agent.turns[0].generate, agent.turns[0].append > 0, agent.turns[0].drop) == (1, True, 0)
        assert [(t.append, t.generate) for t in agent.turns[1:]] == [(t.append, t.generate) for t in source.turns]
        assert not any(turn.block_ids for turn in agent.turns)
        assert agent.timestamp == source.timestamp
    assert len({agent.session_id.split(" ")[0] for agent in agents[2:]}) == 2


def test_scaled_work_leaves_the_lengths_of_prompts_that_drop():
    session = Session("s", (Turn(100, 20), Turn(30, 20, 10), Turn(30, 20, 40), Turn(30, 20)))
    (scaled,) = scale_work([session], 2, 1.5)
    assert scaled.turns == (Turn(200, 30), Turn(60, 30, 50), Turn(60, 30, 80), Turn(60, 30))
    assert list(session.prompt_lengths()) == [100, 140, 150, 200]
    assert list(scaled.prompt_lengths()) == [200, 240, 250, 340]
    (scaled,) = scale_work([session], 0.001, 0.001)
    assert [(turn.append, turn.generate, turn.drop) for turn in scaled.turns] == [(1, 1, 0)] * 4


@given(sessions(), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_scaled_lengths_stay_near_the_scale_and_usable(drawn, scale):
    session = Session("s", *drawn)
    (scaled,) = scale_lengths([session], scale)
    context = 0
    for turn, prompt, full in zip(scaled.turns, scaled.prompt_lengths(), session.prompt_lengths(), strict=True):
        assert turn.append > 0
        assert turn.generate > 0
        assert 0 <= turn.drop <= context
        # Each turn has at least two tokens, whatever the scale.
        assert full * scale - 1 <= prompt <= full * scale + 2 * len(session.turns)
        context += turn.append + turn.generate - turn.drop
    assert scale_lengths([session], 1)[0] == session


def test_small_lengths_add_up_over_many_turns():
    (scaled,) = scale_lengths([Session("s", (Turn(234, 148),) * 100)], 0.02)
    assert list(scaled.prompt_lengths()) == [round((382 * i + 234) * 0.02) for i in range(100)]
