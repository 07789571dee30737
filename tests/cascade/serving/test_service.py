"""`CascadeLLM` over scripted tiers: who answers, what each tier sees, and what becomes of failures."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from jaxdual.cascade.config import ExternalTier, Prices
from jaxdual.cascade.decision import Spent
from jaxdual.cascade.options import CascadeOptions, ConfidenceSpec
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.cascade.serving.stream import UnderWay
from jaxdual.cascade.work import Work
from jaxdual.config import ConfigError
from jaxdual.decoding.dysco import DyscoParams
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import EngineDeadError, NotServingError, PromptTooLongError, QueueFullError
from jaxdual.sampling_params import SamplingParams
from jaxdual.served_models import ServedModels
from jaxdual.tokenizer import TokenizerError
from server.metrics import Metrics
from tests.cascade.serving.tiers import SIZES, Remote, TierLLM, cascade_of, config_of
from tests.server.grpc.face import in_loop, until

SHIPPED = Path(__file__).parents[3] / "models" / "shipped" / "base"
GREEDY = SamplingParams(temperature=0, max_tokens=3)
SURE, UNSURE, LOST = (0.9, 0.95), (0.9, 0.5), (0.1, 0.95)


def pair(small=UNSURE, **settings):
    small, large = TierLLM("small", small), TierLLM("large")
    return small, large, cascade_of(small, large, **settings)


async def read(stream):
    """The finished output; closes the stream."""
    async for _ in stream:
        pass
    stream.close()
    return stream.output


async def ask(cascade, prompt="What is a town?", params=GREEDY, **how):
    return await read(await cascade.submit(prompt, params, **how))


def turns(output):
    return [(hop.tier, hop.outcome) for hop in output.decision.hops]


@in_loop
async def test_a_sure_tier_answers_and_the_next_one_hears_nothing():
    _, large, cascade = pair(SURE)
    output = await ask(cascade)
    assert (output.decision.tier, output.decision.reason, turns(output)) == (
        "small",
        "confident",
        [("small", "answered")],
    )
    assert (output.decision.p_ik, output.decision.p_t) == SURE
    assert len(output.outputs[0].token_ids) == 3
    assert not large.submitted


@pytest.mark.parametrize(("scores", "outcome", "upper"), [(UNSURE, "p_t", True), (LOST, "p_ik", False)])
def test_an_unsure_tier_hands_the_prompt_on_and_its_work_is_counted(scores, outcome, upper):
    @in_loop
    async def test():
        small, large, cascade = pair(scores)
        output = await ask(cascade)
        assert turns(output) == [("small", outcome), ("large", "answered")]
        assert (output.decision.tier, output.decision.reason) == ("large", "last")
        tokens = len(output.prompt_token_ids)
        first, last = (hop.spent for hop in output.decision.hops)
        assert first.work == Work(tokens, tokens if upper else 0)
        assert first.output_tokens == (1 if upper else 0)
        assert first.flops == 2 * (60 * tokens + (40 * tokens if upper else 0))
        assert (last.work, last.prompt_tokens, last.output_tokens) == (Work(tokens, tokens), tokens, 3)
        assert output.decision.flops == first.flops + SIZES.flops(last.work)
        assert small.gates[0].uses_probe
        assert large.gates == [None]

    test()


@in_loop
async def test_the_stream_begins_with_the_first_token_and_ends_once():
    _, _, cascade = pair(SURE)
    stream = await cascade.submit("abc", SamplingParams(max_tokens=4))
    assert stream.output.outputs[0].token_ids
    assert stream.output.decision.tier == "small"
    assert cascade.num_unfinished == 1
    lengths = [len(output.outputs[0].token_ids) async for output in stream]
    assert lengths[-1] == 4
    assert lengths == sorted(lengths)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert cascade.num_unfinished == 0


@in_loop
async def test_the_first_token_is_read_at_once_though_no_other_comes():
    small, _, cascade = pair(SURE)
    stream = await cascade.submit("abc", SamplingParams(max_tokens=1))
    small.hold()
    assert [len(output.outputs[0].token_ids) async for output in stream] == [1]
    assert stream.output.finished


@in_loop
async def test_every_tier_makes_its_own_tokens_of_the_same_prompt():
    small, large = TierLLM("small", UNSURE), TierLLM("large", folder=SHIPPED)
    cascade = cascade_of(small, large)
    output = await ask(cascade, "def f(x):\n")
    assert output.prompt_token_ids == large.get_tokenizer().encode("def f(x):\n")
    assert output.prompt_token_ids != small.get_tokenizer().encode("def f(x):\n")
    messages = [{"role": "user", "content": "hello"}]
    output = await ask(cascade, await cascade.tokenize_chat(messages))
    assert output.prompt_token_ids == (await large.tokenize_chat(messages, template_vars={})).tokens
    for prompt, params in (
        ([1, 2, 3], GREEDY),
        ({"prompt_token_ids": [1, 2]}, GREEDY),
        ("a", dataclasses.replace(GREEDY, stop_token_ids=[3])),
        ("a", dataclasses.replace(GREEDY, logit_bias={3: 1.0})),
    ):
        with pytest.raises(ValueError, match="needs tiers with one tokenizer"):
            await cascade.submit(prompt, params)
    with pytest.raises(TokenizerError, match="name one of small, large"):
        cascade.get_tokenizer()


@in_loop
async def test_token_ids_are_taken_where_all_tiers_have_one_tokenizer():
    _, _, cascade = pair()
    assert (await ask(cascade, {"prompt_token_ids": [5, 6, 7]})).prompt_token_ids == [5, 6, 7]
    assert (await ask(cascade, [5, 6, 7])).outputs[0].token_ids == [5, 6, 7]
    assert cascade.get_tokenizer().vocab_size


@in_loop
async def test_what_a_request_leaves_open_is_each_model_s_own():
    small = TierLLM("small", UNSURE, defaults={"temperature": 0.25, "top_k": 7})
    large = TierLLM("large", defaults={"temperature": 0.5})
    cascade = cascade_of(small, large)
    await ask(cascade, params=SamplingParams(max_tokens=2, top_k=3), left_open=("temperature",))
    assert [(params.temperature, params.top_k) for params in (small.params[0], large.params[0])] == [
        (0.25, 3),
        (0.5, 3),
    ]
    await ask(cascade, params=None)
    assert (small.params[1].temperature, small.params[1].top_k) == (0.25, 7)


@in_loop
async def test_what_one_model_only_can_do_is_refused():
    _, _, cascade = pair()
    for params, message in (
        (SamplingParams(n=2), "n=2 must be 1 for 'auto'"),
        (SamplingParams(prompt_logprobs=1), "prompt_logprobs is that of one model"),
        (SamplingParams(dysco=DyscoParams(heads=[(0, 0)])), "dysco is that of one model"),
    ):
        with pytest.raises(ValueError, match=message):
            await cascade.submit("a", params)
    assert cascade.num_unfinished == 0


@in_loop
async def test_a_request_s_options_make_its_gate():
    small, _, cascade = pair(SURE)
    await ask(cascade, options=CascadeOptions(letters=("X", "Y"), mode="choices"))
    tokenizer = small.get_tokenizer()
    (gate,) = small.gates
    assert gate.confidence.mode == "choices"
    assert gate.confidence.tokens[0][0] == tokenizer.encode("X", add_special_tokens=False)[0]
    await ask(cascade, options=CascadeOptions(opening="A"))
    assert small.gates[-1].confidence.kind == "opening"
    small.scores = UNSURE
    assert (await ask(cascade, options=CascadeOptions(max_hops=0))).decision.reason == "max_hops"
    with pytest.raises(ValueError, match="tier 'small': the letter 'zebra fish' is no single token"):
        await cascade.submit("a", GREEDY, options=CascadeOptions(letters=("zebra fish", "b")))
    assert cascade.num_unfinished == 0


@in_loop
async def test_a_request_can_lower_the_bound_of_escalations_and_not_raise_it():
    small, _, cascade = pair(max_hops=0)
    assert (await ask(cascade, options=CascadeOptions(max_hops=5))).decision.tier == "small"
    assert small.gates == [None]


@in_loop
async def test_a_letter_without_a_token_is_an_error_at_the_start():
    _, _, cascade = pair(confidence=ConfidenceSpec(letters=("zebra fish", "b")))
    with pytest.raises(ConfigError, match="tier 'small': the letter 'zebra fish'"):
        await cascade.start()


@in_loop
async def test_an_engine_that_has_no_gates_is_an_error_at_the_start():
    small, _, cascade = pair()
    info = dataclasses.replace(small.info, gate_refusal="no gates with several ranks")
    type(small).info, before = property(lambda self: info), type(small).info
    try:
        with pytest.raises(ConfigError, match="tier 'small' can't have a gate: no gates with several ranks"):
            await cascade.start()
    finally:
        type(small).info = before


@pytest.mark.parametrize("tier", ["small", "large"])
def test_leaving_ends_the_request_in_the_tier_that_it_is_in(tier):
    @in_loop
    async def test():
        small, large, cascade = pair(UNSURE if tier == "large" else SURE)
        held = {"small": small, "large": large}[tier]
        held.hold()
        asking = asyncio.create_task(ask(cascade, request_id="mine"))
        await until(lambda: held.submitted == ["mine"], "the request to be in its tier")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert held.closed == ["mine"]
        assert (held.num_unfinished, cascade.num_unfinished) == (0, 0)

    test()


@in_loop
async def test_closing_the_answer_ends_it():
    small, _, cascade = pair(SURE)
    stream = await cascade.submit("abc", SamplingParams(max_tokens=400, ignore_eos=True))
    stream.close()
    assert stream.output.outputs[0].finish_reason == "abort"
    assert (small.num_unfinished, cascade.num_unfinished) == (0, 0)


@pytest.mark.parametrize("scores", [SURE, UNSURE])
def test_an_abort_reaches_a_request_while_tiers_are_asked(scores):
    @in_loop
    async def test():
        small, large, cascade = pair(scores)
        held = small if scores is SURE else large
        held.hold()
        asking = asyncio.create_task(ask(cascade, request_id="mine"))
        await until(lambda: held.submitted == ["mine"], "the request to be in its tier")
        heard = []
        cascade.on_decision(heard.append)
        assert cascade.abort("mine")
        assert not cascade.abort("other")
        output = await asking
        assert output.outputs[0].finish_reason == "abort"
        assert not cascade.abort("mine")
        assert heard == [output.decision]
        assert (output.decision.reason, output.decision.hops[-1].outcome) == ("aborted", "aborted")

    test()


def test_an_abort_between_two_tiers_ends_the_request_in_the_next_one():
    class Stream:
        closed = False

        def close(self):
            self.closed = True

    under_way, stream = UnderWay(0.0), Stream()
    under_way.abort()
    under_way.enter(stream)
    assert stream.closed


@in_loop
async def test_an_id_is_one_request_s_at_a_time():
    small, _, cascade = pair(SURE)
    small.hold()
    first = asyncio.create_task(ask(cascade, request_id="mine"))
    await until(lambda: bool(small.submitted), "the request to be taken")
    with pytest.raises(ValueError, match="request_id='mine' is in use"):
        await cascade.submit("a", GREEDY, "mine")
    small.go()
    assert (await first).finished
    assert (await ask(cascade, request_id="mine")).finished


@pytest.mark.parametrize(
    ("close", "outcome"), [(TierLLM.fill, "queue_full"), (TierLLM.stop, "unavailable")], ids=["full", "stopped"]
)
def test_a_tier_that_takes_nothing_is_passed_over_and_the_last_one_s_place_is_taken(close, outcome):
    @in_loop
    async def test():
        small, large, cascade = pair()
        close(small)
        cascade.check_door()
        assert turns(await ask(cascade)) == [("small", outcome), ("large", "answered")]
        small.closed_by = None
        close(large)
        output = await ask(cascade)
        assert turns(output) == [("small", "p_t"), ("large", outcome), ("small", "answered")]
        assert output.decision.reason == "fallback"
        close(small)
        error = QueueFullError if outcome == "queue_full" else NotServingError
        with pytest.raises(error):
            cascade.check_door()
        with pytest.raises(error):
            await ask(cascade)
        assert cascade.num_unfinished == 0

    test()


@in_loop
async def test_a_tier_that_breaks_before_its_answer_is_passed_over():
    small, large, cascade = pair()
    small.fails = True
    assert turns(await ask(cascade)) == [("small", "failed"), ("large", "answered")]
    large.fails = True
    with pytest.raises(EngineDeadError, match="tier 'large': it broke"):
        await ask(cascade)
    assert cascade.num_unfinished == 0


@in_loop
async def test_a_tier_that_breaks_within_its_answer_ends_it_with_an_error():
    small, _, cascade = pair(SURE)
    stream = await cascade.submit("abc", SamplingParams(max_tokens=400, ignore_eos=True))
    small.die()
    output = await read(stream)
    assert (output.outputs[0].finish_reason, output.decision.tier) == ("error", "small")


@in_loop
async def test_a_prompt_too_long_for_a_tier_goes_to_one_that_holds_it():
    small, large = TierLLM("small", SURE, max_model_len=8), TierLLM("large", max_model_len=64)
    cascade = cascade_of(small, large)
    assert cascade.max_model_len == 64
    assert turns(await ask(cascade, [5] * 20)) == [("small", "too_long"), ("large", "answered")]
    with pytest.raises(PromptTooLongError, match="at most 7"):
        await ask(cascade, [5] * 100)


@in_loop
async def test_times_count_from_the_arrival_at_the_first_tier():
    _, large, cascade = pair()
    large.hold()
    asking = asyncio.create_task(ask(cascade))
    await until(lambda: bool(large.submitted), "the second tier's turn")
    (stream,) = large._streams.values()
    entered = stream.output.metrics.arrival_time
    large.go()
    output = await asking
    assert output.metrics.arrival_time < entered < output.metrics.first_token_time


@in_loop
async def test_decisions_are_told_when_requests_have_ended():
    _, _, cascade = pair()
    told = []
    cascade.on_decision(told.append)
    output = await ask(cascade)
    assert told == [output.decision]
    stream = await cascade.submit("a", SamplingParams(max_tokens=300, ignore_eos=True))
    assert len(told) == 1
    stream.close()
    stream.close()
    assert len(told) == 2


@in_loop
async def test_draining_lets_requests_be_handed_on_and_refuses_new_ones():
    small, large, cascade = pair()
    small.hold()
    asking = asyncio.create_task(ask(cascade))
    await until(lambda: bool(small.submitted), "the request to be taken")
    draining = asyncio.create_task(cascade.drain(20))
    await asyncio.sleep(0)
    assert cascade.state is EngineState.DRAINING
    for refused in (cascade.check_door, cascade._check_open):
        with pytest.raises(NotServingError, match="shutting down"):
            refused()
    assert not small.drained
    small.go()
    assert turns(await asking)[-1] == ("large", "answered")
    await draining
    assert len(small.drained) == len(large.drained) == 1


@in_loop
async def test_draining_ends_what_is_left():
    small, _, cascade = pair()
    small.hold()
    asking = asyncio.create_task(ask(cascade))
    await until(lambda: bool(small.submitted), "the request to be taken")
    await cascade.drain(0)
    assert (await asking).outputs[0].finish_reason == "abort"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("SERVING", "SERVING"), "SERVING"),
        (("SERVING", "WARMING"), "WARMING"),
        (("RESTARTING", "WARMING"), "RESTARTING"),
        (("STARTING", "RESTARTING"), "STARTING"),
        (("STOPPED", "SERVING"), "SERVING"),
        (("SERVING", "STOPPED"), "SERVING"),
        (("STOPPED", "STOPPED"), "STOPPED"),
    ],
)
def test_the_state_is_the_least_ready_one_of_the_engines_that_are_left(states, expected):
    small, large, cascade = pair()
    heard = []
    cascade.on_state(heard.append)
    for engine, state in zip((small, large), states, strict=True):
        engine.set_state(EngineState[state])
    assert cascade.state is EngineState[expected]
    assert heard[-1] is EngineState[expected]


def test_the_fingerprint_is_that_of_models_and_thresholds():
    _, _, cascade = pair()
    _, _, same = pair()
    _, _, other = pair(max_hops=1)
    assert cascade.system_fingerprint == same.system_fingerprint != other.system_fingerprint
    config = cascade.config
    tau = dataclasses.replace(config.tiers[0], tau_t=0.8)
    changed = CascadeLLM(dataclasses.replace(config, tiers=(tau, config.tiers[1])), cascade.engines)
    assert changed.system_fingerprint != cascade.system_fingerprint


def test_a_tier_without_an_engine_is_an_error():
    with pytest.raises(ConfigError, match="tier 'large' has no engine"):
        CascadeLLM(config_of([TierLLM("large")]), {})


@in_loop
async def test_a_request_that_is_given_up_before_its_answer_is_decided_as_such():
    """What it took until then counts."""
    _, large, cascade = pair(UNSURE)
    heard = []
    cascade.on_decision(heard.append)
    large.hold()
    asking = asyncio.create_task(ask(cascade, request_id="mine"))
    await until(lambda: large.submitted == ["mine"], "the request to be in the second tier")
    asking.cancel()
    await asyncio.wait((asking,))
    (decision,) = heard
    assert (decision.tier, decision.reason) == ("large", "aborted")
    assert [hop.outcome for hop in decision.hops] == ["p_t", "aborted"]
    assert decision.hops[0].spent.prompt_tokens > 0


# The external tier.


def remote_pair(url, scores=UNSURE, **settings):
    small = TierLLM("small", scores)
    external = ExternalTier(name="remote", url=url, model="gpt", **settings)
    return small, cascade_of(small, remote=external)


@in_loop
async def test_a_remote_answers_last_with_the_prompt_as_it_came():
    async with Remote("Hel", "lo", usage=(11, 2)).serving() as remote:
        _, cascade = remote_pair(remote.url, parameters=10, prices=Prices(input=1.0, output=2.0))
        messages = [{"role": "user", "content": "hello"}]
        prompt = await cascade.tokenize_chat(messages)
        params = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.5, stop=["x"], seed=3)
        output = await ask(cascade, prompt, params, left_open=("top_p",))
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("Hello", "stop")
        assert (output.num_prompt_tokens, output.num_output_tokens) == (11, 2)
        assert turns(output) == [("small", "p_t"), ("remote", "answered")]
        spent = output.decision.hops[-1].spent
        assert spent == Spent(Work(13, 13), 2 * 10 * 13, 11, 2, spent.seconds, 15e-6)
        assert remote.paths == ["/v1/chat/completions"]
        assert remote.bodies == [
            {"model": "gpt", "stream": True, "stream_options": {"include_usage": True}}
            | {"messages": messages, "max_completion_tokens": 5, "temperature": 0.5, "stop": ["x"], "seed": 3}
        ]
        await ask(cascade, "plain", SamplingParams(max_tokens=None))
        assert remote.paths[-1] == "/v1/completions"
        assert remote.bodies[-1]["prompt"] == "plain"
        assert not {"max_tokens", "temperature"} & set(remote.bodies[-1])


@in_loop
async def test_answers_of_a_remote_count_in_the_usual_metrics():
    async with Remote("Hel", "lo", usage=(11, 2)).serving() as remote:
        _, cascade = remote_pair(remote.url)
        metrics = Metrics(ServedModels(cascade))
        stream = metrics.observe(await cascade.submit("abc", GREEDY), "auto")
        async for _ in stream:
            pass
        shown = metrics.expose()[0].decode()
        for name, value in (("prompt_tokens_total", 11), ("generation_tokens_total", 2)):
            assert f'jaxdual:{name}{{model_name="auto"}} {value}.0' in shown
        assert 'jaxdual:time_to_first_token_seconds_count{model_name="auto"} 1.0' in shown


@in_loop
async def test_the_key_is_that_of_the_named_variable():
    import os

    os.environ["A_KEY"] = "secret"
    try:
        async with Remote("a").serving() as remote:
            _, cascade = remote_pair(remote.url, api_key_env="A_KEY")
            await ask(cascade)
            assert remote.headers[0]["authorization"] == "Bearer secret"
    finally:
        del os.environ["A_KEY"]
    with pytest.raises(ConfigError, match="A_KEY is not set"):
        remote_pair("http://127.0.0.1:1/v1", api_key_env="A_KEY")


@pytest.mark.parametrize(
    ("status", "events", "outcome"),
    [
        (429, ["x"], "queue_full"),
        (503, ["x"], "unavailable"),
        (400, ["x"], "failed"),
        (500, ["x"], "failed"),
        (200, [30.0], "timeout"),
        (200, [], "failed"),
        (200, [ConnectionError()], "failed"),
        (200, ["not JSON"], "failed"),
        (200, [{"error": {"message": "busy"}}], "failed"),
        (200, [part for _ in range(60) for part in (": keep-alive", 0.05)], "timeout"),
        (200, ['{"choices": [{"delta": null}]}'], "failed"),
        (200, ['{"choices": ["x"]}'], "failed"),
        (200, ['{"choices": {"a": 1}}'], "failed"),
        (200, ['{"choices": [], "usage": [1]}'], "failed"),
        (200, ['{"choices": [], "usage": {"prompt_tokens": 1e999, "completion_tokens": 1}}'], "failed"),
        (200, ['{"choices": ' + "[" * 20000 + "]" * 20000 + "}"], "failed"),
    ],
)
def test_a_remote_that_does_not_answer_is_stood_in_for(status, events, outcome):
    @in_loop
    async def test():
        async with Remote().serving() as remote:
            remote.status, remote.events = status, events
            _, cascade = remote_pair(remote.url, timeout=0.2, connect_timeout=1.0)
            output = await ask(cascade)
            assert turns(output) == [("small", "p_t"), ("remote", outcome), ("small", "answered")]
            assert output.decision.reason == "fallback"
            assert len(output.outputs[0].token_ids) == 3

    test()


@in_loop
async def test_a_remote_that_is_not_there_is_stood_in_for():
    _, cascade = remote_pair("http://127.0.0.1:1/v1")
    assert turns(await ask(cascade))[1] == ("remote", "unavailable")


@pytest.mark.parametrize("end", [ConnectionError(), "[DONE]", 30.0])
def test_a_remote_that_dies_within_its_answer_ends_it_with_an_error(end):
    @in_loop
    async def test():
        async with Remote("Hel").serving() as remote:
            remote.events = [remote.events[0], 0.05, end]
            _, cascade = remote_pair(remote.url, timeout=0.2)
            output = await ask(cascade)
            assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("Hel", "error")
            assert output.decision.tier == "remote"
            assert cascade.num_unfinished == 0

    test()


@pytest.mark.parametrize("events", [[], ["first"]])
def test_leaving_closes_the_remote_s_connection(events):
    @in_loop
    async def test():
        async with Remote("Hel").serving() as remote:
            remote.events = [*(remote.events[:1] if events else []), 30.0]
            _, cascade = remote_pair(remote.url)
            if events:
                stream = await cascade.submit("a", GREEDY)
                stream.close()
                assert stream.output.outputs[0].finish_reason == "abort"
            else:
                asking = asyncio.create_task(ask(cascade))
                await until(lambda: bool(remote.bodies), "the request to be there")
                asking.cancel()
            await until(lambda: remote.gone == 1, "the connection to be closed")
            assert cascade.num_unfinished == 0

    test()


@in_loop
async def test_a_remote_is_asked_for_text_only():
    _, cascade = remote_pair("http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="logprobs: the last tier of 'auto' is elsewhere"):
        await cascade.submit("a", SamplingParams(logprobs=1))
    prompt = await cascade.tokenize_chat([{"role": "user", "content": "a"}], template_vars={"tools": [{"a": 1}]})
    with pytest.raises(ValueError, match="tools: the last tier"):
        await cascade.submit(prompt, GREEDY)
    with pytest.raises(ValueError, match="needs tiers with one tokenizer"):
        await cascade.submit([1, 2], GREEDY)
