"""The Open Inference Protocol, spoken by hand and by the stock tritonclient."""

import asyncio
import json
import struct
import subprocess
import sys

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from jaxdual.engine.supervisor import EngineState
from server.proto.kserve import open_inference_pb2 as pb
from server.proto.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.server.grpc.face import Scripted, in_loop, read_all, serving, status, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT
Tensor = pb.ModelInferRequest.InferInputTensor


def packed(*texts):
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def of_text(text=b"one two", parameters=None, **fields):
    request = pb.ModelInferRequest(model_name="scripted", **fields)
    request.inputs.append(Tensor(name="text_input", datatype="BYTES", shape=[1]))
    request.raw_input_contents.append(packed(text))
    set_parameters(request, parameters or {})
    return request


def set_parameters(request, parameters):
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)


def of_ids(*ids, parameters=None, **fields):
    tensor = Tensor(
        name="input_ids", datatype="INT32", shape=[len(ids)], contents=pb.InferTensorContents(int_contents=ids)
    )
    request = pb.ModelInferRequest(model_name="scripted", inputs=[tensor], **fields)
    set_parameters(request, parameters or {})
    return request


def outputs(response):
    """The response's tensors by name."""
    tensors = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "INT32":
            tensors[tensor.name] = np.frombuffer(raw, "<i4").tolist()
        else:
            texts = []
            while raw:
                length = int.from_bytes(raw[:4], "little")
                texts.append(raw[4 : 4 + length])
                raw = raw[4 + length :]
            tensors[tensor.name] = texts
        assert list(tensor.shape) == [len(tensors[tensor.name])]
    return tensors


def stub(face):
    return GRPCInferenceServiceStub(face.channel)


def fields_of(message, prefix):
    yield from (
        (f"{prefix}.{message.name}", field.number, field.name, field.type, field.label, field.type_name)
        for field in message.field
    )
    for nested in message.nested_type:
        yield from fields_of(nested, f"{prefix}.{message.name}")


def test_the_wire_format_is_that_of_tritonclient():
    code = (
        "import sys\n"
        "from tritonclient.grpc import service_pb2\n"
        "sys.stdout.buffer.write(service_pb2.DESCRIPTOR.serialized_pb)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    theirs = FileDescriptorProto.FromString(done.stdout)
    ours = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    their_fields = {field for message in theirs.message_type for field in fields_of(message, theirs.package)}
    our_fields = {field for message in ours.message_type for field in fields_of(message, ours.package)}
    our_messages = {message.name for message in ours.message_type}
    assert our_fields <= their_fields
    of_our_messages = {field for field in their_fields if field[0].split(".")[1] in our_messages}
    assert of_our_messages == our_fields
    assert FieldDescriptorProto.TYPE_MESSAGE in {field[3] for field in our_fields}
    their_methods = {method.SerializeToString() for method in theirs.service[0].method}
    assert {method.SerializeToString() for method in ours.service[0].method} <= their_methods


@in_loop
async def test_an_answer_holds_text_reason_ids_and_counts():
    async with serving() as face:
        response = await stub(face).ModelInfer(of_ids(5, 6, id="a", parameters={"max_tokens": 3, "n": 2}))
        text = face.llm.get_tokenizer().decode([5, 6, 5])
    assert (response.model_name, response.id) == ("scripted", "a")
    tensors = outputs(response)
    assert tensors["text_output"][0] == text.encode()
    assert tensors["finish_reason"] == [b"length", b"length"]
    assert tensors["output_ids"] == [5, 6, 5, 6, 5, 6]
    assert tensors["num_output_tokens"] == [3, 3]
    assert response.parameters["prompt_tokens"].int64_param == 2
    assert response.parameters["completion_tokens"].int64_param == 6


@in_loop
async def test_only_the_requested_outputs_come_in_their_order():
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("output_ids", "text_output")]
    async with serving() as face:
        response = await stub(face).ModelInfer(of_ids(5, 6, outputs=wanted))
    assert [tensor.name for tensor in response.outputs] == ["output_ids", "text_output"]


