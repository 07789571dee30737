"""A cascade and its tiers behind every face: who is asked, and where the decision shows."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.kserve import open_inference_pb2 as kserve
from server.proto.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.cascade.serving.tiers import TierLLM, cascade_of
from tests.server.grpc.face import in_loop, read_all, serving, status
from tests.server.http.scripted import RunningServer

UNSURE = (0.9, 0.5)
BODY = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
MESSAGES = [{"role": "user", "content": "hello"}]


class CascadeServer(RunningServer):
    def __init__(self):
        super().__init__(self._make)

    def _make(self):
        self.small, self.large = TierLLM("small", UNSURE), TierLLM("large")
        return cascade_of(self.small, self.large)

    def post(self, path="completions", **fields):
        given = {name: value for name, value in (BODY | fields).items() if value is not ...}
        return httpx.post(f"{self.url}/v1/{path}", json=given, timeout=20)

    def chat(self, **fields):
        return self.post("chat/completions", prompt=..., messages=MESSAGES, **fields)

    def samples(self):
        families = parse(httpx.get(f"{self.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {(one.name.removeprefix("jaxdual:"), frozenset(one.labels.items())): one.value for one in samples}


@pytest.fixture
def server():
    with CascadeServer() as running:
        yield running


@pytest.mark.parametrize("named", [{}, {"model": "auto"}])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_cascade_answers_requests_that_name_it_or_nothing(server, path, named):
    response = server.post(**named) if path == "completions" else server.chat(**named)
    body = response.json()
    assert (body["model"], response.headers["x-jaxdual-tier"]) == ("auto", "large")
    assert len(server.small.submitted) == len(server.large.submitted) == 1
    decision = body["cascade"]
    assert (decision["tier"], decision["reason"], decision["p_ik"], decision["p_t"]) == ("large", "last", None, None)
    small, large = decision["hops"]
    assert (small["tier"], small["outcome"], small["p_ik"], small["p_t"]) == ("small", "p_t", 0.9, 0.5)
    tokens = body["usage"]["prompt_tokens"]
    assert (small["lower_tokens"], small["upper_tokens"], small["output_tokens"]) == (tokens, tokens, 1)
    assert (large["outcome"], large["output_tokens"]) == ("answered", 3)
    assert decision["flops"] == small["flops"] + large["flops"] == 2 * 2 * 100 * tokens
    assert small["seconds"] > 0


def test_a_tier_answers_under_its_own_name_as_if_it_were_alone(server):
    response = server.post(model="small", n=2)
    assert response.json()["model"] == "small"
    assert len(response.json()["choices"]) == 2
    assert "cascade" not in response.json()
    assert "x-jaxdual-tier" not in response.headers
    assert server.small.gates == [None]
    assert not server.large.submitted


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_brings_the_decision_with_the_finish_reason(server, path, include_usage):
    fields = {"stream": True, "stream_options": {"include_usage": include_usage}}
    response = server.post(**fields) if path == "completions" else server.chat(**fields)
    assert response.headers["x-jaxdual-tier"] == "large"
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert {chunk["model"] for chunk in chunks} == {"auto"}
    (last,) = [chunk for chunk in chunks if "cascade" in chunk]
    assert last["choices"][0]["finish_reason"] == "length"
    assert [hop["outcome"] for hop in last["cascade"]["hops"]] == ["p_t", "answered"]
    assert last["cascade"]["hops"][-1]["output_tokens"] == 3


def test_several_prompts_go_their_own_ways_at_once(server):
    server.call(server.small.hold)
    server.call(server.large.hold)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, prompt=[[5, 6], [7, 8], [9, 10]])
        server.wait_for(lambda: len(server.small.submitted) == 3, "all prompts to be in the first tier")
        server.call(server.small.go)
        server.call(server.large.go)
        body = answer.result()
    assert [decision["tier"] for decision in body.json()["cascade"]] == ["large"] * 3
    assert body.headers["x-jaxdual-tier"] == "large, large, large"
    assert [choice["index"] for choice in body.json()["choices"]] == [0, 1, 2]


def test_the_options_of_a_request_reach_its_gate(server):
    assert server.post(cascade={"max_hops": 0}).json()["cascade"]["reason"] == "max_hops"
    assert server.post(cascade={"letters": ["X", "Y", "Z"], "mode": "choices"}).status_code == 200
    assert len(server.small.gates[-1].confidence.tokens) == 3
    assert server.chat(cascade={"opening": "A"}).status_code == 200
    assert server.small.gates[-1].confidence.kind == "opening"


def test_what_a_body_leaves_open_is_each_model_s_own(server):
    server.small.defaults, server.large.defaults = {"temperature": 0.25, "top_k": 9}, {"temperature": 0.5}
    server.post(temperature=..., top_k=3)
    sampled = [(tier.params[0].temperature, tier.params[0].top_k) for tier in (server.small, server.large)]
    assert sampled == [(0.25, 3), (0.5, 3)]


@pytest.mark.parametrize(
    ("fields", "status_code", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "'auto', 'small' and 'large' are served"),
        ({"model": "small", "cascade": {}}, 400, "cascade", "'small' is one model, and no cascade"),
        ({"cascade": {"letter": 1}}, 400, "cascade", "unknown field 'letter'"),
        ({"cascade": {"max_hops": -1}}, 400, "cascade", "max_hops=-1 must be"),
        ({"cascade": 3}, 400, "cascade", "must be an object"),
        ({"cascade": {"letters": ["zebra fish", "b"]}}, 400, "cascade", "'zebra fish' is no single token"),
        ({"n": 2}, 400, None, "n=2 must be 1 for 'auto'"),
        ({"prompt_logprobs": 1}, 400, None, "prompt_logprobs is that of one model"),
        ({"prompt": [[5], [6]], "logprobs": 1}, 400, "logprobs", "one prompt at a time"),
        ({"prompt": [5] * 600}, 400, "prompt", "at most 511"),
    ],
)
def test_what_can_not_be_asked_is_refused(server, fields, status_code, param, message):
    response = server.post(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status_code, param)
    assert message in error["message"]
    assert server.call(lambda: server.llm.num_unfinished) == 0


def test_log_probabilities_are_those_of_the_tier_that_answers(server):
    tokens = server.post(logprobs=1).json()["choices"][0]["logprobs"]
    assert len(tokens["tokens"]) == 3
    assert [len(top) for top in tokens["top_logprobs"]] == [1, 1, 1]


def test_models_list_the_cascade_and_its_tiers(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [card.id for card in client.models.list()] == ["auto", "small", "large"]
        assert client.models.retrieve("small").id == "small"
        assert client.models.retrieve("auto").tiers == ["small", "large"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


def test_health_goes_on_without_a_tier_that_has_stopped_and_tells_which(server):
    def health():
        response = httpx.get(f"{server.url}/health")
        return response.status_code, response.json()

    assert health() == (200, {"status": "serving", "tiers": {"small": "serving", "large": "serving"}})
    server.call(server.small.set_state, EngineState.WARMING)
    assert health() == (503, {"status": "warming up", "tiers": {"small": "warming up", "large": "serving"}})
    server.call(server.small.set_state, EngineState.STOPPED)
    server.small.closed_by = NotServingError("gone")
    assert health() == (200, {"status": "serving", "tiers": {"small": "stopped", "large": "serving"}})
    assert server.post().json()["cascade"]["hops"][0]["outcome"] == "unavailable"
    server.call(server.large.set_state, EngineState.STOPPED)
    assert health()[0] == 503


def test_decisions_are_counted_by_tier_and_engines_by_their_names(server):
    server.call(lambda: server.small.set_stats(num_running=3))
    server.post()
    server.small.scores = (0.1, 0.9)
    server.post()
    server.small.scores = (0.9, 0.95)
    server.post()
    server.post(model="small")
    server.post(model="small", cascade={})
    samples = server.samples()

    def sample(name, **labels):
        return samples[name, frozenset(labels.items())]

    cascade = {"model_name": "auto"}
    assert sample("cascade_requests_total", **cascade, tier="small", reason="confident") == 1
    assert sample("cascade_requests_total", **cascade, tier="large", reason="last") == 2
    assert sample("cascade_escalations_total", **cascade, tier="small", cause="p_t") == 1
    assert sample("cascade_escalations_total", **cascade, tier="small", cause="p_ik") == 1
    whole = 2 * 100 * 3
    assert sample("cascade_flops_total", **cascade, tier="small", accounting="all_passes") == whole * 2 + 2 * 60 * 3
    assert sample("cascade_flops_total", **cascade, tier="small", accounting="answering_pass") == whole
    assert sample("cascade_flops_total", **cascade, tier="large", accounting="all_passes") == whole * 2
    assert sample("cascade_p_ik_count", **cascade, tier="small") == 3
    assert sample("cascade_p_t_count", **cascade, tier="small") == 2
    assert sample("request_success_total", **cascade, finished_reason="length") == 3
    assert sample("request_success_total", model_name="small", finished_reason="length") == 1
    assert sample("generation_tokens_total", model_name="auto") == 9
    assert sample("num_requests_running", model_name="small") == 3
    assert sample("num_requests_running", model_name="large") == 0
    assert sample("request_refused_total", model_name="small", reason="invalid_request") == 1


def test_a_client_that_leaves_ends_its_request_in_its_tier(server):
    server.call(server.large.hold)
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{server.url}/v1/completions", json=BODY, timeout=0.5)
    server.wait_for(lambda: server.large.closed and not server.llm.num_unfinished, "the request to be ended")


# gRPC.


def tiers():
    small, large = TierLLM("small", UNSURE), TierLLM("large")
    return small, large, cascade_of(small, large)


def generate(**fields):
    params = pb.SamplingParams(max_tokens=3, temperature=0)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling_params=params, **fields)


@in_loop
async def test_grpc_gives_the_decision_with_the_last_message():
    small, _, cascade = tiers()
    async with serving(cascade) as face:
        messages = await read_all(face.stub.Generate(generate(request_id="mine")))
        assert messages[0].request_id == "mine"
        assert [message.HasField("cascade") for message in messages].count(True) == 1
        decision = messages[-1].cascade
        assert (decision.tier, decision.reason, decision.HasField("p_ik")) == ("large", "last", False)
        assert [(hop.tier, hop.outcome) for hop in decision.hops] == [("small", "p_t"), ("large", "answered")]
        assert (decision.hops[0].p_ik, decision.hops[0].p_t) == UNSURE
        assert decision.flops == 2 * 2 * 100 * 3
        assert not decision.HasField("price_usd")
        one = await face.stub.GenerateUnary(generate(model="auto", cascade=pb.CascadeOptions(max_hops=0)))
        assert (one.cascade.tier, one.cascade.reason) == ("small", "max_hops")
        chosen = pb.CascadeOptions(letters=["X", "Y"], mode="choices")
        assert (await face.stub.GenerateUnary(generate(cascade=chosen))).cascade.tier == "large"
        assert len(small.gates[-1].confidence.tokens) == 2
        assert not (await face.stub.GenerateUnary(generate(model="small"))).HasField("cascade")


@in_loop
async def test_grpc_leaves_to_each_model_what_the_request_does():
    small = TierLLM("small", UNSURE, defaults={"temperature": 0.25, "top_k": 9})
    large = TierLLM("large", defaults={"temperature": 0.5})
    async with serving(cascade_of(small, large)) as face:
        await face.stub.GenerateUnary(pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(top_k=3)))
        assert [(one.params[0].temperature, one.params[0].top_k) for one in (small, large)] == [(0.25, 3), (0.5, 3)]


@in_loop
async def test_grpc_refuses_what_can_not_be_asked():
    _, _, cascade = tiers()
    async with serving(cascade) as face:
        for request, code, message in (
            (generate(model="other"), "NOT_FOUND", "'auto', 'small' and 'large' are served"),
            (generate(model="small", cascade=pb.CascadeOptions()), "INVALID_ARGUMENT", "no cascade"),
            (generate(cascade=pb.CascadeOptions(mode="half")), "INVALID_ARGUMENT", "mode='half'"),
            (generate(cascade=pb.CascadeOptions(letters=["A"])), "INVALID_ARGUMENT", "letters=['A'] must be"),
        ):
            found, details = await status(face.stub.GenerateUnary(request))
            assert found.name == code
            assert message in details
        assert face.sample("request_refused_total", reason="invalid_request") == 2
        labels = {"reason": "invalid_request", "model_name": "small"}
        assert face.metrics.registry.get_sample_value("jaxdual:request_refused_total", labels) == 1


@in_loop
async def test_grpc_tells_of_the_cascade_and_of_its_tiers():
    _, _, cascade = tiers()
    async with serving(cascade) as face:
        await cascade.start()
        info = await face.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.family, list(info.tiers)) == ("auto", "cascade", ["small", "large"])
        assert list(info.models) == ["auto", "small", "large"]
        assert (await face.stub.GetModelInfo(pb.GetModelInfoRequest(model="small"))).family == "script"
        tokens = await face.stub.Tokenize(pb.TokenizeRequest(text="abc"))
        assert (await face.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == "abc"
        assert (await face.stub.GetLoad(pb.GetLoadRequest())).state == pb.SERVER_STATE_SERVING


@in_loop
async def test_kserve_gives_the_decision_as_parameters():
    small, _, cascade = tiers()
    async with serving(cascade) as face:
        stub = GRPCInferenceServiceStub(face.channel)

        def request(name, **parameters):
            made = kserve.ModelInferRequest(model_name=name)
            tensor = made.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(b"abc")
            made.parameters["max_tokens"].int64_param = 2
            for key, value in parameters.items():
                made.parameters[key].string_param = value
            return made

        answer = await stub.ModelInfer(request("auto"))
        assert answer.model_name == "auto"
        assert answer.parameters["cascade_tier"].string_param == "large"
        assert json.loads(answer.parameters["cascade"].string_param)["hops"][0]["outcome"] == "p_t"
        answer = await stub.ModelInfer(request("auto", cascade='{"max_hops": 0}'))
        assert answer.parameters["cascade_tier"].string_param == "small"
        assert "cascade" not in (await stub.ModelInfer(request("small"))).parameters
        assert (await status(stub.ModelInfer(request("auto", cascade='{"hops": 0}'))))[0].name == "INVALID_ARGUMENT"
        assert (await status(stub.ModelInfer(request("small", cascade="{}"))))[0].name == "INVALID_ARGUMENT"
        for name, ready in (("auto", True), ("small", True), ("other", False)):
            assert (await stub.ModelReady(kserve.ModelReadyRequest(name=name))).ready is ready
        small.set_state(EngineState.RESTARTING)
        for name, ready in (("auto", False), ("small", False), ("large", True)):
            assert (await stub.ModelReady(kserve.ModelReadyRequest(name=name))).ready is ready
