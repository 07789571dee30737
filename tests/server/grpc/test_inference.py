"""jaxdual.v1 over real channels."""

import asyncio
import contextlib

import grpc
import pytest

from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError, QueueFullError
from server.proto.jaxdual.v1 import inference_pb2 as pb
from tests.server.grpc.face import Scripted, in_loop, read_all, serving, status, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def of_tokens(*ids, **fields):
    params = pb.SamplingParams(**fields)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)


def of_text(text, **fields):
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**fields))


def joined(messages, index=0):
    deltas = [delta for message in messages for delta in message.outputs if delta.index == index]
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.token_ids]


@in_loop
async def test_a_stream_gives_every_token_once_and_ends_with_the_usage():
    async with serving() as face:
        messages = await read_all(face.stub.Generate(of_tokens(5, 6, 7, max_tokens=7)))
    assert joined(messages)[1] == [5, 6, 7, 5, 6, 7, 5]
    assert messages[0].request_id
    assert not any(message.request_id for message in messages[1:])
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=7)
    assert messages[-1].outputs[0].finish_reason == pb.FINISH_REASON_LENGTH


@in_loop
async def test_the_deltas_of_a_stream_are_the_unary_answer():
    request = of_text("def clamp(value, low, high):\n    'grüße'\n", max_tokens=60, n=3, logprobs=2)
    async with serving() as face:
        messages = await read_all(face.stub.Generate(request))
        whole = await face.stub.GenerateUnary(request)
    assert len(messages) > 1
    for output in whole.outputs:
        assert joined(messages, output.index) == (output.text, list(output.token_ids))
        assert len(output.logprobs) == len(output.token_ids) == 60
    assert messages[-1].usage == whole.usage


@in_loop
async def test_logprobs_of_output_and_prompt_have_their_tokens():
    async with serving() as face:
        whole = await face.stub.GenerateUnary(of_tokens(5, 6, max_tokens=2, logprobs=2, prompt_logprobs=1))
    output = whole.outputs[0]
    assert [position.chosen.token_id for position in output.logprobs] == [5, 6]
    assert [(top.token_id, top.logprob, top.rank) for top in output.logprobs[0].top] == [(5, -0.5, 1), (6, -1.5, 2)]
    assert output.cumulative_logprob == -1.0
    assert not whole.prompt_logprobs[0].HasField("chosen")
    assert whole.prompt_logprobs[1].chosen.token_id == 6
    assert len(whole.prompt_logprobs[1].top) == 1


@in_loop
async def test_prompt_logprobs_come_once_in_a_stream():
    async with serving() as face:
        messages = await read_all(face.stub.Generate(of_tokens(5, 6, 7, max_tokens=5, prompt_logprobs=0)))
    assert sum(len(message.prompt_logprobs) for message in messages) == 3


@in_loop
async def test_a_stop_string_and_a_stop_token_are_named():
    async with serving() as face:
        tokens = (await face.stub.Tokenize(pb.TokenizeRequest(text="one two three"))).token_ids
        of_string = await face.stub.GenerateUnary(of_text("one two three", max_tokens=60, stop=["two"]))
        face.llm.script = [5, 2047]
        of_token = await face.stub.GenerateUnary(of_tokens(5, stop_token_ids=[2047]))
    assert of_string.outputs[0].stop_string == "two"
    assert of_string.outputs[0].finish_reason == pb.FINISH_REASON_STOP
    assert "two" not in of_string.outputs[0].text
    assert of_token.outputs[0].stop_token_id == 2047
    assert len(tokens) > 1


@in_loop
async def test_absent_parameters_are_the_models_and_a_conversation_is_open_ended():
    async with serving(Scripted(max_model_len=100)) as face:
        text = await face.stub.GenerateUnary(of_text("import os"))
        unlimited = await face.stub.GenerateUnary(of_text("import os", max_tokens=0))
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
        params = pb.SamplingParams(ignore_eos=True)
        of_chat = await face.stub.GenerateUnary(pb.GenerateRequest(chat=chat, sampling_params=params))
        info = await face.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert text.usage.completion_tokens == 16
    assert unlimited.usage.prompt_tokens + unlimited.usage.completion_tokens == 100
    assert of_chat.usage.prompt_tokens + of_chat.usage.completion_tokens == 100
    assert info.default_sampling_params.max_tokens == 16
    assert not info.default_sampling_params.HasField("seed")
    assert (info.model, info.vocab_size, info.max_model_len, info.block_size) == ("scripted", 2048, 100, 16)
    assert info.has_tokenizer
    assert info.has_chat_template


@in_loop
async def test_the_user_reaches_the_engine():
    async with serving() as face:
        for user in ("", "ann"):
            await face.stub.GenerateUnary(pb.GenerateRequest(text="x", user=user))
            await read_all(face.stub.Generate(pb.GenerateRequest(text="x", user=user)))
        assert face.llm.users == [None, None, "ann", "ann"]


