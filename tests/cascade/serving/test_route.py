"""The way of a request through the tiers: a table of scores and the tier that answers, and its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual.cascade.gate import Confidence, Gate
from jaxdual.cascade.serving.route import Route

LETTERS = Confidence("choices", ((1,), (2,)))
NAMES = ("small", "middle", "large")


def gate(tau_ik=0.5, tau_t=0.9, uses_probe=True):
    return Gate(LETTERS, tau_ik, tau_t, uses_probe=uses_probe)


def ask(route, scores, lost=()):
    """Walks to the end: `scores` are (P(IK), P(T)) by tier, `lost` the tiers that can't answer, with the failure."""
    lost = dict(lost)
    while route.step is not None:
        step = route.step
        if step.tier in lost:
            route.lost(lost[step.tier])
            continue
        if step.gate is None:
            return route.answered(None)
        p_ik, p_t = scores[step.tier]
        verdict = step.gate.after_prompt(p_ik) or step.gate.after_answer(p_ik, p_t)
        if verdict.passed:
            return route.answered(verdict)
        route.refused(verdict)
    return None


def way(scores, k=None, lost=(), **bounds):
    """The tier that answers, why, and what became of the ones before it."""
    k = k or len(scores) + 1
    route = Route(NAMES[:k], [*(gate() for _ in range(k - 1)), None], **bounds)
    decision = ask(route, scores, lost)
    return decision and (decision.tier, decision.reason, [hop.outcome for hop in decision.hops[:-1]])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], ("small", "last", [])),
        ([(0.5, 0.9)], ("small", "confident", [])),
        ([(0.49, 0.9)], ("middle", "last", ["p_ik"])),
        ([(0.5, 0.89)], ("middle", "last", ["p_t"])),
        ([(0.1, 0.1)], ("middle", "last", ["p_ik"])),
        ([(None, 0.95)], ("small", "confident", [])),
        ([(0.9, 0.95), (0.0, 0.0)], ("small", "confident", [])),
        ([(0.2, 0.95), (0.9, 0.95)], ("middle", "confident", ["p_ik"])),
        ([(0.9, 0.2), (0.9, 0.2)], ("large", "last", ["p_t", "p_t"])),
        ([(0.2, 0.9), (0.9, 0.2)], ("large", "last", ["p_ik", "p_t"])),
    ],
)
def test_a_prompt_stays_where_both_scores_pass_and_the_last_tier_answers_whatever_comes(scores, expected):
    assert way(scores) == expected


def test_scores_and_turns_are_told():
    decision = ask(Route(NAMES, [gate(), gate(), None]), [(0.25, None), (0.75, 0.95)])
    assert [(hop.tier, hop.p_ik, hop.p_t) for hop in decision.hops] == [
        ("small", 0.25, None),
        ("middle", 0.75, 0.95),
    ]
    assert (decision.p_ik, decision.p_t) == (0.75, 0.95)


@pytest.mark.parametrize(("tau", "expected"), [(0.0, "small"), (1.1, "large")])
def test_thresholds_of_0_keep_everything_and_above_1_nothing(tau, expected):
    for scores in ([(0.0, 0.0)] * 2, [(1.0, 1.0)] * 2):
        route = Route(NAMES, [gate(tau, tau), gate(tau, tau), None])
        assert ask(route, scores).tier == expected


@pytest.mark.parametrize(
    ("max_hops", "expected"),
    [
        (0, ("small", "max_hops", [])),
        (1, ("middle", "max_hops", ["p_t"])),
        (2, ("large", "last", ["p_t", "p_t"])),
        (None, ("large", "last", ["p_t", "p_t"])),
    ],
)
def test_after_so_many_escalations_the_tier_that_was_reached_answers(max_hops, expected):
    assert way([(0.9, 0.2), (0.9, 0.2)], max_hops=max_hops) == expected