@pytest.mark.parametrize("form", ["parameters", "tensors", "json", "json of strings"])
@in_loop
async def test_sampling_parameters_come_in_each_form(form):
    values = {"max_tokens": 3, "temperature": 0.5, "seed": 7, "ignore_eos": True, "stop": "zz"}
    request = of_text()
    if form == "parameters":
        set_parameters(request, values)
    elif form == "tensors":
        for name, datatype, raw in (
            ("max_tokens", "INT32", struct.pack("<i", 3)),
            ("temperature", "FP32", struct.pack("<f", 0.5)),
            ("seed", "UINT64", struct.pack("<Q", 7)),
            ("ignore_eos", "BOOL", b"\1"),
            ("stop", "BYTES", packed(b"zz")),
        ):
            request.inputs.append(Tensor(name=name, datatype=datatype, shape=[1]))
            request.raw_input_contents.append(raw)
    else:
        spelled = {name: str(value) for name, value in values.items()} if form == "json of strings" else values
        request.inputs.append(Tensor(name="sampling_parameters", datatype="BYTES", shape=[1]))
        request.raw_input_contents.append(packed(json.dumps(spelled).encode()))
    seen = []

    class Watched(Scripted):
        async def submit(self, prompt, params=None, request_id=None, **options):
            seen.append(params)
            return await super().submit(prompt, params, request_id, **options)

    async with serving(Watched()) as face:
        await stub(face).ModelInfer(request)
    (params,) = seen
    assert (params.max_tokens, params.temperature, params.seed, params.ignore_eos) == (3, 0.5, 7, True)
    assert params.stop_strings == ("zz",)


@in_loop
async def test_the_user_is_a_parameter():
    async with serving() as face:
        for parameters in ({}, {"user": ""}, {"user": "ann"}):
            await stub(face).ModelInfer(of_text(parameters=parameters))
        assert face.llm.users == [None, None, "ann"]


def changed(request, **fields):
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(request, name)[:]
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    return request


def of_tensor(*tensors, raw=(), parameters=None):
    request = pb.ModelInferRequest(model_name="scripted", inputs=tensors, raw_input_contents=raw)
    set_parameters(request, parameters or {})
    return request


def tensor(name, datatype, *shape, **fields):
    return Tensor(name=name, datatype=datatype, shape=shape, **fields)


def holding(**contents):
    return pb.InferTensorContents(**contents)


TEXT = tensor("text_input", "BYTES", 1)
WITH_TEXT = tensor("text_input", "BYTES", 1, contents=holding(bytes_contents=[b"one"]))
SHARED = tensor("text_input", "BYTES", 1, parameters={"shared_memory_region": pb.InferParameter(string_param="x")})
WRONG = {
    "no input": (of_tensor(), "text_input"),
    "no contents": (of_tensor(TEXT), "0 elements"),
    "two prompts": (of_tensor(tensor("text_input", "BYTES", 2), raw=[packed(b"a", b"b")]), "2 elements"),
    "twice": (of_tensor(WITH_TEXT, WITH_TEXT), "twice"),
    "text and ids": (of_tensor(WITH_TEXT, of_ids(1).inputs[0]), "one of"),
    "unknown tensor": (of_tensor(WITH_TEXT, tensor("x", "BOOL", 0)), "'x'"),
    "unknown datatype": (of_tensor(tensor("text_input", "TEXT", 1)), "datatype"),
    "wrong datatype": (of_tensor(tensor("text_input", "INT32", 1, contents=holding(int_contents=[1]))), "BYTES"),
    "wrong contents": (of_tensor(tensor("text_input", "BYTES", 1, contents=holding(int_contents=[1]))), "int_contents"),
    "shape": (of_tensor(TEXT, raw=[packed(b"a", b"b")]), "shape"),
    "negative shape": (of_tensor(tensor("text_input", "BYTES", -1, -1), raw=[packed(b"a")]), "negative"),
    "huge shape": (of_tensor(tensor("text_input", "BYTES", *[2**62] * 9), raw=[packed(b"a")]), "shape"),
    "raw count": (of_tensor(TEXT, raw=[packed(b"a")] * 2), "raw_input_contents"),
    "raw and contents": (of_tensor(WITH_TEXT, raw=[packed(b"a")]), "one of them"),
    "short raw": (of_tensor(TEXT, raw=[b"\5\0\0\0ab"]), "within"),
    "cut length": (of_tensor(TEXT, raw=[b"\0\0\0\0\1\0"]), "within"),
    "odd raw": (of_tensor(tensor("input_ids", "INT32", 1), raw=[b"abc"]), "whole number"),
    "not UTF-8": (of_tensor(TEXT, raw=[packed(b"\xff\xfe")]), "UTF-8"),
    "shared memory": (of_tensor(SHARED), "shared"),
    "negative id": (of_ids(-1), "-1"),
    "large id": (of_ids(2048), "2048"),
    "no ids": (of_ids(), "empty"),
    "long": (of_text(b"x" * 10_000_000), "characters"),
    "unknown parameter": (of_text(parameters={"max_token": 3}), "max_token"),
    "given twice": (
        of_tensor(WITH_TEXT, tensor("n", "INT32", 1, contents=holding(int_contents=[1])), parameters={"n": 1}),
        "twice",
    ),
    "NaN": (of_text(parameters={"temperature": float("nan")}), "temperature"),
    "text for a number": (of_text(parameters={"temperature": "hot"}), "hot"),
    "a fraction": (of_text(parameters={"max_tokens": 1.5}), "max_tokens"),
    "infinite count": (of_text(parameters={"max_tokens": float("inf")}), "max_tokens"),
    "bool for a number": (of_text(parameters={"max_tokens": True}), "max_tokens"),
    "many digits": (of_text(parameters={"max_tokens": "9" * 5000}), "max_tokens"),
    "priority": (of_text(parameters={"priority": 2**40}), "priority"),
    "long user": (of_text(parameters={"user": "u" * 513}), "user has 513 characters; at most 512"),
    "user of another type": (of_text(parameters={"user": 7}), "user must be text, not int"),
    "timeout": (of_text(parameters={"timeout": -1}), "timeout"),
    "bias": (of_text(parameters={"logit_bias": "[]"}), "logit_bias"),
    "deep": (of_text(parameters={"logit_bias": "[" * 10**6}), "deep"),
    "stream": (of_text(parameters={"stream": True}), "ModelStreamInfer"),
    "unknown output": (of_text(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="x")]), "'x'"),
}


