"""The faces over a real engine in its own process."""

import asyncio
import os
import signal

import grpc
import pytest

from jaxdual import LLM, AsyncLLM, SamplingParams
from jaxdual.engine.supervisor import EngineState
from jaxdual.model_folder import shipped_model
from server.proto.jaxdual.v1 import inference_pb2 as pb
from tests.server.grpc.face import read_all, serving, status, until

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n    def push(self, item):\n", "for i in range("]
SETTINGS = {"max_model_len": 256, "max_num_seqs": 8, "seed": 0, "compile_ahead": False}


def request(prompt, max_tokens):
    params = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(text=prompt, sampling_params=params)


@pytest.mark.slow
def test_a_real_engine_gives_its_text_ends_with_its_clients_and_fails_as_unavailable(monkeypatch):
    monkeypatch.setattr("jaxdual.async_api._MOST_ENGINES_LOST", 0)  # a request that loses its engine is not tried again
    model = str(shipped_model("small"))
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    offline = LLM(model, **SETTINGS)
    expected = [output.outputs[0].text for output in offline.generate(PROMPTS, params)]
    del offline

    async def use():
        async with AsyncLLM(model, **SETTINGS) as llm, serving(llm) as face:
            # Same texts, streamed, unary and over tritonclient.
            streams = await asyncio.gather(*(read_all(face.stub.Generate(request(p, 24))) for p in PROMPTS * 5))
            texts = ["".join(delta.text for message in stream for delta in message.outputs) for stream in streams]
            assert texts == expected * 5
            unary = await face.stub.GenerateUnary(request(PROMPTS[0], 24))
            assert unary.outputs[0].text == expected[0]
            code = (
                "parameters = {'max_tokens': 24, 'temperature': 0.0, 'ignore_eos': True}\n"
                f"result = client.infer('small', [text({PROMPTS[1]!r})], parameters=parameters)\n"
                "show(result.as_numpy('text_output')[0].decode())\n"
            )
            assert await face.tritonclient(code) == [expected[1]]
            # The engine itself lets go of what a client has left.
            call = face.stub.Generate(request(PROMPTS[0], 230))
            await call.read()
            call.cancel()
            await until(lambda: llm.num_unfinished == 0, "the end of the request")
            while (stats := await llm.stats()).num_running or stats.num_waiting:
                await asyncio.sleep(0.01)
            await llm.check_integrity()
            load = await face.stub.GetLoad(pb.GetLoadRequest())
            assert load.num_unfinished == 0
            assert load.kv_blocks > 0
            # An engine that dies is UNAVAILABLE for its requests, and the next ones are served again.
            failing = asyncio.ensure_future(status(read_all(face.stub.Generate(request(PROMPTS[0], 230)))))
            await until(lambda: llm.num_unfinished == 1, "the request")
            os.kill(llm.engine_pid, signal.SIGKILL)
            assert (await failing)[0] is grpc.StatusCode.UNAVAILABLE
            again = await face.stub.GenerateUnary(request(PROMPTS[0], 24))
            assert again.outputs[0].text == expected[0]
            await llm.drain(0)
            assert llm.state is EngineState.DRAINING
            assert (await status(face.stub.GenerateUnary(request("x", 1))))[0] is grpc.StatusCode.UNAVAILABLE

    asyncio.run(asyncio.wait_for(use(), 240))
