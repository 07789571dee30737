"""Whatever fields a request has, it is answered or refused as wrong."""

import asyncio

import grpc
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.kserve import open_inference_pb2 as kserve
from server.proto.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.server.grpc.face import DEADLINE, read_all, serving

INT32 = st.sampled_from([0, 1, 2, -1, 16, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
INT64 = INT32 | st.integers(-(2**63), 2**63 - 1)
UINT32 = st.sampled_from([0, 1, 2047, 2048]) | st.integers(0, 2**32 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.sampled_from(
    ["text_input", "input_ids", "sampling_parameters", "max_tokens", "temperature", "stop", "stream", "logit_bias", "n"]
)
WORDS = TEXT | NAMES | st.sampled_from(["BYTES", "INT32", "INT64", "FP32", "BOOL", "scripted", "user", "{}", "[]", "1"])
SCALARS = {
    FieldDescriptor.TYPE_INT32: INT32,
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_UINT32: UINT32,
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats() | st.sampled_from([0.0, 0.5, 1.0]),
    FieldDescriptor.TYPE_STRING: WORDS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20) | st.just(b"\1\0\0\0a") | WORDS.map(str.encode),
}


@st.composite
def messages(draw, kind):
    """A message with some of its fields set."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            for name in draw(st.lists(NAMES if key.type == key.TYPE_STRING else SCALARS[key.type], max_size=2)):
                if value.message_type is not None:
                    target[name].CopyFrom(draw(messages(value.message_type._concrete_class)))
                else:
                    target[name] = draw(SCALARS[value.type])
        elif field.message_type is not None:
            of_field = messages(field.message_type._concrete_class)
            if field.is_repeated:
                target.extend(draw(st.lists(of_field, max_size=2)))
            else:
                target.CopyFrom(draw(of_field))
        elif field.is_repeated:
            target.extend(draw(st.lists(SCALARS[field.type], max_size=3)))
        else:
            setattr(message, field.name, draw(SCALARS[field.type]))
    if isinstance(message, kserve.ModelInferRequest):
        message.model_name = "scripted"
    elif hasattr(message, "model"):
        message.model = ""
    return message


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(messages(pb.GenerateRequest), min_size=4, max_size=8),
    st.lists(messages(kserve.ModelInferRequest), min_size=4, max_size=8),
    messages(pb.TokenizeRequest),
    messages(pb.DetokenizeRequest),
    st.binary(max_size=40),
)
def test_random_fields_are_answered_or_refused_as_wrong(native, open_inference, tokenize, detokenize, raw):
    async def status_of(call):
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    async def send():
        async with serving() as face:
            infer = GRPCInferenceServiceStub(face.channel)
            calls = [read_all(face.stub.Generate(request)) for request in native]
            calls += [face.stub.GenerateUnary(request) for request in native]
            calls += [infer.ModelInfer(request) for request in open_inference]
            calls += [face.stub.Tokenize(tokenize), face.stub.Detokenize(detokenize)]
            calls += [face.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(raw)]
            answers = await asyncio.gather(*map(status_of, calls))
            on_stream = await read_all(infer.ModelStreamInfer(iter(open_inference)))
            assert face.llm.num_unfinished == 0
        for code, details in answers:
            # NOT_FOUND: random bytes may be a message that names another model, or none.
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), details
            assert code is grpc.StatusCode.OK or details
        assert not [answer for answer in on_stream if "internal" in answer.error_message]
        finals = [answer.infer_response.parameters["triton_final_response"].bool_param for answer in on_stream]
        assert sum(finals) == len(open_inference)

    asyncio.run(asyncio.wait_for(send(), DEADLINE))