def with_json(text):
    return changed(
        of_text(),
        inputs=[TEXT, Tensor(name="sampling_parameters", datatype="BYTES", shape=[1])],
        raw_input_contents=[packed(b"a"), packed(text)],
    )


for text, word in (
    (b"{", "JSON"),
    (b"[1]", "object"),
    (b'{"max_tokens": {}}', "max_tokens"),
    (b'{"max_tokens": [1]}', "max_tokens"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": 1e999}', "temperature"),
    (b'{"stop": ["\\ud800"]}', "surrogate"),
    (b'{"logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"x": 1}', "'x'"),
    (b'{"a":' * 100_000, "deep"),
    (b"\xff", "UTF-8"),
):
    WRONG[f"json {text[:20]!r}"] = with_json(text), word


@pytest.mark.parametrize(("request_", "word"), WRONG.values(), ids=WRONG.keys())
@in_loop
async def test_wrong_input_is_refused_with_its_reason(request_, word):
    async with serving() as face:
        code, message = await status(stub(face).ModelInfer(request_))
        assert code is INVALID
        assert word in message
        assert face.llm.num_unfinished == 0


@in_loop
async def test_unknown_models_and_versions_are_not_found():
    async with serving() as face:
        for name, version in (("other", ""), ("", ""), ("scripted", "7")):
            request = changed(of_text(), model_name=name, model_version=version)
            assert (await status(stub(face).ModelInfer(request)))[0] is grpc.StatusCode.NOT_FOUND
            metadata = stub(face).ModelMetadata(pb.ModelMetadataRequest(name=name, version=version))
            assert (await status(metadata))[0] is grpc.StatusCode.NOT_FOUND
            ready = await stub(face).ModelReady(pb.ModelReadyRequest(name=name, version=version))
            assert not ready.ready


@in_loop
async def test_every_tensor_of_the_metadata_is_accepted():
    async with serving() as face:
        metadata = await stub(face).ModelMetadata(pb.ModelMetadataRequest(name="scripted"))
        for tensor in metadata.inputs:
            if tensor.name in ("text_input", "input_ids"):
                continue
            contents = {
                "BYTES": pb.InferTensorContents(bytes_contents=[b"{}"]),
                "BOOL": pb.InferTensorContents(bool_contents=[False]),
                "INT32": pb.InferTensorContents(int_contents=[1]),
                "INT64": pb.InferTensorContents(int64_contents=[1]),
                "FP32": pb.InferTensorContents(fp32_contents=[0.5]),
            }[tensor.datatype]
            given = Tensor(name=tensor.name, datatype=tensor.datatype, shape=[1], contents=contents)
            response = await stub(face).ModelInfer(of_tensor(WITH_TEXT, given))
            assert {output.name for output in metadata.outputs} == set(outputs(response))


@in_loop
async def test_a_timeout_ends_the_request():
    async with serving() as face:
        face.llm.hold()
        code, _ = await status(stub(face).ModelInfer(of_text(parameters={"timeout": 50_000})))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert face.llm.num_unfinished == 0
        (answer,) = await exchange(face, of_ids(1, id="late", parameters={"timeout": 50_000}))
        assert "timeout" in answer.error_message
        assert answer.infer_response.id == "late"
        assert face.llm.num_unfinished == 0


async def exchange(face, *requests):
    call = stub(face).ModelStreamInfer(iter(requests))
    return await read_all(call)


@in_loop
async def test_requests_of_one_stream_are_answered_under_their_ids():
    async with serving() as face:
        requests = [of_ids(i, i + 1, id=f"id {i}", parameters={"max_tokens": 20}) for i in range(100)]
        answers = await exchange(face, *requests)
    ids = {f"id {i}": [] for i in range(100)}
    finals = []
    for answer in answers:
        response = answer.infer_response
        ids[response.id] += outputs(response)["output_ids"]
        if response.parameters["triton_final_response"].bool_param:
            finals.append(response.id)
    assert ids == {f"id {i}": [i, i + 1] * 10 for i in range(100)}
    assert sorted(finals) == sorted(ids)


@in_loop
async def test_a_failing_request_leaves_the_stream_to_the_others():
    async with serving() as face:
        unknown = changed(of_ids(1), model_name="other", id="unknown")
        raw = face.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        requests = [of_text(b"\xff", id="bad"), unknown, of_ids(5, id="good", parameters={"max_tokens": 2})]
        call = raw(
            iter(
                [
                    *(request.SerializeToString() for request in requests[:2]),
                    b"\xff\xff",
                    requests[2].SerializeToString(),
                ]
            )
        )
        answers = [pb.ModelStreamInferResponse.FromString(data) for data in await read_all(call)]
    errors = {answer.infer_response.id: answer.error_message for answer in answers if answer.error_message}
    assert set(errors) == {"bad", "unknown", ""}
    assert "UTF-8" in errors["bad"]
    for answer in answers:
        assert answer.infer_response.parameters["triton_final_response"].bool_param or not answer.error_message
    good = [answer.infer_response for answer in answers if answer.infer_response.id == "good"]
    assert [token for response in good for token in outputs(response)["output_ids"]] == [5, 5]


@in_loop
async def test_stream_false_and_echo_on_a_stream():
    async with serving() as face:
        whole = of_text(b"one two", parameters={"stream": False, "max_tokens": 9, "exclude_input_in_output": False})
        (answer,) = await exchange(face, whole)
        parts = of_text(b"one two", parameters={"max_tokens": 9, "exclude_input_in_output": False})
        answers = await exchange(face, parts)
    (text,) = outputs(answer.infer_response)["text_output"]
    assert text.startswith(b"one two")
    assert b"".join(outputs(answer.infer_response)["text_output"][0] for answer in answers) == text


@in_loop
async def test_a_dead_engine_is_an_error_of_each_request():
    async with serving() as face:
        face.llm.hold()
        reading = asyncio.ensure_future(exchange(face, of_ids(1, id="a"), of_ids(2, id="b")))
        await until(lambda: face.llm.num_unfinished == 2, "the requests")
        face.llm.die()
        answers = await reading
        assert {answer.infer_response.id for answer in answers} == {"a", "b"}
        assert {answer.error_message for answer in answers} == {"the engine process was killed"}
        face.llm.go()
        face.llm.hold()
        unary = asyncio.ensure_future(status(stub(face).ModelInfer(of_ids(1))))
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        face.llm.die()
        assert (await unary)[0] is grpc.StatusCode.UNAVAILABLE


@in_loop
async def test_cancelling_a_stream_ends_all_its_requests():
    async with serving() as face:
        face.llm.hold()
        call = stub(face).ModelStreamInfer()
        for i in range(5):
            await call.write(of_ids(i, id=str(i)))
        await until(lambda: face.llm.num_unfinished == 5, "the requests")
        call.cancel()
        await until(lambda: face.llm.num_unfinished == 0, "the end of the requests")
        assert len(face.llm.closed) == 5


@in_loop
async def test_tritonclient_sees_a_live_and_ready_server():
    code = (
        "show([client.is_server_live(), client.is_server_ready(), client.is_model_ready('scripted'),\n"
        "      client.is_model_ready('other')])\n"
        "show(client.get_server_metadata(as_json=True)['name'])\n"
        "show(client.get_model_metadata('scripted', as_json=True))\n"
        "try: client.get_model_config('scripted')\n"
        "except InferenceServerException as error: show(error.status())\n"
    )
    async with serving() as face:
        flags, name, metadata, config = await face.tritonclient(code)
        face.llm.set_state(EngineState.WARMING)
        assert (await face.tritonclient(code))[0] == [True, False, False, False]
    assert flags == [True, True, True, False]
    assert name == "jaxdual"
    assert metadata["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
    assert metadata["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": ["-1"]}
    assert config == "StatusCode.UNIMPLEMENTED"


@in_loop
async def test_tritonclient_infers():
    code = (
        "result = client.infer('scripted', [text('eins zwei ü')], request_id='7',\n"
        "                      parameters={'max_tokens': 30, 'temperature': 0.0})\n"
        "show(result.as_numpy('text_output').tolist()[0].decode())\n"
        "show(result.as_numpy('output_ids').tolist())\n"
        "show(result.get_response().id)\n"
        "for wrong in ({'model_name': 'other', 'inputs': [text('x')]}, {'model_name': 'scripted', 'inputs': []},\n"
        "              {'model_name': 'scripted', 'inputs': [text('x')], 'parameters': {'top_p': 2.0}}):\n"
        "    try: client.infer(**wrong)\n"
        "    except InferenceServerException as error: show([error.status(), error.message()])\n"
    )
    async with serving() as face:
        text, ids, request_id, *errors = await face.tritonclient(code)
        tokens = face.llm.get_tokenizer().encode("eins zwei ü")
    assert ids == [tokens[i % len(tokens)] for i in range(30)]
    assert text.startswith("eins zwei ü")
    assert request_id == "7"
    assert [status for status, _ in errors] == [
        "StatusCode.NOT_FOUND",
        "StatusCode.INVALID_ARGUMENT",
        "StatusCode.INVALID_ARGUMENT",
    ]
    assert "top_p" in errors[2][1]


@in_loop
async def test_tritonclient_streams_in_the_form_of_the_vllm_backend():
    code = (
        "def request(prompt, **sampling):\n"
        "    stream = triton.InferInput('stream', [1], 'BOOL')\n"
        "    stream.set_data_from_numpy(np.array([True]))\n"
        "    parameters = triton.InferInput('sampling_parameters', [1], 'BYTES')\n"
        "    parameters.set_data_from_numpy(np.array([json.dumps(sampling).encode()], dtype=np.object_))\n"
        "    return [text(prompt), stream, parameters]\n"
        "answers = queue.Queue()\n"
        "client.start_stream(lambda result, error: answers.put((result, error)))\n"
        "for i in range(4):\n"
        "    client.async_stream_infer('scripted', request(f'prompt {i}', max_tokens='40'), request_id=str(i),\n"
        "                              outputs=[triton.InferRequestedOutput('text_output')],\n"
        "                              enable_empty_final_response=True)\n"
        "client.async_stream_infer('scripted', request('x', max_tokens='many'), request_id='wrong')\n"
        "texts, open, errors = {str(i): '' for i in range(4)}, {str(i) for i in range(4)}, []\n"
        "while open or not errors:\n"
        "    result, error = answers.get(timeout=10)\n"
        "    if error is not None:\n"
        "        errors.append(error.message())\n"
        "        continue\n"
        "    response = result.get_response()\n"
        "    texts[response.id] += result.as_numpy('text_output')[0].decode()\n"
        "    if response.parameters.get('triton_final_response').bool_param: open.discard(response.id)\n"
        "client.stop_stream()\n"
        "show([texts, errors])\n"
    )
    async with serving() as face:
        ((texts, errors),) = await face.tritonclient(code)
        tokenizer = face.llm.get_tokenizer()
        for i in range(4):
            tokens = tokenizer.encode(f"prompt {i}")
            expected = tokenizer.decode([tokens[k % len(tokens)] for k in range(40)], skip_special_tokens=True)
            assert texts[str(i)] == expected
    assert errors == ["max_tokens='many' must be a whole number"]


@in_loop
async def test_tritonclient_cancels_its_stream():
    code = (
        "answers = queue.Queue()\n"
        "client.start_stream(lambda result, error: answers.put((result, error)))\n"
        "client.async_stream_infer('scripted', [text('one two')], parameters={'max_tokens': 400}, request_id='1')\n"
        "answers.get(timeout=10)\n"
        "client.stop_stream(cancel_requests=True)\n"
        "while (error := answers.get(timeout=10)[1]) is None: pass\n"
        "show(error.status())\n"
    )

    class Endless(Scripted):
        def _turn(self, sequence):
            if sequence.count == 3:
                self.hold()
            return super()._turn(sequence)

    async with serving(Endless()) as face:
        assert await face.tritonclient(code) == ["StatusCode.CANCELLED"]
        await until(lambda: face.llm.num_unfinished == 0, "the end of the request")
        assert len(face.llm.closed) == 1