def test_a_very_low_p_ik_goes_to_the_last_tier_at_once():
    assert way([(0.05, 0.9), (0.9, 0.9)], skip_if_pik_below=0.1) == ("large", "skip", ["p_ik"])
    assert way([(0.1, 0.9), (0.9, 0.9)], skip_if_pik_below=0.1) == ("middle", "confident", ["p_ik"])


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({0: "unavailable"}, ("middle", "confident", ["unavailable"])),
        ({1: "queue_full"}, ("large", "last", ["p_t", "queue_full"])),
        ({0: "failed", 1: "too_long"}, ("large", "last", ["failed", "too_long"])),
        ({2: "timeout"}, ("middle", "confident", ["p_t"])),
    ],
)
def test_a_tier_that_cannot_answer_is_passed_over(lost, expected):
    assert way([(0.9, 0.2), (0.9, 0.95)], lost=lost) == expected


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({2: "timeout"}, ("middle", "fallback", ["p_t", "p_t", "timeout"])),
        ({1: "queue_full", 2: "timeout"}, ("small", "fallback", ["p_t", "queue_full", "timeout"])),
        ({0: "unavailable", 2: "timeout"}, ("middle", "fallback", ["unavailable", "p_t", "timeout"])),
        ({0: "failed", 1: "failed", 2: "failed"}, None),
    ],
)
def test_where_nothing_larger_can_answer_the_largest_that_can_does(lost, expected):
    assert way([(0.9, 0.2), (0.9, 0.2)], lost=lost) == expected


def test_a_tier_that_fails_in_the_fallback_is_followed_by_the_next_smaller_one():
    route = Route(NAMES, [gate(), gate(), None])
    for tier in (0, 1):
        assert route.step.tier == tier
        route.refused(gate().after_prompt(0.2))
    route.lost("timeout")
    assert (route.step.tier, route.step.gate, route.step.reason) == (1, None, "fallback")
    route.lost("failed")
    assert (route.step.tier, route.step.reason) == (0, "fallback")
    route.lost("failed")
    assert route.step is None
    with pytest.raises(ValueError, match="no tier is left"):
        route.lost("failed")


def test_a_skip_past_a_last_tier_that_fails_falls_back_to_one_that_was_not_asked():
    expected = ("middle", "fallback", ["p_ik", "unavailable"])
    assert way([(0.01, 0.9), (0.9, 0.2)], lost={2: "unavailable"}, skip_if_pik_below=0.1) == expected


def test_what_is_no_way_is_refused():
    with pytest.raises(ValueError, match="one gate for each"):
        Route(NAMES, [None])
    with pytest.raises(ValueError, match="every tier but the last"):
        Route(NAMES, [gate(), None, None])
    with pytest.raises(ValueError, match="no gate that could refuse"):
        Route(("small",), [None]).refused(gate().after_prompt(0.1))


probabilities = st.floats(0, 1)


@given(
    queries=st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=20),
    tau_ik=probabilities,
    tau_t=probabilities,
)
def test_p_ik_keeps_a_part_of_what_is_kept_without_it(queries, tau_ik, tau_t):
    def kept(uses_probe):
        def stays(p_ik, p_t):
            route = Route(NAMES[:2], [gate(tau_ik, tau_t, uses_probe), None])
            return ask(route, [(p_ik if uses_probe else None, p_t)]).tier == "small"

        return {number for number, (p_ik, p_t) in enumerate(queries) if stays(p_ik, p_t)}

    assert kept(True) <= kept(False)


@given(
    queries=st.lists(st.tuples(probabilities, probabilities), max_size=20),
    taus=st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)).map(sorted),
)
def test_a_higher_threshold_keeps_no_more(queries, taus):
    def kept(tau):
        return {q for q in queries if ask(Route(NAMES[:2], [gate(tau, tau), None]), [q]).tier == "small"}

    assert kept(taus[1]) <= kept(taus[0])


@given(
    scores=st.lists(st.tuples(probabilities, probabilities), min_size=2, max_size=2),
    lost=st.dictionaries(st.integers(0, 2), st.sampled_from(["unavailable", "timeout", "queue_full"])),
    max_hops=st.none() | st.integers(0, 3),
    skip=probabilities,
)
def test_every_way_ends_and_asks_a_tier_with_its_gate_once(scores, lost, max_hops, skip):
    route = Route(NAMES, [gate(), gate(), None], max_hops=max_hops, skip_if_pik_below=skip)
    decision = ask(route, scores, lost)
    assert (decision is None) == (len(lost) == 3)
    if decision is None:
        return
    refusals = [hop.tier for hop in decision.hops if hop.outcome in ("p_ik", "p_t")]
    assert len(set(refusals)) == len(refusals)
    assert max_hops is None or len(refusals) <= max_hops
    assert decision.tier not in {NAMES[tier] for tier in lost}
