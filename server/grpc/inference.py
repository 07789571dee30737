"""The service jaxdual.v1.Inference."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import grpc

from jaxdual.cascade.serving.prompt import CascadePrompt
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.engine.supervisor import EngineState
from jaxdual.front import Prompt, TokenizedPrompt
from jaxdual.outputs import Logprob, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.served_models import Model, ServedModels, submit
from jaxdual.tokenizer import TokenizerError
from server.grpc.cascade import cascade_options, decision_message
from server.grpc.deltas import Delta, Deltas
from server.grpc.errors import raise_if_failed
from server.grpc.prompts import conversation, left_open, no_prompt, sampling_params
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.jaxdual.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from server.metrics import Metrics, ObservedStream

_FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    # Told as the call's status.
    "error": pb.FINISH_REASON_UNSPECIFIED,
    None: pb.FINISH_REASON_UNSPECIFIED,
}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves models; method names and messages are those of inference.proto."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        """Writes a message whenever the request has grown."""
        stream, params = await self._submit(request)
        responses = _Responses(params)
        with closing(stream):
            async for output in stream:
                await context.write(responses.take(output))
        raise_if_failed(stream.output)

    async def GenerateUnary(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """The finished request."""
        stream, params = await self._submit(request)
        with closing(stream):
            async for _ in stream:
                pass
        raise_if_failed(stream.output)
        return _Responses(params).take(stream.output)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        model = self._models.tokenizing(request.model or None)
        match request.WhichOneof("input"):
            case "text":
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                prompt = await model.tokenize(request.text, add_special_tokens=special)
            case "chat":
                prompt = await model.tokenize_chat(
                    **conversation(request.chat), add_special_tokens=request.add_special_tokens
                )
            case _:
                raise no_prompt(("text", "chat"))
        return pb.TokenizeResponse(token_ids=prompt.tokens, max_model_len=model.max_model_len)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        model = self._models.tokenizing(request.model or None)
        vocab_size = model.info.vocab_size
        ids = list(request.token_ids)
        if ids and max(ids) >= vocab_size:
            raise ValueError(f"token id {max(ids)} must be in [0, {vocab_size - 1}]")
        text = model.get_tokenizer().decode(ids, skip_special_tokens=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """Ends a request."""
        if not request.request_id:
            raise ValueError("request_id is empty: it must be the id of a request")
        return pb.AbortResponse(aborted=any(model.abort(request.request_id) for model in self._models.all))

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        model = self._model(request.model)
        if isinstance(model, CascadeLLM):
            return pb.GetModelInfoResponse(
                model=model.served_model_name,
                family="cascade",
                max_model_len=model.max_model_len,
                system_fingerprint=model.system_fingerprint,
                models=self._models.names,
                tiers=model.tier_names,
            )
        info = model.info
        try:
            tokenizer = model.get_tokenizer()
        except TokenizerError:
            tokenizer = None
        return pb.GetModelInfoResponse(
            model=info.served_model_name,
            family=info.family,
            num_layers=info.num_layers,
            dtype=info.dtype,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            block_size=info.block_size,
            system_fingerprint=info.system_fingerprint,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
            default_sampling_params=_params_message(model.get_default_sampling_params()),
            device=info.device,
            models=self._models.names,
        )

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        """How busy the server is, by the latest figures of its engines; zeros before the first ones."""
        models = self._models
        response = pb.GetLoadResponse(state=_STATES[models.state], num_unfinished=models.num_unfinished)
        for load in filter(None, (engine.load() for engine in models.engines)):
            response.num_running += load.num_running
            response.num_waiting += load.num_waiting
            response.kv_blocks += load.kv_blocks
            response.kv_blocks_available += load.kv_blocks_available
            response.kv_blocks_cached += load.kv_blocks_cached
        return response

    def _model(self, name: str) -> Model:
        return self._models.get(name or None)

    async def _submit(self, request: pb.GenerateRequest) -> tuple[ObservedStream, SamplingParams]:
        """Checks a request and queues it; the caller closes the stream."""
        await self._models.ready()
        model = self._model(request.model)
        kind = request.WhichOneof("prompt")
        params = sampling_params(
            request.sampling_params, model.get_default_sampling_params(), open_ended=kind == "chat"
        )
        prompt: Prompt | TokenizedPrompt | CascadePrompt
        match kind:
            case "text":
                prompt = request.text
            case "token_ids":
                prompt = {"prompt_token_ids": request.token_ids.ids}
            case "chat":
                model.check_door(params.n)
                prompt = await model.tokenize_chat(**conversation(request.chat), add_special_tokens=False)
            case _:
                raise no_prompt(("text", "token_ids", "chat"))
        stream = await submit(
            model,
            prompt,
            params,
            request.request_id or None,
            priority=request.priority,
            user=request.user,
            options=cascade_options(request),
            left_open=left_open(request.sampling_params),
        )
        return self._metrics.observe(stream, model.served_model_name), params


class _Responses:
    """Makes messages of a growing request, each with what the ones before it don't have."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._deltas = Deltas(params.n)
        self._first = True
        self._wants_prompt_logprobs = params.prompt_logprobs is not None

    def take(self, output: RequestOutput) -> pb.GenerateResponse:
        deltas = self._deltas.take(output)
        response = pb.GenerateResponse(outputs=[_delta(delta, self._params.logprobs) for delta in deltas])
        if self._first:
            self._first = False
            response.request_id = output.request_id
        if self._wants_prompt_logprobs and output.prompt_logprobs is not None:
            self._wants_prompt_logprobs = False
            response.prompt_logprobs.extend(
                pb.PositionLogprobs() if entries is None else _position(entries, self._params.prompt_logprobs or 0)
                for entries in output.prompt_logprobs
            )
        if output.finished:
            response.usage.prompt_tokens = output.num_prompt_tokens
            response.usage.completion_tokens = output.num_output_tokens
            response.usage.cached_tokens = output.num_cached_tokens
            if output.decision is not None:
                response.cascade.CopyFrom(decision_message(output.decision))
        return response