@in_loop
async def test_a_conversation_is_the_rendered_template():
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], add_generation_prompt=False)
    async with serving() as face:
        tokens = (await face.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
        expected = face.llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=False, tokenize=True
        )
        assert list(tokens) == expected
        chat.add_generation_prompt = True
        longer = (await face.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
        assert len(longer) > len(tokens)
        text = await face.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens))
        assert text.text == face.llm.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=False
        )


@in_loop
async def test_abort_ends_a_request_by_its_id():
    async with serving() as face:
        face.llm.hold()
        request = of_tokens(5, max_tokens=9)
        request.request_id = "mine"
        call = face.stub.GenerateUnary(request)
        answering = asyncio.ensure_future(call)
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        assert (await face.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
        assert (await answering).outputs[0].finish_reason == pb.FINISH_REASON_ABORT
        assert not (await face.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
        assert (await status(face.stub.Abort(pb.AbortRequest())))[0] is INVALID


@in_loop
async def test_load_follows_the_engine():
    async with serving() as face:
        load = await face.stub.GetLoad(pb.GetLoadRequest())
        assert (load.state, load.num_unfinished, load.kv_blocks) == (pb.SERVER_STATE_SERVING, 0, 0)
        face.llm.set_stats(num_running=3, num_waiting=2, kv_blocks=20, kv_blocks_available=9, kv_blocks_cached=4)
        face.llm.set_state(EngineState.RESTARTING)
        load = await face.stub.GetLoad(pb.GetLoadRequest())
    figures = (load.num_running, load.num_waiting, load.kv_blocks, load.kv_blocks_available, load.kv_blocks_cached)
    assert figures == (3, 2, 20, 9, 4)
    assert load.state == pb.SERVER_STATE_RESTARTING


@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect"])
@in_loop
async def test_a_client_that_leaves_ends_its_request(method, way):
    async with serving() as face:
        face.llm.hold()
        request = of_tokens(5, max_tokens=9)
        # A channel of its own, with its own connection, that can be cut.
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{face.server.port}", [("grpc.use_local_subchannel_pool", 1)])
        call = getattr(type(face.stub)(channel), method)(request, timeout=0.3 if way == "deadline" else None)
        reading = asyncio.ensure_future(_finish(call, method))
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        if way == "cancel":
            call.cancel()
        elif way == "disconnect":
            await channel.close()
        await until(lambda: face.llm.num_unfinished == 0, "the end of the request")
        assert len(face.llm.closed) == 1
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await reading
        await channel.close()


async def _finish(call, method):
    return await read_all(call) if method == "Generate" else await call


@in_loop
async def test_a_stream_that_is_left_in_the_middle_ends_its_request():
    async with serving() as face:
        call = face.stub.Generate(of_tokens(5, max_tokens=500))
        await call.read()
        face.llm.hold()
        call.cancel()
        await until(lambda: face.llm.num_unfinished == 0, "the end of the request")


@in_loop
async def test_a_reader_that_is_slow_gets_all_and_holds_nobody_up():
    async with serving() as face:
        slow = face.stub.Generate(of_tokens(5, 6, 7, max_tokens=500, logprobs=20))
        messages = aiter(slow)
        first = await anext(messages)
        for _ in range(5):
            await face.stub.GenerateUnary(of_tokens(8, max_tokens=100))
        assert len(joined([first, *await read_all(messages)])[1]) == 500


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.GenerateRequest(), "text, token_ids, chat"),
        (of_text(""), "empty"),
        (of_tokens(), "empty"),
        (of_tokens(2048), "2048"),
        (of_tokens(1, max_tokens=-1), "max_tokens"),
        (of_tokens(1, temperature=float("nan")), "temperature"),
        (of_tokens(1, temperature=-1), "temperature"),
        (of_tokens(1, temperature=float("inf")), "temperature"),
        (of_tokens(1, top_p=0), "top_p"),
        (of_tokens(1, top_k=-2), "top_k"),
        (of_tokens(1, n=0), "n="),
        (of_tokens(1, n=2**31 - 1), "n="),
        (of_tokens(1, logprobs=21), "logprobs"),
        (of_tokens(1, stop=[""]), "stop"),
        (of_tokens(1, stop=["x"] * 17), "stop"),
        (of_tokens(1, stop_token_ids=[2048]), "stop_token_ids"),
        (of_tokens(1, stop_token_ids=range(40000)), "stop_token_ids"),
        (of_tokens(1, logit_bias={1: 101.0}), "logit_bias"),
        (of_tokens(1, min_tokens=17), "min_tokens"),
        (of_tokens(*[1] * 600), "512"),
        (pb.GenerateRequest(text="x", user="u" * 513), "user has 513 characters; at most 512"),
        (of_text("x" * 10_000_000), "characters"),
        (pb.GenerateRequest(chat=pb.Chat()), "messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])), "role"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")], tools_json="[")), "tools_json"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")], tools_json="[1]")), "tools_json"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="u")], tools_json="[" * 10**6)), "deep"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="u")], template_vars_json={"x": "NaN"})),
            "NaN",
        ),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="u")], template_vars_json={"tools": "1"})),
            "tools",
        ),
        (
            pb.GenerateRequest(
                chat=pb.Chat(messages=[pb.ChatMessage(role="u")], template_vars_json={"x": r'"\ud800"'})
            ),
            "surrogate",
        ),
    ],
)
@in_loop
async def test_wrong_input_is_refused_with_its_reason(request_, word):
    async with serving() as face:
        code, message = await status(read_all(face.stub.Generate(request_)))
        assert code is INVALID
        assert word in message
        assert (await status(face.stub.GenerateUnary(request_)))[0] is INVALID
        assert face.llm.num_unfinished == 0


