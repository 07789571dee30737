import json

import pytest

from jaxdual.offline.batch_file import BatchError
from jaxdual.offline.output_file import OutputFile


def row(custom_id, row_id="batch_req_1"):
    body = {"model": "m", "system_fingerprint": "fp", "created": 7}
    return {"id": row_id, "custom_id": custom_id, "response": {"body": body}, "error": None}


def error_row(number, custom_id=None):
    error = {"code": "c", "message": "m", "line": number, "param": None}
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": None, "error": error}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "out.jsonl"


def write(path, *rows):
    with OutputFile(path) as output:
        for entry in rows:
            output.append(entry)


def test_rows_are_found_again_by_key(path):
    write(path, row("a"), error_row(7), error_row(8, "b"))
    with OutputFile(path) as output:
        assert output.done == {"a": "batch_req_1", 7: "batch_req_7", "b": "batch_req_8"}
        assert output.models == {("m", "fp")}
        assert (output.created, output.errors) == (7, 2)


def test_a_row_is_on_its_line_at_once(path):
    with OutputFile(path) as output:
        output.append(row("日本"))
        assert json.loads(path.read_text()) == row("日本")
        assert "日本" in path.read_text()


def test_lone_surrogate_stays_valid_json(path):
    write(path, row("\ud800"))
    assert json.loads(path.read_bytes()) == row("\ud800")


@pytest.mark.parametrize("cut", [1, 2, 20, -2, -1])
def test_torn_last_row_is_cut_off(path, cut):
    write(path, row("a"), row("b"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first] + whole[first:][:cut])
    with OutputFile(path) as output:
        assert set(output.done) == {"a"}
        output.append(row("b"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_torn_only_row_is_cut_off(path, cut):
    write(path, row("a"))
    path.write_bytes(path.read_bytes()[:cut])
    with OutputFile(path) as output:
        assert output.done == {}
        output.begin()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"some text\n", b"text", b'{"a": 1}', b'{"a": 1}\n{"b": 2}\n', b"\x00\x01", b"\n\n"]
)
def test_another_file_is_never_touched(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(BatchError, match=r"out\.jsonl: line 1 is not a row .* --overwrite"):
        OutputFile(path)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_an_error(path):
    write(path, row("a"), row("b"), row("c"))
    path.write_bytes(path.read_bytes().replace(b'"custom_id": "b"', b'"custom_id": "b'))
    with pytest.raises(BatchError, match="line 2 is not a row"):
        OutputFile(path)


def test_two_rows_of_one_request_are_an_error(path):
    write(path, row("a"), row("a"))
    with pytest.raises(BatchError, match="'a' has two rows"):
        OutputFile(path)


def test_overwrite_drops_what_is_there(path):
    write(path, row("a"))
    with OutputFile(path, overwrite=True) as output:
        assert output.done == {}
        assert path.read_bytes() != b"", "a job that fails before its first row costs nothing"
        output.append(row("b"))
    assert path.read_bytes() == (json.dumps(row("b")) + "\n").encode()


def test_two_jobs_cannot_write_one_file(path):
    with OutputFile(path) as output:
        output.append(row("a"))
        with pytest.raises(BatchError, match="another batch job"):
            OutputFile(path, overwrite=True)
        assert set(json.loads(path.read_text())) == set(row("a"))
    OutputFile(path).close()


def test_folder_or_unwritable_place_is_an_error(tmp_path):
    with pytest.raises(BatchError, match="not a regular file"):
        OutputFile(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchError, match="cannot be written: "):
        OutputFile(tmp_path / "file" / "out.jsonl")
