"""Traces made smaller, larger, or fit for more agents. Each function gives new sessions."""

import dataclasses
from collections.abc import Sequence
from itertools import islice, zip_longest

import numpy as np

from jaxdual.offline.trace import Session, Turn

_SYNTHETIC_TOKENS = 64


def limit_turns(sessions: Sequence[Session], most: int) -> list[Session]:
    """The first `most` turns of each session."""
    return [dataclasses.replace(session, turns=session.turns[:most]) for session in sessions]


def limit_requests(sessions: Sequence[Session], most: int) -> list[Session]:
    """The first `most` requests: all first turns come before all second ones, in the order of the sessions."""
    numbers = [range(len(session.turns)) for session in sessions]
    rounds = (index for row in zip_longest(*numbers) for index, turn in enumerate(row) if turn is not None)
    taken = [0] * len(sessions)
    for index in islice(rounds, most):
        taken[index] += 1
    return [
        dataclasses.replace(session, turns=session.turns[:count])
        for session, count in zip(sessions, taken, strict=True)
        if count
    ]


def with_agents(sessions: Sequence[Session], agents: int, seed: int) -> list[Session]:
    """As many sessions as there are agents.

    Agents beyond the sessions replay sessions drawn at random, each after a first round of random tokens with one
    output token, so that no two agents share a prefix (DualPath A.3). All their tokens are their own.
    """
    chosen = list(sessions[:agents])
    rng = np.random.default_rng((seed, agents))
    for number in range(len(chosen), agents):
        session = sessions[int(rng.integers(len(sessions)))]
        turns = (
            Turn(_SYNTHETIC_TOKENS, 1),
            *(dataclasses.replace(turn, block_ids=()) if turn.block_ids else turn for turn in session.turns),
        )
        copy = dataclasses.replace(session, session_id=f"{session.session_id} (agent {number})", turns=turns)
        chosen.append(copy)
    return chosen


def scale_work(sessions: Sequence[Session], append: float, generation: float) -> list[Session]:
    """Sessions with `append` and `generation` times as many appended and generated tokens.

    A turn that drops tokens drops more or fewer of them, so that its prompt keeps its length where it can; the contexts
    of others grow.
    """
    return [
        dataclasses.replace(session, turns=tuple(_scaled_work(session.turns, append, generation)))
        for session in sessions
    ]


def scale_lengths(sessions: Sequence[Session], scale: float) -> list[Session]:
    """Sessions with all lengths times `scale`, none below one token. Equal blocks stay equal.

    Positions are rounded rather than lengths, so that errors don't add up over many turns.
    """
    return [
        dataclasses.replace(
            session, turns=tuple(_scaled_lengths(session.turns, scale)), block_tokens=session.block_tokens * scale
        )
        for session in sessions
    ]


def _scaled_work(turns: Sequence[Turn], append_scale: float, generation_scale: float) -> list[Turn]:
    scaled: list[Turn] = []
    context = more_generated = 0
    for turn in turns:
        append = max(1, round(turn.append * append_scale))
        generate = max(1, round(turn.generate * generation_scale))
        drop = turn.drop and min(max(0, turn.drop + append - turn.append + more_generated), context)
        scaled.append(dataclasses.replace(turn, append=append, generate=generate, drop=drop))
        context += append + generate - drop
        more_generated = generate - turn.generate
    return scaled


def _scaled_lengths(turns: Sequence[Turn], scale: float) -> list[Turn]:
    scaled: list[Turn] = []
    full_context = context = 0  # before and after scaling
    for turn in turns:
        full_kept = full_context - turn.drop
        kept = min(context, round(full_kept * scale)) if turn.drop else context
        prompt = max(kept + 1, round((full_kept + turn.append) * scale))
        full_context = full_kept + turn.append + turn.generate
        end = max(prompt + 1, round(full_context * scale))
        scaled.append(dataclasses.replace(turn, append=prompt - kept, generate=end - prompt, drop=context - kept))
        context = end
    return scaled