@in_loop
async def test_bytes_that_are_no_message_are_refused():
    async with serving() as face:
        for method in ("Generate", "GenerateUnary", "Tokenize"):
            call = face.channel.unary_stream(f"/jaxdual.v1.Inference/{method}")
            assert (await status(read_all(call(b"\xff\xff\xff"))))[0] is INVALID


@in_loop
async def test_a_long_reason_still_arrives():
    async with serving() as face:
        code, message = await status(face.stub.GenerateUnary(of_text("x", stop=["\N{GRINNING FACE}" * 5000, ""])))
    assert code is INVALID
    assert message.startswith("stop=")
    assert message.endswith("...")


@in_loop
async def test_refusals_and_failures_have_their_status():
    async with serving() as face:
        unknown = pb.GenerateRequest(text="x", model="other")
        assert (await status(face.stub.GenerateUnary(unknown)))[0] is grpc.StatusCode.NOT_FOUND
        face.llm.refuse_with = QueueFullError("256 requests are waiting")
        assert await status(face.stub.GenerateUnary(of_tokens(1))) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "256 requests are waiting",
        )
        face.llm.refuse_with = NotServingError("shutting down")
        assert await status(read_all(face.stub.Generate(of_tokens(1)))) == (
            grpc.StatusCode.UNAVAILABLE,
            "shutting down",
        )
        face.llm.refuse_with = RuntimeError("secret /path")
        code, message = await status(face.stub.GenerateUnary(of_tokens(1)))
        assert code is grpc.StatusCode.INTERNAL
        assert "secret" not in message
        for reason in ("model_not_found", "queue_full", "not_serving", "internal_error"):
            assert face.sample("request_refused_total", reason=reason) == 1


@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
@in_loop
async def test_a_dead_engine_ends_requests_as_unavailable(method):
    async with serving() as face:
        face.llm.hold()
        ending = asyncio.ensure_future(status(_finish(getattr(face.stub, method)(of_tokens(1)), method)))
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        face.llm.die()
        assert await ending == (grpc.StatusCode.UNAVAILABLE, "the engine process was killed")


@in_loop
async def test_a_model_without_a_tokenizer_takes_token_ids_only():
    async with serving(Scripted(with_tokenizer=False)) as face:
        whole = await face.stub.GenerateUnary(of_tokens(5, 6, max_tokens=3, logprobs=1))
        assert (whole.outputs[0].text, list(whole.outputs[0].token_ids)) == ("", [5, 6, 5])
        for call in (
            face.stub.GenerateUnary(of_text("x")),
            face.stub.Tokenize(pb.TokenizeRequest(text="x")),
            face.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
        ):
            code, message = await status(call)
            assert code is INVALID
            assert "tokenizer" in message
        assert not (await face.stub.GetModelInfo(pb.GetModelInfoRequest())).has_tokenizer


@in_loop
async def test_two_hundred_streams_at_once_each_get_their_own():
    async with serving() as face:

        async def one(number):
            return joined(await read_all(face.stub.Generate(of_tokens(number, number + 1, max_tokens=20))))[1]

        for number, tokens in enumerate(await asyncio.gather(*map(one, range(200)))):
            assert tokens == [number, number + 1] * 10
        assert face.sample("generation_tokens_total") == 4000


@in_loop
async def test_tokenize_and_detokenize_undo_each_other():
    text = "for i in range(10):\n    print(i, 'ä€😀')\n"
    async with serving() as face:
        tokens = await face.stub.Tokenize(pb.TokenizeRequest(text=text, add_special_tokens=False))
        assert tokens.max_model_len == 512
        back = await face.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
        assert back.text == text
        for wrong in (pb.DetokenizeRequest(token_ids=[2048]), pb.DetokenizeRequest(token_ids=[2**32 - 1])):
            assert (await status(face.stub.Detokenize(wrong)))[0] is INVALID
        assert (await status(face.stub.Tokenize(pb.TokenizeRequest())))[0] is INVALID