def _delta(delta: Delta, num_logprobs: int | None) -> pb.OutputDelta:
    output = delta.output
    message = pb.OutputDelta(index=output.index, text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs is not None:
        message.logprobs.extend(_position(entries, num_logprobs or 0) for entries in delta.logprobs)
    if delta.finished:
        message.finish_reason = _FINISH_REASONS[output.finish_reason]
        if isinstance(output.stop_reason, str):
            message.stop_string = output.stop_reason
        elif output.stop_reason is not None:
            message.stop_token_id = output.stop_reason
        if output.cumulative_logprob is not None:
            message.cumulative_logprob = output.cumulative_logprob
    return message


def _position(entries: dict[int, Logprob], count: int) -> pb.PositionLogprobs:
    """The chosen token stands first in `entries`, whatever its rank."""
    messages = [
        pb.TokenLogprob(token_id=token, logprob=entry.logprob, rank=entry.rank, text=entry.decoded_token or "")
        for token, entry in entries.items()
    ]
    top = sorted((message for message in messages if message.rank <= count), key=lambda message: message.rank)
    return pb.PositionLogprobs(chosen=messages[0], top=top)


def _params_message(params: SamplingParams) -> pb.SamplingParams:
    values = params.as_dict() | {"stop": params.stop_strings}
    del values["dysco"], values["return_selection"]  # no model has them by default
    return pb.SamplingParams(**values)  # None leaves a field absent


_STATES = {
    EngineState.STARTING: pb.SERVER_STATE_STARTING,
    EngineState.WARMING: pb.SERVER_STATE_WARMING,
    EngineState.SERVING: pb.SERVER_STATE_SERVING,
    EngineState.RESTARTING: pb.SERVER_STATE_RESTARTING,
    EngineState.DRAINING: pb.SERVER_STATE_DRAINING,
    EngineState.STOPPED: pb.SERVER_STATE_STOPPED,
}
