"""A stand-in for `AsyncLLM` with a scripted engine, and a real server over it.

The text side is the real one. The engine gives each output its prompt's tokens again and again, one a turn, so that
whatever is mixed up shows. `hold` stops it until `go`.
"""

import asyncio
import threading
import time
from pathlib import Path

import uvicorn

from jaxdual.engine.request import TokenEvent, TokenLogprobs
from jaxdual.engine.supervisor import EngineState
from jaxdual.front import Front, TokenizedPrompt
from jaxdual.outputs import EngineStats
from jaxdual.request_stream import RequestStream
from jaxdual.sampling_params import SamplingParams
from jaxdual.served_models import ServedModels
from jaxdual.tokenizer import Tokenizer
from server.http import create_app
from server.metrics import Metrics

TOKENIZER = Path(__file__).parents[2] / "fixtures" / "tokenizer"
EOS = 2047


class ScriptedLLM:
    """The surface of `AsyncLLM` that a face uses; it belongs to the loop that it runs on."""

    served_model_name = "scripted"
    system_fingerprint = "fp_scripted"

    def __init__(self, max_model_len=512, with_tokenizer=True):
        tokenizer = Tokenizer.from_dir(TOKENIZER) if with_tokenizer else None
        self.max_model_len = max_model_len
        self.state = EngineState.SERVING
        self.listeners = []
        self.restarts = 0
        self.refuse_with = None
        self.submitted = []
        self.users = []
        self.closed = []
        self.template_vars = None  # of the last chat
        self.script = None  # of output tokens for all requests, in place of their prompts
        self._front = Front(_EngineSide(self), tokenizer, vocab_size=2048, max_model_len=max_model_len)
        self._running = {}
        self._streams = {}
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._work = asyncio.Event()
        self._turns = None
        self._stats = None

    # What a face calls.

    @property
    def num_unfinished(self):
        return len(self._streams)

    def get_tokenizer(self):
        return self._front.text_tokenizer()

    def get_default_sampling_params(self):
        return SamplingParams()

    def on_state(self, listener):
        self.listeners.append(listener)

    def load(self):
        return self._stats

    async def ready(self):
        """It always is."""

    def check_door(self, outputs=1):
        """The scripted refusals come from `submit`."""

    async def tokenize(self, prompt, *, add_special_tokens=True):
        return self._front.tokenize(prompt, add_special_tokens=add_special_tokens)

    async def tokenize_chat(self, messages, **how):
        self.template_vars = how["template_vars"]
        return await asyncio.to_thread(self._front.tokenize_chat, messages, **how)

    async def submit(self, prompt, params=None, request_id=None, *, priority=0, user=None):
        if self.refuse_with is not None:
            raise self.refuse_with
        if not isinstance(prompt, TokenizedPrompt):
            prompt = await self.tokenize(prompt)
        output = self._front.submit(prompt, params, request_id, priority=priority, user=user)
        self.submitted.append(request_id)
        stream = RequestStream(output, self._close)
        self._streams[id(output)] = stream
        return stream

    def abort(self, request_id):
        self._front.abort(request_id)
        self._deliver(self._front.take(()))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        if self._turns is not None:
            self._turns.cancel()

    # What a test does.

    def hold(self):
        self._may_run.clear()

    def go(self):
        self._may_run.set()

    def set_state(self, state):
        self.state = state
        self.restarts += state is EngineState.RESTARTING
        for listener in self.listeners:
            listener(state)

    def set_stats(self, **figures):
        self._stats = EngineStats(**figures)

    def die(self):
        self._running.clear()
        self._deliver(self._front.fail("the engine process was killed"))

    # The engine.

    def add(self, request):
        self._running[request.request_id] = _Sequence(request)
        self.users.append(request.user)
        self._work.set()
        if self._turns is None:
            self._turns = asyncio.get_running_loop().create_task(self._take_turns())

    def _close(self, stream):
        self.closed.append(stream.output.request_id)
        self.abort(stream.output.request_id)

    def _end(self, request_id, index=None):
        sequence = self._running.get(request_id)
        if sequence is not None and index is not None:
            sequence.ended.add(index)
        if sequence is not None and (index is None or len(sequence.ended) == sequence.request.params.n):
            del self._running[request_id]

    async def _take_turns(self):
        while True:
            await self._work.wait()
            await self._may_run.wait()
            events = [event for sequence in list(self._running.values()) for event in self._turn(sequence)]
            self._deliver(self._front.take(events))
            if not self._running:
                self._work.clear()
            await asyncio.sleep(0)

    def _turn(self, sequence):
        request, number = sequence.request, sequence.count
        params, prompt = request.params, request.prompt_token_ids
        sequence.count += 1
        for index in range(params.n):
            if index in sequence.ended:
                continue
            tokens = self.script or prompt
            token = tokens[(number + index) % len(tokens)]
            reason = "stop" if token == EOS and not params.ignore_eos else None
            if reason is None and sequence.count >= params.max_tokens:
                reason = "length"
            first = number == 0 and params.prompt_logprobs is not None
            event = TokenEvent(
                request.request_id,
                index,
                token,
                logprobs=None if params.logprobs is None else scores(token),
                finish_reason=reason,
                stop_token=token if reason == "stop" else None,
                prompt_logprobs=tuple(scores(token) for token in prompt[1:]) if first else None,
            )
            if reason is not None:
                self._end(request.request_id, index)
            yield event

    def _deliver(self, outputs):
        for output in outputs:
            stream = self._streams.get(id(output))
            if stream is not None:
                if output.finished:
                    del self._streams[id(output)]
                stream.wake()


class _Sequence:
    def __init__(self, request):
        self.request = request
        self.count = 0
        self.ended = set()


class _EngineSide:
    """What `Front` knows as its engine."""

    def __init__(self, llm):
        self.add = llm.add
        self.abort = llm._end


def scores(token):
    return TokenLogprobs(-0.5, 1, ((token, -0.5), ((token + 1) % 2048, -1.5)))


class RunningServer:
    """A server on a loopback port, on a loop and thread of its own."""

    def __init__(self, make_llm=ScriptedLLM, **options):
        self._make_llm = make_llm
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(120), "the server did not start"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        async with self._make_llm() as self.llm:
            await self._serve_model()

    async def _serve_model(self):
        models = self._models()
        app = create_app(models, Metrics(models), **self._options)
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, http="httptools")
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._started.set()
        await serving

    def _models(self):
        return ServedModels(self.llm)

    def call(self, function, *args):
        """Runs a function on the server's loop, and returns what it returns."""

        async def run():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def wait_for(self, condition, what, seconds=10):
        """Waits until `condition()` holds on the server's loop."""
        deadline = time.monotonic() + seconds
        while not self.call(condition):
            assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
            time.sleep(0.005)
