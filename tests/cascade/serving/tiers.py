"""Tiers without models: scripted engines that go by given scores, and a remote that answers as a test wants it."""

import asyncio
import contextlib
import json

from jaxdual.cascade.config import CascadeConfig, ExternalTier, LocalTier
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.cascade.work import LayerSizes, Work
from jaxdual.config import EngineConfig
from jaxdual.engine.request import TokenEvent
from jaxdual.errors import NotServingError, QueueFullError
from jaxdual.front import Front
from jaxdual.outputs import EngineInfo
from jaxdual.request_stream import RequestStream
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer
from tests.server.http.scripted import TOKENIZER, ScriptedLLM, _EngineSide

SIZES = LayerSizes(lower=60, upper=40, layers=4, tap=3)


class TierLLM(ScriptedLLM):
    """A scripted engine whose gate sees `scores`, P(IK) and P(T), whatever the prompt.

    Attributes:
      scores: as probe and first token would give them.
      fails: ends requests with an error before their first token.
      closed_by: what `check_door` raises.
    """

    def __init__(self, name, scores=(0.9, 0.95), *, script=None, max_model_len=512, folder=TOKENIZER, defaults=None):
        super().__init__(max_model_len)
        self.served_model_name, self.system_fingerprint = name, f"fp_{name}"
        self.scores = scores
        self.fails = False
        self.closed_by = None
        self.gates = []
        self.params = []
        self.script = script
        self.defaults = defaults or {}
        self.drained = []
        self._front = Front(
            _EngineSide(self),
            Tokenizer.from_dir(folder),
            vocab_size=2048,
            max_model_len=max_model_len,
            gate_refusal="",
            has_probe=True,
        )

    @property
    def info(self):
        return EngineInfo(
            model_folder="nowhere",
            served_model_name=self.served_model_name,
            family="script",
            num_layers=4,
            vocab_size=2048,
            dtype="float32",
            device="none",
            max_model_len=self.max_model_len,
            max_num_seqs=1000,
            block_size=16,
            fingerprint="00",
            default_sampling=self.defaults,
            layer_sizes=SIZES,
            gate_refusal="",
        )

    def get_default_sampling_params(self):
        return SamplingParams(**self.defaults)

    async def start(self):
        """It runs."""

    async def warmed_up(self):
        """It has nothing to compile."""

    async def ready(self):
        if isinstance(self.closed_by, NotServingError):
            raise self.closed_by

    async def drain(self, seconds):
        self.drained.append(seconds)

    async def shutdown(self):
        self.drained.append("shutdown")
        if self._turns is not None:
            self._turns.cancel()
            await asyncio.gather(self._turns, return_exceptions=True)

    def check_door(self, outputs=1):
        if self.closed_by is not None:
            raise self.closed_by

    def fill(self):
        self.closed_by = QueueFullError("full")

    def stop(self):
        self.closed_by = NotServingError("stopped")

    def startup_report(self):
        return {"model": self.served_model_name, "load_seconds": 1.0, "compile_seconds": 0.0} | {
            "compile_seconds_by_shape": {}
        }

    async def submit(self, prompt, params=None, request_id=None, *, priority=0, user=None, gate=None):
        self.check_door()
        output = self._front.submit(prompt, params, request_id, priority=priority, user=user, gate=gate)
        self.submitted.append(request_id)
        self.gates.append(gate)
        self.params.append(params)
        stream = RequestStream(output, self._close)
        self._streams[id(output)] = stream
        return stream

    def abort(self, request_id):
        before = self.num_unfinished
        super().abort(request_id)
        return self.num_unfinished < before

    def _turn(self, sequence):
        request, gate = sequence.request, sequence.request.gate
        prompt = len(request.prompt_token_ids)
        if self.fails:
            self._end(request.request_id)
            yield TokenEvent(request.request_id, 0, None, finish_reason="error", error="it broke")
            return
        verdict = None
        if gate is not None and sequence.count == 0:
            p_ik, p_t = self.scores
            verdict = gate.after_prompt(p_ik if gate.uses_probe else None)
            upper = 0 if verdict is not None else prompt
            verdict = verdict or gate.after_answer(p_ik if gate.uses_probe else None, p_t)
            if not verdict.passed:
                self._end(request.request_id)
                yield TokenEvent(
                    request.request_id, 0, None, finish_reason="refused", verdict=verdict, work=Work(prompt, upper)
                )
                return
        for event in super()._turn(sequence):
            work = None if event.finish_reason is None else Work(prompt, prompt)
            yield TokenEvent(
                **{name: getattr(event, name) for name in event.__slots__} | {"verdict": verdict} | {"work": work}
            )


def config_of(tiers, *, remote=None, **settings):
    """A cascade of these engines, smallest first; all but the last have a gate with a probe."""
    local = [
        LocalTier(
            name=tier.served_model_name,
            engine=EngineConfig(model="x", served_model_name=tier.served_model_name, probe="p"),
            memory_fraction=0.1,
        )
        for tier in tiers
    ]
    if remote is not None:
        remote = remote if isinstance(remote, ExternalTier) else ExternalTier(name="remote", url=remote, model="gpt")
    return CascadeConfig(tiers=(*local, *([remote] if remote else [])), **settings)


def cascade_of(*tiers, **settings):
    config = config_of(tiers, **settings)
    return CascadeLLM(config, {tier.served_model_name: tier for tier in tiers})


class Remote:
    """An OpenAI-compatible server on the test's loop that does what it is told.

    Attributes:
      status: of its answers.
      events: what it sends; a float is a pause in seconds, an exception ends the connection, and text that begins with
        a colon is a comment, which keeps it alive.
      bodies: of the requests that have come.
      gone: how many connections their clients have closed before the end.
    """

    def __init__(self, *texts, usage=(7, 2), finish_reason="stop"):
        self.status = 200
        self.paths, self.bodies, self.headers = [], [], []
        self.gone = 0
        chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
        chunks.append({"choices": [{"delta": {}, "finish_reason": finish_reason}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}})
        self.events = [*chunks, "[DONE]"]

    @contextlib.asynccontextmanager
    async def serving(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            length = int({name.lower(): value for name, value in headers.items()}["content-length"])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.paths.append(lines[0].split()[1])
            writer.write(f"HTTP/1.1 {self.status} X\r\nConnection: close\r\n\r\n".encode())
            ended = asyncio.ensure_future(reader.read())  # returns when the client goes
            for event in self.events:
                if isinstance(event, float):
                    await asyncio.wait((ended,), timeout=event)
                elif isinstance(event, Exception):
                    writer.transport.abort()
                    return
                else:
                    data = event if isinstance(event, str) else json.dumps(event)
                    line = data if data.startswith(":") else f"data: {data}"
                    writer.write(f"{line}\n\n".encode())
                if ended.done():
                    self.gone += 1
                    return
                await writer.drain()
            ended.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone += 1
        finally:
            writer.close()
