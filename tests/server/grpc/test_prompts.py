"""Messages of jaxdual.v1 as parameters of requests."""

from __future__ import annotations

from typing import Any

import pytest

from jaxdual.decoding.dysco import DyscoParams
from jaxdual.sampling_params import SamplingParams
from server.grpc.kserve_request import _SAMPLING
from server.grpc.prompts import sampling_params
from server.proto.jaxdual.v1 import inference_pb2 as pb


def read(**fields: Any) -> DyscoParams | None:
    message = pb.SamplingParams(dysco=pb.Dysco(**fields))
    return sampling_params(message, SamplingParams(), open_ended=False).dysco


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({}, DyscoParams()),
        (
            {
                "heads": [pb.RetrievalHead(layer=0, head=3), pb.RetrievalHead(layer=2)],
                "top_p": 0.5,
                "top_k": 9,
                "strength": 1.5,
                "decay": 0.0,
                "observe": 0,
                "tail": 0,
                "template_sequences": [pb.TokenIds(ids=[1, 2]), pb.TokenIds(ids=[3])],
            },
            DyscoParams(
                heads=[(0, 3), (2, 0)],
                top_p=0.5,
                top_k=9,
                strength=1.5,
                decay=0.0,
                observe=0,
                tail=0,
                template_sequences=[[1, 2], [3]],
            ),
        ),
        (
            {"profile": "qwen3-8b", "preset": "paper", "top_p": 0.0, "raise_template": True, "static": True},
            DyscoParams(profile="qwen3-8b", preset="paper", top_p=None, template_sequences=[], static=True),
        ),
        ({"top_k": 0}, DyscoParams(top_k=None)),
        ({"mode": "refresh", "refresh_every": 3}, DyscoParams(mode="refresh", refresh_every=3)),
    ],
)
def test_dysco_fields_are_its_parameters(fields: dict[str, Any], params: DyscoParams) -> None:
    assert read(**fields) == params


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.0, "top_k": 0}, "can't both be None"),
        ({"profile": "a/b"}, "profile='a/b' must be one of"),
        ({"strength": -1.0}, "strength=-1.0 must be above 0"),
        ({"mode": "fast"}, "mode='fast' must be one of"),
        ({"refresh_every": 1}, "refresh_every=1 must be a whole number of at least 2"),
        ({"raise_template": True, "template_sequences": [pb.TokenIds(ids=[1])]}, "exclude each other"),
    ],
)
def test_dysco_fields_that_cannot_be_used_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**fields)


def test_absent_dysco_asks_for_none() -> None:
    assert sampling_params(pb.SamplingParams(top_k=3), SamplingParams(), open_ended=False).dysco is None


def test_kserve_s_parameter_is_an_object_or_its_json() -> None:
    reader = _SAMPLING["dysco"]
    want = DyscoParams(heads=[(1, 2)], top_k=5)
    assert reader("dysco", {"heads": [[1, 2]], "top_k": 5}) == want
    assert reader("dysco", '{"heads": [[1, 2]], "top_k": 5}') == want
    for value in (5, "[]", "{", '{"strange": 1}'):
        with pytest.raises(ValueError, match="dysco"):
            reader("dysco", value)
