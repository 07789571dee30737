import json

import pytest

from jaxdual.offline.batch_file import BatchError, BatchLine, RejectedLine, read_batch


def line(custom_id="a", **changes):
    entry = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    return {k: v for k, v in {**entry, **changes}.items() if v is not ...}


def read(tmp_path, *lines):
    path = tmp_path / "batch.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return list(read_batch(path))


def test_lines_in_order_with_their_numbers(tmp_path):
    found = read(tmp_path, line("a"), b"  ", line("b", url="/v1/chat/completions", method=...))
    assert [(x.number, x.custom_id, x.url) for x in found] == [
        (1, "a", "/v1/completions"),
        (3, "b", "/v1/chat/completions"),
    ]
    assert found[0].body == {"prompt": "x"}


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    found = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(line("a")).encode() + b"\r", line("b"))
    assert all(isinstance(x, BatchLine) for x in found)


def test_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "batch.jsonl"
    path.write_text(json.dumps(line("a")))
    assert [x.custom_id for x in read_batch(path)] == ["a"]


def test_digest_is_of_the_request_not_of_its_spelling(tmp_path):
    body = {"prompt": "x", "max_tokens": 3}
    one, two, three, four = read(
        tmp_path,
        line("a", body=body),
        json.dumps(line("b", body=dict(reversed(body.items()))), indent=None, separators=(" , ", " : ")).encode(),
        line("c", body=body),
        line("d", body={**body, "max_tokens": 4}),
    )
    assert len({x.digest for x in (one, two, three, four)}) == 4
    again = read(tmp_path, json.dumps(line("a", body=dict(reversed(body.items()))), separators=(" , ", " : ")).encode())
    assert again[0].digest == one.digest


@pytest.mark.parametrize(
    ("bad", "code", "param", "message"),
    [
        (b"{", "invalid_json", None, "not valid JSON"),
        (b"\xff", "invalid_json", None, "not valid UTF-8 at byte 0"),
        (b"[" * 10**5, "invalid_json", None, "not"),
        (b'{"custom_id": ' + b"1" * 5000 + b"}", "invalid_json", None, "not usable JSON"),
        ([1], "invalid_line", None, "must be a JSON object, got"),
        (line(custom_id=...), "invalid_line", "custom_id", "it is missing"),
        (line(custom_id=""), "invalid_line", "custom_id", "must be a string that is not empty; got ''"),
        (line(custom_id=3), "invalid_line", "custom_id", "got 3"),
        (line(custom_id="\ud800"), "invalid_line", "custom_id", "not valid Unicode"),
    ],
)
def test_lines_without_a_usable_custom_id_are_known_by_number(tmp_path, bad, code, param, message):
    _, rejected = read(tmp_path, b"", line("first"), bad)[-2:]
    assert isinstance(rejected, RejectedLine)
    assert (rejected.number, rejected.key, rejected.custom_id) == (3, 3, None)
    assert (rejected.code, rejected.param) == (code, param)
    assert rejected.message.startswith("line 3: ")
    assert message in rejected.message


@pytest.mark.parametrize(
    ("bad", "code", "param", "message"),
    [
        (line(method="GET"), "invalid_line", "method", "method must be 'POST', got 'GET'"),
        (line(url="/v1/embeddings"), "invalid_url", "url", "got '/v1/embeddings'"),
        (line(url=...), "invalid_url", "url", "got None"),
        (line(body=...), "invalid_line", "body", "it is missing"),
        (line(body="x"), "invalid_line", "body", "got 'x'"),
        (line(extra=1), "invalid_line", "extra", "unknown key 'extra'"),
    ],
)
def test_wrong_lines_keep_their_custom_id(tmp_path, bad, code, param, message):
    (rejected,) = read(tmp_path, bad)
    assert (rejected.key, rejected.custom_id, rejected.code, rejected.param) == ("a", "a", code, param)
    assert message in rejected.message


def test_second_use_of_a_custom_id_is_rejected(tmp_path):
    first, second, third = read(tmp_path, line("a"), line("a"), line("a", body={}))
    assert isinstance(first, BatchLine)
    for number, rejected in ((2, second), (3, third)):
        assert (rejected.custom_id, rejected.key, rejected.code) == (None, number, "duplicate_custom_id")
        assert rejected.message == f"line {number}: custom_id 'a' was already used on line 1"


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(BatchError, match=r"nothing\.jsonl: cannot be read: No such file"):
        list(read_batch(tmp_path / "nothing.jsonl"))
